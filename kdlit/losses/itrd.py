r"""ITRD: Miles, Lopez Rodriguez and Mikolajczyk, BMVC 2022, Information Theoretic Representation Distillation.

Two terms on pooled features: every embedded student feature is to correlate with the teacher's over the batch
(correlation), and the similarities of the samples are to hold what the teacher's hold (mutual information).

The code released with TTM (Zheng and Yang 2024) is followed. Deviations have B - 1 in the denominator but correlations
are divided by B, so that equal features correlate to (B - 1)/B, not to 1. The mutual term has no logarithms, which the
paper takes of both norms, and looks at the student's features as they are where both networks have the same width. A
feature that is the same for the whole batch counts as uncorrelated; in the code it divides by 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kdlit.losses.feature import FeatureLoss, Shape
from kdlit.losses.functional import check_not_negative, check_positive, full_precision
from kdlit.losses.last_layer import EPS, single_layer, unit
from kdlit.losses.lskd import standardize_logits
from kdlit.models.layers import FeatureLayers


@full_precision
def itrd_loss(
    embedded_feat: Tensor,
    teacher_feat: Tensor,
    student_feat: Tensor | None = None,
    *,
    alpha_it: float,
    lambda_corr: float,
    lambda_mutual: float,
) -> Tensor:
    r"""Weighted sum of the correlation and the mutual-information term.

    .. math:: L = \lambda_c \log_2 \sum_d |v_d - 1|^{2 \alpha} + \lambda_m \big(\|G^s\|_F^2 - \|G^s \circ G^t\|_F^2\big)

    with :math:`v_d` the correlation of feature :math:`d` over the batch and :math:`G` the cosines of all pairs of
    samples; :math:`G^s` and the product are divided by their traces.

    Args:
        embedded_feat: student features embedded in the teacher's width, shape ``(B, D)``; receives a gradient.
        teacher_feat: shape ``(B, D)``.
        student_feat: what the mutual term looks at, shape ``(B, d)``; receives a gradient. None for ``embedded_feat``.
        alpha_it: :math:`\alpha > 0`; the larger, the more the worst features count.
        lambda_corr: :math:`\lambda_c \geq 0`.
        lambda_mutual: :math:`\lambda_m \geq 0`.

    Returns:
        Scalar; the first term is below 0 where most features correlate, but for equal features still
        :math:`\log_2 D - 2 \alpha \log_2 B`.

    Raises:
        ValueError: If shapes do not fit, the batch has one sample or a number is out of its range.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [0.0]])
        >>> itrd_loss(student, teacher, alpha_it=1.0, lambda_corr=1.0, lambda_mutual=0.0)  # log2 (-1/2 - 1)^2
        tensor(1.1699)
    """
    check_positive("alpha_it", alpha_it)
    check_not_negative("lambda_corr", lambda_corr)
    check_not_negative("lambda_mutual", lambda_mutual)
    student_feat = embedded_feat if student_feat is None else student_feat
    if embedded_feat.ndim != 2 or embedded_feat.shape != teacher_feat.shape or len(student_feat) != len(teacher_feat):
        raise ValueError(
            "embedded_feat and teacher_feat must have one shape, (B, D), and student_feat as many samples, got "
            f"{tuple(embedded_feat.shape)}, {tuple(teacher_feat.shape)} and {tuple(student_feat.shape)}"
        )
    if len(teacher_feat) < 2:
        raise ValueError("ITRD needs a batch of at least 2 samples, got 1: it correlates over the batch")
    teacher_feat = teacher_feat.detach()
    correlation = (_standardized(embedded_feat) * _standardized(teacher_feat)).mean(dim=0)
    gap = (correlation - 1).abs().pow(2 * alpha_it).sum().log2()
    return lambda_corr * gap + lambda_mutual * _mutual(student_feat, teacher_feat)


def _standardized(feat: Tensor) -> Tensor:
    """Every column to mean 0 and deviation 1 over the batch; a column of equal values to 0."""
    return standardize_logits(feat.T, unbiased=True, eps=0.0).T


def _mutual(student_feat: Tensor, teacher_feat: Tensor) -> Tensor:
    of_student, of_teacher = (unit(feat) @ unit(feat).T for feat in (student_feat, teacher_feat))
    marginal, joint = (_trace_one(kernel).square().sum() for kernel in (of_student, of_student * of_teacher))
    return marginal - joint


def _trace_one(kernel: Tensor) -> Tensor:
    return kernel / kernel.trace().clamp_min(EPS)


class ITRDLoss(FeatureLoss):
    """Correlation and mutual information of pooled features (Miles et al. 2022): see :func:`itrd_loss`.

    A linear layer from the student's width to the teacher's (``embed``) is trained with the student.

    Args:
        student_layers: one layer with a feature of shape ``(B, D)``; None: what the student's classifier is given.
        teacher_layers: likewise of the teacher.
        alpha_it: the larger, the more the worst features count, > 0; 1.01 for pairs of one family on CIFAR-100, 1.5 for
            others.
        lambda_corr: weight of the correlation term, >= 0.
        lambda_mutual: weight of the mutual-information term, >= 0; 0 for some pairs of two families.

    Raises:
        ValueError: If a number is out of its range, or, at :meth:`setup`, if a layer gives another shape.
    """

    across_batch = True

    def __init__(
        self,
        student_layers: Sequence[str] | str | None = None,
        teacher_layers: Sequence[str] | str | None = None,
        alpha_it: float = 1.5,
        lambda_corr: float = 2.0,
        lambda_mutual: float = 1.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.alpha_it = check_positive("alpha_it", alpha_it)
        self.lambda_corr = check_not_negative("lambda_corr", lambda_corr)
        self.lambda_mutual = check_not_negative("lambda_mutual", lambda_mutual)

    def default_layers(self, layers: FeatureLayers) -> Sequence[str]:
        """The pooled feature."""
        return (layers.pool,)

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> None:
        """Make the embedding."""
        (_, student_width), (_, teacher_width) = single_layer(self, student, teacher, "(B, D)")
        self.embed = nn.Linear(student_width, teacher_width)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Scalar loss of one batch."""
        same_width = self.embed.in_features == self.embed.out_features
        return itrd_loss(
            self.embed(student[0]),
            teacher[0],
            student[0] if same_width else None,
            alpha_it=self.alpha_it,
            lambda_corr=self.lambda_corr,
            lambda_mutual=self.lambda_mutual,
        )
