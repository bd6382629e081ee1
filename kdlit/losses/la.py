"""Label-corrected teacher by exchange (LA): Wen, Lai and Qian 2021, Preparing Lessons.

Followed is the re-implementation by Sun et al. 2024 (the method called swap in section 2 of their RLD paper), which
trains with this loss alone, without a cross-entropy with the labels.
"""

from __future__ import annotations

from torch import Tensor

from kdlit.losses.base import DistillationLoss
from kdlit.losses.functional import check_logits, check_positive, check_target, full_precision
from kdlit.losses.kd import kd_loss
from kdlit.types import Batch, ModelOutput


@full_precision
def la_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """KD from a teacher in whose logits the largest and the label's have changed places: see :func:`swap_label_logit`.

    Args:
        student_logits: shape ``(B, C)``; the only logits that receive a gradient.
        teacher_logits: shape ``(B, C)``.
        target: labels, integers of shape ``(B,)``.
        temperature: softens both distributions, > 0; a tensor of one element, or of shape ``(B, 1)``, receives a
            gradient.
        sample_weight: factor of each sample's term, >= 0, shape ``(B,)``; None for 1.

    Returns:
        Scalar, at least 0; that of :func:`~kdlit.losses.kd_loss` where the teacher is right about every sample.

    Raises:
        ValueError: If shapes do not fit, a label is out of range, a logit is not finite or the temperature is not
            positive.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> la_loss(student, teacher, torch.tensor([1]), temperature=4.0)
        tensor(0.)
    """
    check_logits(student_logits, teacher_logits)
    swapped = swap_label_logit(teacher_logits, target)
    return kd_loss(student_logits, swapped, temperature=temperature, sample_weight=sample_weight)


def swap_label_logit(logits: Tensor, target: Tensor) -> Tensor:
    """Exchange every sample's largest logit, the first of equal ones, with that of its label.

    Args:
        logits: shape ``(B, C)``.
        target: labels, integers of shape ``(B,)``.

    Raises:
        ValueError: If shapes do not fit, a label is out of range or a logit is not finite.
    """
    check_logits(logits)
    check_target(target, logits)
    label, largest = target.long().unsqueeze(1), logits.argmax(dim=-1, keepdim=True)
    return logits.scatter(1, largest, logits.gather(1, label)).scatter(1, label, logits.gather(1, largest))


class LALoss(DistillationLoss):
    """KD from a teacher corrected by exchange (Wen et al. 2021): see :func:`la_loss`.

    Args:
        temperature: softens both distributions, > 0.

    Raises:
        ValueError: If the temperature is not positive.
    """

    reads_sample_weight = True

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        return la_loss(
            student.logits,
            teacher.logits,
            batch["target"],
            temperature=self.temperature,
            sample_weight=batch.get("sample_weight"),
        )
