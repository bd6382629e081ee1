r"""Review and correction (RC), its correction part: Cao et al. 2023, IEEE Signal Processing Letters 30.

Beside KD, the student follows its own prediction with the label's logit raised (the method called augment in section 2
of the RLD paper). Followed is the re-implementation by the authors of that paper, Sun et al. 2024.
"""

from __future__ import annotations

from torch import Tensor

from kdlit.losses.base import DistillationLoss
from kdlit.losses.functional import (
    check_logits,
    check_not_negative,
    check_positive,
    check_target,
    full_precision,
    target_mask,
)
from kdlit.losses.kd import kd_loss
from kdlit.types import Batch, ModelOutput


@full_precision
def rc_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor,
    kd_weight: float,
    rc_weight: float,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Weighted sum of KD and of the divergence from the student's own, corrected prediction.

    .. math:: L = w_{kd} KD_T(z, v) + w_{rc} KD_T(z, u), \quad u_i = z_i + [i = y] \max_j z_j

    with :math:`u` a constant: no gradient flows through it.

    Args:
        student_logits: :math:`z`, shape ``(B, C)``; the only logits that receive a gradient.
        teacher_logits: :math:`v`, shape ``(B, C)``.
        target: labels, integers of shape ``(B,)``.
        temperature: :math:`T > 0`; a tensor of one element, or of shape ``(B, 1)``, receives a gradient.
        kd_weight: :math:`w_{kd} \geq 0`.
        rc_weight: :math:`w_{rc} \geq 0`.
        sample_weight: factor of each sample's terms, >= 0, shape ``(B,)``; None for 1.

    Returns:
        Scalar, at least 0. A constant added to the student's logits changes it, since the correction is not relative.

    Raises:
        ValueError: If shapes do not fit, a label is out of range, a logit is not finite, a weight is negative or the
            temperature is not positive.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 3)  # nothing to follow and nothing to add
        >>> rc_loss(logits, logits, torch.tensor([0]), temperature=4.0, kd_weight=1.0, rc_weight=0.1)
        tensor(0.)
    """
    check_logits(student_logits, teacher_logits)
    check_target(target, student_logits)
    check_not_negative("kd_weight", kd_weight)
    check_not_negative("rc_weight", rc_weight)
    own = student_logits.detach()
    corrected = own + target_mask(target, own) * own.amax(dim=-1, keepdim=True)
    return kd_weight * kd_loss(
        student_logits, teacher_logits, temperature=temperature, sample_weight=sample_weight
    ) + rc_weight * kd_loss(student_logits, corrected, temperature=temperature, sample_weight=sample_weight)


class RCLoss(DistillationLoss):
    """KD with a correction of the student's own prediction (Cao et al. 2023): see :func:`rc_loss`.

    Args:
        temperature: softens all distributions, > 0.
        kd_weight: weight of KD, >= 0.
        rc_weight: weight of the correction, >= 0.

    Raises:
        ValueError: If a weight is negative or the temperature is not positive.
    """

    reads_sample_weight = True

    def __init__(self, temperature: float = 4.0, kd_weight: float = 1.0, rc_weight: float = 0.1) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)
        self.kd_weight = check_not_negative("kd_weight", kd_weight)
        self.rc_weight = check_not_negative("rc_weight", rc_weight)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        return rc_loss(
            student.logits,
            teacher.logits,
            batch["target"],
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            rc_weight=self.rc_weight,
            sample_weight=batch.get("sample_weight"),
        )
