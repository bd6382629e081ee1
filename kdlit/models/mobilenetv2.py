"""MobileNetV2 in the two forms of the distillation literature.

Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (arXiv:1801.04381). For CIFAR: half width,
plain ReLU and a stem of stride 2. For Tiny-ImageNet: full width, ReLU6, convolutions with bias and a 1x1 convolution as
classifier. Both expand even where the factor is 1, which torchvision's MobileNetV2 does not, and have other strides:
its weights belong to another network. Parameters are named as in the published weights.
"""

from functools import partial

from torch import Tensor, nn

from kdlit.models._common import (
    check_count,
    check_image,
    conv1x1,
    conv3x3,
    depthwise3x3,
    global_pool,
    init_classifier,
    init_convs,
    stage,
)
from kdlit.models.layers import FeatureLayers

LAST_WIDTH = 1280
STAGES = (  # expansion, channels at full width, blocks, stride of the first
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
MIN_IMAGE_SIZE = 16  # stem and three stages of stride 2
MIN_IMAGE_SIZE_TINY = 8  # three stages of stride 2


class InvertedResidual(nn.Module):
    """Expand, filter every channel by itself, and project; add the input where stride is 1 and widths agree.

    ReLU follows the first two convolutions; nothing follows the projection or the sum.
    """

    branch_name = "conv"  # prefix of its parameters in the published weights
    activation: type[nn.Module] = nn.ReLU
    bias = False

    def __init__(self, in_width: int, out_width: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = expansion * in_width
        branch = nn.Sequential(
            *(conv1x1(in_width, width, bias=self.bias), nn.BatchNorm2d(width), self.activation()),
            *(depthwise3x3(width, stride, bias=self.bias), nn.BatchNorm2d(width), self.activation()),
            *(conv1x1(width, out_width, bias=self.bias), nn.BatchNorm2d(out_width)),
        )
        self.add_module(self.branch_name, branch)
        self.adds_input = stride == 1 and in_width == out_width

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_width, H, W)`` to ``(B, out_width, H / stride, W / stride)``."""
        y: Tensor = self.get_submodule(self.branch_name)(x)
        return x + y if self.adds_input else y


class InvertedResidual6(InvertedResidual):
    """The same with ReLU6 and with biases."""

    branch_name = "residual"
    activation = nn.ReLU6
    bias = True


class MobileNetV2(nn.Module):
    """MobileNetV2 for CIFAR: a 3x3 stem of stride 2 and seven stages of inverted residuals with plain ReLU.

    Paths of the published feature maps: ``conv1`` (after its ReLU), ``blocks.1``, ``blocks.2``, ``blocks.4``,
    ``blocks.6`` (linear, so there is no other pre-activation) and, pooled, ``pool``.

    Args:
        width: Factor on the channels of the stem and the stages, products rounded down; the last 1280 stay.
        num_classes: Size of the classifier.

    Raises:
        ValueError: If ``width`` leaves a stage without channels or ``num_classes`` < 1.
    """

    def __init__(self, width: float = 0.5, num_classes: int = 100) -> None:
        super().__init__()
        if int(16 * width) < 1:
            raise ValueError(f"width must be at least 1/16, so that every stage has a channel, got {width!r}")
        in_width = int(32 * width)
        self.conv1 = nn.Sequential(conv3x3(3, in_width, stride=2), nn.BatchNorm2d(in_width), nn.ReLU())
        self.blocks = nn.Sequential()
        for expansion, full_width, n_blocks, stride in STAGES:
            out_width = int(full_width * width)
            block = partial(InvertedResidual, expansion=expansion)
            self.blocks.append(stage(block, in_width, out_width, n_blocks, stride))
            in_width = out_width
        self.conv2 = nn.Sequential(conv1x1(in_width, LAST_WIDTH), nn.BatchNorm2d(LAST_WIDTH), nn.ReLU())
        self.pool = global_pool()
        linear = nn.Linear(LAST_WIDTH, check_count("num_classes", num_classes))
        self.classifier = nn.Sequential(linear)
        init_convs(self)
        init_classifier(linear)

    @property
    def feature_layers(self) -> FeatureLayers:
        """Where to look inside."""
        maps = ("conv1", "blocks.1", "blocks.2", "blocks.4", "blocks.6")
        last = [f"{path}.{len(self.get_submodule(path)) - 1}" for path in maps[1:]]  # type: ignore[arg-type]
        norms = tuple(f"{block}.conv.7" for block in last)
        return FeatureLayers(maps, maps, norms, "pool", "classifier.0")

    def forward(self, image: Tensor) -> Tensor:
        """Classify images of any size from 16x16 on; the published weights expect 32x32.

        Args:
            image: Shape ``(B, 3, H, W)``.

        Returns:
            Logits, shape ``(B, num_classes)``.

        Raises:
            ValueError: If ``image`` is no such batch.
        """
        check_image(image, MIN_IMAGE_SIZE)
        x = self.conv2(self.blocks(self.conv1(image)))
        logits: Tensor = self.classifier(self.pool(x))
        return logits


class MobileNetV2TinyImageNet(nn.Module):
    """MobileNetV2 for Tiny-ImageNet: full width, a 1x1 stem that pads, and seven stages with ReLU6.

    Paths of the published feature maps: ``pre``, ``stage2``, ``stage3``, ``stage4``, ``conv1`` and, pooled, ``pool``.

    Args:
        num_classes: Size of the classifier.

    Raises:
        ValueError: If ``num_classes`` < 1.
    """

    def __init__(self, num_classes: int = 200) -> None:
        super().__init__()
        stem = nn.Conv2d(3, 32, kernel_size=1, padding=1)  # adds a border of one pixel
        self.pre = nn.Sequential(stem, nn.BatchNorm2d(32), nn.ReLU6())
        self.stage1 = InvertedResidual6(32, 16, stride=1, expansion=1)
        block = partial(InvertedResidual6, expansion=6)
        self.stage2 = stage(block, 16, 24, 2, stride=2)
        self.stage3 = stage(block, 24, 32, 3, stride=2)
        self.stage4 = stage(block, 32, 64, 4, stride=2)
        self.stage5 = stage(block, 64, 96, 3, stride=1)
        self.stage6 = stage(block, 96, 160, 3, stride=1)
        self.stage7 = InvertedResidual6(160, 320, stride=1, expansion=6)
        self.conv1 = nn.Sequential(conv1x1(320, LAST_WIDTH, bias=True), nn.BatchNorm2d(LAST_WIDTH), nn.ReLU6())
        self.pool = global_pool()
        self.conv2 = conv1x1(LAST_WIDTH, check_count("num_classes", num_classes), bias=True)

    @property
    def feature_layers(self) -> FeatureLayers:
        """Where to look inside."""
        maps = ("pre", "stage2", "stage3", "stage4", "conv1")
        return FeatureLayers(maps, maps, pool="pool", classifier="conv2")

    def forward(self, image: Tensor) -> Tensor:
        """Classify images of any size from 8x8 on; the published weights expect 64x64 or 32x32.

        Args:
            image: Shape ``(B, 3, H, W)``.

        Returns:
            Logits, shape ``(B, num_classes)``.

        Raises:
            ValueError: If ``image`` is no such batch.
        """
        check_image(image, MIN_IMAGE_SIZE_TINY)
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.pre(image)))))
        x = self.conv1(self.stage7(self.stage6(self.stage5(x))))
        logits: Tensor = self.conv2(self.pool(x)[:, :, None, None])
        return logits.flatten(1)


def mobilenetv2(num_classes: int = 100) -> MobileNetV2:
    """MobileNetV2 of half width for CIFAR."""
    return MobileNetV2(0.5, num_classes)


def mobilenetv2_tinyimagenet(num_classes: int = 200) -> MobileNetV2TinyImageNet:
    """MobileNetV2 of full width for Tiny-ImageNet; weiaicunzai's CIFAR network is the same with 100 classes."""
    return MobileNetV2TinyImageNet(num_classes)
