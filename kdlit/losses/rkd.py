r"""Relational knowledge distillation: Park, Kim, Lu and Cho, CVPR 2019, equations 2 to 8.

Distances between two samples and angles between three are compared. The authors' code is followed: means go over all
:math:`B^2` pairs and :math:`B^3` triples, those that repeat a sample included as zeros. The paper, which was not at
hand, is said to count distinct samples, which makes the terms :math:`B / (B - 1)` and :math:`B^2 / ((B - 1)(B - 2))`
times as large.

The angles at a few samples are looked at together, and their gradient is taken at once, so that memory grows with
:math:`B^2` and not with :math:`B^3`. There is no second derivative of that term: it counts as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import vector_norm

from kdlit.losses.feature import FeatureLoss, Features, in_pairs
from kdlit.losses.functional import check_not_negative, check_positive, full_precision
from kdlit.models.layers import FeatureLayers

ELEMENTS = 2**22  # in the largest tensor, 16 MiB in float32: enough to keep an accelerator busy


def rkd_loss(
    student_feat: Features,
    teacher_feat: Features,
    *,
    distance_weight: float,
    angle_weight: float,
    squared: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    r"""Weighted sum of the distance and the angle term, added up over the pairs of features.

    .. math:: L = \frac{w_D}{B^2} \sum_{ij} h \big( d_{ij}^s - d_{ij}^t \big)
              + \frac{w_A}{B^3} \sum_{ijk} h \big( \langle e_{ij}^s, e_{ik}^s \rangle
              - \langle e_{ij}^t, e_{ik}^t \rangle \big)

    with :math:`h` Huber's function of threshold 1, :math:`d_{ij}` the distance of two samples divided by the mean over
    :math:`i \neq j`, and :math:`e_{ij} = (x_j - x_i) / \|x_j - x_i\|`, 0 where samples coincide. Features are
    flattened.

    Args:
        student_feat: shape ``(B, ...)`` with ``B >= 2``, one or several; they alone receive a gradient.
        teacher_feat: as many, of any shapes of the same batch.
        distance_weight: :math:`w_D \geq 0`; 0 leaves the angles alone.
        angle_weight: :math:`w_A \geq 0`; 0 leaves the distances alone.
        squared: compare squared distances.
        eps: squared distances below are raised to it, > 0.

    Returns:
        Scalar, at least 0; 0 where one network's features are those of the other turned, shifted and scaled.

    Raises:
        ValueError: If the features do not pair up, the batch has one sample, or a number is out of its range.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [3.0]])
        >>> rkd_loss(student, teacher, distance_weight=1.0, angle_weight=1.0)  # 3/4 3/4 3/2 against 1/2 1 3/2
        tensor(0.0139)
    """
    check_not_negative("distance_weight", distance_weight)
    check_not_negative("angle_weight", angle_weight)
    check_positive("eps", eps)
    losses = []
    for student, teacher in in_pairs(student_feat, teacher_feat):
        if len(student) < 2:
            raise ValueError(f"RKD compares samples of a batch and needs at least 2, got a batch of {len(student)}")
        losses.append(_relation_gap(student, teacher, distance_weight, angle_weight, squared, eps))
    return torch.stack(losses).sum()


@full_precision
def _relation_gap(
    student: Tensor, teacher: Tensor, distance_weight: float, angle_weight: float, squared: bool, eps: float
) -> Tensor:
    student, teacher = (feature.reshape(len(feature), -1) for feature in (student, teacher))
    loss = student.new_zeros(())
    if distance_weight:
        distance = F.smooth_l1_loss(_distances(student, squared, eps), _distances(teacher, squared, eps))
        loss = loss + distance_weight * distance
    if angle_weight:
        angle: Tensor = _AngleGap.apply(student, teacher)
        loss = loss + angle_weight * angle
    return loss


def _distances(feature: Tensor, squared: bool, eps: float) -> Tensor:
    """Distances in units of their mean, shape ``(B, B)``; not by ``cdist``, whose gradient takes (B, B, D) on a GPU."""
    batch = len(feature)
    x = feature - feature.mean(dim=0)  # or rounding of large norms would drown small distances
    square = x.square().sum(dim=1)
    distance = (square.unsqueeze(1) + square - 2 * x @ x.mT).clamp(min=eps)
    if not squared:
        distance = distance.sqrt()
    distance = distance.masked_fill(torch.eye(batch, dtype=torch.bool, device=x.device), 0.0)
    return distance * (batch * (batch - 1) / distance.sum())


class _AngleGap(torch.autograd.Function):
    """Mean of Huber's function over differences of cosines; the gradient is taken in the forward pass."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        batch = len(student)
        at_once = max(1, ELEMENTS // (batch * max(batch, student.shape[1], teacher.shape[1])))
        value, gradient = student.new_zeros(()), torch.zeros_like(student)
        for anchors in torch.arange(batch, device=student.device).split(at_once):  # type: ignore[no-untyped-call]
            edges, length = _edges(student, anchors)
            others, _ = _edges(teacher, anchors)
            gap = edges @ edges.mT - others @ others.mT
            value += F.smooth_l1_loss(gap, torch.zeros_like(gap), reduction="sum") / batch**3
            if ctx.needs_input_grad[0]:
                slope = 2 * gap.clamp(-1, 1) @ edges  # twice, as each cosine stands above and below the diagonal
                slope = (slope - edges * (edges * slope).sum(dim=-1, keepdim=True)) / length
                gradient += slope.sum(dim=0)
                gradient[anchors] -= slope.sum(dim=1)
        ctx.save_for_backward(gradient / batch**3)
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad_outputs[0] * gradient, None


def _edges(feature: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Directions from some samples to all, ``(A, B, D)``, 0 where there is none, and lengths, infinite there."""
    edges = feature - feature[anchors].unsqueeze(1)
    length = vector_norm(edges, dim=-1, keepdim=True)
    length = length.masked_fill(length < 1e-12, torch.inf)
    return edges / length, length


class RKDLoss(FeatureLoss):
    """Equal distances and angles between samples (Park et al. 2019): see :func:`rkd_loss`.

    Args:
        student_layers: paths of layers; None for the pooled feature.
        teacher_layers: likewise of the teacher, as many.
        distance_weight: factor of the distance term, >= 0.
        angle_weight: factor of the angle term, >= 0.
        squared: compare squared distances.
        eps: squared distances below are raised to it, > 0.

    Raises:
        ValueError: If a number is out of its range, or, in a step, if the batch has one sample.
    """

    across_batch = True

    def __init__(
        self,
        student_layers: Sequence[str] | str | None = None,
        teacher_layers: Sequence[str] | str | None = None,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        squared: bool = False,
        eps: float = 1e-12,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.distance_weight = check_not_negative("distance_weight", distance_weight)
        self.angle_weight = check_not_negative("angle_weight", angle_weight)
        self.squared = squared
        self.eps = check_positive("eps", eps)

    def default_layers(self, layers: FeatureLayers) -> Sequence[str]:
        """The pooled feature."""
        return (layers.pool,)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Scalar loss of one batch."""
        return rkd_loss(
            student,
            teacher,
            distance_weight=self.distance_weight,
            angle_weight=self.angle_weight,
            squared=self.squared,
            eps=self.eps,
        )
