"""Cross-entropy with the labels, optionally smoothed (Szegedy et al. 2016, section 7)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdlit.losses.base import DistillationLoss
from kdlit.losses.functional import check_logits, check_target, full_precision
from kdlit.types import Batch, ModelOutput


@full_precision
def cross_entropy_loss(student_logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the student with the labels, averaged over the batch.

    Args:
        student_logits: shape ``(B, C)``.
        target: labels, integers of shape ``(B,)``.
        label_smoothing: share of the label's probability that is spread evenly over all classes, in [0, 1].

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: If shapes do not fit, a label is out of range, a logit is not finite or the smoothing is not in
            [0, 1].

    Example:
        >>> import torch
        >>> cross_entropy_loss(torch.zeros(1, 4), torch.tensor([2]))  # log 4
        tensor(1.3863)
    """
    check_logits(student_logits)
    check_target(target, student_logits)
    _check_label_smoothing(label_smoothing)
    return F.cross_entropy(student_logits, target.long(), label_smoothing=label_smoothing)


def _check_label_smoothing(label_smoothing: float) -> float:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing!r}")
    return label_smoothing


class CrossEntropyLoss(DistillationLoss):
    """Cross-entropy of the student with the labels; the one loss that needs no teacher.

    Args:
        label_smoothing: share of the label's probability that is spread evenly over all classes, in [0, 1].
        strong_view: whether to look at the strongly augmented view instead of the ordinary one.

    Raises:
        ValueError: If the smoothing is not in [0, 1].
    """

    needs_teacher = False

    def __init__(self, label_smoothing: float = 0.0, strong_view: bool = False) -> None:
        super().__init__()
        self.label_smoothing = _check_label_smoothing(label_smoothing)
        self.needs_strong_view = strong_view

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        logits = student.logits_strong if self.needs_strong_view else student.logits
        if logits is None:
            raise ValueError("strong_view needs logits_strong, but the student was given no image_strong")
        return cross_entropy_loss(logits, batch["target"], label_smoothing=self.label_smoothing)
