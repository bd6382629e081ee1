"""ITRD: golden vectors, the floor and the zeros of its terms, batches without spread."""

from __future__ import annotations

import math

import pytest
import torch

from kdlit.losses.itrd import ITRDLoss, itrd_loss
from tests.losses.heads import check_gradients, load_head, outputs
from tests.losses.test_golden import Case, assert_agrees, load

NUMBERS = pytest.mark.parametrize("number", range(3))
ONLY = {"correlation": {"lambda_corr": 1.0, "lambda_mutual": 0.0}, "mutual": {"lambda_corr": 0.0, "lambda_mutual": 1.0}}


def golden(case: Case, **changed: float) -> ITRDLoss:
    loss = ITRDLoss(
        "a", "a", **({name: case.params[name] for name in ("alpha_it", "lambda_corr", "lambda_mutual")} | changed)
    )
    loss.student_layers = loss.teacher_layers = ("a",)
    loss.build([tuple(case["student_feat_0"].shape)], [tuple(case["teacher_feat_0"].shape)])
    load_head(loss.double(), case)
    return loss


def run(loss: ITRDLoss, case: Case) -> torch.Tensor:
    return loss(*outputs(loss, {"a": case["student_feat_0"]}, {"a": case["teacher_feat_0"]}))


@NUMBERS
def test_golden(number: int) -> None:
    case = load("itrd", number)
    loss = golden(case)
    value = run(loss, case)
    value.backward()
    assert_agrees(value.detach(), case["loss"], case.rtol, "loss")
    check_gradients(loss, case, 1e-9)
    for name, weights in ONLY.items():
        assert_agrees(run(golden(case, **weights), case).detach(), case[name], case.rtol, name)


@NUMBERS
def test_golden_in_float32(number: int) -> None:
    case = load("itrd", number)
    loss = golden(case).float()
    student = case["student_feat_0"].detach().float().requires_grad_()
    value = loss(*outputs(loss, {"a": student}, {"a": case["teacher_feat_0"].float()}))
    value.backward()
    torch.testing.assert_close(value.double(), case["loss"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), case["grad_student_feat_0"], rtol=1e-3, atol=1e-4)


def features(batch: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(batch, width, dtype=torch.float64) for width in (5, 5, 3))


@pytest.mark.parametrize("alpha", [1.01, 1.5])
def test_equal_features_reach_the_floor(alpha: float) -> None:
    feat = features()[0]
    value = itrd_loss(3 * feat - 2, feat, alpha_it=alpha, **ONLY["correlation"])
    torch.testing.assert_close(value.item(), math.log2(5) - 2 * alpha * math.log2(6))


def test_the_mutual_term_is_zero_where_the_teacher_tells_no_sample_from_another() -> None:
    student, teacher, _ = features()
    alike = teacher[:1].expand_as(teacher) * torch.rand(6, 1, dtype=torch.float64)
    assert itrd_loss(student, alike, alpha_it=1.0, **ONLY["mutual"]).abs() < 1e-12
    assert itrd_loss(student, teacher, alpha_it=1.0, **ONLY["mutual"]) > 0  # similarities are at most 1


def test_invariances() -> None:
    student, teacher, other = features()
    options = {"alpha_it": 1.5, "lambda_corr": 2.0, "lambda_mutual": 1.0}
    value = itrd_loss(student, teacher, other, **options)
    order = torch.randperm(6)
    torch.testing.assert_close(itrd_loss(student[order], teacher[order], other[order], **options), value)
    scale = 1 + torch.rand(6, 1, dtype=torch.float64)
    torch.testing.assert_close(
        itrd_loss(student * torch.rand(5, dtype=torch.float64) + 7, teacher, scale * other, **options), value
    )
    torch.testing.assert_close(itrd_loss(student, teacher, **options), itrd_loss(student, teacher, student, **options))


def test_gradients() -> None:
    student, teacher, other = (feat.requires_grad_() for feat in features(4))
    options = {"alpha_it": 1.5, "lambda_corr": 2.0, "lambda_mutual": 1.0}
    assert torch.autograd.gradcheck(lambda s, o: itrd_loss(s, teacher, o, **options), (student, other))
    itrd_loss(student, teacher, other, **options).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("scale", [1e4, 1e-6])
@pytest.mark.parametrize("batch", [2, 5])
def test_finite_at_the_edges(scale: float, batch: int) -> None:
    """Features that are dead in the whole batch, samples that are dead, a student that gives nothing at all."""
    student, teacher = scale * torch.randn(batch, 6), scale * torch.randn(batch, 6).relu()
    teacher[:, 0] = student[:, 1] = 0
    teacher[:, 2] = student[:, 3] = 0.1 * scale
    teacher[0] = student[-1] = 0
    for one in (student, torch.zeros_like(student)):
        one = one.requires_grad_()
        value = itrd_loss(one, teacher, alpha_it=1.01, lambda_corr=2.0, lambda_mutual=1.0)
        value.backward()
        assert value.isfinite()
        assert one.grad.isfinite().all()
    half = itrd_loss(student.bfloat16(), teacher.bfloat16(), alpha_it=1.5, lambda_corr=2.0, lambda_mutual=1.0)
    wide = itrd_loss(student.bfloat16().float(), teacher.bfloat16(), alpha_it=1.5, lambda_corr=2.0, lambda_mutual=1.0)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, wide)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ITRDLoss(alpha_it=0), "alpha_it must be > 0, got 0"),
        (lambda: ITRDLoss(lambda_mutual=-1), "lambda_mutual must be >= 0, got -1"),
        (lambda: loss_of((1, 4), (1, 4)), "at least 2 samples, got 1"),
        (lambda: loss_of((3, 4), (3, 5)), r"must have one shape, \(B, D\), .* got \(3, 4\), \(3, 5\)"),
        (lambda: loss_of((3, 4, 2, 2), (3, 4, 2, 2)), r"must have one shape, \(B, D\)"),
    ],
)
def test_mistakes(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def loss_of(student: tuple[int, ...], teacher: tuple[int, ...]) -> torch.Tensor:
    return itrd_loss(torch.randn(student), torch.randn(teacher), alpha_it=1.0, lambda_corr=1.0, lambda_mutual=1.0)
