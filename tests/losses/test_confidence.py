"""Samples chosen by the teacher's confidence."""

from __future__ import annotations

import pytest
import torch

from kdlit.losses import ConfidenceSelection, DISTLoss, DKDLoss, KDLoss, kd_loss
from kdlit.types import ModelOutput


def outputs(size=8, classes=5):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, size, classes, generator=generator)
    target = torch.arange(size) % classes
    return ModelOutput(student), ModelOutput(teacher), {"target": target, "index": torch.arange(size)}


def confidence(teacher, batch):
    return teacher.logits.softmax(1)[torch.arange(len(teacher.logits)), batch["target"]]


@pytest.mark.parametrize("keep", ["most", "least"])
def test_the_chosen_half_counts_and_the_other_does_not(keep):
    student, teacher, batch = outputs()
    order = confidence(teacher, batch).argsort(descending=keep == "most")
    chosen = order[:4]
    value = ConfidenceSelection(KDLoss(2.0), keep=keep, num_samples=8)(student, teacher, batch)
    expected = kd_loss(student.logits[chosen], teacher.logits[chosen], temperature=2.0) * 4 / 8
    assert value == pytest.approx(expected.item())


def test_both_halves_together_are_the_whole():
    student, teacher, batch = outputs()
    halves = [
        ConfidenceSelection(DKDLoss(), keep=keep, num_samples=8)(student, teacher, batch) for keep in ("most", "least")
    ]
    assert sum(halves) == pytest.approx(DKDLoss()(student, teacher, batch).item(), rel=1e-5)
    assert ConfidenceSelection(DKDLoss(), share=1.0, num_samples=8)(student, teacher, batch) == pytest.approx(
        DKDLoss()(student, teacher, batch).item()
    )


def test_the_rank_is_among_all_samples_seen():
    student, teacher, batch = outputs()
    selection = ConfidenceSelection(KDLoss(), keep="most", num_samples=100)
    sure = ModelOutput(20 * torch.nn.functional.one_hot(batch["target"], 5).float())
    selection.on_train_batch_end(student, sure, batch | {"index": torch.arange(50, 58)})
    assert selection(student, teacher, batch) == 0, "all of this batch are below the median of what was seen"
    assert selection.state_dict()["confidence"][50:58].min() > 0.99, "the memory resumes with the checkpoint"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConfidenceSelection(DISTLoss()), "loss must read sample weights, got DISTLoss"),
        (lambda: ConfidenceSelection(KDLoss(), share=1.5), r"share must lie in \(0, 1\], got 1.5"),
        (lambda: ConfidenceSelection(KDLoss(), share=0.0), "share must be > 0, got 0.0"),
        (lambda: ConfidenceSelection(KDLoss(), keep="top"), "keep must be"),
        (lambda: ConfidenceSelection(KDLoss(), num_samples=0), "num_samples must be > 0, got 0"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_batches_without_positions_and_too_small_memories_are_refused():
    student, teacher, batch = outputs()
    with pytest.raises(ValueError, match="num_samples must be above every index, got 4 and 7"):
        ConfidenceSelection(KDLoss(), num_samples=4).on_train_batch_end(student, teacher, batch)
    del batch["index"]
    with pytest.raises(ValueError, match="needs index"):
        ConfidenceSelection(KDLoss()).on_train_batch_end(student, teacher, batch)
