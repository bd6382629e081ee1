"""Correlation of samples and of classes in the predictions, student against teacher (mlkd figure 3).

The paper states neither temperature nor distance; here the temperature is an option, 1 by default, and the distance is
the absolute difference.
"""

from __future__ import annotations

from torch import Tensor

from kdlit.figures.outputs import Outputs, of_networks
from kdlit.figures.style import CaptionedFigure, heat_maps, number, quoted, styled
from kdlit.losses.functional import check_logits, check_positive


def correlation_differences(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    r"""Absolute difference of :math:`P P^T` (samples) and of :math:`P^T P` (classes), with the diagonals set to 0.

    Args:
        student_logits: shape ``(B, C)``.
        teacher_logits: shape ``(B, C)``.
        temperature: softens both distributions, > 0.

    Returns:
        Float64, shapes ``(B, B)`` and ``(C, C)``.

    Raises:
        ValueError: If shapes differ or the temperature is not positive.
    """
    check_logits(student_logits, teacher_logits)
    check_positive("temperature", temperature)
    p = (student_logits.double() / temperature).softmax(dim=-1)
    q = (teacher_logits.double() / temperature).softmax(dim=-1)
    samples, classes = (p @ p.T - q @ q.T).abs(), (p.T @ p - q.T @ q).abs()
    return samples.fill_diagonal_(0), classes.fill_diagonal_(0)


def _differences(outputs: Outputs, batch: int, temperature: float) -> tuple[Outputs, dict[str, tuple[Tensor, Tensor]]]:
    few = outputs.some(batch)
    few = few.only(few.target.argsort(stable=True))
    teacher = few.teacher.logits
    return few, {name: correlation_differences(one.logits, teacher, temperature) for name, one in few.students.items()}


def _map(title: str, matrices: dict[str, Tensor], axis: str, what: str, note: str) -> CaptionedFigure:
    means = {name: number(float(matrix.mean())) for name, matrix in matrices.items()}
    tops = {name: number(float(matrix.max())) for name, matrix in matrices.items()}
    maps = {name: matrix.numpy() for name, matrix in matrices.items()}
    numbers = {name: f"mean {mean}" for name, mean in means.items()}
    figure, _ = heat_maps(title, maps, numbers, "absolute difference (no unit, root scale)", axis, axis, gamma=0.5)
    figure.set_caption(
        f"{note} Darker means that the student relates {what} as its teacher does; the diagonal is set to 0.",
        f"Mean: {quoted(means)}. Largest: {quoted(tops)}.",
    )
    return figure


@styled
def draw_batch_correlation_map(outputs: Outputs, *, batch: int = 64, temperature: float = 1.0) -> CaptionedFigure:
    """Heat map of the difference of the correlations of samples, P P^T, student against teacher.

    Args:
        outputs: what the networks say.
        batch: how many pictures, evenly over the classes.
        temperature: softens both distributions, > 0.

    Raises:
        ValueError: If a number is out of range.
    """
    few, both = _differences(outputs, batch, temperature)
    return _map(
        "Correlation of pictures, student against teacher",
        {name: samples for name, (samples, _) in both.items()},
        "picture (by class)",
        "pictures",
        f"Difference of P P^T for {len(few)} {few.split} pictures in the order of their classes, P the probabilities "
        f"at temperature {temperature:g}.",
    )


@styled
def draw_class_correlation_map(outputs: Outputs, *, batch: int = 64, temperature: float = 1.0) -> CaptionedFigure:
    """Heat map of the difference of the correlations of classes, P^T P, student against teacher.

    Args:
        outputs: what the networks say.
        batch: how many pictures, evenly over the classes.
        temperature: softens both distributions, > 0.

    Raises:
        ValueError: If a number is out of range.
    """
    few, both = _differences(outputs, batch, temperature)
    return _map(
        "Correlation of classes, student against teacher",
        {name: classes for name, (_, classes) in both.items()},
        "class (number)",
        "classes",
        f"Difference of P^T P for {len(few)} {few.split} pictures, P the probabilities at temperature {temperature:g}.",
    )


batch_correlation_map = of_networks(draw_batch_correlation_map)
class_correlation_map = of_networks(draw_class_correlation_map)
