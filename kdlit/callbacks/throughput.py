"""How fast a run goes, where the time of its steps is spent, and how much memory it takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from kdlit.modules import DistillationModule, ManyStudents
from kdlit.modules.base import as_batch
from kdlit.modules.clock import StepClock
from kdlit.modules.epoch_log import log_epoch

try:
    import resource
except ImportError:  # as on Windows
    resource = None  # type: ignore[assignment]


_TIMED = ("train/images_per_s", "train/share/", "train/peak_memory_mb")


class Throughput(L.Callback):
    """Logs, each epoch, pictures per second, where the time of a step goes, and the peak of memory.

    - ``train/images_per_s``: training pictures of all processes over the time between epoch start and end, validation
      left out;
    - ``train/share/data``, ``teacher``, ``student`` (its forward pass), ``losses``, ``update`` (backward pass and
      optimizer): shares of the time of a step, which add up to 1. How long a step waits for its batch is measured in
      all steps, the rest in one step in ``log_every_n_steps`` of the trainer, in which an accelerator is waited for
      after each part. What callbacks compute, as :class:`PlainBaseline` does, counts to ``update`` or ``data``;
    - ``train/peak_memory_mb``: of what torch has allocated on a GPU, or of the process on a CPU, since it started.

    All are those of the first process, from where a resumed run went on.
    """

    def __init__(self) -> None:
        self._clock = StepClock()
        self._epoch_began = 0.0
        self._step_ended = 0.0
        self._left_out = 0.0  # seconds of the epoch
        self._pictures = 0
        self._processes = 1
        self._waited, self._steps = 0.0, 0  # for batches

    @property
    def images_per_s(self) -> float | None:
        """Those of this epoch so far; None before the first step."""
        spent = time.perf_counter() - self._epoch_began - self._left_out
        return self._pictures * self._processes / spent if self._pictures else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give all modules one clock."""
        self._processes = trainer.world_size
        students = pl_module.students.values() if isinstance(pl_module, ManyStudents) else [pl_module]
        for module in students:
            if isinstance(module, DistillationModule):
                module.clock = self._clock
        self._begin()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting."""
        self._begin()

    def _begin(self) -> None:
        self._epoch_began = self._step_ended = time.perf_counter()
        self._left_out, self._pictures = 0.0, 0
        self._waited, self._steps = 0.0, 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to time a step, now and then."""
        self._waited += time.perf_counter() - self._step_ended
        self._steps += 1
        every: int = cast("Any", trainer).log_every_n_steps
        if every and batch_idx % every == 0:
            self._clock.start(trainer.strategy.root_device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the pictures."""
        self._pictures += _size(batch)
        self._clock.mark("update")
        self._clock.stop()
        self._step_ended = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave out what comes."""
        self._left_out -= time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on."""
        self._step_ended = time.perf_counter()
        self._left_out += self._step_ended

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log."""
        shares = self._clock.shares(self._waited / max(self._steps, 1))
        figures = {f"train/share/{section}": share for section, share in shares.items()}
        if (speed := self.images_per_s) is not None:
            figures["train/images_per_s"] = speed
        if memory := peak_memory(trainer.strategy.root_device):
            figures["train/peak_memory_mb"] = memory / 1e6
        log_epoch(trainer, trainer.strategy.broadcast(figures))


def _size(batch: Any) -> int:
    """Pictures in a batch; those in a form that a step of the user's own knows are not counted."""
    try:
        image: Any = as_batch(batch)["image"]
        is_batch = isinstance(image, Tensor) and image.ndim > 0
        return image.shape[0] if is_batch else len(image)  # of a tensor the latter takes ten times as long
    except TypeError:
        return 0


def without_times(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Of logged figures those that a repeated run would have, too.

    Args:
        figures: values by name.
    """
    return {name: value for name, value in figures.items() if not name.startswith(_TIMED)}


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far; 0 where the system does not tell.

    Args:
        device: a GPU, of which it counts what torch has allocated; otherwise the memory of the process counts.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
