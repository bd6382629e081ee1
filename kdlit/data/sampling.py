"""Which sample comes when, and with which random numbers: settled by (seed, epoch, sample) alone.

So batches are the same with any number of worker processes, every process of a distributed run reads a part of its own,
and a run that stopped in the middle of an epoch goes on with the very next batch. The sampler asks the data set for
``epoch * size + index``; workers that live through all epochs need to be told nothing else.
"""

from __future__ import annotations

import multiprocessing.process
import os
import re
import signal
import threading
import time
import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch import Tensor
from torch._C import _error_if_any_worker_fails
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from kdlit.data.teacher_logits import TeacherLogits
from kdlit.types import Batch


class EpochSampler(DistributedSampler[int]):
    """Draws the order of each epoch anew and hands every process a share of its own, all of the same length.

    Up to one sample less than there are processes is left over in an epoch, others each time; none comes twice. (Being
    a ``DistributedSampler``, it is left in place by Lightning.)

    Args:
        size: number of samples.
        batch_size: samples a step, to count the batches that a resumed epoch has done.
        seed: draws the orders.
        progress: gives the epoch and how many of its batches are done; by default each pass is the next epoch.
        processes: number of this process and how many there are; by default what torch.distributed says.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int = 0,
        progress: Callable[[], tuple[int, int]] | None = None,
        processes: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(range(size), 1, 0, seed=seed)  # type: ignore[arg-type]
        self.size = size
        self.batch_size = batch_size
        self.progress = progress
        self.processes = processes
        self.passes = 0

    def _share(self) -> tuple[int, int]:
        if self.processes is not None:
            return self.processes
        started = torch.distributed.is_available() and torch.distributed.is_initialized()
        return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if started else (0, 1)

    def __len__(self) -> int:
        return self.size // self._share()[1]

    def __iter__(self) -> Iterator[int]:
        """Yield ``epoch * size + index`` of this process's share, from the first batch that is not done."""
        epoch, done = self.progress() if self.progress else (self.passes, 0)
        self.passes += 1
        rank, count = self._share()
        order = torch.randperm(self.size, generator=generator(self.seed, epoch))
        share = order[rank::count][: len(self)]
        yield from (epoch * self.size + share[done * self.batch_size :]).tolist()


class Samples(Sequence[Batch]):
    """The samples of one batch, which are there as a whole and taken apart only if somebody asks for one.

    Attributes:
        batch: the batch.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["image"])

    def __getitem__(self, row: Any) -> Any:
        if not -len(self) <= row < len(self):
            raise IndexError(f"sample {row} of {len(self)}")
        return {name: value[row] for name, value in self.batch.items()}  # type: ignore[index]


class EpochDataset(Dataset[Batch]):
    """Base of data sets whose samples are asked for as ``epoch * len(self) + index``, a whole batch at once.

    Args:
        size: number of samples.
        columns: how many random numbers a sample needs.
        augmented: whether these are training samples.

    Attributes:
        seed: draws the random numbers, together with the epoch.
        device: where batches are made.
        teacher_logits: what the teacher says, added to every batch; its augmented views are then drawn, not new ones.
    """

    def __init__(self, size: int, columns: int, augmented: bool) -> None:
        self.size = size
        self.columns = columns
        self.augmented = augmented
        self.seed = 0
        self.device = torch.device("cpu")
        self.teacher_logits: TeacherLogits | None = None
        self._draws: tuple[tuple[int, int] | None, Tensor] = (None, torch.empty(0))

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, key: int) -> Batch:
        """One sample without a batch dimension."""
        sample: Batch = self.__getitems__([key])[0]
        return sample

    def __getitems__(self, keys: Sequence[int]) -> Samples:
        """One batch, all of one epoch; the DataLoader prefers this to one call a sample.

        Raises:
            IndexError: If there is no such sample; only training samples have epochs.
        """
        epoch = int(keys[0]) // self.size if self.size else 0
        index = torch.as_tensor(keys, device=self.device) - epoch * self.size
        if epoch and not self.augmented:
            raise IndexError(f"sample {int(keys[0])} of {self.size}")
        batch = {"index": index} | self.read(index, self._draw(epoch, index))
        if self.teacher_logits is not None:
            batch |= self.teacher_logits.read(epoch, batch["index"])
        return Samples(cast("Batch", batch))

    def to(self, device: torch.device) -> None:
        """Move the samples to where batches are made, if they lie in memory; here, they do not."""

    def fingerprint(self, times: bool = True) -> str:
        """Changes whenever the samples or their order do, labels aside.

        Args:
            times: whether of files the times of change count, by which files of the same size are told apart.

        Raises:
            NotImplementedError: If the data set does not tell.
        """
        raise NotImplementedError(f"{type(self).__name__} has no fingerprint")

    @abstractmethod
    def read(self, index: Tensor, draws: Tensor) -> dict[str, Tensor]:
        """Make one batch.

        Args:
            index: positions, int64, shape ``(B,)``.
            draws: random numbers in [0, 1) of these samples in this epoch, float64, shape ``(B, columns)``.

        Returns:
            What :class:`~kdlit.types.Batch` names; with fewer samples than asked for, ``index`` says which.
        """

    @property
    @abstractmethod
    def labels(self) -> Tensor:
        """Of all samples, int64, shape ``(N,)``."""

    @abstractmethod
    def only(self, index: Tensor) -> EpochDataset:
        """The same with fewer samples, given their positions."""

    def _draw(self, epoch: int, index: Tensor) -> Tensor:
        """The random numbers of some samples; those of all samples are drawn when an epoch starts."""
        if not self.augmented:
            return torch.empty(len(index), 0)
        source = (self.seed, epoch)
        if self.teacher_logits is not None:
            source = self.teacher_logits.drawn_from(*source)
        if self._draws[0] != source:
            # The order comes from (seed, epoch) too, so that this must be another stream.
            table = torch.rand(self.size, self.columns, generator=generator(*source, 1), dtype=torch.float64)
            self._draws = (source, table.to(self.device))
        return self._draws[1][index]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_draws": (None, torch.empty(0))}


class EpochLoader(DataLoader[Batch]):
    """A DataLoader that asks its sampler for the first time when the first batch is wanted, not before.

    Raises:
        WorkerDiedError: If a worker process dies, also in the middle of a step.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with clear_errors():
            batches = super().__iter__()
            watch_workers()
            yield from batches


class ResumableLoader(EpochLoader):
    """The same in a trainer, whose own count of batches says where to go on; Lightning asks whether it is known."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to take up."""


class WorkerDiedError(OSError):
    """A process that prepares batches has died; the message says which, how and what to do."""


_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(?:.*killed by signal: ([\w ]+))?")
_GRACE = 30  # seconds that a worker goes on after the first SIGTERM


def start_worker(worker: int) -> None:
    """Let a worker process leave it to the main one when to end: what clusters and terminals send goes to all of them.

    SIGINT, SIGUSR1 and SIGHUP are ignored. A first SIGTERM is obeyed after half a minute, in which the main process can
    finish its step, save and end its workers; a second one at once.

    Args:
        worker: number of the worker.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, _end_soon)
    if int(os.environ.get("PL_SEED_WORKERS", 0)):  # what Lightning does for loaders without such a function
        pl_worker_init_function(worker)


def _end_soon(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(_GRACE)


def watch_workers() -> None:
    """Say clearly that a worker has died, whatever the main process is doing then.

    torch has a handler of SIGCHLD for that, which breaks into any line of the program with a RuntimeError, but only
    until a trainer has put back, at its end, the handlers that it had found.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return
    known: Any = signal.getsignal(signal.SIGCHLD)
    if getattr(known, "__module__", "") == __name__:
        return

    def tell(number: int, frame: Any) -> None:
        try:
            _error_if_any_worker_fails()
            if callable(known):
                known(number, frame)
        except RuntimeError as error:
            raise death_of_worker(str(error)) from None

    signal.signal(signal.SIGCHLD, tell)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Say what was wrong in a worker without its traceback, or that it has died.

    Raises:
        ValueError: If the data was wrong.
        WorkerDiedError: If a worker has died.
    """
    try:
        yield
    except ValueError as error:
        raise without_worker(error) from None
    except RuntimeError as error:
        if isinstance(error.__cause__, WorkerDiedError):  # torch found it once more, and knows less
            raise error.__cause__ from None
        if not _WORKER.search(str(error)):
            raise
        raise death_of_worker(str(error)) from None
    except (ConnectionError, EOFError, FileNotFoundError) as error:  # while it was handing over a batch
        if "multiprocessing" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        raise death_of_worker(_who_died()) from None


def _who_died() -> str:
    """What torch says about a worker that has died, as soon as it knows; or the system, as torch says it only once."""
    for _ in range(20):
        try:
            _error_if_any_worker_fails()
        except RuntimeError as error:
            return str(error)
        for child in list(multiprocessing.process._children):  # type: ignore[attr-defined]
            if (code := child.exitcode) is not None and code < 0:
                return f"DataLoader worker (pid {child.pid}) is killed by signal: {signal.strsignal(-code)}."
        time.sleep(0.05)
    return ""


def death_of_worker(message: str) -> WorkerDiedError:
    """An error that says more than torch does about a worker that died."""
    found = _WORKER.search(message)
    pids, how = (found[1], found[2] or "") if found else ("unknown", "")
    causes = {
        "Killed": "most likely the system ran out of memory and ended it (dmesg tells)",
        "Bus error": "most likely the shared memory in /dev/shm is full (df -h /dev/shm; docker run --shm-size=8g)",
        "Segmentation fault": "a library that it called has crashed, such as a decoder on a damaged file",
        "Terminated": "somebody ended it, such as the scheduler of a cluster",
        "Alarm clock": "somebody ended it, such as the scheduler of a cluster",
    }
    cause = causes.get(how, "too little memory or shared memory (/dev/shm), or a library that crashed")
    ended = f"was ended by signal {how}" if how else "ended unexpectedly"
    return WorkerDiedError(
        f"a process that prepares batches (data-loading worker, pid {pids}) {ended}: {cause}. Set a smaller "
        "--data.num_workers, or 0 to see where it happens, or a smaller batch size, and go on with --ckpt_path=last"
    )


def without_worker(error: ValueError) -> ValueError:
    """What was wrong, without the traceback that a worker process sends along."""
    _, worker, trace = str(error).partition("in DataLoader worker process")
    if not worker:
        return error
    lines = trace.rstrip().split("\n")
    last_of_traceback = max(number for number, line in enumerate(lines) if line.startswith("  "))
    return ValueError("\n".join(lines[last_of_traceback + 1 :]).partition(": ")[2])


def generator(*numbers: int) -> torch.Generator:
    """A generator for a tuple of numbers, unrelated to that of any other tuple."""
    seed = np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) % 2**63)
