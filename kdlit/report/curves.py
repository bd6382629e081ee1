"""Curves of everything that runs have logged, in groups; several runs on top of each other."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from kdlit.report.svg import MUTED, SERIES, as_html, drawing, new_figure

Series = Mapping[str, Mapping[int, float]]  # logged name -> {epoch from 0: value}

_DASHES = ((), (1.5, 1.5), (5, 2), (5, 1.5, 1, 1.5), (8, 3), (2, 4))
_STUDENT, _STUDENT_TRAIN, _TEACHER, _TEACHER_TRAIN = (0, 0), (0, 1), (1, 2), (1, 3)  # colour, dashes
_FEW = 25  # points that are marked one by one
_SHARES = ("data", "teacher", "student", "losses", "update")


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: under which it is logged.
        label: what it is, for the legend.
        look: numbers of colour and dashes, where one run is shown.
    """

    name: str
    label: str
    look: tuple[int, int]


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes.

    Attributes:
        title: what they are.
        lines: those that may be there.
        unit: of the values; ``%`` stands for fractions of 1.
        note: how to read it.
        apart: whether several runs get one panel for each line.
    """

    title: str
    lines: Sequence[Line]
    unit: str = ""
    note: str = ""
    apart: bool = False


@dataclass(frozen=True)
class Key:
    """One entry of a legend.

    Attributes:
        label: of the curve.
        colour: number of its colour, from 1.
        dashes: of its stroke, for SVG.
        last: its last value, written out.
        is_area: whether it stands for an area.
    """

    label: str
    colour: int
    dashes: str = ""
    last: str = ""
    is_area: bool = False


@dataclass
class Drawn:
    """A panel as the page shows it."""

    title: str
    note: str
    figure: Markup
    keys: list[Key] = field(default_factory=list)
    styles: list[Key] = field(default_factory=list)


@dataclass
class Group:
    """Panels under one heading."""

    title: str
    panels: list[Drawn]


def groups(runs: Sequence[tuple[str, Series]]) -> list[Group]:
    """Draw all curves.

    Args:
        runs: their names and what they logged.
    """
    names = list(dict.fromkeys(name for _, series in runs for name in series if not name.startswith("test/")))
    drawn: list[Group] = []
    seen: set[str] = set()
    for title, panels in _plan(names):
        shown: list[Drawn] = []
        for panel in panels:
            lines = [line for line in panel.lines if line.name in names]
            seen.update(line.name for line in lines)
            parts = [[line] for line in lines] if panel.apart and len(runs) > 1 else [lines] if lines else []
            for part in parts:
                heading = f"{panel.title}: {part[0].label}" if panel.apart and len(runs) > 1 else panel.title
                one = Panel(heading, part, panel.unit, panel.note)
                shown.append(_draw(one, runs, f"c{len(drawn)}-{len(shown)}"))
        if title == "Speed and memory":
            seen.update(f"train/share/{name}" for name in _SHARES)
            for name, series in runs:
                if (areas := _shares(name if len(runs) > 1 else "", series, f"share{len(shown)}")) is not None:
                    shown.append(areas)
        if shown:
            drawn.append(Group(title, shown))
    if others := [name for name in names if name not in seen]:
        alone = [Panel(name, [Line(name, "this run", _STUDENT)]) for name in others]
        group = [_draw(panel, runs, f"other{number}") for number, panel in enumerate(alone)]
        drawn.append(Group("Everything else that was logged", group))
    return drawn


def _plan(names: Sequence[str]) -> list[tuple[str, list[Panel]]]:
    """Which panels stand under which heading."""
    peers = [match[1] for name in names if (match := re.fullmatch(r"val/([^/]+)/top1", name))]
    students = [
        Line(f"{stage}/{peer}/top1", f"student {peer}, {_PARTS[stage]}", (2 + i, dash))
        for i, peer in enumerate(peers)
        for stage, dash in (("val", 0), ("train", 1))
    ]
    alone = [Line("val/plain_top1", "same student trained alone, validation", (2, 4))]
    return [
        (
            "Losses",
            [
                Panel("Objective", [Line("train/loss", "sum of weighted terms", _STUDENT)]),
                Panel("Terms as they are", _below(names, "train/loss/"), apart=True, note="Before weight and warm-up."),
                Panel(
                    "Terms as they count",
                    _below(names, "train/weighted/"),
                    apart=True,
                    note="Weight and warm-up times the term.",
                ),
                Panel("Weights", _below(names, "train/weight/"), apart=True),
                Panel("Warm-up factors", _below(names, "train/warmup/"), apart=True),
                _both("Cross-entropy", "cross_entropy", "nats", "With the true labels, temperature 1."),
            ],
        ),
        (
            "Accuracy",
            [
                _both("Top-1", "top1", "%", more=[*alone, *students]),
                _both("Top-5", "top5", "%"),
            ],
        ),
        (
            "Student and teacher",
            [
                _both("Agreement", "agreement", "%", "Both name the same class."),
                _both(
                    "Agreement among five", "agreement5", "%", "The teacher's class is among the student's first five."
                ),
                *(_mistakes(stage) for stage in _PARTS),
                _both("KL(teacher ‖ student)", "kl", "nats", "Both at temperature 1."),
                _both("KL(softened teacher ‖ student)", "kl_softened", "nats", "Teacher at T, student at 1."),
            ],
        ),
        (
            "Outputs",
            [
                _both("Shannon entropy of the outputs", "entropy", "nats", "Temperature 1."),
                _both("Mean of the logits", "logit_mean"),
                _both("Standard deviation of the logits", "logit_std"),
                _both("Calibration error (ECE)", "ece", "%", "0 where confidence equals accuracy."),
            ],
        ),
        (
            "Gradients",
            [
                Panel("Norms by loss term", _below(names, "train/grad_norm/"), apart=True),
                Panel(
                    "Cosine between terms",
                    _below(names, "train/grad_cosine/"),
                    apart=True,
                    note="Below 0 two terms pull against each other.",
                ),
            ],
        ),
        (
            "Speed and memory",
            [
                Panel("Learning rate", _below(names, "lr-"), apart=True),
                Panel("Training speed", [Line("train/images_per_s", "training", _STUDENT)], "pictures / s"),
                Panel("Peak memory", [Line("train/peak_memory_mb", "training", _STUDENT)], "MB"),
                Panel("Skipped batches", [Line("train/skipped", "not finite", _STUDENT)]),
            ],
        ),
    ]


_PARTS = {"val": "validation", "train": "training"}


def _both(title: str, key: str, unit: str = "", note: str = "", more: Sequence[Line] = ()) -> Panel:
    """Student and teacher on validation and training pictures."""
    looks = {
        f"val/{key}": ("student, validation", _STUDENT),
        f"train/{key}": ("student, training", _STUDENT_TRAIN),
        f"val/teacher_{key}": ("teacher, validation", _TEACHER),
        f"train/teacher_{key}": ("teacher, training", _TEACHER_TRAIN),
    }
    return Panel(title, [*(Line(name, *look) for name, look in looks.items()), *more], unit, note)


def _mistakes(stage: str) -> Panel:
    """What the student does where the teacher is wrong."""
    labels = {
        "": "teacher wrong",
        "_student_right": "student right",
        "_student_same": "student repeats the mistake",
        "_student_other": "student wrong otherwise",
    }
    lines = [Line(f"{stage}/teacher_wrong{end}", label, (i + 1, i)) for i, (end, label) in enumerate(labels.items())]
    note = "Shares of all pictures; the student's three add up to the teacher's mistakes."
    return Panel(f"Where the teacher is wrong, {_PARTS[stage]}", lines, "%", note)


def _below(names: Sequence[str], prefix: str) -> list[Line]:
    found = [name for name in names if name.startswith(prefix)]
    return [
        Line(name, name.removeprefix(prefix), (i % len(SERIES), i // len(SERIES) % len(_DASHES)))
        for i, name in enumerate(found)
    ]


def _draw(panel: Panel, runs: Sequence[tuple[str, Series]], prefix: str) -> Drawn:
    factor = 100 if panel.unit == "%" else 1
    keys, heights = [], []
    with drawing():
        figure = new_figure()
        axes = figure.add_subplot()
        for number, (run, series) in enumerate(runs):
            for place, line in enumerate(panel.lines):
                points = sorted(series.get(line.name, {}).items())
                values = [factor * value if math.isfinite(value) else math.nan for _, value in points]
                if not points:
                    continue
                colour, dash = line.look if len(runs) == 1 else (number, place)
                colour, dashes = colour % len(SERIES), _DASHES[dash % len(_DASHES)]
                known = [value for value in values if not math.isnan(value)]
                heights += known
                axes.plot(
                    [epoch + 1 for epoch, _ in points],
                    values,
                    color=SERIES[colour],
                    linestyle=(0, dashes) if dashes else "-",
                    marker="o" if len(points) <= _FEW else "",
                )
                if len(runs) == 1 or line.name == next(one.name for one in panel.lines if one.name in series):
                    last = f"{written(points[-1][1] * factor)}{' %' if factor == 100 else ''}"
                    gaps = (
                        f", not finite in {len(points) - len(known)} of {len(points)}"
                        if len(known) < len(points)
                        else ""
                    )
                    dashed = " ".join(map(str, dashes)) if len(runs) == 1 else ""
                    keys.append(Key(line.label if len(runs) == 1 else run, colour + 1, dashed, last + gaps))
        _scale(axes, heights, panel.unit)
        label = f"{panel.title} by epoch: " + "; ".join(f"{key.label} {key.last} at the end" for key in keys[:12])
        styles = []
        if len(runs) > 1 and len(panel.lines) > 1:
            styles = [
                Key(line.label, 0, " ".join(map(str, _DASHES[place % len(_DASHES)])))
                for place, line in enumerate(panel.lines)
            ]
        title = f"{panel.title}, {panel.unit}" if panel.unit else panel.title
        return Drawn(title, panel.note, as_html(figure, prefix, label), keys, styles)


def _scale(axes: Any, heights: Sequence[float], unit: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if heights and min(heights) > 0 and max(heights) > 50 * min(heights) and unit != "%":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", size=0)
    elif heights and max(heights) - min(heights) <= 1e-9 * max(1.0, abs(max(heights))):
        middle = heights[0]
        reach = abs(middle) / 2 or 1.0
        axes.set_ylim(middle - reach, middle + reach)
    elif unit == "%":
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(y=0.08)
    if not heights:
        axes.text(0.5, 0.5, "no value is finite", ha="center", transform=axes.transAxes, color=MUTED)


def _shares(run: str, series: Series, prefix: str) -> Drawn | None:
    """Where the time of a step goes, as areas on top of each other."""
    names = [name for name in _SHARES if f"train/share/{name}" in series]
    if not names:
        return None
    epochs = sorted(set.intersection(*({*series[f"train/share/{name}"]} for name in names)))
    heights = [[_finite(series[f"train/share/{name}"][epoch]) for epoch in epochs] for name in names]
    if not epochs:
        return None
    with drawing():
        figure = new_figure()
        axes = figure.add_subplot()
        # an area needs two points
        at = [epoch + 1 for epoch in epochs] if len(epochs) > 1 else [epochs[0] + 0.5, epochs[0] + 1.5]
        heights = [row if len(epochs) > 1 else row * 2 for row in heights]
        colours = [SERIES[i] for i in range(len(names))]
        axes.stackplot(at, [[100 * value for value in row] for row in heights], colors=colours, linewidth=0)
        axes.set_ylim(0, 100)
        axes.margins(x=0)
        _scale(axes, [0, 100], "share")
        keys = [
            Key(name, i + 1, "", f"{100 * row[-1]:.1f} %", is_area=True)
            for i, (name, row) in enumerate(zip(names, heights, strict=True))
        ]
        label = "Shares of the time of a step: " + ", ".join(f"{key.label} {key.last}" for key in keys)
        title = f"Where the time goes, %{f': {run}' if run else ''}"
        return Drawn(title, "Shares of a training step.", as_html(figure, prefix, label), keys)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def written(value: float) -> str:
    """A number with four significant digits."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
