"""CAT-KD: golden vectors, laws of class maps, and which of both classifiers learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdlit.losses.catkd import CATKDLoss, catkd_loss
from kdlit.types import ModelOutput
from tests.losses.heads import Own
from tests.losses.test_golden import assert_agrees, load

NUMBERS = pytest.mark.parametrize("number", range(3))
PLAIN = {"cam_resolution": 2, "normalize": False, "binarize": False, "cat_weight": 1.0}
FORMS = pytest.mark.parametrize(
    "options", [PLAIN, PLAIN | {"normalize": True}, PLAIN | {"normalize": True, "binarize": True}]
)


@NUMBERS
def test_golden(number: int) -> None:
    case = load("catkd", number)
    student, teacher = case["student_feat_0"], case["teacher_feat_0"]
    options = {name: case.params[name] for name in PLAIN}
    value = catkd_loss(student, teacher, **options)
    value.backward()
    assert_agrees(value.detach(), case["loss"], case.rtol, "loss")
    assert_agrees(student.grad, case["grad_student_feat_0"], case.rtol_grad, "grad_student_feat_0")
    unweighted = catkd_loss(student.detach(), teacher, **(options | {"cat_weight": 1.0}))
    assert_agrees(unweighted, case["loss_unweighted"], case.rtol, "loss_unweighted")


@NUMBERS
def test_golden_in_float32(number: int) -> None:
    case = load("catkd", number)
    student = case["student_feat_0"].detach().float().requires_grad_()
    value = catkd_loss(student, case["teacher_feat_0"].float(), **{name: case.params[name] for name in PLAIN})
    value.backward()
    torch.testing.assert_close(value.double(), case["loss"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), case["grad_student_feat_0"], rtol=1e-3, atol=1e-5)


def maps() -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(3, 4, 4, 4, dtype=torch.float64), torch.randn(3, 4, 8, 8, dtype=torch.float64)
    return student.requires_grad_(), teacher.requires_grad_()


@FORMS
def test_laws(options: dict) -> None:
    student, teacher = maps()
    value = catkd_loss(student, teacher, **options)
    assert value > 0
    order, classes = torch.randperm(3), torch.randperm(4)
    shuffled = catkd_loss(student[order][:, classes], teacher[order][:, classes], **options)
    torch.testing.assert_close(shuffled, value)
    torch.testing.assert_close(catkd_loss(student, teacher, **(options | {"cat_weight": 7.0})), 7 * value)
    assert torch.autograd.gradcheck(lambda s: catkd_loss(s, teacher, **options), student)
    value.backward()
    assert teacher.grad is None
    if not options["binarize"]:
        assert catkd_loss(teacher.repeat_interleave(2, -1), teacher, **options) < 1e-12
    if options["normalize"]:
        torch.testing.assert_close(catkd_loss(5 * student, 3 * teacher, **options), value)


def test_binarized_maps_mark_what_exceeds_the_mean_absolute_value() -> None:
    teacher = torch.tensor([[[[4.0, -3.0], [1.0, 2.5]]]])  # mean absolute value 2.625
    expected = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert catkd_loss(expected, teacher, **(PLAIN | {"binarize": True})) == 0


@FORMS
def test_finite_at_the_edges(options: dict) -> None:
    """Large maps, maps of zeros, one sample, half precision."""
    for student, teacher in (
        (1e4 * torch.randn(1, 3, 4, 4), 1e4 * torch.randn(1, 3, 2, 2)),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)),
        (torch.zeros(2, 3, 1, 1), torch.randn(2, 3, 7, 7)),
    ):
        student = student.requires_grad_()
        value = catkd_loss(student, teacher, **options)
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()
        assert student.grad.abs().max() < 1e6
        half = catkd_loss(student.bfloat16(), teacher.bfloat16(), **options)
        torch.testing.assert_close(half, catkd_loss(student.bfloat16().float(), teacher.bfloat16(), **options))


def test_class_maps_are_the_classifier_at_each_place() -> None:
    """So that their mean is the logit less the bias; the student's classifier learns, the teacher's does not."""
    student, teacher = Own(4), Own(6)
    loss = CATKDLoss("second", "second", cam_resolution=1, normalize=False, cat_weight=1.0)
    loss.setup(student, teacher, torch.zeros(1, 3, 8, 8))
    features = [torch.rand(2, width, size, size) for width, size in ((8, 3), (12, 5))]
    value = loss(*(ModelOutput(torch.zeros(2, 5), {"second": one}) for one in features), {})
    logits = [
        network.head(one.mean((2, 3))) - network.head.bias
        for network, one in zip((student, teacher), features, strict=True)
    ]
    torch.testing.assert_close(value, (logits[0] - logits[1]).square().mean())
    value.backward()
    assert student.head.weight.grad.abs().sum() > 0
    assert student.head.bias.grad is None
    assert teacher.head.weight.grad is None
    assert not loss.state_dict()
    assert not list(loss.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CATKDLoss(cam_resolution=0), "cam_resolution must be a whole number > 0, got 0"),
        (lambda: CATKDLoss(cat_weight=-1), "cat_weight must be >= 0, got -1"),
        (
            lambda: catkd_loss(torch.rand(2, 3, 4, 4), torch.rand(2, 5, 4, 4), **PLAIN),
            r"\(2, 3, 4, 4\) and \(2, 5, 4, 4\)",
        ),
        (lambda: catkd_loss(torch.rand(2, 3), torch.rand(2, 3), **PLAIN), r"must have shape \(B, C, height, width\)"),
    ],
)
def test_mistakes(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
