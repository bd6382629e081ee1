"""What was logged in each epoch: entropy of the student (ttm figure 1), divergence from its teacher (ttm figure 2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from kdlit.figures.style import (
    TEACHER_COLOUR,
    CaptionedFigure,
    add_legend,
    line_style,
    number,
    quoted,
    shorten,
    styled,
    whole_numbers,
    with_legend,
)
from kdlit.metrics import WATCHED_TEMPERATURE
from kdlit.runs import find_runs

Curves = Mapping[str, Mapping[int, float]]


def logged_curves(folders: Iterable[str | Path], name: str) -> dict[str, dict[int, float]]:
    """Values of each epoch, by the name of the run; runs that did not log them are left out.

    Args:
        folders: of runs, or that hold runs.
        name: what was logged, such as ``val/entropy``.

    Raises:
        FileNotFoundError: If a folder is not there or holds no run.
        ValueError: If none of the runs has logged it.
    """
    runs = find_runs(folders)
    found = {run.name: values for run in runs if (values := run.series().get(name))}
    if not found:
        raise ValueError(
            f"none of the {len(runs)} runs ({', '.join(run.name for run in runs[:3])}{', ...' * (len(runs) > 3)}) has "
            f"logged {name}; train again with this version of kdlit, or choose another stage"
        )
    return found


@styled
def _draw(title: str, ylabel: str, curves: Curves, reference: float | None, what: str) -> CaptionedFigure:
    if not curves or not all(curves.values()):
        empty = [label for label, values in curves.items() if not values]
        raise ValueError(f"curves need a value at least, got none for {', '.join(empty) or 'any label'}")
    last = {label: values[max(values)] for label, values in curves.items()}
    names = [f"{shorten(label)}: {number(value)}" for label, value in last.items()]
    names += [] if reference is None else [f"teacher: {number(reference)}"]
    figure, axis, legend = with_legend(title, names)
    for position, values in enumerate(curves.values()):
        epochs = sorted(values)
        marker = "o" if len(epochs) == 1 else ""
        axis.plot(
            [epoch + 1 for epoch in epochs],
            [values[epoch] for epoch in epochs],
            marker=marker,
            linewidth=1.5,
            **line_style(position),
        )
    if reference is not None:
        axis.axhline(reference, color=TEACHER_COLOUR, linestyle=(0, (5, 3)), linewidth=1)
    axis.set(xlabel="epochs trained", ylabel=ylabel)
    axis.xaxis.set_major_locator(whole_numbers(5))
    add_legend(axis, legend, names)
    figure.set_caption(what, f"Last epoch: {quoted({label: number(value) for label, value in last.items()})}.")
    return figure


def entropy_curves(curves: Curves, teacher: float | None = None) -> CaptionedFigure:
    """Mean entropy of the students' predictions over the epochs.

    Args:
        curves: entropy in nats by epoch from 0, by label.
        teacher: entropy of the teacher in nats, drawn as a level line.

    Raises:
        ValueError: If there is no curve or an empty one.
    """
    return _draw(
        "Entropy of the student's predictions",
        "mean entropy (nats)",
        curves,
        teacher,
        "Mean Shannon entropy of the outputs at temperature 1 after each epoch. The higher, the less sure is the "
        "student; in the paper TTM and WTTM stay above KD.",
    )


def divergence_curves(curves: Curves, temperature: float = WATCHED_TEMPERATURE) -> CaptionedFigure:
    """Mean divergence of the students from the softened teacher over the epochs.

    Args:
        curves: divergence in nats by epoch from 0, by label.
        temperature: that of the teacher, for the caption; by default that of ``kl_softened`` as it is logged.

    Raises:
        ValueError: If there is no curve or an empty one.
    """
    return _draw(
        "Divergence of the student from its softened teacher",
        "mean divergence (nats)",
        curves,
        None,
        f"Mean KL divergence of the student at temperature 1 from its teacher at temperature {temperature:g}, after "
        "each epoch. Lower is closer; in the paper WTTM stays below TTM.",
    )


def entropy_curves_of_runs(folders: Iterable[str | Path], stage: str = "val") -> CaptionedFigure:
    """The same from run folders, which must have logged ``STAGE/entropy``.

    Args:
        folders: of runs, or that hold runs.
        stage: ``train`` or ``val``.

    Raises:
        FileNotFoundError: If a folder is not there or holds no run.
        ValueError: If no run has logged it.
    """
    folders = list(folders)
    teachers = {
        round(values[max(values)], 6)
        for run in find_runs(folders)
        if (values := run.series().get(f"{stage}/teacher_entropy"))
    }
    # Of several teachers, or of augmented training pictures, there is no one level to draw.
    return entropy_curves(
        logged_curves(folders, f"{stage}/entropy"), teachers.pop() if len(teachers) == 1 and stage != "train" else None
    )


def divergence_curves_of_runs(folders: Iterable[str | Path], stage: str = "val") -> CaptionedFigure:
    """The same from run folders, which must have logged ``STAGE/kl_softened``.

    Args:
        folders: of runs, or that hold runs.
        stage: ``train`` or ``val``.

    Raises:
        FileNotFoundError: If a folder is not there or holds no run.
        ValueError: If no run has logged it.
    """
    return divergence_curves(logged_curves(folders, f"{stage}/kl_softened"))
