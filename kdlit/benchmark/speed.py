"""What each option of the distillation step is worth: pictures a second, where the time goes, memory, lower bound.

Whole training steps, data included, on random pictures in the shape of CIFAR-100, through kdlit's data module and
DistillationModule. All settings of a pair and a method take turns within each round, on a CPU each in a process of its
own, as some settle what holds for a whole process; ratios are medians over the rounds of the ratios within a round,
with the least and the largest. On one CPU thread times are CPU time, on a GPU wall time.

Of several students on one teacher, times and pictures are those of one student, so that they compare with runs one
after another; memory is that of all.

The lower bound of a step is one forward pass of the teacher and three of the student at the rate of the fastest single
convolution measured here. Below it stand the convolutions of the step alone, one by one, at the speed of each.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

from kdlit import models
from kdlit.benchmark.convolutions import bound_seconds, forward_flops, peak_flops, sum_of_bare
from kdlit.benchmark.measure import (
    Stopwatch,
    add_device,
    heading,
    interleaved,
    peak_bytes,
    ratio,
    table,
    timed,
)
from kdlit.benchmark.training import CLASSES, METHODS, RandomPictures, Training, endless, one_by_one, set_tf32
from kdlit.modules.performance import Performance, chosen
from kdlit.types import Batch

PAIRS = ("resnet32x4:resnet8x4", "resnet56:resnet20", "wrn_40_2:wrn_16_2", "resnet50:mobilenetv2")
USUAL_METHODS = ("KD", "DKD", "MLKD", "CRD", "ReviewKD")
PARTS = ("data", "teacher", "student", "losses", "optimizer")


@dataclass(frozen=True)
class Setting:
    """One way to run the step.

    Attributes:
        performance: options of the module.
        one_by_one: whether pictures come from the usual pipeline, in this process, and not from kdlit's.
        cached: whether the teacher's logits come with the batch.
        students: how many are trained on one teacher.
    """

    performance: Performance
    one_by_one: bool = False
    cached: bool = False
    students: int = 1


_PLAIN, _EXACT, _FAST = chosen("plain"), chosen("exact"), chosen("fast")
BASE = "plain, pictures one by one"
SETTINGS = {
    BASE: Setting(_PLAIN, one_by_one=True),
    "plain": Setting(_PLAIN),
    "plain + channels last": Setting(replace(_PLAIN, channels_last=True)),
    "plain + folded teacher": Setting(replace(_PLAIN, fold_teacher=True)),
    "plain + fused optimizer": Setting(replace(_PLAIN, fused_optimizer=True)),
    "plain + kept memory": Setting(replace(_PLAIN, keep_memory=True)),
    "plain + bf16 teacher": Setting(replace(_PLAIN, teacher_dtype="bfloat16")),
    "plain + bf16 student": Setting(replace(_PLAIN, student_dtype="bfloat16")),
    "plain + tf32": Setting(replace(_PLAIN, tf32=True)),
    "plain + compiled student": Setting(replace(_PLAIN, compile=["student"])),
    "plain + compiled teacher": Setting(replace(_PLAIN, compile=["teacher"])),
    "plain + compiled losses": Setting(replace(_PLAIN, compile=["losses"])),
    "exact": Setting(_EXACT),
    "exact + cache": Setting(_EXACT, cached=True),
    "exact, 4 students": Setting(_EXACT, students=4),
    "fast": Setting(_FAST),
    "fast + cache": Setting(_FAST, cached=True),
    "fast, 4 students": Setting(_FAST, students=4),
    "exact + compiled teacher": Setting(replace(_EXACT, compile=["teacher"])),
    "exact + all compiled": Setting(replace(_EXACT, compile=["student", "teacher", "losses"])),
    "fast + all compiled": Setting(replace(_FAST, compile=["student", "teacher", "losses"])),
}
# What the project promises, as ratios of these settings
GAINS = (
    ("exact", BASE),
    ("exact + compiled teacher", BASE),
    ("exact + all compiled", BASE),
    ("fast", BASE),
    ("exact + cache", "exact"),
    ("fast + cache", BASE),
    ("exact, 4 students", "exact"),
    ("fast, 4 students", "fast"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument(
        "--pairs",
        nargs="+",
        default=[PAIRS[0]],
        metavar="TEACHER:STUDENT",
        help=f"names of networks in kdlit.models, default: {PAIRS[0]}; `all` stands for {', '.join(PAIRS)}",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["DKD"],
        metavar="METHOD",
        help=f"default: DKD; `all` stands for {', '.join(USUAL_METHODS)}; those of `steps` are known",
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        metavar="SETTING",
        help="default: all but those that compile, which takes minutes, and on a CPU tf32; `all`, or any of "
        + ", ".join(f"'{name}'" for name in SETTINGS),
    )
    parser.add_argument("--batch_size", type=int, default=64, help="pictures a step, default: 64")
    parser.add_argument("--num_samples", type=int, default=50_000, help="training pictures, default: 50000")
    parser.add_argument("--rounds", type=int, default=10, help="times that every setting is measured, default: 10")
    parser.add_argument("--steps", type=int, default=20, help="steps of each such time on a GPU, default: 20")
    add_device(parser)


def measure(
    pairs: list[str],
    methods: list[str],
    settings: list[str] | None,
    batch_size: int,
    num_samples: int,
    rounds: int,
    steps: int,
    device: str,
) -> dict[str, Any]:
    """Measure all settings for every pair and method.

    Args:
        pairs: ``TEACHER:STUDENT`` each, or ``all``.
        methods: names in :data:`METHODS`, or ``all``.
        settings: names in :data:`SETTINGS`, or ``all``, or None for the usual ones.
        batch_size: pictures a step.
        num_samples: training pictures.
        rounds: times that every setting is measured.
        steps: steps of each such time on a GPU; on a CPU it is one.
        device: where to run.

    Raises:
        ValueError: If a name is not known.
    """
    place = torch.device(device)
    pairs = list(PAIRS) if pairs == ["all"] else pairs
    methods = list(USUAL_METHODS) if methods == ["all"] else methods
    if settings is None:
        settings = [
            name for name in SETTINGS if "compiled" not in name and (place.type == "cuda" or "tf32" not in name)
        ]
    elif settings == ["all"]:
        settings = list(SETTINGS)
    _check_known("--settings", settings, SETTINGS)
    _check_known("--methods", methods, METHODS)
    networks = [pair.partition(":")[::2] for pair in pairs]
    _check_known("--pairs", [name for pair in networks for name in pair], models.__all__)
    chosen_settings = {name: SETTINGS[name] for name in settings}
    runs = []
    for teacher, student in networks:
        with _apart(place) as ask:
            facts = ask(_facts, teacher, student, batch_size, place)
        for method in methods:
            rows = _measure_one(
                teacher, student, method, chosen_settings, batch_size, num_samples, rounds, steps, place
            )
            views = 2 if any(term.needs_strong_view for term in METHODS[method]().values()) else 1
            for name, row in rows.items():
                row["bound_ms"] = 1e3 * views * _bound(SETTINGS[name], facts, batch_size)
                row["bound_reached"] = row["bound_ms"] / row["step_ms"]
            runs.append({"teacher": teacher, "student": student, "method": method, **facts, "settings": rows})
    return {"batch_size": batch_size, "rounds": rounds, "runs": runs}


def report(result: Mapping[str, Any]) -> str:
    """Write the result as Markdown."""
    return "\n\n".join(_report_one(result, run) for run in result["runs"])


def _check_known(option: str, names: list[str], known: Any) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: there is no {name!r}; known are {', '.join(known)}")


def _facts(teacher: str, student: str, batch_size: int, device: torch.device) -> dict[str, Any]:
    """What the bound follows from, and the bare convolutions."""
    networks = {"teacher": getattr(models, teacher)(), "student": getattr(models, student)()}
    dtypes = ("float32", "bfloat16")
    return {
        "flops": {role: forward_flops(model) for role, model in networks.items()},
        "peak_flops": {
            dtype: peak_flops(batch_size, getattr(torch, dtype), device, *networks.values()) for dtype in dtypes
        },
        "convolutions_ms": {
            dtype: {
                role: 1e3 * sum_of_bare(model, batch_size, getattr(torch, dtype), device, role == "student")
                for role, model in networks.items()
            }
            for dtype in dtypes
        },
    }


def _bound(setting: Setting, facts: Mapping[str, Any], batch_size: int) -> float:
    """Least seconds of a step, for each student."""
    flops = dict(facts["flops"])
    flops["teacher"] *= 0 if setting.cached else 1 / setting.students
    options = setting.performance
    dtypes = {"teacher": options.teacher_dtype, "student": options.student_dtype}
    return bound_seconds(flops, facts["peak_flops"], dtypes, batch_size)


def _measure_one(
    teacher: str,
    student: str,
    method: str,
    settings: Mapping[str, Setting],
    batch_size: int,
    num_samples: int,
    rounds: int,
    steps: int,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    with ExitStack() as stack:
        asks = {}
        for name, setting in settings.items():
            ask = stack.enter_context(_apart(device))
            if ask(_begin, name, teacher, student, method, setting, batch_size, num_samples, steps, device):
                asks[name] = ask
        title = f"{teacher} -> {student}, {method}"
        turns = interleaved({name: partial(ask, _turn, name) for name, ask in asks.items()}, rounds, title=title)
        peaks = {name: ask(_peak_bytes, name) for name, ask in asks.items()}
    rows = {}
    for name, parts in turns.items():
        students = settings[name].students
        seconds = [turn["step"] / students for turn in parts]
        step = statistics.median(seconds)
        rows[name] = {
            "images_per_s": batch_size / step,
            "step_ms": 1e3 * step,
            **{
                f"{part}_ms": 1e3 * statistics.median(turn.get(part, 0.0) / students for turn in parts)
                for part in PARTS
            },
            "peak_mb": peaks[name] / 1e6,
            "rounds_ms": [1e3 * one for one in seconds],
        }
    return rows


@contextmanager
def _apart(device: torch.device) -> Iterator[Callable[..., Any]]:
    """Something that calls functions in a process of its own; on a GPU, in this one."""
    if device.type == "cuda":
        yield lambda function, *args: function(*args)
        return
    with ProcessPoolExecutor(1, get_context("fork")) as process:
        yield lambda function, *args: process.submit(function, *args).result()


_WORKS: dict[str, _Work] = {}  # of the process


def _begin(
    name: str,
    teacher: str,
    student: str,
    method: str,
    setting: Setting,
    batch_size: int,
    num_samples: int,
    steps: int,
    device: torch.device,
) -> bool:
    """Build what a setting needs; return whether it can be."""
    strong_view = any(term.needs_strong_view for term in METHODS[method]().values())
    data = RandomPictures(num_samples, batch_size=batch_size, strong_view=strong_view)
    data.setup("fit")
    if device.type == "cuda":
        data.datasets["train"].to(device)
    training = Training(teacher, student, method, data, device, setting.performance, setting.students)
    if setting.cached and training.needs_teacher_features:
        return False
    loader = one_by_one(data) if setting.one_by_one else data.train_dataloader()
    batches = endless(loader, device)
    if setting.cached:
        batches = _with_cache(batches, data, device)
    _WORKS[name] = _Work(training, batches, steps, setting.performance.tf32, device)
    return True


def _turn(name: str) -> dict[str, float]:
    return _WORKS[name].turn()


def _peak_bytes(name: str) -> int:
    return _WORKS.pop(name).peak_bytes()


def _with_cache(batches: Iterator[Batch], data: RandomPictures, device: torch.device) -> Iterator[Batch]:
    """Batches with the teacher's logits, looked up in a table in half precision."""
    logits = torch.randn(2, data.num_samples, CLASSES, device=device, dtype=torch.float16)
    for batch in batches:
        batch["teacher_logits"] = logits[0, batch["index"]]
        if "image_strong" in batch:
            batch["teacher_logits_strong"] = logits[1, batch["index"]]
        yield batch


@dataclass
class _Work:
    """A training and its pictures."""

    training: Training
    batches: Iterator[Batch]
    steps: int
    tf32: bool | None
    device: torch.device

    def turn(self) -> dict[str, float]:
        """Seconds of a step and of its parts.

        On a GPU the parts come from a step of their own: to wait for each makes the whole slower.
        """
        set_tf32(self.tf32)
        watch = Stopwatch(self.device)
        batch = next(self.batches)
        watch.lap("data")
        self.training.step(batch, watch.lap)
        step = sum(watch.seconds.values())
        if self.device.type == "cuda":
            step = timed(partial(self.training.run, self.batches, self.steps), self.device) / self.steps
        return {**watch.seconds, "step": step}

    def peak_bytes(self) -> int:
        """Of one step without its data."""
        return peak_bytes(partial(self.training.step, next(self.batches)), self.device)


def _report_one(result: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    rows = run["settings"]
    bases = [name for name in (BASE, "plain", "exact") if name in rows]
    columns = ["setting", "images/s", "step, ms", *PARTS, "peak memory, MB", "of the bound", *(f"x {b}" for b in bases)]
    lines = []
    for name, row in rows.items():
        cells = [name, f"{row['images_per_s']:,.0f}", f"{row['step_ms']:.4g}"]
        cells += [f"{row[f'{part}_ms']:.3g}" for part in PARTS]
        cells += [f"{row['peak_mb']:.0f}", f"{row['bound_reached']:.0%}"]
        lines.append([*cells, *(_spread(rows[base], row) for base in bases)])
    gains = [
        f"- {fast} against {slow}: {_spread(rows[slow], rows[fast])}"
        for fast, slow in GAINS
        if fast in rows and slow in rows
    ]
    title = f"{run['teacher']} -> {run['student']}, {run['method']}, batch {result['batch_size']}"
    return "\n".join(
        [
            heading(result, title),
            table(columns, lines),
            "",
            f"Forward pass on one picture: teacher {run['flops']['teacher'] / 1e6:,.0f} MFLOP, student "
            f"{run['flops']['student'] / 1e6:,.0f} MFLOP.",
            *(
                f"Peak of convolutions in {dtype}: {peak / 1e9:,.0f} GFLOP/s. The convolutions of a step alone: "
                f"{sum(run['convolutions_ms'][dtype].values()):.4g} ms ("
                + ", ".join(f"{role} {ms:.4g}" for role, ms in run["convolutions_ms"][dtype].items())
                + ")."
                for dtype, peak in run["peak_flops"].items()
            ),
            "",
            *gains,
        ]
    ).rstrip()


def _spread(slow: Mapping[str, Any], fast: Mapping[str, Any]) -> str:
    gain = ratio(slow["rounds_ms"], fast["rounds_ms"])
    return f"{gain['median']:.2f} ({gain['low']:.2f} to {gain['high']:.2f})"
