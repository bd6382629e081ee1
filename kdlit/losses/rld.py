r"""Refined logit distillation: Sun et al. 2024, Knowledge Distillation with Refined Logits, equations 4 to 9.

Two parts that the teacher's mistakes cannot turn against the labels. Sample confidence (SCD): the student's probability
of the label follows the teacher's largest probability. Masked correlation (MCD): the divergence over the classes that
the teacher ranks below the label. Where the teacher is always right both are DKD's (section 4.3).

The paper has one temperature; the released code has a second one for SCD that is 1 unless a flag ties it to the first.
The paper is followed unless ``confidence_temperature`` is given. As in :mod:`kdlit.losses.dkd`, SCD is computed from
binary logits: the released code takes the logarithm of a sum of probabilities, which is -inf once the label leads by
about 103 T.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kdlit.losses.base import DistillationLoss
from kdlit.losses.functional import (
    batch_mean,
    binary_kl_divergence,
    check_logits,
    check_not_negative,
    check_one_of,
    check_positive,
    check_target,
    full_precision,
    kl_divergence,
    masked_log_softmax,
    target_gap,
    target_mask,
)
from kdlit.types import Batch, ModelOutput

MASKS = ("ge", "g")


@full_precision
def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float | Tensor,
    confidence_temperature: float | Tensor | None = None,
    mask: Literal["ge", "g"] = "ge",
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Weighted sum of sample-confidence and masked-correlation distillation (equation 10 without its label term).

    .. math:: L = \frac{1}{B} \sum_b \alpha A^2 KL(b^t \| b^s) + \beta T^2 KL(\tilde p^t \| \tilde p^s)

    with :math:`b^t = (\max p^t, 1 - \max p^t)` and :math:`b^s = (p^s_y, 1 - p^s_y)` at temperature :math:`A`, and
    :math:`\tilde p` the softmax at :math:`T` over the classes that are not masked.

    Args:
        student_logits: shape ``(B, C)``; the only logits that receive a gradient.
        teacher_logits: shape ``(B, C)``; the first of several equal largest logits counts as the prediction.
        target: labels, integers of shape ``(B,)``.
        alpha: weight of SCD, >= 0; 0 leaves MCD alone.
        beta: weight of MCD, >= 0; 0 leaves SCD alone.
        temperature: :math:`T > 0`; a tensor of one element, or of shape ``(B, 1)``, receives a gradient.
        confidence_temperature: :math:`A > 0`; None for the same as ``temperature``.
        mask: which classes MCD leaves out: ``"ge"`` those whose teacher logit is at least that of the label (equation
            7), ``"g"`` those whose teacher logit is above it, so that the label stays in (section 4.2 and table 1).
        sample_weight: factor of each sample's term, >= 0, shape ``(B,)``; None for 1.

    Returns:
        Scalar, at least 0. A sample all of whose classes are masked adds nothing to MCD, and no gradient.

    Raises:
        ValueError: If shapes do not fit, a label is out of range, a logit is not finite, a weight is negative, a
            temperature is not positive or the mask is unknown.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 1.0]]).log()
        >>> rld_loss(student, teacher, torch.tensor([0]), alpha=1.0, beta=8.0, temperature=1.0)  # as DKD
        tensor(0.0589)
    """
    check_logits(student_logits, teacher_logits)
    check_target(target, student_logits)
    check_not_negative("alpha", alpha)
    check_not_negative("beta", beta)
    check_positive("temperature", temperature)
    if confidence_temperature is None:
        confidence_temperature = temperature
    check_positive("confidence_temperature", confidence_temperature)
    check_one_of("mask", mask, MASKS)
    teacher_logits, is_target = teacher_logits.detach(), target_mask(target, student_logits)
    is_predicted = target_mask(teacher_logits.argmax(dim=-1), student_logits)
    is_masked = _mask(teacher_logits, target, mask)

    scd = binary_kl_divergence(
        target_gap(teacher_logits / confidence_temperature, is_predicted),
        target_gap(student_logits / confidence_temperature, is_target),
    )
    mcd = kl_divergence(
        masked_log_softmax(teacher_logits / temperature, is_masked),
        masked_log_softmax(student_logits / temperature, is_masked),
    )
    return alpha * batch_mean(scd, temperature=confidence_temperature, sample_weight=sample_weight) + beta * batch_mean(
        mcd, temperature=temperature, sample_weight=sample_weight
    )


def _mask(teacher_logits: Tensor, target: Tensor, mask: str) -> Tensor:
    label_logit = teacher_logits.gather(1, target.long().unsqueeze(1))
    return teacher_logits >= label_logit if mask == "ge" else teacher_logits > label_logit


class RLDLoss(DistillationLoss):
    """Refined logit distillation (Sun et al. 2024): see :func:`rld_loss`.

    Args:
        alpha: weight of sample confidence, >= 0; 1 in the paper.
        beta: weight of masked correlation, >= 0; the paper tunes it among 2, 4, 8, 16 on CIFAR-100 and 0.5, 1, 2, 3 on
            ImageNet.
        temperature: softens both distributions, > 0; tuned among 2, 3, 4, 5 on CIFAR-100 and 1, 2 on ImageNet.
        confidence_temperature: temperature of sample confidence, > 0; None for the same as ``temperature``.
        mask: ``"ge"``, or ``"g"`` to keep the label among the classes of masked correlation.

    Raises:
        ValueError: If a weight is negative, a temperature is not positive or the mask is unknown.
    """

    reads_sample_weight = True

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        confidence_temperature: float | None = None,
        mask: Literal["ge", "g"] = "ge",
    ) -> None:
        super().__init__()
        self.alpha = check_not_negative("alpha", alpha)
        self.beta = check_not_negative("beta", beta)
        self.temperature = check_positive("temperature", temperature)
        if confidence_temperature is not None:
            check_positive("confidence_temperature", confidence_temperature)
        self.confidence_temperature = confidence_temperature
        self.mask: Literal["ge", "g"] = mask
        check_one_of("mask", mask, MASKS)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        return rld_loss(
            student.logits,
            teacher.logits,
            batch["target"],
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            confidence_temperature=self.confidence_temperature,
            mask=self.mask,
            sample_weight=batch.get("sample_weight"),
        )
