r"""Neuron selectivity transfer: Huang and Wang 2017 (arXiv 1707.01219), Like What You Like, section 4.

Each channel of a map is one sample of where the network looks, and the two sets of samples are matched by their maximum
mean discrepancy with the kernel :math:`k(x, y) = (x^\top y)^2`. With this kernel the discrepancy is also the distance
between two matrices over pairs of positions. That form is used where there are fewer positions than channels: it is
then the smaller one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlit.losses.feature import FeatureLoss, Features, Shape, check_layers_give_maps, check_maps, in_pairs, same_size
from kdlit.losses.functional import full_precision
from kdlit.models.layers import FeatureLayers


def nst_loss(student_feat: Features, teacher_feat: Features) -> Tensor:
    r"""Maximum mean discrepancy between the channels of two maps, each of unit norm; added up over the pairs.

    .. math:: L = k(t, t) + k(s, s) - 2 k(s, t), \quad
              k(a, b) = \frac{1}{B \, C_a C_b} \sum_{n, i, j} \langle a_{ni}, b_{nj} \rangle^2

    or, the same, :math:`\frac{1}{B} \sum_n \big\| \frac{1}{C_s} S_n^\top S_n - \frac{1}{C_t} T_n^\top T_n \big\|_F^2`
    with channels as rows. Of two maps the larger is first brought to the smaller size by average pooling.

    Args:
        student_feat: maps of shape ``(B, C, H, W)``, one or several; they alone receive a gradient.
        teacher_feat: as many maps, of any number of channels and any size.

    Returns:
        Scalar, at least 0; 0 for equal maps, whatever the order and scale of their channels.

    Raises:
        ValueError: If something else than maps is given, or they do not pair up.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]]])
        >>> nst_loss(student, teacher)  # 1 + 1 - 2 * 0
        tensor(2.)
    """
    return torch.stack([_discrepancy(*pair) for pair in in_pairs(student_feat, teacher_feat)]).sum()


@full_precision
def _discrepancy(student: Tensor, teacher: Tensor) -> Tensor:
    check_maps(student, teacher)
    s, t = (F.normalize(one.flatten(2), dim=-1) for one in same_size(student, teacher))
    if s.shape[2] < max(s.shape[1], t.shape[1]):
        positions = s.mT @ s / s.shape[1] - t.mT @ t / t.shape[1]
        return positions.square().sum(dim=(1, 2)).mean()
    return _kernel(t, t) + _kernel(s, s) - 2 * _kernel(s, t)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.mT).square().mean()


class NSTLoss(FeatureLoss):
    """Equally distributed neurons (Huang and Wang 2017): see :func:`nst_loss`.

    Layers must give maps, and are by default all maps of the network but that of its stem.
    """

    def default_layers(self, layers: FeatureLayers) -> Sequence[str]:
        """All maps but that of the stem."""
        return layers.maps[1:]

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> None:
        """Check that these are maps."""
        check_layers_give_maps(self, student, teacher)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Scalar loss of one batch."""
        return nst_loss(student, teacher)
