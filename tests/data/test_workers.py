"""Worker processes that die, signals that are not for them, and files that vanish in the middle of an epoch."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
import warnings

import lightning as L
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from kdlit import config_errors
from kdlit.data import ImageNet
from kdlit.data.sampling import EpochLoader, WorkerDiedError, death_of_worker, start_worker
from kdlit.losses import CrossEntropyLoss
from kdlit.modules import ClassificationDistillation
from tests.conftest import TinyData, TinyNet


def plain(num_classes=5, side=8):
    return ClassificationDistillation(TinyNet(num_classes), {"ce": CrossEntropyLoss()}, input_size=(3, side, side))


def workers_of(trainer):
    return trainer.fit_loop._combined_loader.flattened[0]._iterator._workers


class Kill(L.Callback):
    """Sends a signal to a worker after the second batch; waits a while, in which the main process computes."""

    def __init__(self, number, computes):
        self.number, self.computes = number, computes

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.worker = workers_of(trainer)[0]
            os.kill(self.worker.pid, self.number)
            end = time.monotonic() + (5 if self.computes else 0)
            while time.monotonic() < end:
                torch.ones(8).sum()


@pytest.mark.parametrize(("number", "computes"), [("SIGKILL", True), ("SIGKILL", False), ("SIGSEGV", False)])
def test_a_worker_that_is_killed_ends_the_run_with_one_clear_error(trainer, number, computes):
    kill, started = Kill(getattr(signal, number), computes), time.monotonic()
    with pytest.raises(WorkerDiedError) as caught:
        trainer(max_epochs=3, callbacks=[kill]).fit(plain(), TinyData(batch_size=2, num_workers=2))
    message = str(caught.value)
    assert f"pid {kill.worker.pid}) was ended by signal" in message
    assert ("ran out of memory" if number == "SIGKILL" else "damaged file") in message
    assert "--data.num_workers" in message
    assert "--ckpt_path=last" in message
    assert config_errors.users_mistake(caught.value) == message
    assert time.monotonic() - started < 20, "it hung"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Killed. ",
            "pid 7) was ended by signal Killed: most likely the",
        ),
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are "
            "out of shared memory. Please try to raise your shared memory limit.",
            "signal Bus error: most likely the shared memory in /dev/shm is full",
        ),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "pid 7, 8) ended unexpectedly: too little memory"),
        (
            "DataLoader worker (pid 7) exited unexpectedly with exit code 1. Details are lost",
            "pid 7) ended unexpectedly: too little memory or shared memory (/dev/shm)",
        ),
    ],
)
def test_what_torch_says_is_understood(said, expected):
    assert expected in str(death_of_worker(said))

    class Dataset(list):
        def __getitem__(self, index):
            raise RuntimeError(said)

    with pytest.raises(WorkerDiedError):
        list(EpochLoader(Dataset([1])))
    with pytest.raises(RuntimeError, match="something else"):
        list(EpochLoader(Broken([1])))


class Broken(list):
    def __getitem__(self, index):
        raise RuntimeError("something else")


class Slow(list):
    """Takes its time, and tells the process that makes it."""

    def __getitem__(self, index):
        time.sleep(0.05)
        return torch.tensor([index, os.getpid()])


def test_workers_leave_it_to_the_main_process_when_to_end():
    assert pickle.loads(pickle.dumps(start_worker)) is start_worker
    loader = EpochLoader(Slow(range(8)), num_workers=1, worker_init_fn=start_worker, batch_size=None)
    seen = []
    for batch in loader:
        seen.append(batch.tolist())
        if len(seen) == 1:
            for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
                os.kill(seen[0][1], number)
    assert [index for index, _ in seen] == list(range(8))
    assert len({pid for _, pid in seen}) == 1


def test_a_second_sigterm_ends_a_worker_at_once():
    loader = EpochLoader(Slow(range(99)), num_workers=1, worker_init_fn=start_worker, batch_size=None)
    started = time.monotonic()

    def read():
        for number, batch in enumerate(loader):
            if number in (0, 3):
                os.kill(int(batch[1]), signal.SIGTERM)

    with pytest.raises(WorkerDiedError, match="signal Terminated: somebody ended it"):
        read()
    assert time.monotonic() - started < 15


def test_all_loaders_start_their_workers_so():
    data = TinyData(num_workers=2)
    data.setup("fit")
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    loaders.append(data.in_order(data.datasets["val"], [[0, 1]]))
    assert all(isinstance(one, DataLoader) and one.worker_init_fn is start_worker for one in loaders)


# Files


@pytest.fixture
def folders(tmp_path):
    for part, count in (("train", 24), ("val", 2)):
        for name in ("n01", "n02"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40, 32), (number, 99, 9)).save(tmp_path / part / name / f"{number}.png")
    return tmp_path


class Delete(L.Callback):
    """Deletes pictures of this epoch that nobody has read yet, after the first step."""

    def __init__(self, data, count=2):
        self.data, self.count, self.seen, self.gone = data, count, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(batch["index"].tolist())
        if batch_idx == 0:
            dataset = self.data.datasets["train"]
            order = list(iter(trainer.fit_loop._combined_loader.flattened[0].sampler))
            self.gone = [index % len(dataset) for index in order[-self.count :]]
            for index in self.gone:
                dataset.photographs.path(int(dataset.positions[index])).unlink()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanishes_is_named_or_skipped_and_counted(folders, trainer, workers):
    settings = {"root": str(folders), "size": 32, "resize": 32, "batch_size": 4, "num_workers": workers}
    data = ImageNet(broken="skip", **settings)
    delete = Delete(data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callbacks=[delete]).fit(plain(2, 32), data)
    said = [str(warning.message) for warning in caught]
    assert any(one.startswith("2 of 48 train pictures could not be decoded and were skipped") for one in said)
    assert sorted(index for batch in delete.seen for index in batch) == sorted(set(range(48)) - set(delete.gone))
    data = ImageNet(**settings)
    delete = Delete(data, count=1)
    with pytest.raises(
        ValueError, match=r"^cannot read .*/train/n0\d/\d+.png: No such file.* since it was listed$"
    ) as one:
        trainer(callbacks=[delete]).fit(plain(2, 32), data)
    assert config_errors.users_mistake(one.value) == str(one.value)


def test_a_worker_that_dies_while_it_hands_over_a_batch_is_told_as_such(monkeypatch):
    from kdlit.data import sampling

    def torch_knows():
        raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")

    monkeypatch.setattr(sampling, "_error_if_any_worker_fails", torch_knows)
    one, other = multiprocessing.Pipe()
    other.close()
    with pytest.raises(WorkerDiedError, match="pid 12.*signal Killed"), sampling.clear_errors():
        one.recv()
    with pytest.raises(FileNotFoundError, match="mine"), sampling.clear_errors():
        raise FileNotFoundError("mine")
