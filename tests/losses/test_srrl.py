"""SRRL: golden vectors, the zeros of its terms, and what it trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdlit.losses.srrl import SRRLLoss, srrl_loss
from kdlit.types import ModelOutput
from tests.losses.heads import Own, check_gradients, close, load_head
from tests.losses.test_golden import Case, assert_agrees, load

NUMBERS = pytest.mark.parametrize("number", range(2))


class Stub(nn.Module):
    """Gives a map at ``map`` and logits from its mean."""

    def __init__(self, feature: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.given = [feature.detach()]
        self.map = nn.Identity()
        self.fc = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
        with torch.no_grad():
            self.fc.weight.copy_(weight)
            if bias is not None:
                self.fc.bias.copy_(bias)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.map(self.given[0]).mean((2, 3)))


def golden(case: Case) -> tuple[SRRLLoss, ModelOutput, ModelOutput]:
    teacher = Stub(case["teacher_feat_0"], case["teacher_fc_weight"], case["teacher_fc_bias"])
    width = case["student_feat_0"].shape[1]
    student = Stub(case["student_feat_0"], torch.zeros(3, width, dtype=torch.float64), None)
    loss = SRRLLoss("map", "map", weight=case.weight).double()
    loss.setup(student, teacher, torch.zeros(1, 3, 8, 8))
    load_head(loss.double(), case)
    assert_agrees(teacher(torch.zeros(1)).detach(), case["teacher_logits"], case.rtol, "teacher_logits")
    return (
        loss,
        ModelOutput(torch.zeros(1), {"map": case["student_feat_0"]}),
        ModelOutput(case["teacher_logits"], {"map": case["teacher_feat_0"]}),
    )


@NUMBERS
def test_golden(number: int) -> None:
    case = load("srrl", number)
    loss, student, teacher = golden(case)
    connected = loss.connect(student.features["map"])
    close(connected.detach(), case["student_feat_proj_0"], 1e-9)
    close(loss.cross_logits(connected).detach(), case["cross_logits"], 1e-9)
    value = loss(student, teacher, {})
    value.backward()
    assert_agrees(value.detach(), case["loss"], case.rtol, "loss")
    check_gradients(loss, case, 1e-9)
    matching, both = (
        srrl_loss(
            case["student_feat_proj_0"], case["teacher_feat_0"], case["cross_logits"], case["teacher_logits"],
            weight=weight,
        )
        for weight in (0.0, 1.0)
    )  # fmt: skip
    assert_agrees(matching, case["feature_matching"], case.rtol, "feature_matching")
    assert_agrees(both - matching, case["softmax_regression"], case.rtol, "softmax_regression")


@NUMBERS
def test_golden_in_float32(number: int) -> None:
    case = load("srrl", number)
    loss, _, teacher = golden(case)
    for network in loss._of_teacher:
        network.float()
    feature = case["student_feat_0"].detach().float().requires_grad_()
    teacher = ModelOutput(teacher.logits.float(), {"map": teacher.features["map"].float()})
    value = loss.float()(ModelOutput(torch.zeros(1), {"map": feature}), teacher, {})
    value.backward()
    torch.testing.assert_close(value.double(), case["loss"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(feature.grad.double(), case["grad_student_feat_0"], rtol=1e-3, atol=1e-5)


def test_zero_where_means_and_logits_agree_whatever_the_size_of_the_maps() -> None:
    teacher = torch.rand(2, 3, 4, 4)
    moved = teacher.flatten(2)[:, :, torch.randperm(16)].view(2, 3, 2, 8).repeat(1, 1, 2, 1)
    logits = torch.randn(2, 5)
    value = srrl_loss(moved, teacher, logits, logits, weight=3.0)
    torch.testing.assert_close(value, torch.tensor(0.0), rtol=0, atol=1e-12)
    order = torch.tensor([1, 0])
    student, cross = torch.rand(2, 3, 1, 1), torch.randn(2, 5)
    torch.testing.assert_close(
        srrl_loss(student[order], teacher[order], cross[order], logits[order], weight=3.0),
        srrl_loss(student, teacher, cross, logits, weight=3.0),
    )


def test_gradients() -> None:
    student, teacher = (torch.rand(2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cross, logits = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda s, c: srrl_loss(s, teacher, c, logits, weight=2.0), (student, cross))
    srrl_loss(student, teacher, cross, logits, weight=2.0).backward()
    assert teacher.grad is None
    assert logits.grad is None


def test_one_large_sample_in_half_precision() -> None:
    student, teacher = 1e4 * torch.rand(1, 3, 2, 2), 1e4 * torch.rand(1, 3, 2, 2)
    logits = torch.randn(2, 1, 4)
    wide = srrl_loss(student.bfloat16().float(), teacher.bfloat16().float(), *logits, weight=1.0)
    half = srrl_loss(student.bfloat16(), teacher.bfloat16(), *logits, weight=1.0)
    assert half.isfinite()
    torch.testing.assert_close(half, wide)


def test_the_connector_starts_as_in_the_authors_code() -> None:
    loss = SRRLLoss("second", "second")
    loss.setup(Own(64), Own(200), torch.zeros(1, 3, 8, 8))
    torch.testing.assert_close(loss.conv.weight.std().item(), (2 / 400) ** 0.5, rtol=0.02, atol=0)
    assert set(dict(loss.named_parameters())) == {"conv.weight", "bn.weight", "bn.bias"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SRRLLoss(weight=-1.0), "weight must be >= 0, got -1.0"),
        (lambda: loss_of((2, 3, 2, 2), (2, 4, 2, 2)), r"channels of connected_feat .* got shapes \(2, 3, 2, 2\)"),
        (lambda: loss_of((2, 3, 2, 2), (2, 3, 2, 2), classes=4), r"classes of cross_logits .* got shapes \(2, 4\)"),
    ],
)
def test_mistakes(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def loss_of(student: tuple[int, ...], teacher: tuple[int, ...], classes: int = 5) -> Tensor:
    return srrl_loss(torch.rand(student), torch.rand(teacher), torch.rand(2, classes), torch.rand(2, 5), weight=1.0)
