"""Accuracy of one student under teachers of different size (dkd tables 11 and 12, lskd table 5, ttm table 7)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kdlit.figures.style import (
    CaptionedFigure,
    add_legend,
    line_style,
    quoted,
    shorten,
    styled,
    with_legend,
)


@styled
def accuracy_against_teacher(
    teachers: Mapping[str, float], students: Mapping[str, Mapping[str, float]]
) -> CaptionedFigure:
    """Accuracy of the student under each teacher, a line for each method; teachers in the order of their own accuracy.

    Args:
        teachers: own accuracy of each teacher, a fraction of 1.
        students: of each method, accuracy of the student by teacher, fractions of 1; some may be missing.

    Raises:
        ValueError: If there is no method, a student has a teacher whose accuracy is not given, or an accuracy is out of
            range.
    """
    if not students or not any(students.values()):
        raise ValueError("there is no student to draw; give its accuracy under at least one teacher")
    for method, by_teacher in {"teachers": teachers, **students}.items():
        if unknown := by_teacher.keys() - teachers.keys():
            raise ValueError(f"{method} has students of {', '.join(sorted(unknown))}, whose own accuracy is not given")
        for name, value in by_teacher.items():
            if not 0 <= value <= 1:
                raise ValueError(f"accuracy must be a fraction in [0, 1], got {value!r} for {name} in {method}")
    order = sorted(teachers, key=lambda name: teachers[name])
    names = [shorten(method) for method in students]
    figure, axis, legend = with_legend("Accuracy of the student under different teachers", names)
    for position, by_teacher in enumerate(students.values()):
        values = [100 * by_teacher.get(name, math.nan) for name in order]
        axis.plot(range(len(order)), values, marker="o", markersize=4, **line_style(position))
    axis.set_xticks(range(len(order)), [f"{shorten(name, 14)}\n{100 * teachers[name]:.1f} %" for name in order])
    if len(order) > 5:
        axis.tick_params(axis="x", labelrotation=40)
    axis.set(xlabel="teacher and its own accuracy (top-1)", ylabel="accuracy of the student (top-1, %)")
    axis.grid(axis="y", alpha=0.25)
    add_legend(axis, legend, names)
    gains = {
        method: f"{100 * (last[-1] - last[0]):+.2f}"
        for method, by_teacher in students.items()
        if len(last := [by_teacher[name] for name in order if name in by_teacher]) > 1
    }
    rises = [
        method
        for method, by_teacher in students.items()
        if (line := [by_teacher[name] for name in order if name in by_teacher]) == sorted(line) and len(line) > 1
    ]
    figure.set_caption(
        "Teachers from left to right by their own accuracy. A better teacher need not make a better student:",
        f"{', '.join(map(shorten, rises)) or 'no method'} never falls from one teacher to the next.",
        f"From the first to the last teacher, points: {quoted(gains)}." if gains else "",
    )
    return figure
