"""What default logging and metrics cost, against a training step of 5 ms.

Lightning's fit loop runs synthetic steps that sleep for --step_ms. From step to step it is drawn whether the module
keeps its metrics and whether the progress bar is told, so that neighbouring steps compare. A step counts with all that
the loop does around it, as CPU time, so that sleeping does not count. What the end of an epoch takes, log file
included, is shared out among its steps. What is added is set against the length of a step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
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
    off = [epoch[STATES[0]] for epoch in epochs]
    rows = {}
    for state in (*STATES, "end of an epoch, log file"):
        values = [epoch[state] for epoch in epochs]
        added = [one - other * (state in STATES) for one, other in zip(values, off, strict=True)]
        rows[state] = {
            "step_ms": 1e3 * statistics.median(values),
            "added_ms": 1e3 * statistics.median(added),
            "added_share": 1e3 * statistics.median(added) / step_ms,
            "low": 1e3 * min(added) / step_ms,
            "high": 1e3 * max(added) / step_ms,
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
    """Draws the state of each step and notes when it starts."""

    def __init__(self, steps: int) -> None:
        self.states = [STATES[int(number)] for number in torch.randint(len(STATES), (steps,))]
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


def _epoch(seconds: float, steps: int) -> dict[str, float]:
    """Mean CPU seconds of the steps of each state, and of the end of the epoch for each step."""
    batch = {"image": torch.randn(64, 3, 8, 8), "target": torch.randint(0, CLASSES, (64,))}
    terms = {"ce": losses.CrossEntropyLoss(), "dkd": losses.DKDLoss()}
    module = _Alternating(_Sleeper(seconds), terms, _Sleeper(0.0), input_size=(3, 8, 8))
    director = _Director(steps)
    bar = _AlternatingBar(console_kwargs={"stderr": True, "force_terminal": True})
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(
            torch.device("cpu"),
            max_epochs=1,
            callbacks=[director, LearningRateMonitor("epoch"), _AlternatingThroughput(), bar],
            logger=RunLogger(folder),
            enable_progress_bar=True,
        )
        trainer.fit(module, DataLoader([batch] * steps, batch_size=None))  # type: ignore[arg-type]
    taken = [end - start for start, end in pairwise(director.moments)]
    means = {
        state: statistics.mean(one for one, other in zip(taken, director.states, strict=False) if other == state)
        for state in STATES
    }
    return {**means, "end of an epoch, log file": taken[-1] / steps}
