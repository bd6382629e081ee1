"""Wide ResNets for CIFAR.

Zagoruyko and Komodakis 2016, "Wide Residual Networks" (arXiv:1605.07146), without dropout. Parameters are named as in
the published weights.
"""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn.functional import relu

from kdlit.models._common import (
    blocks_per_stage,
    check_count,
    check_image,
    conv1x1,
    conv3x3,
    global_pool,
    init_convs,
    stage,
)
from kdlit.models.layers import FeatureLayers


class PreactBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU, added to the block's input.

    Where the width changes, a 1x1 projection of the *activated* input is added; elsewhere the raw input.
    """

    def __init__(self, in_width: int, out_width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv1 = conv3x3(in_width, out_width, stride)
        self.bn2 = nn.BatchNorm2d(out_width)
        self.conv2 = conv3x3(out_width, out_width)
        self.convShortcut = None if in_width == out_width else conv1x1(in_width, out_width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_width, H, W)`` to ``(B, out_width, H / stride, W / stride)``."""
        active = relu(self.bn1(x))
        residual: Tensor = self.conv2(relu(self.bn2(self.conv1(active))))
        return residual + (x if self.convShortcut is None else self.convShortcut(active))


class WideResNet(nn.Module):
    """Wide ResNet: a bare 3x3 stem of 16 channels and three stages of ``(depth - 4) / 6`` pre-activation blocks.

    Paths of the published feature maps: ``conv1``, ``block1``, ``block2``, ``block3`` (raw sums, neither normalised nor
    rectified) and, pooled, ``pool``; the published pre-activation maps are the outputs of ``block2.layer.0.bn1``,
    ``block3.layer.0.bn1`` and ``bn1``.

    Args:
        depth: 6n+4 with n >= 1: 10, 16, 22, 28, 40, ...
        width: Factor on the stages' 16/32/64 channels.
        num_classes: Size of the classifier.

    Raises:
        ValueError: If ``depth`` is not 6n+4, ``width`` < 1 or ``num_classes`` < 1.
    """

    def __init__(self, depth: int, width: int, num_classes: int = 100) -> None:
        super().__init__()
        n_blocks = blocks_per_stage(depth, offset=4)
        stem, width1, width2, width3 = 16, *(base * check_count("width", width) for base in (16, 32, 64))
        self.conv1 = conv3x3(3, stem)
        self.block1 = _named_stage(stem, width1, n_blocks, stride=1)
        self.block2 = _named_stage(width1, width2, n_blocks, stride=2)
        self.block3 = _named_stage(width2, width3, n_blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(width3)
        self.pool = global_pool()
        self.fc = nn.Linear(width3, check_count("num_classes", num_classes))
        init_convs(self)
        nn.init.zeros_(self.fc.bias)

    @property
    def feature_layers(self) -> FeatureLayers:
        """Where to look inside."""
        norms = ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")
        return FeatureLayers(("conv1", "block1", "block2", "block3"), ("conv1", *norms), norms, "pool", "fc")

    def forward(self, image: Tensor) -> Tensor:
        """Classify images of any size from 4x4 on; the published weights expect 32x32.

        Args:
            image: Shape ``(B, 3, H, W)``.

        Returns:
            Logits, shape ``(B, num_classes)``.

        Raises:
            ValueError: If ``image`` is no such batch.
        """
        check_image(image)
        x = self.block3(self.block2(self.block1(self.conv1(image))))
        logits: Tensor = self.fc(self.pool(relu(self.bn1(x))))
        return logits


def _named_stage(in_width: int, out_width: int, n_blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layer=stage(PreactBlock, in_width, out_width, n_blocks, stride)))


def wrn_16_1(num_classes: int = 100) -> WideResNet:
    """WRN-16-1: depth 16, stage widths 16/32/64."""
    return WideResNet(16, 1, num_classes)


def wrn_16_2(num_classes: int = 100) -> WideResNet:
    """WRN-16-2: depth 16, stage widths 32/64/128."""
    return WideResNet(16, 2, num_classes)


def wrn_16_4(num_classes: int = 100) -> WideResNet:
    """WRN-16-4: depth 16, stage widths 64/128/256."""
    return WideResNet(16, 4, num_classes)


def wrn_28_2(num_classes: int = 100) -> WideResNet:
    """WRN-28-2: depth 28, stage widths 32/64/128."""
    return WideResNet(28, 2, num_classes)


def wrn_28_4(num_classes: int = 100) -> WideResNet:
    """WRN-28-4: depth 28, stage widths 64/128/256."""
    return WideResNet(28, 4, num_classes)


def wrn_40_1(num_classes: int = 100) -> WideResNet:
    """WRN-40-1: depth 40, stage widths 16/32/64."""
    return WideResNet(40, 1, num_classes)


def wrn_40_2(num_classes: int = 100) -> WideResNet:
    """WRN-40-2: depth 40, stage widths 32/64/128."""
    return WideResNet(40, 2, num_classes)
