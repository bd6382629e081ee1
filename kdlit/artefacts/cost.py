"""What networks cost side by side: parameters, bytes, multiply-adds, time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kdlit.artefacts.formats import Predict
from kdlit.benchmark.measure import cpu_name

_FEWEST, _MOST = 5, 200  # rounds of time measurement


@dataclass
class Row:
    """One form of one network.

    Attributes:
        name: ``teacher``, ``student``, ``student_NAME`` of one that learned with others, or the name of a file.
        runtime: what runs it.
        predict: gives logits.
        image: pictures as it takes them, shape ``(N, C, H, W)``.
        megabytes: of its weights, or of the file.
        top1: share of the pictures that it is right about; None where their targets are no classes.
        parameters: how many; None for a file.
        multiply_adds: of one picture: products in convolutions, linear layers and attention; None for a file.
        milliseconds: time of one picture by batch size, the median of all rounds.
    """

    name: str
    runtime: str
    predict: Predict
    image: Tensor
    megabytes: float
    top1: float | None
    parameters: int | None = None
    multiply_adds: int | None = None
    milliseconds: dict[int, float] = field(default_factory=dict)


def megabytes(network: nn.Module) -> float:
    """What its weights and buffers take, in millions of bytes."""
    tensors: list[Tensor] = list(network.state_dict().values())
    return sum(value.numel() * value.element_size() for value in tensors) / 1e6


def measure_times(rows: Sequence[Row], batch_sizes: Sequence[int], seconds: float) -> dict[int, int]:
    """Fill in ``milliseconds`` of all rows, whose runs take turns so that a busy machine is busy for all of them.

    Args:
        rows: what to measure.
        batch_sizes: pictures at a time; repeated where there are fewer.
        seconds: how long to go on, for each batch size.

    Returns:
        How many rounds there were by batch size.
    """
    rounds = {}
    for size in batch_sizes:
        batches = [row.image[torch.arange(size) % len(row.image)] for row in rows]
        took: list[list[float]] = [[] for _ in rows]
        with torch.no_grad():
            for row, batch in zip(rows, batches, strict=True):
                for _ in range(2):
                    row.predict(batch)
            begin = time.perf_counter()
            while len(took[0]) < _FEWEST or (len(took[0]) < _MOST and time.perf_counter() - begin < seconds):
                for row, batch, times in zip(rows, batches, took, strict=True):
                    start = time.perf_counter()
                    row.predict(batch)
                    times.append(time.perf_counter() - start)
        for row, times in zip(rows, took, strict=True):
            row.milliseconds[size] = 1000 * statistics.median(times) / size
        rounds[size] = len(took[0])
    return rounds


def machine() -> dict[str, str | int]:
    """What the times were measured on."""
    return {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def print_comparison(rows: Sequence[Row], rounds: Mapping[int, int], split: str, pictures: int) -> None:
    """Print all rows as a table, with the ratio of teacher and student if there is a teacher.

    Args:
        rows: what was measured.
        rounds: of the times, by batch size.
        split: where the pictures for the accuracy are from.
        pictures: how many these are.
    """
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("", no_wrap=True)
    table.add_column("Run by", no_wrap=True)
    for title in ("Parameters", "Multiply-adds", "MB", *(f"ms, batch {size}" for size in rounds), "Top-1 %"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            row.runtime,
            *("" if count is None else f"{count:,}" for count in (row.parameters, row.multiply_adds)),
            *map(_short, (row.megabytes, *(row.milliseconds[size] for size in rounds))),
            "-" if row.top1 is None else f"{100 * row.top1:.2f}",
        )
        if row.name == "student" and (ratio := ratios(rows)):
            table.add_row("teacher / student", "", *map(_short, ratio.values()), "")
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    where = machine()
    repeats = " and ".join(map(str, rounds.values()))
    print(
        f"Times: of one picture, median of {repeats} runs by turns, {where['cpu']}, {where['threads']} thread"
        f"{'s' * (where['threads'] != 1)}, torch {where['torch']}. Top-1: {about_top1(rows, split, pictures)}."
    )


def about_top1(rows: Sequence[Row], split: str, pictures: int) -> str:
    """What the accuracy is of, or why there is none.

    Args:
        rows: what was measured.
        split: where the pictures are from.
        pictures: how many.
    """
    if all(row.top1 is None for row in rows):
        return f"left out, as not every {split} picture has the index of one of several logits as its target"
    return f"of {pictures} {split} pictures"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """How many times the student's cost the teacher's is, by kind of cost; empty if there is no teacher."""
    named = {row.name: row for row in rows}
    if "teacher" not in named:
        return {}
    teacher, student = named["teacher"], named["student"]
    pairs = {
        "parameters": (teacher.parameters, student.parameters),
        "multiply_adds": (teacher.multiply_adds, student.multiply_adds),
        "megabytes": (teacher.megabytes, student.megabytes),
    }
    pairs |= {
        f"milliseconds, batch {size}": (one, student.milliseconds[size]) for size, one in teacher.milliseconds.items()
    }
    return {name: (one or 0) / (other or 1) for name, (one, other) in pairs.items()}
