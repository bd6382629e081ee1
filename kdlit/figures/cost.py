"""Training time against accuracy, extra parameters as the area of a circle (dkd figure 2, rld figure 6, mlkd 4a)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L

from kdlit.figures.style import COLOURS, CaptionedFigure, label_points, number, quoted, shorten, styled
from kdlit.modules import DistillationModule
from kdlit.runs import Run, find_runs


@dataclass(frozen=True)
class Cost:
    """What a method costs and brings.

    Attributes:
        method: its name.
        step_ms: milliseconds of a training step, > 0.
        accuracy: of the student, a fraction of 1.
        extra_parameters: learnt beside the student's, and stored memories; >= 0.

    Raises:
        ValueError: If a number is out of range.
    """

    method: str
    step_ms: float
    accuracy: float
    extra_parameters: float = 0

    def __post_init__(self) -> None:
        if not (self.step_ms > 0 and math.isfinite(self.step_ms)):
            raise ValueError(f"step_ms of {self.method} must be > 0, got {self.step_ms!r}")
        if not 0 <= self.accuracy <= 1:
            raise ValueError(f"accuracy of {self.method} must be a fraction in [0, 1], got {self.accuracy!r}")
        if not (self.extra_parameters >= 0 and math.isfinite(self.extra_parameters)):
            raise ValueError(f"extra_parameters of {self.method} must be >= 0, got {self.extra_parameters!r}")


def costs_of_benchmark(result: Mapping[str, Any] | str | Path, accuracy: Mapping[str, float]) -> list[Cost]:
    """Join measured steps with accuracies; methods without an accuracy are left out.

    Args:
        result: what ``python -m kdlit.benchmark steps --json FILE`` wrote: the content or the file.
        accuracy: of the student, fractions of 1, by the benchmark's name of the method.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else, or an accuracy is of a method that was not measured.
    """
    if not isinstance(result, Mapping):
        path = Path(result)
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
    rows = result.get("methods") if isinstance(result, Mapping) else None
    if not isinstance(rows, Mapping) or not all("step_ms" in row for row in rows.values()):
        raise ValueError("the result holds no step times; make it by `python -m kdlit.benchmark steps --json FILE`")
    if unknown := accuracy.keys() - rows.keys():
        raise ValueError(f"no step was measured of {', '.join(sorted(unknown))}; measured were {', '.join(rows)}")
    return [
        Cost(name, row["step_ms"], accuracy[name], row.get("extra_parameters", 0))
        for name, row in rows.items()
        if name in accuracy
    ]


def extra_parameters(module: DistillationModule) -> int:
    """How many numbers the losses learn or remember: parameters with a gradient, and memories of two dimensions.

    Args:
        module: as built from a config; the student's own parameters do not count.
    """
    learnt = sum(parameter.numel() for parameter in module.losses.parameters() if parameter.requires_grad)
    stored = sum(buffer.numel() for buffer in module.losses.buffers() if buffer.is_floating_point() and buffer.ndim > 1)
    return learnt + stored


def costs_of_runs(folders: Iterable[str | Path], accuracy: str = "test/top1") -> list[Cost]:
    """Measure whole runs: time of a step from ``train/images_per_s``, median over the epochs, and accuracy.

    The modules are built again to count parameters. Compare runs of one machine only.

    Args:
        folders: of runs, or that hold runs.
        accuracy: ``test/top1``, which needs ``kdlit test`` to have run, or what was logged in the last epoch, such as
            ``val/top1``.

    Raises:
        FileNotFoundError: If a folder is not there or holds no run.
        ValueError: If a run lacks the time or the accuracy.
    """
    runs = [(run, *run.rebuild()) for run in find_runs(folders)]
    return [cost_of_run(run, module, data, accuracy) for run, module, data in runs]


def cost_of_run(run: Run, module: DistillationModule, data: L.LightningDataModule, accuracy: str = "test/top1") -> Cost:
    """Likewise of one run whose module and data have been built again.

    Args:
        run: as :func:`kdlit.runs.find_runs` found it.
        module: of that run.
        data: of that run.
        accuracy: see :func:`costs_of_runs`.

    Raises:
        ValueError: If the run lacks the time or the accuracy.
    """
    series, tested = run.series(), run.results().get("test", {})
    speed = series.get("train/images_per_s")
    if not speed:
        raise ValueError(f"run {run.name} has not logged train/images_per_s; train again with this version of kdlit")
    value = tested.get(accuracy)
    if value is None and accuracy in series:
        value = series[accuracy][max(series[accuracy])]
    if value is None:
        raise ValueError(f"run {run.name} has no {accuracy}; run `kdlit test` on it, or choose another accuracy")
    step_ms = 1000 * getattr(data, "batch_size", 1) / median(speed.values())
    return Cost(run.name, step_ms, value, extra_parameters(module))


@styled
def time_against_accuracy(costs: Sequence[Cost], where: str = "") -> CaptionedFigure:
    """Scatter of step time against accuracy; the area of a circle shows the extra parameters.

    Args:
        costs: one a method.
        where: machine, pair and batch size, for the caption.

    Raises:
        ValueError: If there is none.
    """
    if not costs:
        raise ValueError("there is no method to draw; give at least one Cost")
    figure = CaptionedFigure("Training time against accuracy", 4.2)
    axis = figure.subplots()
    most = max(cost.extra_parameters for cost in costs)
    sizes = [20 + 600 * cost.extra_parameters / (most or 1) for cost in costs]
    x, y = [cost.step_ms for cost in costs], [100 * cost.accuracy for cost in costs]
    colours = [COLOURS[1] if cost.extra_parameters else COLOURS[0] for cost in costs]
    axis.scatter(x, y, sizes, colours, alpha=0.5, linewidths=0)
    axis.scatter(x, y, 4, "black", linewidths=0, zorder=3)
    if max(x) > 8 * min(x):
        axis.set_xscale("log")
    axis.margins(0.18)
    axis.set(xlabel="time of a training step (ms)", ylabel="accuracy of the student (top-1, %)")
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)
    label_points(
        axis, x, y, [shorten(cost.method) for cost in costs], (4.3, 3.5), [(s / math.pi) ** 0.5 for s in sizes]
    )
    extra = {cost.method: number(cost.extra_parameters / 1e6) for cost in costs if cost.extra_parameters}
    figure.set_caption(
        f"{where}." if where else "",
        "Up and to the left is better. The area of an orange circle grows with the parameters and memories that a "
        "method needs beside the student; blue ones need none.",
        f"Millions of these: {quoted(extra)}." if extra else "",
    )
    return figure
