"""Whole training steps of every method, with peak memory and extra parameters.

Methods take turns within each round; of each the fastest step counts, as what else runs on a machine only ever adds to
so long a time. Ratios mean more than milliseconds. Pictures are ready made; ``speed`` measures these too.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from kdlit.benchmark.measure import add_pair, heading, interleaved, peak_bytes, table, timed
from kdlit.benchmark.training import METHODS, RandomPictures, Training, endless


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    add_pair(parser)
    parser.add_argument("--rounds", type=int, default=5, help="times that every method is measured, default: 5")
    parser.add_argument("--num_samples", type=int, default=50_000, help="training samples, for memory banks")
    parser.add_argument("--plot", metavar="FILE", help="draw extra parameters over step time; needs matplotlib")


def measure(
    teacher: str, student: str, batch_size: int, device: str, rounds: int, num_samples: int, plot: str | None
) -> dict[str, Any]:
    """Time whole training steps of every method.

    Args:
        teacher: name of a network in :mod:`kdlit.models`.
        student: likewise.
        batch_size: pictures a step.
        device: where to run.
        rounds: times that every method is measured.
        num_samples: training samples, for memory banks.
        plot: file to draw to.
    """
    place = torch.device(device)
    data = RandomPictures(num_samples, batch_size=batch_size, strong_view=True)
    data.setup("fit")
    batch = next(endless(data.train_dataloader(), place))
    trainings = {name: Training(teacher, student, name, data, place) for name in METHODS}
    steps = {name: partial(one.step, batch) for name, one in trainings.items()}
    runs = {name: partial(timed, step, place) for name, step in steps.items()}
    fastest = {name: min(values) for name, values in interleaved(runs, rounds, title="steps").items()}
    rows = {
        name: {
            "step_ms": 1e3 * fastest[name],
            "ratio_to_kd": fastest[name] / fastest["KD"],
            "peak_mb": peak_bytes(steps[name], place) / 1e6,
            "extra_parameters": one.extra_parameters,
        }
        for name, one in trainings.items()
    }
    if plot:
        _draw(rows, f"{teacher} -> {student}, batch {batch_size}, {place.type}", plot)
    return {"pair": [teacher, student], "batch_size": batch_size, "methods": rows}


def report(result: Mapping[str, Any]) -> str:
    """Write the result as Markdown."""
    columns = ["method", "step, ms", "against KD", "peak memory of a step, MB", "extra parameters"]
    rows = (
        [
            name,
            f"{row['step_ms']:.0f}",
            f"{row['ratio_to_kd']:.2f}",
            f"{row['peak_mb']:.0f}",
            f"{row['extra_parameters']:,}",
        ]
        for name, row in result["methods"].items()
    )
    title = heading(result, f"{' -> '.join(result['pair'])}, batch {result['batch_size']}")
    return title + "\n" + table(columns, rows)


def _draw(rows: dict[str, dict[str, float]], title: str, path: str) -> None:
    """Step time against extra parameters, a point for each method, as figures of efficiency in the papers do."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    line = {"arrowstyle": "-", "color": "0.7", "linewidth": 0.5}
    by_time = sorted(rows.items(), key=lambda item: (item[1]["extra_parameters"] > 1, item[1]["ratio_to_kd"]))
    for number, (name, row) in enumerate(by_time):
        place = row["ratio_to_kd"], row["extra_parameters"]
        # Many stand close together at the bottom, so that their names must be spread out.
        up = 4 + 9 * (number % 3) if row["extra_parameters"] > 1 else 8 + 11 * (number % 12)
        axes.scatter(*place, color="#0072B2", s=20, zorder=3)
        axes.annotate(name, place, xytext=(4, up), textcoords="offset points", size=7, arrowprops=line)
    axes.set_yscale("symlog", linthresh=1_000)
    axes.set(xlabel="training step, times that of KD", ylabel="parameters beside the student's", title=title)
    axes.set_ylim(-200, 10 * max(row["extra_parameters"] for row in rows.values()))
    axes.grid(alpha=0.3)
    figure.savefig(path)
