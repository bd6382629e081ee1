r"""OFD: Heo et al., ICCV 2019, A Comprehensive Overhaul of Feature Distillation, equations 1 to 5.

The student learns the teacher's maps before the ReLU. A negative value of the teacher only says that there is no
response: it is cut at a margin, the mean of that channel's negative values, and a student already below it is left
alone. The margins follow from the batch norm before the ReLU; where its mean lies so far above zero that less than
0.001 of the values are negative, the authors' code takes -3 standard deviations, as here.

The loss is what mdistiller and the authors' code agree on: a sum over channels and positions, a mean over the batch,
half the weight for each stage further from the last. Published weights for it are 0.001 on CIFAR-100 and 0.0001 on
ImageNet. mdistiller takes margins from the first batch norms even where it pairs maps from the last; here a margin
always belongs to its map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlit.losses.feature import FeatureLoss, Features, Shape, check_layers_give_maps, in_pairs
from kdlit.losses.functional import full_precision
from kdlit.models.features import find_layer
from kdlit.models.layers import FeatureLayers, feature_layers

RARE = 0.001  # share of negative values below which their mean is not used


def negative_mean(norm: nn.Module) -> Tensor:
    r"""Margin of each channel after a batch norm: the mean of what is negative of a normal distribution.

    .. math:: m = \mu - \sigma \frac{\phi(\mu / \sigma)}{\Phi(-\mu / \sigma)}, \quad
              \text{or } -3 \sigma \text{ if } \Phi(-\mu / \sigma) \leq 0.001

    with :math:`\mu` the bias and :math:`\sigma` the absolute weight, computed in float64.

    Args:
        norm: a batch norm with weight and bias, shape ``(C,)`` each.

    Returns:
        Shape ``(C,)``, in the dtype of the weight, at most 0.

    Raises:
        ValueError: If the layer has no weight and bias per channel.
    """
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or weight.ndim != 1:
        raise ValueError(f"margins follow from weight and bias of a batch norm, got {norm}")
    mean, deviation = bias.detach().double(), weight.detach().double().abs().clamp_min(1e-30)
    ratio = mean / deviation
    share = torch.special.ndtr(-ratio)
    density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
    return torch.where(share > RARE, mean - deviation * density / share, -3 * deviation).to(weight)


@full_precision
def _stage_loss(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    target = torch.maximum(teacher, margin.view(-1, 1, 1))
    counts = (student > target) | (teacher > 0)
    return torch.where(counts, student - target, 0.0).square().flatten(1).sum(dim=1).mean()


def ofd_loss(student_feat: Features, teacher_feat: Features, *, margins: Sequence[Tensor]) -> Tensor:
    r"""Partial squared distance of maps before the ReLU.

    .. math:: L = \sum_{k=1}^{n} 2^{k-n} \frac{1}{B} \sum (x_k - \max(t_k, m_k))^2 \,
              [x_k > \max(t_k, m_k) \text{ or } t_k > 0]

    Args:
        student_feat: :math:`x_k` after the connectors, shape ``(B, C, H, W)``, from shallow to deep, or one map.
        teacher_feat: :math:`t_k`, as many of as many channels; averaged to the student's height and width.
        margins: :math:`m_k`, shape ``(C,)``, one for each map.

    Returns:
        Scalar, at least 0; 0 where the student gives the teacher's maps.

    Raises:
        ValueError: If the numbers of maps or margins or the batch sizes differ.

    Example:
        >>> import torch
        >>> student = torch.tensor([2.0, -9.0, 0.0]).view(1, 1, 1, 3)
        >>> teacher = torch.tensor([1.0, -2.0, -3.0]).view(1, 1, 1, 3)
        >>> ofd_loss(student, teacher, margins=[torch.tensor([-1.0])])  # (2 - 1)^2 + 0 + (0 - -1)^2
        tensor(2.)
    """
    pairs = in_pairs(student_feat, teacher_feat)
    if len(margins) != len(pairs):
        raise ValueError(f"margins must be one for each of the {len(pairs)} maps, got {len(margins)}")
    stages = [
        _stage_loss(student, F.adaptive_avg_pool2d(teacher, (student.shape[-2], student.shape[-1])), margin)
        for (student, teacher), margin in zip(pairs, margins, strict=True)
    ]
    return torch.stack([stage / 2**depth for depth, stage in enumerate(reversed(stages))]).sum()


class DeepestLayersLoss(FeatureLoss):
    """Base of losses that pair layers from the last to the first, so that the shallowest are left over.

    Arguments and errors are those of :class:`~kdlit.losses.FeatureLoss`.
    """

    def align(self, found: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Make as many layers of both networks: of defaults the deepest, as many as the other has."""
        count = min(map(len, found))
        cut = [layers[-count:] if given is None else layers for layers, given in zip(found, self._given, strict=True)]
        return self._in_pairs(cut)


class OFDLoss(DeepestLayersLoss):
    """Maps before the ReLU, the teacher's cut at a margin (Heo et al. 2019): see :func:`ofd_loss`.

    Each map of the student passes a convolution and a batch norm, ``connector0``, ``connector1``, ..., which train with
    it. By default the maps of all stages but the stem, paired from the last; published weights are 0.001 (CIFAR-100)
    and 0.0001 (ImageNet).

    Args:
        student_layers: dotted paths of student layers, from shallow to deep, or one path; None: the maps before the
            ReLU of a network that names them.
        teacher_layers: likewise of the teacher, as many.
        teacher_norms: dotted paths of the teacher's batch norms before these ReLUs, one for each of its layers; None:
            those that the teacher names, or the layer itself if it is a batch norm.
        kernel_size: of the connectors' convolutions, odd.

    Raises:
        ValueError: If ``kernel_size`` is no odd number >= 1, or, at :meth:`setup`, if a network does not say where to
            look, a layer gives no map or has no batch norm.
    """

    across_batch = True

    def __init__(
        self,
        student_layers: Sequence[str] | str | None = None,
        teacher_layers: Sequence[str] | str | None = None,
        teacher_norms: Sequence[str] | str | None = None,
        kernel_size: int = 1,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be an odd number >= 1, got {kernel_size!r}")
        self.kernel_size = kernel_size
        self.teacher_norms = (teacher_norms,) if isinstance(teacher_norms, str) else teacher_norms

    def default_layers(self, layers: FeatureLayers) -> Sequence[str]:
        """All stages before their last ReLU, without the stem."""
        return layers.preact[1:]

    def setup(
        self, student: nn.Module, teacher: nn.Module | None, example: Tensor, teacher_example: Tensor | None = None
    ) -> None:
        """Settle the layers, build the connectors and compute the margins."""
        super().setup(student, teacher, example, teacher_example)
        assert teacher is not None
        for index, path in enumerate(self._norms_of(teacher)):
            margin = negative_mean(find_layer(teacher, path))
            connector: nn.Sequential = self.get_submodule(f"connector{index}")  # type: ignore[assignment]
            if len(margin) != (channels := connector.get_parameter("bn.weight").numel()):
                raise ValueError(
                    f"teacher_norms: {path!r} has {len(margin)} channels, but layer {self.teacher_layers[index]!r} of "
                    f"the teacher gives {channels}"
                )
            self.register_buffer(f"margin_{index}", margin)

    def _norms_of(self, teacher: nn.Module) -> Sequence[str]:
        if self.teacher_norms is not None:
            if len(self.teacher_norms) != len(self.teacher_layers):
                raise ValueError(
                    f"teacher_norms must be one for each of the teacher's layers {', '.join(self.teacher_layers)}, got "
                    f"{', '.join(self.teacher_norms)}"
                )
            return self.teacher_norms
        layers = feature_layers(teacher)
        known = dict(zip(layers.preact[::-1], layers.norms[::-1], strict=False))
        norms = [known.get(path, path) for path in self.teacher_layers]
        for path, norm in zip(self.teacher_layers, norms, strict=True):
            if not isinstance(dict(teacher.named_modules()).get(norm), nn.modules.batchnorm._BatchNorm):
                raise ValueError(
                    f"OFDLoss needs teacher_norms: {type(teacher).__name__} names no batch norm before the ReLU after "
                    f"{path!r}; name one for each of {', '.join(self.teacher_layers)}"
                )
        return norms

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> None:
        """Make a connector for each pair of maps."""
        check_layers_give_maps(self, student, teacher)
        for index, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
            conv = nn.Conv2d(ours[1], theirs[1], self.kernel_size, padding=self.kernel_size // 2, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            connector = nn.Sequential()
            connector.add_module("conv", conv)
            connector.add_module("bn", nn.BatchNorm2d(theirs[1]))
            self.add_module(f"connector{index}", connector)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Connect the student's maps and compare."""
        connected = [self.get_submodule(f"connector{index}")(feature) for index, feature in enumerate(student)]
        margins = [self.get_buffer(f"margin_{index}") for index in range(len(student))]
        return ofd_loss(connected, teacher, margins=margins)
