"""The four-stage ResNets (18, 34, 50, 101, 152) in the form for 32x32 images.

He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), table 1, with a 3x3 stem of stride 1
and no max-pool, as the CIFAR experiments of the distillation literature have them. Parameters are named as in the
published weights: ``shortcut`` and ``linear`` where torchvision has ``downsample`` and ``fc``. The ImageNet forms are
torchvision's own (``torchvision.models.resnet18`` and so on).
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import relu

from kdlit.models import _common
from kdlit.models._common import (
    ResidualBlock,
    check_count,
    check_image,
    conv1x1,
    conv3x3,
    global_pool,
    init_convs,
    stage,
)
from kdlit.models.layers import FeatureLayers

MIN_IMAGE_SIZE = 8  # three stages of stride 2


class BasicBlock(_common.BasicBlock):
    """Two 3x3 convolutions added to the block's input; ``preact`` is the sum before the last ReLU."""

    shortcut_name = "shortcut"


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions, the first two a quarter as wide, added to the block's input.

    The 3x3 convolution carries the stride; ``preact`` is the sum before the last ReLU.
    """

    shortcut_name = "shortcut"
    expansion = 4

    def __init__(self, in_width: int, out_width: int, stride: int) -> None:
        super().__init__()
        width = out_width // self.expansion
        self.conv1 = conv1x1(in_width, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, out_width)
        self.bn3 = nn.BatchNorm2d(out_width)
        self.add_shortcut(in_width, out_width, stride)

    def residual(self, x: Tensor) -> Tensor:
        """Map ``(B, in_width, H, W)`` to ``(B, out_width, H / stride, W / stride)``."""
        x = relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))))
        branch: Tensor = self.bn3(self.conv3(x))
        return branch


class FourStageResNet(nn.Module):
    """ResNet with a 3x3 stem and four stages of basic or bottleneck blocks, for small images.

    Paths of the published feature maps: ``relu``, ``layer1`` to ``layer4`` and, pooled, ``pool``; the sum before a
    block's last ReLU is its ``preact``, for example ``layer4.1.preact``.

    Args:
        blocks: Number of blocks in each of the four stages.
        bottleneck: Whether the blocks are bottlenecks, whose stages are four times as wide.
        widths: Channels of the four stages, before that factor; the stem is as wide as the first.
        num_classes: Size of the classifier.

    Raises:
        ValueError: If ``blocks`` or ``widths`` are not four integers >= 1 or ``num_classes`` < 1.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        bottleneck: bool = False,
        widths: Sequence[int] = (64, 128, 256, 512),
        num_classes: int = 100,
    ) -> None:
        super().__init__()
        for name, values in (("blocks", blocks), ("widths", widths)):
            if len(values) != 4:
                raise ValueError(f"{name} must be four integers, one a stage, got {values!r}")
            for value in values:
                check_count(name, value)
        block = Bottleneck if bottleneck else BasicBlock
        stem = widths[0]
        width1, width2, width3, width4 = (width * (Bottleneck.expansion if bottleneck else 1) for width in widths)
        self.conv1 = conv3x3(3, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = stage(block, stem, width1, blocks[0], stride=1)
        self.layer2 = stage(block, width1, width2, blocks[1], stride=2)
        self.layer3 = stage(block, width2, width3, blocks[2], stride=2)
        self.layer4 = stage(block, width3, width4, blocks[3], stride=2)
        self.pool = global_pool()
        self.linear = nn.Linear(width4, check_count("num_classes", num_classes))
        init_convs(self)

    @property
    def feature_layers(self) -> FeatureLayers:
        """Where to look inside."""
        stages = ("layer1", "layer2", "layer3", "layer4")
        last = [f"{stage}.{len(getattr(self, stage)) - 1}" for stage in stages]
        norm = "bn3" if isinstance(self.layer1[0], Bottleneck) else "bn2"
        return FeatureLayers(
            ("relu", *stages),
            ("relu", *(f"{block}.preact" for block in last)),
            tuple(f"{block}.{norm}" for block in last),
            pool="pool",
            classifier="linear",
        )

    def forward(self, image: Tensor) -> Tensor:
        """Classify images of any size from 8x8 on; the published weights expect 32x32 or 64x64.

        Args:
            image: Shape ``(B, 3, H, W)``.

        Returns:
            Logits, shape ``(B, num_classes)``.

        Raises:
            ValueError: If ``image`` is no such batch.
        """
        check_image(image, MIN_IMAGE_SIZE)
        x = self.relu(self.bn1(self.conv1(image)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(self.pool(x))
        return logits


def resnet18(num_classes: int = 100) -> FourStageResNet:
    """ResNet-18 for small images: 2-2-2-2 basic blocks."""
    return FourStageResNet((2, 2, 2, 2), num_classes=num_classes)


def resnet34(num_classes: int = 100) -> FourStageResNet:
    """ResNet-34 for small images: 3-4-6-3 basic blocks."""
    return FourStageResNet((3, 4, 6, 3), num_classes=num_classes)


def resnet50(num_classes: int = 100) -> FourStageResNet:
    """ResNet-50 for small images: 3-4-6-3 bottlenecks."""
    return FourStageResNet((3, 4, 6, 3), bottleneck=True, num_classes=num_classes)


def resnet101(num_classes: int = 100) -> FourStageResNet:
    """ResNet-101 for small images: 3-4-23-3 bottlenecks."""
    return FourStageResNet((3, 4, 23, 3), bottleneck=True, num_classes=num_classes)


def resnet152(num_classes: int = 100) -> FourStageResNet:
    """ResNet-152 for small images: 3-8-36-3 bottlenecks."""
    return FourStageResNet((3, 8, 36, 3), bottleneck=True, num_classes=num_classes)
