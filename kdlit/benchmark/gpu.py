"""The one command for a machine with a GPU: kdlit's fit against a plain loop with a DataLoader and workers.

The plain loop is float32, with nothing changed: torchvision's transforms on one picture at a time in worker processes,
channels first, the teacher as it is. Against it stand whole epochs of Trainer.fit, log file included, on random
pictures in the shape of CIFAR-100. All take turns within each round; the first epoch of each fit, which compiles, does
not count. The share of time that the GPU is busy is what its kernels take in a step, as the profiler sees it, over the
length of a step without the profiler. Times of 240 epochs follow from one; --full measures them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning as L
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from kdlit import models
from kdlit.benchmark.measure import add_pair, heading, interleaved, ratio, table, timed
from kdlit.benchmark.training import (
    EpochClock,
    RandomPictures,
    Training,
    endless,
    make_module,
    one_by_one,
    quiet_trainer,
    set_tf32,
)
from kdlit.loggers import RunLogger
from kdlit.modules import ClassificationDistillation
from kdlit.modules.performance import Performance, chosen
from kdlit.types import Batch

PLAIN = "plain loop, DataLoader with workers"
_COMPILED = replace(chosen("fast"), compile=["student", "teacher", "losses"])
VARIANTS: dict[str, Performance] = {
    "exact": chosen("exact"),
    "fast": chosen("fast"),
    "fast, compiled": _COMPILED,
    "fast, compiled, CUDA graphs": replace(_COMPILED, compile_mode="reduce-overhead"),
}
RUN = 240  # epochs of the published runs on CIFAR-100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    add_pair(parser, device="cuda")
    parser.add_argument("--method", default="DKD", help="as in `speed`, default: DKD")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        metavar="VARIANT",
        help="default: all, " + ", ".join(f"'{name}'" for name in VARIANTS),
    )
    parser.add_argument("--num_samples", type=int, default=50_000, help="pictures an epoch, default: 50000")
    parser.add_argument("--num_workers", type=int, default=8, help="of the plain loop, default: 8")
    parser.add_argument("--steps", type=int, default=300, help="steps of each time of the plain loop, default: 300")
    parser.add_argument("--profiled_steps", type=int, default=50, help="steps under the profiler, default: 50")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is measured, default: 3")
    parser.add_argument("--full", action="store_true", help=f"then run all {RUN} epochs with the fastest variant")


def measure(
    teacher: str,
    student: str,
    batch_size: int,
    device: str,
    method: str,
    variants: list[str],
    num_samples: int,
    num_workers: int,
    steps: int,
    profiled_steps: int,
    rounds: int,
    full: bool,
) -> dict[str, Any]:
    """Measure the plain loop and kdlit's fits.

    Args:
        teacher: name of a network in :mod:`kdlit.models`.
        student: likewise.
        batch_size: pictures a step.
        device: where to run.
        method: name in :data:`~kdlit.benchmark.training.METHODS`.
        variants: names in :data:`VARIANTS`.
        num_samples: pictures an epoch.
        num_workers: of the plain loop.
        steps: steps of each time of the plain loop.
        profiled_steps: steps under the profiler.
        rounds: times that each is measured.
        full: whether to run all epochs with the fastest variant.

    Raises:
        ValueError: If there is no such device or variant.
    """
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "gpu needs a GPU, but torch sees none (torch.cuda.is_available() is false); run it on a machine that "
            "has one. --device cpu runs the same code here, to try it out; its figures say nothing about a GPU"
        )
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise ValueError(f"--variants: there is no {unknown[0]!r}; known are {', '.join(VARIANTS)}")
    data = RandomPictures(num_samples, batch_size=batch_size)
    data.setup("fit")
    plain = Training(teacher, student, method, data, place, "plain")
    batches = endless(one_by_one(data, num_workers), place)
    fits = {
        name: Fit(make_module(getattr(models, teacher)(), student, method, VARIANTS[name]), data, place)
        for name in variants
    }
    failed = {name: reason for name, fit in fits.items() if (reason := fit.failure())}
    fits = {name: fit for name, fit in fits.items() if name not in failed}
    if not fits:
        raise ValueError(f"all variants fail; {next(iter(failed))}: {next(iter(failed.values()))}")
    runs: dict[str, Callable[[], float]] = {PLAIN: partial(_plain_rate, plain, batches, steps, batch_size, place)}
    runs |= {name: fit.rate for name, fit in fits.items()}
    rates = interleaved(runs, rounds, warmup=0, title="gpu")
    rows: dict[str, dict[str, Any]] = {}
    for name, values in rates.items():
        rate = statistics.median(values)
        rows[name] = {
            "images_per_s": rate,
            "step_ms": 1e3 * batch_size / rate,
            "run_minutes": RUN * num_samples / rate / 60,
            "against_plain": ratio(values, rates[PLAIN]),
        }
        if name in fits:
            rows[name]["busy"] = fits[name].busy_seconds(profiled_steps) * rate / batch_size
    fastest = max(fits, key=lambda name: statistics.median(rates[name]))
    if full:
        rows[fastest]["measured_run_minutes"] = sum(fits[fastest].epochs(RUN)) / 60
    return {
        "pair": [teacher, student],
        "method": method,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "epochs": RUN,
        "variants": rows,
        "failed": failed,
    }


def report(result: Mapping[str, Any]) -> str:
    """Write the result as Markdown."""
    epochs = result["epochs"]
    columns = ["variant", "images/s", "step, ms", "GPU busy", f"{epochs} epochs, minutes", "measured", "x plain loop"]
    rows = []
    for name, row in result["variants"].items():
        gain = row["against_plain"]
        rows.append(
            [
                name,
                f"{row['images_per_s']:,.0f}",
                f"{row['step_ms']:.2f}",
                f"{row['busy']:.0%}" if "busy" in row else "-",
                f"{row['run_minutes']:.1f}",
                f"{row['measured_run_minutes']:.1f}" if "measured_run_minutes" in row else "-",
                f"{gain['median']:.1f} ({gain['low']:.1f} to {gain['high']:.1f})",
            ]
        )
    pair = " -> ".join(result["pair"])
    title = f"{pair}, {result['method']}, batch {result['batch_size']}, plain loop with {result['num_workers']} workers"
    failed = "".join(f"\n\n{name} fails: {reason}" for name, reason in result["failed"].items())
    return heading(result, title) + "\n" + table(columns, rows) + failed


@dataclass
class Fit:
    """Fits of one module, one after the other.

    Attributes:
        module: what is trained.
        data: what on.
        device: where.
    """

    module: ClassificationDistillation
    data: RandomPictures
    device: torch.device

    def epochs(self, count: int, *callbacks: L.Callback, **settings: Any) -> list[float]:
        """Seconds of each epoch of a fit."""
        clock = EpochClock()
        set_tf32(None)
        with tempfile.TemporaryDirectory() as folder:
            trainer = quiet_trainer(
                self.device, max_epochs=count, logger=RunLogger(folder), callbacks=[clock, *callbacks], **settings
            )
            trainer.fit(self.module, self.data)
        return clock.seconds

    def failure(self) -> str:
        """Why it cannot be run, if so: compilers are choosy about devices."""
        try:
            self.epochs(1, limit_train_batches=3)
        except RuntimeError as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return ""

    def rate(self) -> float:
        """Pictures a second in the second epoch of a fit."""
        return self.data.num_samples / self.epochs(2)[-1]

    def busy_seconds(self, steps: int) -> float:
        """Seconds of a step in which the device computes."""
        watch = _Profile(steps)
        self.epochs(1, watch, limit_train_batches=_Profile.SKIPPED + steps)
        return watch.busy / steps


class _Profile(L.Callback):
    """Profiles some steps of a fit.

    Attributes:
        busy: seconds in which the device computed.
    """

    SKIPPED = 10  # steps before, while memory is found and kernels are chosen

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.busy = 0.0
        self._profiler: Any = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin."""
        if batch_idx == self.SKIPPED:
            on_gpu = trainer.strategy.root_device.type == "cuda"
            self._profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
            self._kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
            _wait(trainer)
            self._profiler.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End."""
        if batch_idx == self.SKIPPED + self.steps - 1:
            _wait(trainer)
            self._profiler.stop()
            events = self._profiler.profiler.kineto_results.events()
            # Spans that only bear a name, such as that of an optimizer's step, contain pauses.
            spans = (
                (one.start_ns(), one.end_ns())
                for one in events
                if one.device_type() == self._kind and not one.is_user_annotation()
            )
            self.busy = union(spans) / 1e9


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Total length of spans that may overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _wait(trainer: L.Trainer) -> None:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()


def _plain_rate(
    training: Training, batches: Iterator[Batch], steps: int, batch_size: int, device: torch.device
) -> float:
    """Pictures a second of the plain loop."""
    set_tf32(None)
    training.run(batches, 3)
    return steps * batch_size / timed(partial(training.run, batches, steps), device)
