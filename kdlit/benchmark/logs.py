"""What default logging and metrics cost, against a training step of 5 ms.

Lightning's fit loop runs synthetic steps that sleep for --step_ms. From block to block of as many steps as lie between
two that are looked at closely it is drawn whether the module keeps its metrics and times its steps, and whether the
progress bar is told, so that neighbouring blocks compare. A step counts with all that the loop does around it, as CPU
time, so that sleeping does not count. What the end of an epoch takes, log file included, is shared out among its steps.
What is added is set against the length of a step: the median of all differences between neighbouring blocks, and the
interval in which it lies.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kdlit import losses
from kdlit.benchmark.measure import heading, interleaved, table
from kdlit.benchmark.training import CLASSES, quiet_trainer
from kdlit.callbacks import Progress, Throughput
from kdlit.loggers import RunLogger
from kdlit.modules import ClassificationDistillation
from kdlit.modules.means import RunningMeans
from kdlit.types import Batch, ModelOutput

STATES = ("nothing", "metrics", "metrics and progress bar")
_END = "end of an epoch, log file"
_BLOCK = 50  # steps, as log_every_n_steps of the trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--step_ms", type=float, default=5.0, help="length of a step in ms, default: 5")
    parser.add_argument("--steps", type=int, default=782, help="steps an epoch, default: 782, those of CIFAR-100")
    parser.add_argument("--rounds", type=int, default=7, help="epochs that are measured, default: 7")


def measure(step_ms: float, steps: int, rounds: int) -> dict[str, Any]:
    """Time the fit loop with and without logging.

    Args:
        step_ms: length of a step in ms.
        steps: steps an epoch.
        rounds: epochs that are measured.
    """
    epochs = interleaved({"": partial(_epoch, step_ms / 1e3, steps)}, rounds, warmup=1, title="logging")[""]
    rows = {}
    for state in (*STATES, _END):
        values = [1e3 * value for epoch in epochs for value in epoch[state]]
        off = (
            [1e3 * value for epoch in epochs for value in epoch[STATES[0]]] if state in STATES else [0.0] * len(values)
        )
        added = [one - other for one, other in zip(values, off, strict=True)]
        middle, spread = statistics.median(added), _spread(added)
        rows[state] = {
            "step_ms": statistics.median(values),
            "added_ms": middle,
            "added_share": middle / step_ms,
            "low": (middle - spread) / step_ms,
            "high": (middle + spread) / step_ms,
        }
    return {"step_ms": step_ms, "steps": steps, "states": rows}


def report(result: Mapping[str, Any]) -> str:
    """Write the result as Markdown."""
    step = f"{result['step_ms']:g} ms"
    rows = (
        [
            name,
            f"{row['step_ms']:.3f}",
            f"{row['added_ms']:.3f}",
            f"{row['added_share']:.1%} ({row['low']:.1%} to {row['high']:.1%})",
        ]
        for name, row in result["states"].items()
    )
    columns = ["on", "fit loop, CPU ms a step", "added, ms", f"added, of a step of {step}"]
    return heading(result, f"steps of {step}, {result['steps']} an epoch") + "\n" + table(columns, rows)


def _spread(values: Sequence[float]) -> float:
    """Half of the interval in which the median lies with a probability of about 95 %."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return 1.58 * (high - low) / math.sqrt(len(values))


class _Sleeper(nn.Module):
    """A linear classifier that sleeps before it answers."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, CLASSES)
        self.seconds = seconds

    def forward(self, image: Tensor) -> Tensor:
        time.sleep(self.seconds)
        logits: Tensor = self.linear(image.flatten(1))
        return logits


class _DeafMeans(RunningMeans):
    def add(self, values: Mapping[str, Tensor], size: int) -> None:
        """Count nothing."""


class _Alternating(ClassificationDistillation):
    """Keeps its metrics in some steps only."""

    state = STATES[0]

    def distil(self, batch: Batch, teacher: ModelOutput) -> dict[str, Any]:
        if self.state != STATES[0]:
            return super().distil(batch, teacher)
        means, self.means = self.means, {"train": _DeafMeans()}
        outputs = super().distil(batch, teacher)
        self.means = means
        return outputs

    def watch(self, student: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        return super().watch(student, batch) if self.state != STATES[0] else {}

    def show(self, outputs: dict[str, Any]) -> None:
        if self.state != STATES[0]:
            super().show(outputs)


class _AlternatingThroughput(Throughput):
    """Counts and times some steps only."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if pl_module.state != STATES[0]:
            super().on_train_batch_start(trainer, pl_module, *args)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if pl_module.state != STATES[0]:
            super().on_train_batch_end(trainer, pl_module, *args)


class _AlternatingBar(Progress):
    """Is told of some steps only."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if pl_module.state == STATES[2]:
            super().on_train_batch_end(trainer, pl_module, *args)


class _Director(L.Callback):
    """Draws the state of each block of steps and notes when they start."""

    def __init__(self, steps: int) -> None:
        self.block = min(_BLOCK, steps // len(STATES))
        blocks = [STATES[int(number)] for _ in range(steps // self.block + 1) for number in torch.randperm(len(STATES))]
        self.states = [blocks[step // self.block] for step in range(steps)]
        self.moments: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        cast("_Alternating", pl_module).state = self.states[batch_idx]
        self.moments.append(time.process_time())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.moments.append(time.process_time())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.moments.append(time.process_time())


def _epoch(seconds: float, steps: int) -> dict[str, list[float]]:
    """CPU seconds of a step in each block, by state, and of the end of the epoch for each step."""
    batch = {"image": torch.randn(64, 3, 8, 8), "target": torch.randint(0, CLASSES, (64,))}
    terms = {"ce": losses.CrossEntropyLoss(), "dkd": losses.DKDLoss()}
    module = _Alternating(_Sleeper(seconds), terms, _Sleeper(0.0), input_size=(3, 8, 8))
    director = _Director(steps)
    bar = _AlternatingBar(console_kwargs={"stderr": True, "force_terminal": True})
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(
            torch.device("cpu"),
            max_epochs=1,
            log_every_n_steps=director.block,
            callbacks=[director, LearningRateMonitor("epoch"), _AlternatingThroughput(), bar],
            logger=RunLogger(folder),
            enable_progress_bar=True,
        )
        trainer.fit(module, DataLoader([batch] * steps, batch_size=None))  # type: ignore[arg-type]
    taken = [end - start for start, end in pairwise(director.moments)]
    found: dict[str, list[float]] = {state: [] for state in STATES}
    of_all = director.block * len(STATES)
    for start in range(0, steps - steps % of_all, director.block):
        found[director.states[start]].append(statistics.mean(taken[start : start + director.block]))
    return {**found, _END: [taken[-1] / steps]}
