"""What default logging and metrics cost, of a training step of 5 ms.

Lightning's fit loop runs with all that ``kdlit fit`` logs by default. Its steps are synthetic: the teacher multiplies
matrices until --step_ms are over, so that caches are full of other things, as after real networks, and the student is
a single layer. In the midst of this loop the CPU time of everything that belongs to logging is taken, call by call and
less what it takes to take it, and is set against the length of a step. What comes once in many steps or once an epoch
is shared out among all.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kdlit import losses
from kdlit.benchmark.measure import heading, table
from kdlit.benchmark.training import CLASSES, quiet_trainer
from kdlit.callbacks import Progress, Throughput
from kdlit.loggers import RunLogger
from kdlit.modules import ClassificationDistillation

_BAR = ("on_train_epoch_start", "on_train_batch_end", "on_train_epoch_end")
PARTS: dict[str, list[tuple[type, str]]] = {
    "losses and accuracy of every step": [(ClassificationDistillation, "_note")],
    "some steps looked at closely": [(ClassificationDistillation, "show")],
    "images/s and where the time goes": [(Throughput, "on_train_batch_start"), (Throughput, "on_train_batch_end")],
    "progress bar": [(Progress, hook) for hook in _BAR],
    "means of an epoch, metrics.csv": [
        (ClassificationDistillation, "figures"),
        (ClassificationDistillation, "_log_training"),
        (Throughput, "on_train_epoch_end"),
        (LearningRateMonitor, "on_train_epoch_start"),
    ],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--step_ms", type=float, default=5.0, help="length of a step in ms, default: 5")
    parser.add_argument("--steps", type=int, default=782, help="steps an epoch, default: 782, those of CIFAR-100")
    parser.add_argument(
        "--log_every_n_steps", type=int, default=100, help="of the trainer, default: 100, as of kdlit fit"
    )
    parser.add_argument("--rounds", type=int, default=7, help="epochs that are measured, default: 7")


def measure(step_ms: float, steps: int, log_every_n_steps: int, rounds: int) -> dict[str, Any]:
    """Take the time of all that is logged.

    Args:
        step_ms: length of a step in ms.
        steps: steps an epoch.
        log_every_n_steps: one step in so many is looked at closely.
        rounds: epochs that are measured, after one that is not.
    """
    epochs = _epochs(step_ms / 1e3, steps, log_every_n_steps, rounds + 1)[1:]
    rows: dict[str, dict[str, Any]] = {
        part: {
            "calls": statistics.median(calls[part] for _, calls in epochs),
            "step_us": [
                1e6 * (seconds[part] - calls[part] * seconds[""] / calls[""]) / steps for seconds, calls in epochs
            ],
        }
        for part in PARTS
    }
    together = [sum(one) for one in zip(*(row["step_us"] for row in rows.values()), strict=True)]
    rows["all of it"] = {"step_us": together}
    for row in rows.values():
        row["share"] = [taken / 1e3 / step_ms for taken in row["step_us"]]
    return {"step_ms": step_ms, "steps": steps, "log_every_n_steps": log_every_n_steps, "parts": rows}


def report(result: Mapping[str, Any]) -> str:
    """Write the result as Markdown."""
    rows = []
    for part, row in result["parts"].items():
        share = row["share"]
        spread = f"{statistics.median(share):.2%} ({min(share):.2%} to {max(share):.2%})"
        calls = f"{row['calls']:g}" if "calls" in row else ""
        rows.append([part, calls, f"{statistics.median(row['step_us']):.1f}", spread])
    step = f"{result['step_ms']:g} ms"
    columns = ["what", "calls an epoch", "CPU us a step", f"of a step of {step}"]
    every = f"one in {result['log_every_n_steps']} looked at closely"
    return heading(result, f"steps of {step}, {result['steps']} an epoch, {every}") + "\n" + table(columns, rows)


class _Busy(nn.Module):
    """A linear classifier that computes something else before it answers."""

    matrix: Tensor

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, CLASSES)
        self.seconds = seconds
        self.register_buffer("matrix", torch.eye(512))

    def forward(self, image: Tensor) -> Tensor:
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            self.matrix = self.matrix @ self.matrix
        logits: Tensor = self.linear(image.flatten(1))
        return logits


class _Meter(L.Callback):
    """Adds up the CPU time and calls of some methods, epoch by epoch."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, float] = defaultdict(float)
        self.epochs: list[tuple[dict[str, float], dict[str, float]]] = []
        self._counts = False  # within another
        self._nothing = self._timed("", lambda: None)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take the time of all parts."""
        with ExitStack() as patches:
            for part, methods in PARTS.items():
                for owner, name in methods:
                    patches.enter_context(patch.object(owner, name, self._timed(part, getattr(owner, name))))
            yield

    def _timed(self, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._counts:
                return method(*args, **kwargs)
            self._counts, start = True, time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[part] += time.process_time() - start
                self.calls[part] += 1
                self._counts = False

        return timed

    def on_train_batch_end(self, *args: Any) -> None:
        self._nothing()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds, self.calls = defaultdict(float), defaultdict(float)
        self.epochs.append((self.seconds, self.calls))


def _epochs(
    seconds: float, steps: int, log_every_n_steps: int, epochs: int
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """CPU seconds and calls of each part, epoch by epoch."""
    batch = {"image": torch.randn(64, 3, 8, 8), "target": torch.randint(0, CLASSES, (64,))}
    terms = {"ce": losses.CrossEntropyLoss(), "dkd": losses.DKDLoss()}
    module = ClassificationDistillation(_Busy(0.0), terms, _Busy(seconds), input_size=(3, 8, 8))
    meter = _Meter()
    bar = Progress(console_kwargs={"stderr": True, "force_terminal": True})
    with tempfile.TemporaryDirectory() as folder, meter.watching():
        trainer = quiet_trainer(
            torch.device("cpu"),
            max_epochs=epochs,
            log_every_n_steps=log_every_n_steps,
            callbacks=[meter, LearningRateMonitor("epoch"), Throughput(), bar],
            logger=RunLogger(folder),
            enable_progress_bar=True,
        )
        trainer.fit(module, DataLoader([batch] * steps, batch_size=None))  # type: ignore[arg-type]
    return meter.epochs
