r"""Correlation congruence: Peng et al., ICCV 2019, Correlation Congruence for Knowledge Distillation.

What RepDistiller released under this name is followed: both features are embedded in one space, and the differences
between the networks of samples that are neighbours in the batch are multiplied. The paper, which was not at hand, is
said to compare kernel matrices over the batch, which is another function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdlit.losses.feature import FeatureLoss, Shape
from kdlit.losses.functional import check_positive, full_precision
from kdlit.models.layers import FeatureLayers


class CCLoss(FeatureLoss):
    r"""Congruent differences of neighbouring samples (Peng et al. 2019, as released in RepDistiller).

    .. math:: L = \frac{1}{B - 1} \sum_{b=1}^{B-1} \langle d_b, d_{b+1} \rangle, \quad
              d_b = | E_s x_b^s - E_t x_b^t |

    with the absolute value taken elementwise and :math:`E_s, E_t` trained linear maps with bias (``heads.K.embed_s``
    and ``heads.K.embed_t`` for the K-th pair). Features are flattened; several pairs are added up. The value depends on
    the order of the batch.

    Args:
        student_layers: paths of layers; None for the pooled feature.
        teacher_layers: likewise of the teacher, as many.
        feat_dim: width of the common space, > 0.

    Raises:
        ValueError: If ``feat_dim`` is not positive, or, in a step, if the batch has one sample.
    """

    across_batch = True

    def __init__(
        self,
        student_layers: Sequence[str] | str | None = None,
        teacher_layers: Sequence[str] | str | None = None,
        feat_dim: int = 128,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.feat_dim = check_positive("feat_dim", feat_dim)

    def default_layers(self, layers: FeatureLayers) -> Sequence[str]:
        """The pooled feature."""
        return (layers.pool,)

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> None:
        """Make the two embeddings of each pair."""
        self.heads = nn.ModuleList(
            _Embeddings(math.prod(ours[1:]), math.prod(theirs[1:]), self.feat_dim)
            for ours, theirs in zip(student, teacher, strict=True)
        )

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Scalar loss of one batch."""
        if len(student[0]) < 2:
            raise ValueError(
                f"CC compares neighbours in a batch and needs at least 2 samples, got a batch of {len(student[0])}"
            )
        return torch.stack(list(map(_congruence, self.heads, student, teacher))).sum()


class _Embeddings(nn.Module):
    """Maps both features into one space; gives the absolute differences there, shape ``(B, feat_dim)``."""

    def __init__(self, student_width: int, teacher_width: int, feat_dim: int) -> None:
        super().__init__()
        self.embed_s = nn.Linear(student_width, feat_dim)
        self.embed_t = nn.Linear(teacher_width, feat_dim)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = (feature.reshape(len(feature), -1) for feature in (student, teacher))
        gap: Tensor = self.embed_s(student) - self.embed_t(teacher)
        return gap.abs()


@full_precision
def _congruence(embed: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    gap: Tensor = embed(student, teacher)
    return (gap[:-1] * gap[1:]).sum(dim=1).mean()
