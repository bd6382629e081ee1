"""Two processes with half the batch each against one with the whole batch, for every loss, under DDP with gloo."""

from __future__ import annotations

import functools
import inspect
import multiprocessing
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from kdlit import losses
from kdlit.losses import CrossEntropyLoss, DistillationLoss, KDLoss, WeightedLoss
from kdlit.modules.base import run_loss
from kdlit.types import ModelOutput
from tests.losses import process_cases
from tests.losses.process_cases import ACROSS, CASES, DRAWING, MEANS, MEMORIES, UNEQUAL, Step, train

WITHOUT, WITH = False, True


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What both processes found. They branch off from one that has imported everything, which takes longest."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.set_forkserver_preload([process_cases.__name__])
    torch.multiprocessing.start_processes(process_cases.process, (str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@functools.cache
def alone(name: str) -> dict[str, Tensor]:
    """What one process finds."""
    return train(name, WITHOUT, None)


def gradients(values: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    return {key: value for key, value in values.items() if key.startswith(f"{step} ")}


def gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference of any two gradients in units of that gradient, or of 1/10,000 of the largest of all."""
    assert ours.keys() == theirs.keys()
    largest = {key: float(value.abs().max()) for key, value in theirs.items()}
    floor = 1e-4 * max(largest.values())
    return max(float((ours[key] - value).abs().max()) / max(largest[key], floor) for key, value in theirs.items())


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """All gradients of all steps and all buffers, up to the order of sums."""
    for step in range(3):
        assert gap(gradients(ours, step), gradients(theirs, step)) < 1e-9
    buffers = [key for key in theirs if key.startswith("buffer")]
    assert buffers == [key for key in ours if key.startswith("buffer")]
    for key in buffers:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-10, atol=1e-12, equal_nan=True, msg=key)


def test_every_loss_is_in_one_list() -> None:
    public = {
        name for name, kind in vars(losses).items() if inspect.isclass(kind) and issubclass(kind, DistillationLoss)
    }
    assert public - {"DistillationLoss", "FeatureLoss", "LossWrapper", "WeightedLoss"} == MEANS.keys() | ACROSS.keys()
    assert not MEANS.keys() & ACROSS.keys()


@pytest.mark.parametrize("name", CASES)
def test_the_losses_say_themselves_whether_they_look_across_the_batch(name: str) -> None:
    assert Step(name, False).term.across_batch == (name in ACROSS)


@pytest.mark.parametrize("name", MEANS)
def test_means_over_samples_need_nothing(found, name: str) -> None:
    assert_same(found[0][name, WITHOUT], alone(name))


@pytest.mark.parametrize("name", [*ACROSS, *DRAWING])
def test_others_differ_without_gather(found, name: str) -> None:
    ours = found[0][name, WITHOUT]
    assert max(gap(gradients(ours, step), gradients(alone(name), step)) for step in range(3)) > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_with_gather_all_are_exact(found, name: str) -> None:
    assert_same(found[0][name, WITH], alone(name))


@pytest.mark.parametrize("name", ["CRDLoss", "DISTLoss", "FitNetLoss"])
def test_in_one_process_gather_does_nothing(name: str) -> None:
    values = train(name, WITH, None)
    assert all(torch.equal(value, values[key]) for key, value in alone(name).items())


@pytest.mark.parametrize("name", UNEQUAL)
def test_batches_may_differ_in_size(found, name: str) -> None:
    assert_same(found[0]["unequal"][name], train(name, WITHOUT, None, (5, 3)))


@pytest.mark.parametrize("gather", [WITHOUT, WITH])
@pytest.mark.parametrize("name", MEMORIES)
def test_memories_are_equal_bit_for_bit(found, name: str, gather: bool) -> None:
    one, other = ({key: value for key, value in values[name, gather].items() if "buffer" in key} for values in found)
    assert one
    assert all(torch.equal(value.nan_to_num(), other[key].nan_to_num()) for key, value in one.items())
    if name != "CRDLoss":  # whose embeddings are trained by a loss that differs
        for key, value in one.items():
            torch.testing.assert_close(value, alone(name)[key], rtol=1e-12, atol=0, equal_nan=True)


def test_a_loss_gets_what_it_reads_of_all_processes_and_no_more(found) -> None:
    """Maps of its own layers and, where it says so, pictures; what is not one entry a sample stays as it is."""
    read = {
        "index": [8], "target": [8], "note": [], "student": [8, 5], "teacher": [8, 5], "strong": [8, 5],
        "student.act1": [8, 4, 4, 4], "teacher.act1": [8, 4, 4, 4],
    }  # fmt: skip
    pictures = {"image": [8, 3, 8, 8], "image_strong": [8, 3, 8, 8]}
    assert found[0]["look"] == found[1]["look"] == [read, read, read | pictures, read | pictures]


def test_a_whole_run_is_that_of_one_process(found, tmp_path) -> None:
    """Two students that train together in two processes: the one with gather is the one of a single process."""
    module = process_cases.distiller(True)
    process_cases.fit(module, str(tmp_path), 1)
    expected = {key: value for key, value in module.state_dict().items() if not key.startswith("teacher.")}
    for values in found:
        for key, value in expected.items():
            torch.testing.assert_close(values["run"]["all"][key], value, rtol=1e-8, atol=1e-10, msg=key)
    moved = (found[0]["run"]["own"]["student.stem.weight"] - expected["student.stem.weight"]).abs().max()
    assert moved > 1e-3


def test_pictures_that_a_loss_does_not_say_it_reads_are_missed_with_the_cure(monkeypatch) -> None:
    class Reader(CrossEntropyLoss):
        def forward(self, student, teacher, batch):
            return batch["image"].mean()

    term = WeightedLoss(Reader(), gather=True)
    monkeypatch.setattr("kdlit.losses.base.process_count", lambda: 2)
    monkeypatch.setattr("kdlit.losses.base.gathered", lambda student, teacher, batch, **_: (student, teacher, {}))
    output = ModelOutput(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"losses.x needs 'image' .* leaves pictures out .* without reads_image"):
        run_loss("x", term, output, output, {"image": torch.zeros(2, 3, 4, 4)})


def test_nothing_is_put_together_for_a_loss_that_does_not_listen(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr("kdlit.losses.base.process_count", lambda: 2)
    monkeypatch.setattr(
        "kdlit.losses.base.gathered", lambda student, teacher, batch, **_: calls.append(1) or (student, teacher, batch)
    )
    output = ModelOutput(torch.randn(2, 3))
    batch = {"image": torch.zeros(2, 3, 4, 4), "target": torch.tensor([0, 1]), "index": torch.tensor([0, 1])}
    for loss, count in (
        (KDLoss(), 0),
        (losses.LogitStandardization(KDLoss()), 0),
        (losses.AutoBetaDKDLoss(), 1),
        (losses.LogitStandardization(losses.AutoBetaDKDLoss()), 1),
        (losses.ConfidenceSelection(KDLoss(), num_samples=2), 1),
    ):
        calls.clear()
        WeightedLoss(loss, gather=True).on_train_batch_end(output, output, batch)
        assert len(calls) == count, type(loss)
