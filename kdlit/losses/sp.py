r"""Similarity-preserving distillation: Tung and Mori, ICCV 2019, equations 1 to 4.

Which samples of a batch are similar to which is compared; the features themselves may differ in any dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlit.losses.feature import FeatureLoss, Features, in_pairs
from kdlit.losses.functional import full_precision
from kdlit.models.layers import FeatureLayers


def sp_loss(student_feat: Features, teacher_feat: Features) -> Tensor:
    r"""Squared difference of the normalised similarities between samples, added up over the pairs.

    .. math:: L = \sum_k \frac{1}{B^2} \| \hat G_s - \hat G_t \|_F^2, \quad G = X X^\top

    with :math:`X` the flattened features, shape ``(B, D)``, and :math:`\hat G` the matrix with rows of unit norm.

    Args:
        student_feat: shape ``(B, ...)``, one or several; they alone receive a gradient.
        teacher_feat: as many, of any shapes of the same batch.

    Returns:
        Scalar, at least 0; 0 for a batch of one sample, and where one network's features are a rotation or a multiple
        of the other's.

    Raises:
        ValueError: If the features do not pair up.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0], [1.0]]), torch.eye(2)
        >>> sp_loss(student, teacher)  # four entries: 1 - sqrt(1/2) twice, sqrt(1/2) twice
        tensor(0.2929)
    """
    return torch.stack([_similarity_gap(*pair) for pair in in_pairs(student_feat, teacher_feat)]).sum()


@full_precision
def _similarity_gap(student: Tensor, teacher: Tensor) -> Tensor:
    rows = (feature.reshape(len(feature), -1) for feature in (student, teacher))
    ours, theirs = (F.normalize(x @ x.mT) for x in rows)
    return F.mse_loss(ours, theirs)


class SPLoss(FeatureLoss):
    """Equal similarities between samples (Tung and Mori 2019): see :func:`sp_loss`.

    Layers may give features of any shape; by default the last map is compared.
    """

    across_batch = True

    def default_layers(self, layers: FeatureLayers) -> Sequence[str]:
        """The last map."""
        return layers.maps[-1:]

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Scalar loss of one batch."""
        return sp_loss(student, teacher)
