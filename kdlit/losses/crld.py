r"""Cross-view consistency (CRLD): Zhang et al., ACM Multimedia 2024, Cross-View Consistency Regularisation for KD.

Student and teacher see a weak and a strong view of every picture. The student's prediction for each view follows the
teacher's for the same view and for the other one, wherever the teacher is sure enough of the view that is followed. The
form here was written from the idea; the paper was not at hand, and its weights and thresholds may differ.
"""

from __future__ import annotations

from torch import Tensor

from kdlit.losses.base import DistillationLoss
from kdlit.losses.functional import check_logits, check_positive, check_strong_logits, full_precision
from kdlit.losses.kd import kd_loss
from kdlit.types import Batch, ModelOutput


@full_precision
def crld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_logits_strong: Tensor,
    teacher_logits_strong: Tensor,
    *,
    temperature: float | Tensor,
    weak_threshold: float,
    strong_threshold: float,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Sum of KD within and across two views, each sample counted where the teacher is sure.

    .. math:: L = \sum_{a, c \in \{weak, strong\}} \frac{T^2}{B} \sum_b
              [\max q_b^c \geq \theta_c] \, KL(q_{b,T}^c \| p_{b,T}^a)

    with :math:`p_T^a` the student's probabilities of view :math:`a`, :math:`q_T^c` the teacher's of view :math:`c`, and
    :math:`q^c` the latter at temperature 1. Samples left out still count in :math:`B`.

    Args:
        student_logits: of the weak view, shape ``(B, C)``; receives a gradient.
        teacher_logits: of the weak view, shape ``(B, C)``.
        student_logits_strong: of the strong view, shape ``(B, C)``; receives a gradient.
        teacher_logits_strong: of the strong view, shape ``(B, C)``.
        temperature: :math:`T > 0`; a tensor of one element, or of shape ``(B, 1)``, receives a gradient.
        weak_threshold: lowest largest probability at which the teacher's weak view is followed, in [0, 1]; 0 for
            always.
        strong_threshold: the same for its strong view.
        sample_weight: factor of each sample's terms, >= 0, shape ``(B,)``; None for 1.

    Returns:
        Scalar, at least 0; 0 where all four predictions are the same, or the teacher is never sure.

    Raises:
        ValueError: If the shapes differ, a logit is not finite, the temperature is not positive or a threshold is not
            in [0, 1].

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]]).log()
        >>> crld_loss(  # four times 1/4 log(1/2) + 3/4 log(3/2)
        ...     student, teacher, student, teacher, temperature=1.0, weak_threshold=0.5, strong_threshold=0.5
        ... )
        tensor(0.5232)
    """
    check_logits(student_logits, teacher_logits)
    check_logits(student_logits_strong, teacher_logits_strong)
    loss = student_logits.new_zeros(())
    for followed, name, threshold in (
        (teacher_logits, "weak_threshold", weak_threshold),
        (teacher_logits_strong, "strong_threshold", strong_threshold),
    ):
        weight = _is_sure(followed, _check_threshold(name, threshold))
        if sample_weight is not None:
            weight = weight * sample_weight
        for following in (student_logits, student_logits_strong):
            loss = loss + kd_loss(following, followed, temperature=temperature, sample_weight=weight)
    return loss


def _is_sure(logits: Tensor, threshold: float) -> Tensor:
    return (logits.detach().softmax(dim=-1).amax(dim=-1) >= threshold).to(logits.dtype)


def _check_threshold(name: str, threshold: float) -> float:
    if not 0 <= threshold <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {threshold!r}")
    return threshold


class CRLDLoss(DistillationLoss):
    """KD within and across a weak and a strong view (Zhang et al. 2024): see :func:`crld_loss`.

    Args:
        temperature: softens all distributions, > 0.
        weak_threshold: lowest largest probability at which the teacher's weak view is followed, in [0, 1].
        strong_threshold: the same for its strong view.

    Raises:
        ValueError: If the temperature is not positive or a threshold is not in [0, 1]; in the first step, if there is
            no strong view.
    """

    needs_strong_view = True
    reads_sample_weight = True

    def __init__(self, temperature: float = 4.0, weak_threshold: float = 0.6, strong_threshold: float = 0.6) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)
        self.weak_threshold = _check_threshold("weak_threshold", weak_threshold)
        self.strong_threshold = _check_threshold("strong_threshold", strong_threshold)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        return crld_loss(
            student.logits,
            teacher.logits,
            *check_strong_logits(student, teacher),
            temperature=self.temperature,
            weak_threshold=self.weak_threshold,
            strong_threshold=self.strong_threshold,
            sample_weight=batch.get("sample_weight"),
        )
