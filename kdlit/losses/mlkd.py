r"""Multi-level logit distillation: Jin, Wang and Lin, CVPR 2023, equations 3 to 9 and algorithm 1.

Predictions at several temperatures are matched at three levels: sample by sample (instance), the similarity of samples
(batch) and the similarity of classes (class). Paper and released code are two different losses:

- :func:`mlkd_loss` is the paper's: no squared temperatures, one view. Equation 4 sums the divergences over the batch
  while equations 6 and 8 divide by B and C; here the divergence is averaged over the batch.
- :func:`mlkd_two_view_loss` is what the released code computes and what the published accuracies come from. Every
  divergence carries :math:`T^2`. Its confidence masks multiply terms that are already averaged, so they act only as the
  shares :math:`f, g` of what they keep. The strong view enters through three divergences; two more that are named after
  it read the weak view; its batch and class terms are computed but not added.
- :func:`mlkd_single_view_loss` is the second without the strong view.

The released weight of 0.9 on everything belongs to :class:`~kdlit.losses.WeightedLoss`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from kdlit.losses.base import DistillationLoss
from kdlit.losses.functional import (
    batch_mean,
    check_logits,
    check_one_of,
    check_positive,
    check_strong_logits,
    full_precision,
    kl_divergence,
)
from kdlit.losses.kd import kd_loss
from kdlit.losses.lskd import standardize_logits
from kdlit.types import Batch, ModelOutput

Level = Literal["instance", "batch", "class"]
LEVELS: tuple[Level, ...] = ("instance", "batch", "class")

# What the released code uses beside its one configurable temperature.
RELEASED_TEMPERATURES = (3.0, 5.0, 2.0, 6.0)


@full_precision
def mlkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperatures: Sequence[float],
    levels: Sequence[Level] = LEVELS,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Sum of the three levels over all temperatures, as in the paper (equation 9).

    .. math:: L = \sum_T \frac{1}{B} \sum_b KL(Q_b \| P_b) + \frac{1}{B} \| P P' - Q Q' \|_F^2
              + \frac{1}{C} \| P' P - Q' Q \|_F^2

    with :math:`P, Q` the probabilities of student and teacher at :math:`T`, shape ``(B, C)``.

    Args:
        student_logits: shape ``(B, C)``; the only logits that receive a gradient.
        teacher_logits: shape ``(B, C)``.
        temperatures: every :math:`T > 0`, at least one.
        levels: which of ``"instance"``, ``"batch"`` and ``"class"`` to add up, at least one.
        sample_weight: factor of each sample's divergence, >= 0, shape ``(B,)``; None for 1. The similarity of samples
            and of classes belongs to no one sample and is not weighted.

    Returns:
        Scalar, at least 0; 0 where both networks give the same probabilities.

    Raises:
        ValueError: If the shapes differ, a logit is not finite, a temperature is not positive or a level is unknown.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]]).log()
        >>> mlkd_loss(student, teacher, temperatures=[1.0], levels=["batch"])  # (1/2 - 5/8)^2
        tensor(0.0156)
    """
    check_logits(student_logits, teacher_logits)
    temperatures = _check_temperatures(temperatures)
    levels = _check_levels(levels)
    terms: dict[Level, Callable[[float], Tensor]] = {
        "instance": lambda t: _divergence(student_logits, teacher_logits, t, sample_weight),
        "batch": lambda t: batch_relation_loss(student_logits, teacher_logits, temperature=t),
        "class": lambda t: class_relation_loss(student_logits, teacher_logits, temperature=t),
    }
    return torch.stack([terms[level](temperature) for temperature in temperatures for level in levels]).sum()


def _divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, sample_weight: Tensor | None
) -> Tensor:
    log_p = (teacher_logits.detach() / temperature).log_softmax(dim=-1)
    log_q = (student_logits / temperature).log_softmax(dim=-1)
    return batch_mean(kl_divergence(log_p, log_q), sample_weight=sample_weight)


@full_precision
def batch_relation_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    r"""Gap between the similarities of samples at one temperature (equations 5 and 6), :math:`\|PP' - QQ'\|_F^2 / B`.

    Args:
        student_logits: shape ``(B, C)``; the only logits that receive a gradient.
        teacher_logits: shape ``(B, C)``.
        temperature: :math:`T > 0`; a tensor of one element, or of shape ``(B, 1)``, receives a gradient.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: If the shapes differ, a logit is not finite or the temperature is not positive.
    """
    p, q = _probabilities(student_logits, teacher_logits, temperature)
    return (p @ p.T - q @ q.T).square().sum() / len(p)


@full_precision
def class_relation_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    r"""Gap between the similarities of classes at one temperature (equations 7 and 8), :math:`\|P'P - Q'Q\|_F^2 / C`.

    Args:
        student_logits: shape ``(B, C)``; the only logits that receive a gradient.
        teacher_logits: shape ``(B, C)``.
        temperature: :math:`T > 0`; a tensor of one element, or of shape ``(B, 1)``, receives a gradient.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: If the shapes differ, a logit is not finite or the temperature is not positive.
    """
    p, q = _probabilities(student_logits, teacher_logits, temperature)
    return (p.T @ p - q.T @ q).square().sum() / p.shape[1]


def _probabilities(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    check_logits(student_logits, teacher_logits)
    check_positive("temperature", temperature)
    p = (student_logits / temperature).softmax(dim=-1)
    q = (teacher_logits.detach() / temperature).softmax(dim=-1)
    return p, q


@full_precision
def mlkd_single_view_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor,
    standardize: bool = False,
    levels: Sequence[Level] = LEVELS,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Sum of the three levels as in the released code, of one view.

    .. math:: L = \sum_{T \in (T_0, 3, 5, 2, 6)} f \, KD_T + f \, batch_T + g \, class_T

    with :math:`KD_T` of :func:`~kdlit.losses.kd_loss`, :math:`T^2` included, :math:`f` the share of samples whose
    largest teacher probability is at most the median of the batch, and :math:`g` the share of classes whose teacher
    probability, summed over the batch, is at most the median of the classes.

    Args:
        student_logits: shape ``(B, C)``; the only logits that receive a gradient.
        teacher_logits: shape ``(B, C)``.
        temperature: :math:`T_0 > 0`; a tensor of one element, or of shape ``(B, 1)``, receives a gradient.
        standardize: whether the divergences, and only they, read logits standardised as in LSKD.
        levels: which of ``"instance"``, ``"batch"`` and ``"class"`` to add up, at least one.
        sample_weight: factor of each sample's divergences, >= 0, shape ``(B,)``; None for 1. The similarity of samples
            and of classes belongs to no one sample and is not weighted.

    Returns:
        Scalar, at least 0; 0 where both networks give the same probabilities.

    Raises:
        ValueError: If the shapes differ, a logit is not finite, the temperature is not positive or a level is unknown.
    """
    return _released(student_logits, teacher_logits, None, temperature, standardize, levels, sample_weight)


@full_precision
def mlkd_two_view_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_logits_strong: Tensor,
    teacher_logits_strong: Tensor,
    *,
    temperature: float | Tensor,
    standardize: bool = False,
    levels: Sequence[Level] = LEVELS,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Sum of the three levels as in the released code, of a weakly and a strongly augmented view.

    That of :func:`mlkd_single_view_loss` for the weak view, and at the instance level also, without :math:`f`,
    :math:`KD_{T_0} + KD_3 + KD_5` of the strong view and :math:`KD_2 + KD_6` of the weak view.

    Args:
        student_logits: of the weak view, shape ``(B, C)``; receives a gradient.
        teacher_logits: of the weak view, shape ``(B, C)``.
        student_logits_strong: of the strong view, shape ``(B, C)``; receives a gradient.
        teacher_logits_strong: of the strong view, shape ``(B, C)``.
        temperature: :math:`T_0 > 0`; a tensor of one element, or of shape ``(B, 1)``, receives a gradient.
        standardize: whether the divergences, and only they, read logits standardised as in LSKD.
        levels: which of ``"instance"``, ``"batch"`` and ``"class"`` to add up, at least one.
        sample_weight: factor of each sample's divergences, of both views, >= 0, shape ``(B,)``; None for 1.

    Returns:
        Scalar, at least 0; 0 where both networks give the same probabilities on both views.

    Raises:
        ValueError: If the shapes differ, a logit is not finite, the temperature is not positive or a level is unknown.
    """
    check_logits(student_logits_strong, teacher_logits_strong)
    strong = (student_logits_strong, teacher_logits_strong)
    return _released(student_logits, teacher_logits, strong, temperature, standardize, levels, sample_weight)


def _released(
    student_logits: Tensor,
    teacher_logits: Tensor,
    strong: tuple[Tensor, Tensor] | None,
    temperature: float | Tensor,
    standardize: bool,
    levels: Sequence[Level],
    sample_weight: Tensor | None,
) -> Tensor:
    check_logits(student_logits, teacher_logits)
    check_positive("temperature", temperature)
    levels = _check_levels(levels)
    pool = (temperature, *RELEASED_TEMPERATURES)
    view = (student_logits, teacher_logits)
    q = teacher_logits.detach().softmax(dim=-1)
    samples, classes = _share_up_to_median(q.amax(dim=-1)), _share_up_to_median(q.sum(dim=0))

    def instance() -> Tensor:
        weak = _divergences(view, pool, standardize, sample_weight)
        if strong is None:
            return samples * weak.sum()
        return samples * weak.sum() + weak[3:].sum() + _divergences(strong, pool[:3], standardize, sample_weight).sum()

    terms: dict[Level, Callable[[], Tensor]] = {
        "instance": instance,
        "batch": lambda: samples * torch.stack([batch_relation_loss(*view, temperature=t) for t in pool]).sum(),
        "class": lambda: classes * torch.stack([class_relation_loss(*view, temperature=t) for t in pool]).sum(),
    }
    return torch.stack([terms[level]() for level in levels]).sum()


def _divergences(
    view: tuple[Tensor, Tensor],
    pool: Sequence[float | Tensor],
    standardize: bool,
    sample_weight: Tensor | None,
) -> Tensor:
    """The KD loss of one view at each temperature."""
    student_logits, teacher_logits = map(standardize_logits, view) if standardize else view
    return torch.stack(
        [kd_loss(student_logits, teacher_logits, temperature=t, sample_weight=sample_weight) for t in pool]
    )


def _share_up_to_median(values: Tensor) -> Tensor:
    ordered = values.sort().values
    median = (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
    return (values <= median).to(values.dtype).mean()


def _check_temperatures(temperatures: Sequence[float]) -> tuple[float, ...]:
    if not temperatures:
        raise ValueError(f"temperatures must hold at least one number, got {temperatures!r}")
    return tuple(check_positive(f"temperatures[{i}]", temperature) for i, temperature in enumerate(temperatures))


def _check_levels(levels: Sequence[Level]) -> tuple[Level, ...]:
    if not levels:
        raise ValueError(f"levels must hold at least one of {', '.join(map(repr, LEVELS))}, got {levels!r}")
    for level in levels:
        check_one_of("levels", level, LEVELS)
    return tuple(levels)


class MLKDLoss(DistillationLoss):
    """Multi-level logit distillation in the paper's form (Jin et al. 2023): see :func:`mlkd_loss`.

    Args:
        temperatures: soften both distributions, all > 0.
        levels: which of ``"instance"``, ``"batch"`` and ``"class"`` to add up; all three in the paper, others in
            table 6.

    Raises:
        ValueError: If there is no temperature, one is not positive or a level is unknown.
    """

    reads_sample_weight = True
    across_batch = True

    def __init__(
        self, temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0), levels: Sequence[Level] = LEVELS
    ) -> None:
        super().__init__()
        self.temperatures = _check_temperatures(temperatures)
        self.levels = _check_levels(levels)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        return mlkd_loss(
            student.logits,
            teacher.logits,
            temperatures=self.temperatures,
            levels=self.levels,
            sample_weight=batch.get("sample_weight"),
        )


class MLKDSingleViewLoss(DistillationLoss):
    """Multi-level logit distillation as released, without a strong view: see :func:`mlkd_single_view_loss`.

    Args:
        temperature: first of the five temperatures, > 0; the others are 3, 5, 2 and 6.
        standardize: whether the divergences, and only they, read logits standardised as in LSKD.
        levels: which of ``"instance"``, ``"batch"`` and ``"class"`` to add up.

    Raises:
        ValueError: If the temperature is not positive or a level is unknown.
    """

    reads_sample_weight = True
    across_batch = True

    def __init__(self, temperature: float = 4.0, standardize: bool = False, levels: Sequence[Level] = LEVELS) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)
        self.standardize = standardize
        self.levels = _check_levels(levels)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        return mlkd_single_view_loss(
            student.logits,
            teacher.logits,
            temperature=self.temperature,
            standardize=self.standardize,
            levels=self.levels,
            sample_weight=batch.get("sample_weight"),
        )


class MLKDTwoViewLoss(DistillationLoss):
    """Multi-level logit distillation as released, with a weak and a strong view: see :func:`mlkd_two_view_loss`.

    Args:
        temperature: first of the five temperatures, > 0; the others are 3, 5, 2 and 6.
        standardize: whether the divergences, and only they, read logits standardised as in LSKD; the recipe of Sun et
            al. 2024 for MLKD, with temperature 2.
        levels: which of ``"instance"``, ``"batch"`` and ``"class"`` to add up.

    Raises:
        ValueError: If the temperature is not positive or a level is unknown; in the first step, if there is no strong
            view.
    """

    needs_strong_view = True
    reads_sample_weight = True
    across_batch = True

    def __init__(self, temperature: float = 4.0, standardize: bool = False, levels: Sequence[Level] = LEVELS) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)
        self.standardize = standardize
        self.levels = _check_levels(levels)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        return mlkd_two_view_loss(
            student.logits,
            teacher.logits,
            *check_strong_logits(student, teacher),
            temperature=self.temperature,
            standardize=self.standardize,
            levels=self.levels,
            sample_weight=batch.get("sample_weight"),
        )
