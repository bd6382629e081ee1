r"""Label revision (LR): Lan et al. 2024, Improve Knowledge Distillation via Label Revision and Data Selection.

Where the teacher is right the student follows its logits; where it is wrong, a mixture of its probabilities and the
label. Followed is the re-implementation by Sun et al. 2024 for their RLD paper, with fixed weights 4, 1 and 0.8. It
takes the cross-entropy with the labels of those samples only that the teacher gets right:
:class:`TeacherRightCrossEntropyLoss`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlit.losses.base import DistillationLoss
from kdlit.losses.functional import check_logits, check_not_negative, check_target, full_precision
from kdlit.types import Batch, ModelOutput


@full_precision
def lr_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    lambda1: float,
    lambda2: float,
    eta: float,
) -> Tensor:
    r"""Squared gap to the teacher's logits where it is right, to its revised probabilities where it is wrong.

    .. math:: L = \lambda_1 \operatorname{mean}_{right} (z - v)^2 + \lambda_2 \operatorname{mean}_{wrong} (p - t)^2, \\
              t = e q + (1 - e) \, onehot(y), \quad e = \frac{\eta}{\max q - q_y + 1}

    with :math:`p, q` the probabilities of student and teacher; both means over samples and classes, 0 without samples.

    Args:
        student_logits: :math:`z`, shape ``(B, C)``; the only logits that receive a gradient.
        teacher_logits: :math:`v`, shape ``(B, C)``; the first of several equal largest logits counts as the prediction.
        target: labels, integers of shape ``(B,)``.
        lambda1: weight of the samples that the teacher gets right, >= 0.
        lambda2: weight of the samples that the teacher gets wrong, >= 0.
        eta: how much of the teacher's probabilities a revised label keeps at most, in [0, 1].

    Returns:
        Scalar, at least 0. A constant added to the logits of one network changes it.

    Raises:
        ValueError: If shapes do not fit, a label is out of range, a logit is not finite, a weight is negative or
            ``eta`` is not in [0, 1].

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])
        >>> lr_loss(student, teacher, torch.tensor([0]), lambda1=4.0, lambda2=1.0, eta=0.8)  # 4 (2^2 + 0) / 2
        tensor(8.)
    """
    check_logits(student_logits, teacher_logits)
    check_target(target, student_logits)
    check_not_negative("lambda1", lambda1)
    check_not_negative("lambda2", lambda2)
    _check_eta(eta)
    teacher_logits = teacher_logits.detach()
    is_right = teacher_logits.argmax(dim=-1) == target
    right = (student_logits - teacher_logits).square().mean(dim=-1)
    wrong = (student_logits.softmax(dim=-1) - revised_labels(teacher_logits, target, eta=eta)).square().mean(dim=-1)
    return lambda1 * _mean_where(is_right, right) + lambda2 * _mean_where(~is_right, wrong)


def revised_labels(teacher_logits: Tensor, target: Tensor, *, eta: float) -> Tensor:
    """Mix the teacher's probabilities with the label so that the label is the most probable class.

    Args:
        teacher_logits: shape ``(B, C)``.
        target: labels, integers of shape ``(B,)``.
        eta: how much of the teacher's probabilities is kept at most, in [0, 1].

    Returns:
        Probabilities, shape ``(B, C)``.

    Raises:
        ValueError: If shapes do not fit, a label is out of range, a logit is not finite or ``eta`` is not in [0, 1].
    """
    check_logits(teacher_logits)
    check_target(target, teacher_logits)
    _check_eta(eta)
    q = teacher_logits.softmax(dim=-1)
    label = target.long().unsqueeze(1)
    share = eta / (q.amax(dim=-1, keepdim=True) - q.gather(1, label) + 1)
    return (share * q).scatter_add(1, label, 1 - share)


def _mean_where(is_kept: Tensor, values: Tensor) -> Tensor:
    """Mean of the kept values; 0, with no gradient, if there are none."""
    return torch.where(is_kept, values, 0.0).sum() / is_kept.sum().clamp(min=1)


def _check_eta(eta: float) -> float:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta!r}")
    return eta


@full_precision
def teacher_right_cross_entropy_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with the labels, averaged over the samples that the teacher gets right; 0 if there are none.

    Args:
        student_logits: shape ``(B, C)``; the only logits that receive a gradient.
        teacher_logits: shape ``(B, C)``.
        target: labels, integers of shape ``(B,)``.

    Raises:
        ValueError: If shapes do not fit, a label is out of range or a logit is not finite.
    """
    check_logits(student_logits, teacher_logits)
    check_target(target, student_logits)
    is_right = teacher_logits.argmax(dim=-1) == target
    return _mean_where(is_right, F.cross_entropy(student_logits, target.long(), reduction="none"))


class LRLoss(DistillationLoss):
    """Label revision (Lan et al. 2024): see :func:`lr_loss`.

    Args:
        lambda1: weight of the samples that the teacher gets right, >= 0.
        lambda2: weight of the samples that the teacher gets wrong, >= 0.
        eta: how much of the teacher's probabilities a revised label keeps at most, in [0, 1].

    Raises:
        ValueError: If a weight is negative or ``eta`` is not in [0, 1].
    """

    across_batch = True

    def __init__(self, lambda1: float = 4.0, lambda2: float = 1.0, eta: float = 0.8) -> None:
        super().__init__()
        self.lambda1 = check_not_negative("lambda1", lambda1)
        self.lambda2 = check_not_negative("lambda2", lambda2)
        self.eta = _check_eta(eta)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        return lr_loss(
            student.logits,
            teacher.logits,
            batch["target"],
            lambda1=self.lambda1,
            lambda2=self.lambda2,
            eta=self.eta,
        )


class TeacherRightCrossEntropyLoss(DistillationLoss):
    """The label term that goes with :class:`LRLoss`: see :func:`teacher_right_cross_entropy_loss`."""

    across_batch = True

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        return teacher_right_cross_entropy_loss(student.logits, teacher.logits, batch["target"])
