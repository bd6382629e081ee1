r"""Decoupled knowledge distillation: Zhao, Cui, Song, Qiu and Liang, CVPR 2022, equations 3 to 7.

KD splits into a binary part, target class against the rest (TCKD), and a part over the other classes (NCKD). DKD weighs
them on their own. Both carry the factor :math:`T^2`, as in the authors' code.

Everything is computed from the binary logit :math:`d = z_y / T - \log \sum_{i \neq y} \exp(z_i / T)`, since
:math:`\log p_y = \log \sigma(d)` and :math:`\log(1 - p_y) = \log \sigma(-d)`. The published code takes the logarithm of
a sum of probabilities, which is -inf in float32 once the label leads by about 103 T.
"""

from __future__ import annotations

from torch import Tensor

from kdlit.losses.base import DistillationLoss
from kdlit.losses.functional import (
    batch_mean,
    binary_kl_divergence,
    check_logits,
    check_not_negative,
    check_positive,
    check_target,
    full_precision,
    kl_divergence,
    masked_log_softmax,
    target_gap,
    target_mask,
)
from kdlit.types import Batch, ModelOutput


@full_precision
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float,
    beta: float | Tensor,
    temperature: float | Tensor,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Weighted sum of target-class and non-target-class distillation (equation 7).

    .. math:: L = \frac{T^2}{B} \sum_b \alpha \, KL(b^t \| b^s) + \beta \, KL(\hat p^t \| \hat p^s)

    with :math:`b = (p_y, 1 - p_y)` and :math:`\hat p` the softmax over the classes other than the label.

    Args:
        student_logits: shape ``(B, C)``; the only logits that receive a gradient.
        teacher_logits: shape ``(B, C)``.
        target: labels, integers of shape ``(B,)``.
        alpha: weight of TCKD, >= 0; 0 leaves NCKD alone.
        beta: weight of NCKD, >= 0, a number or a tensor of one element; 0 leaves TCKD alone.
        temperature: :math:`T > 0`; a tensor of one element, or of shape ``(B, 1)``, receives a gradient.
        sample_weight: factor of each sample's term, >= 0, shape ``(B,)``; None for 1.

    Returns:
        Scalar, at least 0; 0 where both networks give the same probabilities.

    Raises:
        ValueError: If shapes do not fit, a label is out of range, a logit is not finite, a weight is negative or the
            temperature is not positive.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 1.0]]).log()
        >>> dkd_loss(student, teacher, torch.tensor([0]), alpha=1.0, beta=8.0, temperature=1.0)  # 1/2 log(9/8)
        tensor(0.0589)
    """
    check_logits(student_logits, teacher_logits)
    check_target(target, student_logits)
    check_not_negative("alpha", alpha)
    check_not_negative("beta", beta)
    check_positive("temperature", temperature)
    is_target = target_mask(target, student_logits)
    student, teacher = student_logits / temperature, teacher_logits.detach() / temperature

    tckd = binary_kl_divergence(target_gap(teacher, is_target), target_gap(student, is_target))
    nckd = kl_divergence(masked_log_softmax(teacher, is_target), masked_log_softmax(student, is_target))
    return batch_mean(alpha * tckd + beta * nckd, temperature=temperature, sample_weight=sample_weight)


class DKDLoss(DistillationLoss):
    """Decoupled knowledge distillation (Zhao et al. 2022): see :func:`dkd_loss`.

    Args:
        alpha: weight of the target-class part, >= 0.
        beta: weight of the non-target part, >= 0; the paper sets it by the teacher: 2 for ResNet-56 and ResNet-110, 6
            for WRN-40-2 and VGG-13, 8 for ResNet-32x4 and ResNet-50.
        temperature: softens both distributions, > 0.

    Raises:
        ValueError: If a weight is negative or the temperature is not positive.
    """

    reads_sample_weight = True

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        self.alpha = check_not_negative("alpha", alpha)
        self.beta = check_not_negative("beta", beta)
        self.temperature = check_positive("temperature", temperature)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        return dkd_loss(
            student.logits,
            teacher.logits,
            batch["target"],
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            sample_weight=batch.get("sample_weight"),
        )
