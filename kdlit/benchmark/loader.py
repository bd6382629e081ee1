"""How fast training pictures of CIFAR-100's size come, against the usual pipeline of two workers that use Pillow.

Both in turn, several rounds, wall time, medians; pictures are random, as their content does not matter.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from kdlit.benchmark.measure import heading, interleaved, ratio
from kdlit.benchmark.training import RandomPictures, endless, one_by_one
from kdlit.types import Batch

USUAL, OURS = "Pillow, workers", "kdlit, no worker"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--batch_size", type=int, default=64, help="pictures a batch, default: 64")
    parser.add_argument("--num_workers", type=int, default=2, help="of the usual pipeline, default: 2")
    parser.add_argument("--num_samples", type=int, default=50_000, help="training pictures, default: 50000")
    parser.add_argument("--rounds", type=int, default=7, help="times that both are measured, default: 7")
    parser.add_argument("--seconds", type=float, default=3.0, help="that each measurement takes, default: 3")


def measure(batch_size: int, num_workers: int, num_samples: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Count pictures a second.

    Args:
        batch_size: pictures a batch.
        num_workers: of the usual pipeline.
        num_samples: training pictures.
        rounds: times that both are measured.
        seconds: that each measurement takes.
    """
    data = RandomPictures(num_samples, batch_size=batch_size)
    data.setup("fit")
    cpu = torch.device("cpu")
    makers = {USUAL: partial(one_by_one, data, num_workers), OURS: data.train_dataloader}
    runs = {name: partial(lambda make: _rate(endless(make(), cpu), seconds), make) for name, make in makers.items()}
    rates = interleaved(runs, rounds, warmup=0, title="loader")
    return {"num_workers": num_workers, "pictures_per_s": rates, "ratio": ratio(rates[OURS], rates[USUAL])}


def report(result: Mapping[str, Any]) -> str:
    """Write the result as Markdown."""
    lines = [
        f"- {name}: {statistics.median(rates):,.0f} pictures/s" for name, rates in result["pictures_per_s"].items()
    ]
    gain = result["ratio"]
    lines.append(f"- ratio: {gain['median']:.1f} ({gain['low']:.1f} to {gain['high']:.1f})")
    return heading(result, f"{result['num_workers']} workers") + "\n" + "\n".join(lines)


def _rate(batches: Iterator[Batch], seconds: float) -> float:
    """Pictures a second of wall time, which workers share; the first batch, which starts them, does not count."""
    next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += len(next(batches)["target"])
    return count / (time.perf_counter() - start)
