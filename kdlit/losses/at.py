r"""Attention transfer: Zagoruyko and Komodakis, ICLR 2017, Paying More Attention to Attention, equation 2.

Of each map only the attention is compared: where, not in which channel, the activation is. The paper takes the norm of
the difference of two attention maps and a sum over channels; the released code, which is followed, takes the mean of
its squares and a mean over channels. Published weights, such as 1000, belong to that form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlit.losses.feature import FeatureLoss, Features, Shape, check_layers_give_maps, check_maps, in_pairs, same_size
from kdlit.losses.functional import full_precision
from kdlit.losses.last_layer import unit
from kdlit.models.layers import FeatureLayers


def at_loss(student_feat: Features, teacher_feat: Features, *, p: int = 2) -> Tensor:
    r"""Squared distance of normalised attention maps, averaged over samples and positions, added up over the pairs.

    .. math:: L = \sum_k \frac{1}{B H W} \sum_b \Big\| \frac{a_b^s}{\|a_b^s\|} - \frac{a_b^t}{\|a_b^t\|} \Big\|^2, \quad
              a_b = \mathrm{vec} \Big( \frac{1}{C} \sum_c x_{bc}^p \Big)

    Of two maps the larger is first brought to the smaller size by average pooling.

    Args:
        student_feat: maps of shape ``(B, C, H, W)``, one or several; they alone receive a gradient.
        teacher_feat: as many maps, of any number of channels and any size.
        p: the power of an activation, a whole number of at least 1; the sign stays where it is odd.

    Returns:
        Scalar, at least 0; 0 where the attention maps are multiples of each other.

    Raises:
        ValueError: If something else than maps is given, they do not pair up, or ``p`` is out of range.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]]])
        >>> at_loss(student, teacher)  # (1, 0) against (0, 1)
        tensor(1.)
    """
    _check_power(p)
    return torch.stack([_attention_gap(*pair, p) for pair in in_pairs(student_feat, teacher_feat)]).sum()


@full_precision
def _attention_gap(student: Tensor, teacher: Tensor, p: int) -> Tensor:
    check_maps(student, teacher)
    ours, theirs = (unit(one.pow(p).mean(dim=1).flatten(1)) for one in same_size(student, teacher))
    return F.mse_loss(ours, theirs)


def _check_power(p: int) -> int:
    if p != int(p) or p < 1:  # a root of a negative activation would be NaN
        raise ValueError(f"p must be a whole number >= 1, got {p!r}")
    return int(p)


class ATLoss(FeatureLoss):
    """Equal spatial attention (Zagoruyko and Komodakis 2017): see :func:`at_loss`.

    Args:
        student_layers: paths of layers that give maps; None for all maps of the network but that of its stem.
        teacher_layers: likewise of the teacher, as many.
        p: the power of an activation, a whole number of at least 1.

    Raises:
        ValueError: If ``p`` is out of range, or, at :meth:`setup`, if a layer gives no map.
    """

    def __init__(
        self,
        student_layers: Sequence[str] | str | None = None,
        teacher_layers: Sequence[str] | str | None = None,
        p: int = 2,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.p = _check_power(p)

    def default_layers(self, layers: FeatureLayers) -> Sequence[str]:
        """All maps but that of the stem."""
        return layers.maps[1:]

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> None:
        """Check that these are maps."""
        check_layers_give_maps(self, student, teacher)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Scalar loss of one batch."""
        return at_loss(student, teacher, p=self.p)
