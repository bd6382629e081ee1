"""Means over samples."""

from __future__ import annotations

import pytest
import torch

from kdlit.modules.means import RunningMeans


def alone(sums):
    return sums


def test_batches_count_by_their_size_and_taking_starts_anew():
    means = RunningMeans()
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(0.5)}, 3)
    means.add({"a": torch.tensor(5.0), "b": torch.tensor(0.0)}, 1)
    taken = means.take(alone)
    assert {name: value.item() for name, value in taken.items()} == {"a": 2.0, "b": 0.375}
    assert means.take(alone) == {}


def test_batches_may_hold_different_figures():
    means = RunningMeans()
    means.add({"a": torch.tensor(1.0)}, 2)
    means.add({"a": torch.tensor(4.0), "b": torch.tensor(7.0)}, 4)
    assert {name: value.item() for name, value in means.take(alone).items()} == {"a": 3.0, "b": 7.0}


def test_over_processes_sums_and_counts_are_added():
    ours, theirs = RunningMeans(), RunningMeans()
    ours.add({"a": torch.tensor(1.0)}, 1)
    theirs.add({"a": torch.tensor(4.0)}, 2)
    (other,) = theirs.state_dict().values()
    assert ours.take(lambda sums: sums + other)["a"].item() == 3.0


def test_a_state_goes_on_where_it_was_saved():
    whole, first, second = RunningMeans(), RunningMeans(), RunningMeans()
    values = [torch.rand(()) for _ in range(7)]
    for number, value in enumerate(values):
        whole.add({"a": value}, 3)
        (first if number < 4 else second).add({"a": value}, 3)
        if number == 3:
            saved = first.state_dict()
            first.add({"a": torch.tensor(100.0)}, 1)  # what comes after saving is not in it
            second.load_state_dict(saved)
    assert torch.equal(whole.take(alone)["a"], second.take(alone)["a"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_many_samples_are_counted_exactly(dtype):
    means = RunningMeans()
    for _ in range(1000):
        means.add({"a": torch.tensor(0.25, dtype=dtype)}, 1000)
    assert means.take(alone)["a"].item() == 0.25
