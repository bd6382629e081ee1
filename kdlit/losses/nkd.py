r"""Normalized knowledge distillation: Yang et al., ICCV 2023, From KD to Self-KD.

The target's term and the other classes' term are both cross-entropies: the teacher's entropy is not taken off, so the
loss is not zero where both networks agree. The temperature softens the other classes only. The authors' code is
followed; no difference from the paper is known.
"""

from __future__ import annotations

from torch import Tensor

from kdlit.losses.base import DistillationLoss
from kdlit.losses.functional import (
    batch_mean,
    check_logits,
    check_not_negative,
    check_positive,
    check_target,
    full_precision,
    masked_log_softmax,
    target_cross_entropy,
    target_mask,
)
from kdlit.types import Batch, ModelOutput


@full_precision
def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    gamma: float,
    temperature: float | Tensor,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Soft label of the target and softened distribution over the other classes.

    .. math:: L = \frac{1}{B} \sum_b - p^t_y \log p^s_y - \gamma T^2 \sum_{i \neq y} \hat p^t_i \log \hat p^s_i

    with :math:`p` the softmax at temperature 1 and :math:`\hat p` the softmax at :math:`T` over the classes other than
    the label.

    Args:
        student_logits: shape ``(B, C)``; the only logits that receive a gradient.
        teacher_logits: shape ``(B, C)``.
        target: labels, integers of shape ``(B,)``.
        gamma: weight of the term of the other classes, >= 0.
        temperature: :math:`T > 0`; a tensor of one element, or of shape ``(B, 1)``, receives a gradient.
        sample_weight: factor of each sample's term, >= 0, shape ``(B,)``; None for 1.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: If shapes do not fit, a label is out of range, a logit is not finite, ``gamma`` is negative or the
            temperature is not positive.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 3)
        >>> nkd_loss(logits, logits, torch.tensor([0]), gamma=1.0, temperature=1.0)  # 1/3 log 3 + log 2
        tensor(1.0594)
    """
    check_logits(student_logits, teacher_logits)
    check_target(target, student_logits)
    check_not_negative("gamma", gamma)
    check_positive("temperature", temperature)
    teacher_logits, is_target = teacher_logits.detach(), target_mask(target, student_logits)

    log_p = masked_log_softmax(teacher_logits / temperature, is_target)
    log_q = masked_log_softmax(student_logits / temperature, is_target)
    others = -(log_p.exp() * log_q).sum(dim=-1)
    return batch_mean(
        target_cross_entropy(student_logits, teacher_logits, is_target), sample_weight=sample_weight
    ) + gamma * batch_mean(others, temperature=temperature, sample_weight=sample_weight)


class NKDLoss(DistillationLoss):
    """Normalized knowledge distillation (Yang et al. 2023): see :func:`nkd_loss`.

    Args:
        gamma: weight of the term of the classes other than the label, >= 0.
        temperature: softens the distribution over those classes, > 0.

    Raises:
        ValueError: If ``gamma`` is negative or the temperature is not positive.
    """

    reads_sample_weight = True

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0) -> None:
        super().__init__()
        self.gamma = check_not_negative("gamma", gamma)
        self.temperature = check_positive("temperature", temperature)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        return nkd_loss(
            student.logits,
            teacher.logits,
            batch["target"],
            gamma=self.gamma,
            temperature=self.temperature,
            sample_weight=batch.get("sample_weight"),
        )
