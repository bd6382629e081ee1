"""How time and memory are taken and tables are written: what all measurements share."""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def now(device: torch.device) -> float:
    """Seconds, of which only differences mean something.

    On a GPU they are wall time once all that was asked for is done; on one CPU thread they are CPU time of this
    process, which what else runs on the machine hardly touches; on several they are wall time, as threads that wait
    burn CPU time too.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


class Stopwatch:
    """Adds up where the time goes.

    Attributes:
        seconds: time of each part so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = now(device)

    def lap(self, part: str) -> None:
        """Count the time since the last lap, or the start, to a part."""
        moment = now(self.device)
        self.seconds[part] += moment - self._last
        self._last = moment


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes."""
    start = now(device)
    run()
    return now(device) - start


def interleaved(
    runs: Mapping[str, Callable[[], T]], rounds: int, warmup: int = 2, title: str = ""
) -> dict[str, list[T]]:
    """What each gives, ``rounds`` times, all in turn within a round, every other round backwards.

    Args:
        runs: what to call, by name.
        rounds: calls of each that count, >= 1.
        warmup: rounds before these.
        title: of the progress bar.
    """
    results: dict[str, list[T]] = {name: [] for name in runs}
    for number in track(range(rounds + warmup), title):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            result = runs[name]()
            if number >= warmup:
                results[name].append(result)
    return results


def track(sequence: Sequence[T], title: str) -> Iterator[T]:
    """Go through a sequence with a progress bar on stderr, which draws nothing while something is measured."""
    with Progress(console=Console(stderr=True), auto_refresh=False) as bar:
        yield from bar.track(sequence, description=title)


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times as fast: the median over the rounds of the ratios within each, and the least and the largest."""
    ratios = [one / other for one, other in zip(slow, fast, strict=True)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """How much more memory a call takes at its peak than was taken before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"), default=0)


def machine(device: str, threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    on_gpu = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """What the processor calls itself, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return model[1] if model else platform.processor() or platform.machine()


def heading(result: Mapping[str, Any], text: str) -> str:
    """A line that says what was measured and on what."""
    facts = result["machine"]
    threads = f"{facts['threads']} thread{'s' * (facts['threads'] > 1)}"
    return f"{text}; {facts['device']}, {facts['cpu']} ({facts['instructions']}), {threads}, torch {facts['torch']}\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def add_device(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add ``--device``; by default a GPU if there is one."""
    default = default or ("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", default=default, help=f"where to run, default: {default}")


def add_pair(parser: argparse.ArgumentParser, device: str | None = None) -> None:
    """Add the options of measurements that look at one pair."""
    parser.add_argument("--teacher", default="resnet32x4", help="name of a network in kdlit.models")
    parser.add_argument("--student", default="resnet8x4", help="name of a network in kdlit.models")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures a step, default: 64")
    add_device(parser, device)
