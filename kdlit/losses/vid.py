r"""Variational information distillation: Ahn et al., CVPR 2019, Variational Information Distillation, equations 4 to 7.

The mutual information of two maps is bounded from below by how well a Gaussian, whose mean comes from the student's map
and whose variance is learned for each channel, predicts the teacher's. RepDistiller is followed: the mean over all
elements, with half the logarithm of the variance, where the paper, which was not at hand, is said to sum. In mdistiller
the variance stays at its initial value; that is ``learn_variance=False``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlit.losses.feature import FeatureLoss, Shape, check_layers_give_maps, same_size
from kdlit.losses.functional import check_positive, full_precision
from kdlit.models.layers import FeatureLayers


class VIDLoss(FeatureLoss):
    r"""Predictable maps (Ahn et al. 2019).

    .. math:: L = \frac{1}{2 B C H W} \sum_{bchw} \frac{(t - \mu(s))_{bchw}^2}{\sigma_c^2} + \log \sigma_c^2, \quad
              \sigma_c^2 = \log(1 + e^{\alpha_c}) + \epsilon

    with :math:`\mu` three convolutions of size 1 without bias, ReLUs between them (``heads.K.conv0`` to ``conv2`` for
    the K-th pair), and :math:`\alpha` ``heads.K.log_scale``. Of two maps the larger is first brought to the smaller
    size by average pooling. Several pairs are added up.

    Args:
        student_layers: paths of layers that give maps; None for all maps of the network but that of its stem.
        teacher_layers: likewise of the teacher, as many.
        init_pred_var: variance at the beginning, > ``eps``.
        eps: :math:`\epsilon > 0`, the lowest variance.
        learn_variance: train the variances, as the paper does; False to leave them as they begin.

    Raises:
        ValueError: If a number is out of its range, or, at :meth:`setup`, if a layer gives no map.
    """

    def __init__(
        self,
        student_layers: Sequence[str] | str | None = None,
        teacher_layers: Sequence[str] | str | None = None,
        init_pred_var: float = 5.0,
        eps: float = 1e-5,
        learn_variance: bool = True,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.eps = check_positive("eps", eps)
        self.init_pred_var = check_positive("init_pred_var", init_pred_var)
        if init_pred_var <= eps:
            raise ValueError(f"init_pred_var must be > eps = {eps}, got {init_pred_var}")
        self.learn_variance = learn_variance

    def default_layers(self, layers: FeatureLayers) -> Sequence[str]:
        """All maps but that of the stem."""
        return layers.maps[1:]

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> None:
        """Make the predictor of each pair."""
        check_layers_give_maps(self, student, teacher)
        excess = self.init_pred_var - self.eps
        log_scale = excess + math.log(-math.expm1(-excess))  # log(exp(excess) - 1)
        self.heads = nn.ModuleList(
            _Gaussian(ours[1], theirs[1], log_scale, self.eps, self.learn_variance)
            for ours, theirs in zip(student, teacher, strict=True)
        )

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Scalar loss of one batch."""
        return torch.stack(list(map(_surprise, self.heads, student, teacher))).sum()


class _Gaussian(nn.Module):
    """Predicts the teacher's map from the student's: mean, shape ``(B, C, H, W)``, and variance, ``(C, 1, 1)``."""

    def __init__(self, channels: int, out_channels: int, log_scale: float, eps: float, learn_variance: bool) -> None:
        super().__init__()
        self.eps = eps
        self.conv0 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 1, bias=False)
        self.log_scale = nn.Parameter(torch.full((out_channels,), log_scale), requires_grad=learn_variance)

    def forward(self, student: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.conv2(self.conv1(self.conv0(student).relu()).relu())
        return mean, (F.softplus(self.log_scale) + self.eps).view(-1, 1, 1)


@full_precision
def _surprise(predict: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = same_size(student, teacher)
    mean, variance = predict(student)
    loss: Tensor = ((teacher - mean).square() / variance + variance.log()).mean() / 2
    return loss
