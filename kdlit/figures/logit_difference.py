"""How the student's logits differ from the teacher's, by class.

Two figures: class-wise mean logits, which the papers call the difference of correlation matrices (dkd figure 4, lskd
figure 3, second row), and the mean difference of each logit (rld figure 5).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kdlit.figures.outputs import Outputs, of_networks
from kdlit.figures.style import CaptionedFigure, heat_maps, number, quoted, shorten, styled
from kdlit.losses.functional import check_logits, check_positive, check_target
from kdlit.losses.lskd import standardize_logits


def class_mean_logits(logits: Tensor, target: Tensor) -> Tensor:
    """Mean logit vector of the pictures of each class.

    Args:
        logits: shape ``(N, C)``.
        target: labels, int64, shape ``(N,)``.

    Returns:
        Float64, shape ``(C, C)``: row c for true class c; NaN in the rows of classes without pictures.
    """
    check_logits(logits)
    check_target(target, logits)
    classes = logits.shape[1]
    sums = torch.zeros(classes, classes, dtype=torch.float64).index_add_(0, target, logits.double())
    return sums / target.bincount(minlength=classes).unsqueeze(1)


def class_mean_logit_difference(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Absolute difference of the class-wise mean logits of two networks, with the diagonal set to 0.

    Args:
        student_logits: shape ``(N, C)``.
        teacher_logits: shape ``(N, C)``.
        target: labels, int64, shape ``(N,)``.

    Returns:
        Float64, shape ``(C, C)``; NaN in the rows of classes without pictures.

    Raises:
        ValueError: If shapes differ or a label is out of range.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[3.0, 1.0], [0.0, 2.0]]), torch.tensor([[9.0, 0.5], [2.0, 8.0]])
        >>> class_mean_logit_difference(student, teacher, torch.tensor([0, 1])).tolist()
        [[0.0, 0.5], [2.0, 0.0]]
    """
    check_logits(student_logits, teacher_logits)
    difference = (class_mean_logits(student_logits, target) - class_mean_logits(teacher_logits, target)).abs()
    diagonal = torch.eye(len(difference), dtype=torch.bool) & ~difference.isnan()
    return difference.masked_fill(diagonal, 0.0)


def mean_logit_difference(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean over the pictures of the absolute difference of each logit: float64, shape ``(C,)``.

    Args:
        student_logits: shape ``(N, C)``.
        teacher_logits: shape ``(N, C)``.

    Raises:
        ValueError: If shapes differ.
    """
    check_logits(student_logits, teacher_logits)
    return (student_logits.double() - teacher_logits.double()).abs().mean(dim=0)


def _logits(outputs: Outputs, standardize: bool) -> tuple[Tensor, dict[str, Tensor]]:
    def of(logits: Tensor) -> Tensor:
        return standardize_logits(logits) if standardize else logits

    return of(outputs.teacher.logits), {name: of(one.logits) for name, one in outputs.students.items()}


@styled
def draw_class_difference_map(outputs: Outputs, *, scale: float = 1.0, standardize: bool = False) -> CaptionedFigure:
    """Heat map of the difference of the class-wise mean logits, student against teacher.

    Args:
        outputs: what the networks say.
        scale: what differences are divided by; 3 in the DKD notebook, 1 in the LSKD notebook.
        standardize: whether to bring each network's logits to mean 0 and standard deviation 1 (1/(C-1)) first.

    Raises:
        ValueError: If the scale is not positive.
    """
    check_positive("scale", scale)
    teacher, students = _logits(outputs, standardize)
    matrices = {
        name: class_mean_logit_difference(logits, teacher, outputs.target).numpy() / scale
        for name, logits in students.items()
    }
    means = {name: number(float(np.nanmean(matrix))) for name, matrix in matrices.items()}
    tops = {name: number(float(np.nanmax(matrix))) for name, matrix in matrices.items()}
    numbers = {name: f"mean {means[name]}, max {tops[name]}" for name in matrices}
    kind = "standardised logits" if standardize else "logits"
    unit = "absolute difference" + ("" if scale == 1 else f" / {scale:g}") + " (logit, no unit)"
    figure, _ = heat_maps(
        f"Class-wise mean {kind}, student against teacher",
        matrices,
        numbers,
        unit,
        "class number, logit",
        "class number, label",
    )
    missing = len(outputs.class_names) - len(torch.unique(outputs.target))
    figure.set_caption(
        f"{outputs.description}. Row c holds the mean logits of the pictures of class c, teacher minus student, "
        "without sign; the diagonal is set to 0 and counts in the mean. Darker means closer to the teacher.",
        f"Mean: {quoted(means)}. Largest: {quoted(tops)}.",
        f"Grey: {missing} {'class' if missing == 1 else 'classes'} without a picture." if missing else "",
    )
    return figure


@styled
def draw_class_difference_grid(outputs: Outputs, *, standardize: bool = False) -> CaptionedFigure:
    """Grid of the mean absolute difference of each class's logit, student against teacher.

    Args:
        outputs: what the networks say.
        standardize: whether to bring each network's logits to mean 0 and standard deviation 1 (1/(C-1)) first.
    """
    teacher, students = _logits(outputs, standardize)
    values = {name: mean_logit_difference(logits, teacher) for name, logits in students.items()}
    side = math.ceil(math.sqrt(len(outputs.class_names)))
    rows = math.ceil(len(outputs.class_names) / side)
    grids = {name: np.full(rows * side, np.nan) for name in values}
    for name, grid in grids.items():
        grid[: len(values[name])] = values[name].numpy()
    means = {name: number(float(value.mean())) for name, value in values.items()}
    numbers = {name: f"mean {mean}" for name, mean in means.items()}
    kind = "standardised logits" if standardize else "logits"
    figure, axes = heat_maps(
        f"Difference of the {kind} of each class, student against teacher",
        {name: grid.reshape(rows, side) for name, grid in grids.items()},
        numbers,
        "mean absolute difference (logit, no unit)",
        "+ column",
        "class: row",
    )
    starts = range(0, rows, math.ceil(rows / 10))
    for axis in axes:
        axis.set_yticks(list(starts), [str(side * start) for start in starts])
    worst = {
        name: f"{shorten(outputs.class_names[int(value.argmax())])} ({number(float(value.max()))})"
        for name, value in values.items()
    }
    figure.set_caption(
        f"{outputs.description}. Each cell is a class: how far the student's logit of that class is from the teacher's "
        "in the mean over all pictures. A student may differ more and yet be more accurate.",
        f"Mean over the classes: {quoted(means)}. Largest for class: {quoted(worst)}.",
    )
    return figure


class_difference_map = of_networks(draw_class_difference_map)
class_difference_grid = of_networks(draw_class_difference_grid)
