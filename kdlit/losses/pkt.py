r"""Probabilistic knowledge transfer: Passalis and Tefas, ECCV 2018, Learning Deep Representations with PKT.

The similarities of a sample to all samples of the batch, divided by their sum, are the probabilities that it is found
beside them. The authors' code is followed: the similarity of a sample to itself counts, and the divergence is averaged
over all pairs. The paper, which was not at hand, is said to leave the diagonal out and to sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from kdlit.losses.feature import FeatureLoss, Features, in_pairs
from kdlit.losses.functional import check_positive, full_precision
from kdlit.models.layers import FeatureLayers


def pkt_loss(student_feat: Features, teacher_feat: Features, *, eps: float = 1e-7) -> Tensor:
    r"""Divergence of the two networks' neighbour probabilities, added up over the pairs.

    .. math:: L = \frac{1}{B^2} \sum_{ij} q_{ij} \log \frac{q_{ij} + \epsilon}{p_{ij} + \epsilon}, \quad
              p_{ij} \propto \tfrac{1}{2} \big(1 + \cos(x_i, x_j)\big)

    with :math:`p` of the student and :math:`q` of the teacher, rows of which sum to 1. Features are flattened.

    Args:
        student_feat: shape ``(B, ...)``, one or several; they alone receive a gradient.
        teacher_feat: as many, of any shapes of the same batch.
        eps: :math:`\epsilon > 0`, also added to the norms in the cosine.

    Returns:
        Scalar; 0 for a batch of one sample, and where one network's features are a rotation or a multiple of the
        other's.

    Raises:
        ValueError: If the features do not pair up or ``eps`` is not positive.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0], [1.0]]), torch.eye(2)
        >>> pkt_loss(student, teacher)  # (1/2, 1/2) against (2/3, 1/3): (2/3 log(4/3) + 1/3 log(2/3)) / 2
        tensor(0.0283)
    """
    check_positive("eps", eps)
    return torch.stack([_divergence(*pair, eps) for pair in in_pairs(student_feat, teacher_feat)]).sum()


@full_precision
def _divergence(student: Tensor, teacher: Tensor, eps: float) -> Tensor:
    p, q = _neighbours(student, eps), _neighbours(teacher, eps)
    return (q * ((q + eps).log() - (p + eps).log())).mean()


def _neighbours(feature: Tensor, eps: float) -> Tensor:
    x = feature.reshape(len(feature), -1)
    x = x / (vector_norm(x, dim=1, keepdim=True) + eps)
    similarity: Tensor = ((x @ x.mT + 1) / 2).clamp(min=0)  # rounding can go below
    return similarity / similarity.sum(dim=1, keepdim=True)


class PKTLoss(FeatureLoss):
    """Equal probabilities of neighbours (Passalis and Tefas 2018): see :func:`pkt_loss`.

    Args:
        student_layers: paths of layers; None for the pooled feature.
        teacher_layers: likewise of the teacher, as many.
        eps: constant in norms and logarithms, > 0.

    Raises:
        ValueError: If ``eps`` is not positive.
    """

    across_batch = True

    def __init__(
        self,
        student_layers: Sequence[str] | str | None = None,
        teacher_layers: Sequence[str] | str | None = None,
        eps: float = 1e-7,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.eps = check_positive("eps", eps)

    def default_layers(self, layers: FeatureLayers) -> Sequence[str]:
        """The pooled feature."""
        return (layers.pool,)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Scalar loss of one batch."""
        return pkt_loss(student, teacher, eps=self.eps)
