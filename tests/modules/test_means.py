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
    ours = RunningMeans()
    ours.add({"a": torch.tensor(1.0)}, 1)
    assert ours.take(lambda sums: sums + torch.tensor([8.0, 2.0]))["a"].item() == 3.0  # 4.0 for two samples


def test_values_of_each_sample_are_averaged():
    means = RunningMeans()
    means.add({"hit": torch.tensor([True, False, True])}, 3)
    means.add({"hit": torch.tensor([False])}, 1)
    assert means.take(alone)["hit"].item() == 0.5


@pytest.mark.parametrize("save_after", [0, 1, 63, 64, 65, 129, 200])
def test_a_state_goes_on_where_it_was_saved(save_after):
    """The same to the last bit, wherever it was saved and also if it was not."""
    torch.manual_seed(0)
    steps = [({"a": torch.rand(()), "hit": torch.rand(size) > 0.5}, size) for size in [7] * 180 + [3] * 20]
    whole, first, second = RunningMeans(), RunningMeans(), RunningMeans()
    for values, size in steps:
        whole.add(values, size)
    for values, size in steps[:save_after]:
        first.add(values, size)
    saved = first.state_dict()
    first.add({"a": torch.tensor(100.0), "hit": torch.ones(1)}, 1)  # what comes after saving is not in it
    second.load_state_dict(saved)
    for values, size in steps[save_after:]:
        second.add(values, size)
    one, other = whole.take(alone), second.take(alone)
    assert all(torch.equal(one[name], other[name]) for name in ("a", "hit"))
    count = sum(size for _, size in steps)
    assert one["hit"].item() == pytest.approx(sum(values["hit"].sum().item() for values, _ in steps) / count)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_many_samples_are_counted_exactly(dtype):
    means = RunningMeans()
    for _ in range(1000):
        means.add({"a": torch.tensor(0.25, dtype=dtype)}, 1000)
    assert means.take(alone)["a"].item() == 0.25
