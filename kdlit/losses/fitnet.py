r"""FitNets: Romero et al., ICLR 2015, FitNets: Hints for Thin Deep Nets, equation 3.

A regressor turns a map of the student into one of the teacher. The paper trains up to that map first and the whole
network later, with half the squared norm; the released code, which is followed, trains all at once with the mean over
all elements, and its regressor ends in a batch norm and a ReLU. The published weight 100 belongs to that form.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlit.losses.feature import FeatureLoss, Shape, check_layers_give_maps
from kdlit.losses.functional import full_precision
from kdlit.models.layers import FeatureLayers


class FitNetLoss(FeatureLoss):
    r"""Equal maps after a regressor (Romero et al. 2015).

    .. math:: L = \frac{1}{B C H W} \| r(x^s) - x^t \|_F^2

    The regressor :math:`r` (``heads.K`` for the K-th pair, with ``conv`` and ``bn``) is a convolution, a batch norm and
    a ReLU. Where the sizes are equal the kernel has size 1; to half the size it has size 3 and stride 2; to twice the
    size it is a transposed one of size 4 and stride 2; to any other smaller size it has the difference and 1. Several
    pairs are added up.

    Args:
        student_layers: paths of layers that give maps, of size ``(H, W)``; None for the map of the second stage.
        teacher_layers: likewise of the teacher, as many.
        use_relu: end the regressor with a ReLU, for maps of the teacher that have no negative values.

    Raises:
        ValueError: At :meth:`setup`, if a layer gives no map or the teacher's is larger than the student's and not
            twice its size.
    """

    across_batch = True

    def __init__(
        self,
        student_layers: Sequence[str] | str | None = None,
        teacher_layers: Sequence[str] | str | None = None,
        use_relu: bool = True,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.use_relu = use_relu

    def default_layers(self, layers: FeatureLayers) -> Sequence[str]:
        """The map of the second stage, that of the stem being the first of all."""
        return layers.maps[2:3]

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> None:
        """Make the regressor of each pair."""
        check_layers_give_maps(self, student, teacher)
        self.heads = nn.ModuleList(_regressor(*pair, self.use_relu) for pair in zip(student, teacher, strict=True))

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Scalar loss of one batch."""
        return torch.stack(list(map(_regression_error, self.heads, student, teacher))).sum()


@full_precision
def _regression_error(regressor: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(regressor(student), teacher)


def _regressor(student: Shape, teacher: Shape, use_relu: bool) -> nn.Sequential:
    (_, channels, *size), (_, out_channels, *goal) = student, teacher
    if size == [2 * length for length in goal]:
        conv: nn.Module = nn.Conv2d(channels, out_channels, 3, stride=2, padding=1)
    elif [2 * length for length in size] == goal:
        conv = nn.ConvTranspose2d(channels, out_channels, 4, stride=2, padding=1)
    elif all(have >= want for have, want in zip(size, goal, strict=True)):
        height, width = (1 + have - want for have, want in zip(size, goal, strict=True))
        conv = nn.Conv2d(channels, out_channels, (height, width))
    else:
        raise ValueError(
            f"FitNetLoss can regress maps of the same, a smaller or twice the size, but the student's is "
            f"{' x '.join(map(str, size))} and the teacher's {' x '.join(map(str, goal))}; name other layers"
        )
    relu: nn.Module = nn.ReLU() if use_relu else nn.Identity()
    return nn.Sequential(OrderedDict[str, nn.Module](conv=conv, bn=nn.BatchNorm2d(out_channels), relu=relu))
