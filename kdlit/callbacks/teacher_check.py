"""Is the teacher as good on this data as it is said to be? Asked before training, not after."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.data import DataLoader

from kdlit.data import SplitDataModule
from kdlit.data.sampling import EpochDataset
from kdlit.fingerprint import of_network
from kdlit.metrics import is_right
from kdlit.modules.base import as_batch
from kdlit.modules.many_students import frozen_teacher_of
from kdlit.modules.streams import read_generators, set_generators
from kdlit.modules.teacher import FrozenTeacher

_ENOUGH = 30  # pictures to tell from chance
_TOLERANCE = 0.02  # besides three standard errors
_CAUSES = """\
  Usual causes:
    - mean and std of the data are not those that the teacher was trained with
    - colours in another order (BGR for RGB), or pictures scaled to 0..255 for 0..1
    - classes numbered in another order, or another data set
    - pictures of another size, or cut out or interpolated in another way
  Where only the teacher wants other pictures, --data.teacher_input gives them to it."""


class TeacherCheck(L.Callback):
    """Measures the teacher before training starts, and warns if it is far worse than recorded or at chance level.

    The record is what the teacher's checkpoint says (``network.recorded_top1``, from
    :func:`kdlit.models.from_checkpoint`) or what is given here. Pictures are those held out for validation or, if there
    are none, training pictures as evaluation sees them; of another data module those of its ``val_dataloader``. The run
    is the same, bit for bit, as without the check.

    Args:
        pictures: how many to measure on at most.
        recorded: the top-1 accuracy that the teacher is known to have, a fraction of 1; by default the checkpoint's.

    Attributes:
        top1: what was measured, a fraction of 1; None if nothing could be.
        pictures_seen: on how many pictures.
        part: which: ``val`` or ``train``.
        recorded: what it was compared with, or None.
        weights: :func:`kdlit.fingerprint.of_network` of the teacher.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(self, pictures: int = 2048, recorded: float | None = None) -> None:
        if pictures < 1:
            raise ValueError(f"pictures must be >= 1, got {pictures!r}")
        if recorded is not None and not 0 < recorded <= 1:
            raise ValueError(f"recorded must be a fraction of 1, in (0, 1], got {recorded!r}")
        self.pictures = pictures
        self.given = recorded
        self._forget()

    def _forget(self) -> None:
        self.top1: float | None = None
        self.pictures_seen = 0
        self.part: str | None = None
        self.recorded: float | None = None
        self.weights: str | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, compare and warn."""
        self._forget()
        frozen = frozen_teacher_of(pl_module)
        if frozen is None:
            return
        self.weights = of_network(frozen.network)
        self.recorded = getattr(frozen.network, "recorded_top1", None) if self.given is None else self.given
        with _aside(frozen.network, pl_module.device):
            right, self.pictures_seen = self._count(trainer, frozen)
        if not self.pictures_seen:
            self.part = None
            return
        self.top1 = right / self.pictures_seen
        noise = getattr(getattr(trainer, "datamodule", None), "label_noise", 0) if self.part == "train" else 0
        warning = self._warning((1 - noise) * (self.recorded or 0), getattr(pl_module, "num_classes", 0))
        if warning:
            rank_zero_only(print)(f"kdlit: warning: {warning}\n{_CAUSES}", file=sys.stderr)

    def _warning(self, expected: float, classes: int) -> str:
        """What is wrong with the figure, if anything."""
        assert self.top1 is not None
        where = {"val": "validation", "train": "training"}[self.part or "val"]
        measured = f"  measured: {100 * self.top1:6.2f} % top-1 on {self.pictures_seen:,} {where} pictures"
        if expected and self.top1 < expected - _TOLERANCE - 3 * _error(expected, self.pictures_seen):
            source = "in its checkpoint" if self.given is None else "in the config"
            noisy = f" ({100 * expected:.2f} % with this label noise)" if expected != self.recorded else ""
            recorded = f"  recorded: {100 * (self.recorded or 0):6.2f} % {source}{noisy}"
            return f"THE TEACHER IS FAR WORSE THAN ITS RECORD\n{measured}\n{recorded}"
        if classes > 1:
            chance = 1 / classes
            limit = min(2 * chance, chance + 0.1 * (1 - chance))  # for two classes 55 and not 100 %
            # Few pictures cannot tell a poor teacher from none.
            if self.top1 <= limit and self.pictures_seen >= _ENOUGH:
                return f"THE TEACHER IS HARDLY BETTER THAN CHANCE\n{measured}\n  chance:   {100 * chance:6.2f} %"
        return ""

    def _count(self, trainer: L.Trainer, frozen: FrozenTeacher) -> tuple[int, int]:
        """How many pictures the teacher is right about, and of how many; over all processes."""
        device, precision = trainer.strategy.root_device, trainer.precision_plugin
        limit, shared, batches = self._batches(trainer)
        right, seen = torch.zeros((), device=device), 0
        for batch in batches:
            batch = trainer.strategy.batch_to_device(precision.convert_input(batch), device)
            batch = as_batch(batch).copy()
            if "target" not in batch or batch["target"].ndim != 1 or batch["target"].is_floating_point():
                break  # there is no class to be right about
            batch.pop("teacher_logits", None)  # the network itself is to be measured
            with torch.no_grad(), precision.forward_context():
                logits = frozen(batch, with_strong_view=False).logits
            hits = is_right(logits, batch["target"])[: limit - seen]
            right, seen = right + hits.sum(), seen + len(hits)
            if seen >= limit or trainer.fast_dev_run:  # type: ignore[attr-defined]
                break
        counts = torch.stack([right, torch.tensor(float(seen), device=device)])
        if shared:
            counts = trainer.strategy.reduce(counts, reduce_op="sum")
        return int(counts[0]), int(counts[1])

    def _batches(self, trainer: L.Trainer) -> tuple[int, bool, Iterable[Any]]:
        """How many pictures to count in this process, whether the others count others, and batches of them."""
        data: Any = getattr(trainer, "datamodule", None)
        self.part = "val"
        if isinstance(data, SplitDataModule) and all(isinstance(one, EpochDataset) for one in data.datasets.values()):
            if not len(source := data.datasets["val"]):
                self.part = "train"
                data._place(data.datasets["train"])  # once, not once more for the copy
                source = copy.copy(data.datasets["train"])
                source.augmented, source.teacher_logits = False, None
            size, processes = min(self.pictures, len(source)), trainer.world_size
            index = torch.arange(size) * len(source) // size  # all over the data, which may be sorted by class
            # As many in every process: where the teacher's weights are shared, all must run it as often.
            share = index[trainer.global_rank :: processes][: size // processes]
            keys = [share[at : at + data.eval_batch_size].tolist() for at in range(0, len(share), data.eval_batch_size)]
            return len(share), True, data.in_order(source, keys)
        loaders: Any = []
        if isinstance(data, L.LightningDataModule) and is_overridden("val_dataloader", data):
            loaders = data.val_dataloader()
        loader = next(iter(loaders), None) if isinstance(loaders, (list, tuple)) else loaders
        return self.pictures, False, itertools.islice(loader, self.pictures) if isinstance(loader, DataLoader) else []


def _error(share: float, count: int) -> float:
    """Standard error of a share, of which a few pictures never show that it is 1."""
    share = min(share, 1 - 1 / count)
    return math.sqrt(share * (1 - share) / count)


@contextmanager
def _aside(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Leave generators and buffers as they were, and what compiles the network to the run's own batches."""
    gpu = device if device.type == "cuda" else None
    state, compiled = read_generators(gpu), network._compiled_call_impl
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network._compiled_call_impl = None
    try:
        yield
    finally:
        network._compiled_call_impl = compiled
        set_generators(state, gpu)
        for name, buffer in network.named_buffers():
            if not torch.equal(buffer, buffers[name]):
                buffer.copy_(buffers[name])
