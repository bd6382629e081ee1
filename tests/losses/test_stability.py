"""Finite values and gradients at the edges: huge logits, smallest shapes, ties, half precision."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from kdlit import losses
from tests.losses.methods import METHODS, Loss

EVERY = pytest.mark.parametrize("loss", [pytest.param(method.loss, id=name) for name, method in METHODS.items()])


def assert_finite(loss: Loss, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Run forward and backward; return the gradient."""
    student = student.clone().requires_grad_()
    value = loss(student, teacher, target)
    value.backward()
    assert value.isfinite(), value
    assert student.grad is not None
    assert student.grad.isfinite().all(), student.grad
    return student.grad


def one_hot(classes: int, column: int, height: float) -> Tensor:
    logits = torch.zeros(classes)
    logits[column] = height
    return logits


def extremes(classes: int) -> list[Tensor]:
    """Logits of both networks where published code overflows, underflows or divides by 0."""
    random = torch.randn(classes)
    return [
        torch.zeros(classes),
        torch.full((classes,), 0.1),
        torch.full((classes,), 1e4),
        torch.full((classes,), -1e4),
        random,
        1e-20 * random,
        1e4 * random.sign(),
        1e3 * random,
        random + 1e4,
        torch.linspace(-1e4, 1e4, classes),
        one_hot(classes, 0, 1e4),
        one_hot(classes, 0, -1e4),
        one_hot(classes, classes - 1, 1e4),
        one_hot(classes, classes - 1, 104.0),
    ]


@EVERY
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_extreme_logits(loss: Loss, classes: int) -> None:
    """Every pair of extremes, with the label first and last, as the samples of one batch."""
    rows = torch.stack(extremes(classes))
    pairs = torch.cartesian_prod(torch.arange(len(rows)), torch.arange(len(rows)), torch.tensor([0, classes - 1]))
    student, teacher, target = pairs.unbind(dim=1)
    assert_finite(loss, rows[student], rows[teacher], target)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_extreme_logits_standardised_as_in_the_paper(temperature: float) -> None:
    def loss(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        s, t = (losses.standardize_logits(logits, unbiased=False, eps=0.0) for logits in (s, t))
        return losses.dkd_loss(s, t, y, alpha=1.0, beta=8.0, temperature=temperature)

    rows = torch.stack(extremes(10))
    for shift in range(len(rows)):
        assert_finite(loss, rows, rows.roll(shift, dims=0), torch.zeros(len(rows), dtype=torch.int64))


@EVERY
@pytest.mark.parametrize("classes", [2, 1000])
def test_extreme_logits_one_sample_at_a_time(loss: Loss, classes: int) -> None:
    rows = torch.stack(extremes(classes))
    for number, (student, target) in enumerate(product(range(len(rows)), (0, classes - 1))):
        teacher = (student + number) % len(rows)
        assert_finite(loss, rows[[student]], rows[[teacher]], torch.tensor([target]))
        assert_finite(loss, rows[[student]], rows[[student]], torch.tensor([target]))


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher, target = 5 * torch.randn(4, 10), 5 * torch.randn(4, 10), torch.tensor([0, 3, 9, 9])
    half = student.to(dtype).requires_grad_()
    value = loss(half, teacher.to(dtype), target)
    value.backward()
    assert value.dtype == torch.float32
    assert half.grad is not None
    assert half.grad.dtype == dtype
    assert half.grad.isfinite().all()
    torch.testing.assert_close(value, loss(student.to(dtype).float(), teacher.to(dtype).float(), target))


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher, target = 5 * torch.randn(4, 10), 5 * torch.randn(4, 10), torch.tensor([0, 3, 9, 9])
    expected = loss(student, teacher, target)
    with torch.autocast("cpu", dtype=dtype):
        value = loss(student, teacher, target)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)


@EVERY
def test_float32_agrees_with_float64(loss: Loss) -> None:
    student, teacher, target = 10 * torch.randn(8, 100), 10 * torch.randn(8, 100), torch.arange(8)
    torch.testing.assert_close(
        loss(student, teacher, target), loss(student.double(), teacher.double(), target).float(), rtol=1e-4, atol=1e-5
    )


def test_rld_with_every_class_masked_teaches_no_correlation() -> None:
    teacher = torch.tensor([[3.0, 2.0, 1.0]])
    gradient = assert_finite(
        lambda s, t, y: losses.rld_loss(s, t, y, alpha=0.0, beta=8.0, temperature=2.0),
        torch.randn(1, 3),
        teacher,
        torch.tensor([2]),
    )
    assert not gradient.any()
    value = losses.rld_loss(torch.randn(1, 3), teacher, torch.tensor([2]), alpha=0.0, beta=8.0, temperature=2.0)
    assert value == 0


def test_rld_counts_masked_samples_in_the_mean() -> None:
    student, teacher = torch.randn(2, 3), torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    both = losses.rld_loss(student, teacher, torch.tensor([0, 2]), alpha=0.0, beta=1.0, temperature=2.0)
    first = losses.rld_loss(student[:1], teacher[:1], torch.tensor([0]), alpha=0.0, beta=1.0, temperature=2.0)
    torch.testing.assert_close(both, first / 2)


def test_ties_go_to_the_first_class() -> None:
    teacher = torch.tensor([[2.0, 2.0, 0.0]])
    torch.testing.assert_close(losses.swap_label_logit(teacher, torch.tensor([2])), torch.tensor([[0.0, 2.0, 2.0]]))
    assert losses.lr_loss(teacher, teacher, torch.tensor([0]), lambda1=1.0, lambda2=1.0, eta=0.8) == 0
    assert losses.lr_loss(teacher, teacher, torch.tensor([1]), lambda1=1.0, lambda2=1.0, eta=0.8) > 0


@pytest.mark.parametrize(("unbiased", "eps"), [(True, 1e-7), (False, 0.0)])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e4])
def test_equal_logits_are_standardised_to_zeros_without_a_gradient(unbiased: bool, eps: float, value: float) -> None:
    logits = torch.full((2, 7), value)
    logits[1, 0] += 1
    logits.requires_grad_()
    scores = losses.standardize_logits(logits, unbiased=unbiased, eps=eps)
    assert not scores[0].any()
    assert scores[1].any()
    (scores * torch.randn(2, 7)).sum().backward()
    assert logits.grad is not None
    assert not logits.grad[0].any()
    assert logits.grad.isfinite().all()


def test_wttm_weight_of_a_sure_teacher_does_not_underflow() -> None:
    """In the published form the small probabilities are lost before they are raised to the power."""
    teacher = torch.zeros(1, 1000, dtype=torch.float64)
    teacher[0, 0] = 104.0
    expected = losses.power_sum(teacher, gamma=0.1)
    torch.testing.assert_close(losses.power_sum(teacher.float(), gamma=0.1), expected.float(), rtol=1e-5, atol=0)
    lost = teacher.float().softmax(dim=-1).pow(0.1).sum()
    assert lost < 0.999 * expected


def test_dkd_where_the_label_leads_by_more_than_float32_can_subtract() -> None:
    student, teacher = torch.tensor([[500.0, 0.0, 0.0]]), torch.tensor([[0.0, 500.0, 0.0]])
    value = losses.dkd_loss(student, teacher, torch.tensor([0]), alpha=1.0, beta=0.0, temperature=1.0)
    torch.testing.assert_close(value, torch.tensor(500.0 - torch.tensor(2.0).log().item()))
