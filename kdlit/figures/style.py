"""How all figures look: legible on a phone, in colours that everybody can tell apart, with a caption."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

WIDTH = 5.0  # inches: on a screen of 375 px 8 points are then 8 px
TEACHER_COLOUR = "black"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # of Okabe and Ito
DASHES = ("-", "--", ":", "-.")
HEAT = matplotlib.colormaps["viridis"].with_extremes(bad="0.8")  # grey where there is no value

_CAPTION_POINTS = 8
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "figure.titlesize": 11,
    "axes.grid": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), "black"),
    "text.parse_math": False,  # names of classes and students may hold dollar signs
    "text.usetex": False,
}

styled = matplotlib.rc_context(_STYLE)
"""Decorates a function that draws: whatever the user's own settings are, the figures look alike."""


class CaptionedFigure(Figure):
    """A matplotlib figure with a title above and a caption below.

    Args:
        title: what is shown.
        height: in inches, without the caption.

    Attributes:
        caption: what to see in the figure, and its numbers; plain text.
    """

    def __init__(self, title: str, height: float) -> None:
        super().__init__(figsize=(WIDTH, height), layout="constrained")
        self.suptitle(textwrap.fill(title, 52))
        self.caption = ""
        self._written: Text | None = None
        self._height = height

    def set_caption(self, *sentences: str) -> None:
        """Write a caption below the drawing; the figure grows by what it takes."""
        self.caption = " ".join(filter(None, sentences))
        lines = textwrap.wrap(self.caption, 80)
        below = len(lines) * 1.25 * _CAPTION_POINTS / 72 + 0.18
        self._make_room(below)
        self._written = self.text(
            0.1 / WIDTH, 0.06 / (self._height + below), "\n".join(lines), va="bottom", size=_CAPTION_POINTS, color="0.2"
        )
        self._written.set_in_layout(False)

    def without_caption(self) -> CaptionedFigure:
        """Take the caption out of the drawing, for pages that set it themselves; ``caption`` still has it."""
        if self._written is not None:
            self._written.remove()
            self._written = None
            self._make_room(0)
        return self

    def _make_room(self, below: float) -> None:
        whole = self._height + below
        self.set_size_inches(WIDTH, whole)
        engine: Any = self.get_layout_engine()
        engine.set(rect=(0, below / whole, 1, self._height / whole))

    def _repr_png_(self) -> bytes:
        """Show itself in a notebook, which knows the figures of pyplot only."""
        self.savefig(file := io.BytesIO(), format="png", dpi=120)
        return file.getvalue()

    def draw(self, renderer: Any) -> None:
        """Draw; ticks are made only now, and have to look like the rest."""
        with matplotlib.rc_context(_STYLE):
            super().draw(renderer)


def shorten(name: object, length: int = 22) -> str:
    """Leave out the middle of a name that is too long."""
    text = " ".join(str(name).split())
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def panel_title(axes: Axes, name: str, below: str, panels: int) -> None:
    """Head one of several drawings with a name and a line of numbers, smaller where there are many."""
    several = panels > 4
    axes.set_title(f"{shorten(name, 18 if several else 22)}\n{below}", size=7.5 if several else None)


def number(value: float) -> str:
    """Three significant digits; a dash for what is not known."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def quoted(values: Mapping[str, str], most: int = 6) -> str:
    """Join ``name value`` of the first few networks, for a caption."""
    shown = [f"{shorten(name)} {value}" for name, value in list(values.items())[:most]]
    rest = len(values) - len(shown)
    return ", ".join(shown) + (f", and {rest} more" if rest else "")


def line_style(position: int) -> dict[str, Any]:
    """Colour and dashes of a student; no two of 24 are alike."""
    return {"color": COLOURS[position % 6], "linestyle": DASHES[position // 6 % 4]}


def network_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and dashes of each network by name: black for the teacher, the students in turn."""
    students = [name for name in names if name != "teacher"]
    styles = {name: line_style(position) for position, name in enumerate(students)}
    return {"teacher": {"color": TEACHER_COLOUR, "linestyle": "-"}, **styles}


def panels(
    title: str, count: int, height: float | None = None, columns: int | None = None, below: float = 0.0
) -> tuple[CaptionedFigure, list[Axes]]:
    """Make a figure with some drawings side by side.

    Args:
        title: of the figure.
        count: how many drawings.
        height: of each, in inches; by default they are about square. (A fixed aspect would upset the layout.)
        columns: how many side by side; by default what the count asks for.
        below: room for a colour bar, in inches.
    """
    columns = columns or (1 if count == 1 else 2 if count <= 4 else 3)
    rows = math.ceil(count / columns)
    height = height or {1: 4.7, 2: 2.55}.get(columns, 1.9)
    figure = CaptionedFigure(title, 0.4 + rows * height + below)
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def with_legend(title: str, names: Sequence[str], height: float = 2.8) -> tuple[CaptionedFigure, Axes, Axes]:
    """Make a figure of one drawing with room for a legend below it.

    Args:
        title: of the figure.
        names: what the legend will hold.
        height: of the drawing, in inches.

    Returns:
        The figure, the axes to draw into, and those for :func:`add_legend`.
    """
    rows = math.ceil(len(names) / _legend_columns(names))
    legend_height = 0.1 + 0.17 * rows
    figure = CaptionedFigure(title, 0.4 + height + legend_height)
    axes, legend = figure.subplots(2, 1, height_ratios=[height, legend_height])
    legend.set_axis_off()
    return figure, axes, legend


def add_legend(axes: Axes, legend: Axes, names: Sequence[str], handles: Sequence[Any] | None = None) -> None:
    """Name the lines of a drawing below it.

    Args:
        axes: the drawing.
        legend: the axes for the legend.
        names: as given to :func:`with_legend`.
        handles: what they name; by default the lines, in order.
    """
    legend.legend(
        handles or axes.get_lines(),
        names,
        loc="upper center",
        ncols=_legend_columns(names),
        frameon=False,
        borderpad=0,
        labelspacing=0.3,
    )


def _legend_columns(names: Sequence[str]) -> int:
    return 2 if max(map(len, names), default=0) <= 32 else 1


def heat_maps(
    title: str,
    matrices: Mapping[str, Array],
    numbers: Mapping[str, str],
    unit: str,
    xlabel: str,
    ylabel: str,
    gamma: float = 1.0,
) -> tuple[CaptionedFigure, list[Axes]]:
    """Draw matrices side by side on one scale from 0; NaN is drawn in grey.

    Args:
        title: of the figure.
        matrices: by the name of each.
        numbers: what to write under each name.
        unit: what the colours stand for.
        xlabel: of the columns.
        ylabel: of the rows.
        gamma: below 1 spreads the colours of small values.
    """
    figure, axes = panels(title, len(matrices), below=0.65)
    top = max((float(np.nanmax(matrix)) for matrix in matrices.values() if not np.isnan(matrix).all()), default=0.0)
    columns = axes[0].get_subplotspec().get_gridspec().ncols  # type: ignore[union-attr]
    for position, (axis, (name, matrix)) in enumerate(zip(axes, matrices.items(), strict=True)):
        image = axis.imshow(matrix, HEAT, PowerNorm(gamma, 0, top or 1.0), aspect="auto")
        panel_title(axis, name, numbers[name], len(matrices))
        if position % columns == 0:
            axis.set_ylabel(ylabel)
        if position + columns >= len(axes):
            axis.set_xlabel(xlabel)
        axis.xaxis.set_major_locator(whole_numbers())
        axis.yaxis.set_major_locator(whole_numbers())
    bar = figure.colorbar(image, ax=axes, location="bottom", label=unit, aspect=40, shrink=0.8)
    bar.ax.xaxis.set_major_locator(MaxNLocator(6 if gamma == 1 else 4))
    return figure, axes


def whole_numbers(ticks: int = 4) -> MaxNLocator:
    """Places ticks at whole numbers only, about as many as asked for."""
    return MaxNLocator(ticks, integer=True)


def label_points(
    axis: Axes,
    x: Sequence[float],
    y: Sequence[float],
    names: Sequence[str],
    size: tuple[float, float],
    radii: Sequence[float],
    avoid: Sequence[tuple[float, float]] = (),
) -> None:
    """Write names beside points so that none lies over another or over a point, as far as there is room.

    Args:
        axis: the drawing, whose limits are settled by now.
        x: of the points.
        y: of the points.
        names: one a point.
        size: about how wide and high the drawing is, in inches.
        radii: of the points' circles, in points of 1/72 inch.
        avoid: where else to write nothing, such as places on a line.
    """
    width, height = 72 * size[0], 72 * size[1]
    axis.set(xlim=axis.get_xlim(), ylim=axis.get_ylim())
    to_axes = axis.transScale + axis.transLimits
    places = to_axes.transform(np.column_stack([x, y])) * [width, height]
    taken = [(px - r, py - r, px + r, py + r) for (px, py), r in zip(places, np.minimum(radii, 8), strict=True)]
    if len(avoid):
        taken += [(px - 1, py - 1, px + 1, py + 1) for px, py in to_axes.transform(avoid) * [width, height]]
    for (px, py), name, radius in sorted(zip(places, names, radii, strict=True), key=lambda one: -one[0][1]):
        wide, high = 4.7 * len(name) + 2, 9.5
        options = [
            (
                px + d * math.cos(a) + (-wide / 2 + math.copysign(wide / 2, math.cos(a)) * (abs(math.cos(a)) > 0.3)),
                py + d * math.sin(a) - high / 2,
            )
            for d in (radius * 0.7 + 6, 16, 28, 42, 58, 76, 96)
            for a in (0.5, 2.64, 1.57, -0.5, -2.64, -1.57, 0, math.pi)
        ]
        boxes = [(left, low, left + wide, low + high) for left, low in options]
        inside = [box for box in boxes if min(box) >= 0 and box[2] <= width and box[3] <= height]
        free = [box for box in inside if not any(_overlap(box, other) for other in taken)]
        box = (free or inside or boxes)[0]
        taken.append(box)
        axis.annotate(
            name,
            (px / width, py / height),
            ((box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            ha="center",
            va="center",
            size=8,
            arrowprops={"arrowstyle": "-", "color": "0.5", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
        )


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
