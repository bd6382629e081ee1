"""Figures of student and teacher against values by hand and against torch and torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from kdlit.metrics import CalibrationError, divergence, entropy, is_right, student_figures, teacher_figures


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    return tuple(3 * torch.randn(200, 12, generator=generator) for _ in range(2))


@pytest.fixture
def target():
    return torch.arange(200) % 12


def test_what_the_student_does_where_the_teacher_is_wrong():
    #                         right            repeats it       something else   the teacher is right
    teacher = torch.tensor([[0.0, 4.0, 1.0], [0.0, 4.0, 1.0], [0.0, 4.0, 1.0], [4.0, 0.0, 1.0]])
    student = torch.tensor([[2.0, 0.0, 1.0], [0.0, 2.0, 1.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]])
    figures = teacher_figures(student, teacher, torch.zeros(4, dtype=torch.long))
    assert figures["teacher_top1"].tolist() == [False, False, False, True]
    assert figures["teacher_wrong"].tolist() == [True, True, True, False]
    assert figures["teacher_wrong_student_right"].tolist() == [True, False, False, False]
    assert figures["teacher_wrong_student_same"].tolist() == [False, True, False, False]
    assert figures["teacher_wrong_student_other"].tolist() == [False, False, True, False]
    assert figures["agreement"].tolist() == [False, True, False, False]
    assert figures["agreement5"].all(), "of three classes five are all"


def test_divergences_and_entropies_are_those_of_torch(logits, target):
    student, teacher = logits
    figures = student_figures(student, target) | teacher_figures(student, teacher, target)
    log_q, p = student.log_softmax(-1), teacher.softmax(-1)
    assert torch.allclose(figures["kl"], F.kl_div(log_q, p, reduction="none").sum(-1), atol=1e-5)
    softened = (teacher / 4).softmax(-1)
    assert torch.allclose(figures["kl_softened"], F.kl_div(log_q, softened, reduction="none").sum(-1), atol=1e-5)
    assert torch.allclose(figures["entropy"], torch.distributions.Categorical(logits=student).entropy(), atol=1e-5)
    assert torch.allclose(
        figures["teacher_entropy"], torch.distributions.Categorical(logits=teacher).entropy(), atol=1e-5
    )
    assert torch.allclose(figures["logit_std"], student.std(-1, correction=0))
    assert torch.allclose(figures["teacher_logit_mean"], teacher.mean(-1))
    five = teacher.topk(5).indices
    assert torch.equal(figures["teacher_top5"], (five == target[:, None]).any(-1))


def test_a_student_like_its_teacher_has_nothing_to_learn(logits):
    figures = teacher_figures(logits[0], logits[0])
    assert figures["agreement"].all()
    assert figures["kl"].abs().max() < 1e-6
    assert "teacher_top1" not in figures, "there are no labels"


@pytest.mark.parametrize("scale", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_stay_finite(scale, dtype):
    student = torch.tensor([[scale, 0.0]], dtype=dtype)
    figures = student_figures(student, torch.tensor([1])) | teacher_figures(student, -student, torch.tensor([0]))
    assert all(value.shape == (1,) and value.float().isfinite().all() for value in figures.values())


def test_impossible_classes_count_for_nothing():
    log_p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert torch.allclose(entropy(log_p), torch.tensor([math.log(2)]))
    assert torch.allclose(divergence(log_p, torch.full((1, 3), 1 / 3).log()), torch.tensor([math.log(1.5)]))


def test_calibration_is_that_of_torchmetrics_however_it_is_cut_into_batches(logits, target):
    error = CalibrationError()
    assert error.take(lambda sums: sums) is None
    for part in (slice(0, 7), slice(7, 150), slice(150, 200)):
        error.add(logits[0][part], target[part])
    expected = multiclass_calibration_error(logits[0].softmax(-1), target, num_classes=12, n_bins=15)
    assert torch.allclose(error.take(lambda sums: sums), expected, atol=1e-6)
    assert error.take(lambda sums: sums) is None, "it starts anew"


def test_the_surest_of_all_falls_into_the_last_bin():
    error = CalibrationError()
    error.add(torch.tensor([[1e4, 0.0], [1e4, 0.0]]), torch.tensor([0, 1]))
    assert error.take(lambda sums: 2 * sums) == 0.5, "of two processes the same"


def test_ties_are_settled_as_argmax_settles_them():
    assert is_right(torch.zeros(2, 4), torch.tensor([0, 1])).tolist() == [True, False]
    assert is_right(torch.zeros(4, 4), torch.arange(4), k=2).tolist() == [True, True, False, False]


def test_what_is_no_number_is_not_right():
    logits = torch.tensor([[math.nan, 1.0, 0.0], [1.0, math.nan, 0.0], [math.nan] * 3])
    assert is_right(logits, torch.tensor([0, 0, 2]), k=2).tolist() == [False, True, False]


@pytest.mark.parametrize("k", [2, 5, 12, 20])
def test_the_largest_k_are_those_of_topk(logits, target, k):
    expected = (logits[0].topk(min(k, 12)).indices == target[:, None]).any(-1)
    assert torch.equal(is_right(logits[0], target, k), expected)
