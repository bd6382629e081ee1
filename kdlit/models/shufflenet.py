"""ShuffleNets for CIFAR: a 1x1 stem of stride 1 and three stages of shuffled blocks.

V1: Zhang et al. 2018, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices"
(arXiv:1707.01083), 3 groups; the published CIFAR network has a ReLU after the depthwise convolution, which the paper
has not. V2: Ma et al. 2018, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design"
(arXiv:1807.11164), size 1x. Parameters are named as in the published weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from kdlit.models._common import check_count, check_image, conv1x1, depthwise3x3, global_pool, stage
from kdlit.models.layers import FeatureLayers

STEM_WIDTH = 24
GROUPS = 3  # of V1
MIN_IMAGE_SIZE = 8  # three stages of stride 2


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of ``groups`` equal parts: the first of each part, then the second of each, ..."""
    batch, width, height, breadth = x.shape
    return x.view(batch, groups, width // groups, height, breadth).transpose(1, 2).reshape(x.shape)


class GroupedBlock(nn.Module):
    """Block of V1: grouped 1x1, depthwise 3x3 and grouped 1x1 convolutions, channels shuffled after the first.

    The input is added to the result or, where the stride is 2, pooled and appended; ``preact`` is that before the last
    ReLU.
    """

    def __init__(self, in_width: int, out_width: int, stride: int) -> None:
        super().__init__()
        branch_width = out_width - in_width if stride == 2 else out_width
        width = branch_width // 4
        self.stride = stride
        self.groups = 1 if in_width == STEM_WIDTH else GROUPS
        self.conv1 = conv1x1(in_width, width, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = depthwise3x3(width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, branch_width, groups=GROUPS)
        self.bn3 = nn.BatchNorm2d(branch_width)
        self.preact = nn.Identity()  # gives the value a path that a forward hook can name

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_width, H, W)`` to ``(B, out_width, H / stride, W / stride)``."""
        branch = channel_shuffle(relu(self.bn1(self.conv1(x))), self.groups)
        branch = self.bn3(self.conv3(relu(self.bn2(self.conv2(branch)))))
        if self.stride == 2:
            return relu(self.preact(torch.cat([branch, avg_pool2d(x, 3, stride=2, padding=1)], dim=1)))
        return relu(self.preact(branch + x))


class SplitBlock(nn.Module):
    """Block of V2 that passes one half of the channels and convolves the other, then shuffles.

    ``preact`` is both halves before the last ReLU and before the shuffle; the ReLU changes only the second, because
    what a block or the stem gives is not negative.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = depthwise3x3(half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.preact = nn.Identity()  # gives the value a path that a forward hook can name

    def forward(self, x: Tensor) -> Tensor:
        """Map a batch, not negative, of shape ``(B, width, H, W)`` to the same shape."""
        passed, half = x.chunk(2, dim=1)
        half = self.bn2(self.conv2(relu(self.bn1(self.conv1(half)))))
        half = self.bn3(self.conv3(half))
        return channel_shuffle(relu(self.preact(torch.cat([passed, half], dim=1))), groups=2)


class DownBlock(nn.Module):
    """First block of a V2 stage: two branches of stride 2, each half the width, then shuffled."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        half = out_width // 2
        self.conv1 = depthwise3x3(in_width, stride=2)
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv2 = conv1x1(in_width, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(in_width, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = depthwise3x3(half, stride=2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_width, H, W)`` to ``(B, out_width, H / 2, W / 2)``."""
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = self.bn4(self.conv4(relu(self.bn3(self.conv3(x)))))
        right = self.bn5(self.conv5(right))
        return channel_shuffle(relu(torch.cat([left, right], dim=1)), groups=2)


def split_or_down(in_width: int, out_width: int, stride: int) -> nn.Module:
    """Make a block of V2."""
    return DownBlock(in_width, out_width) if stride == 2 else SplitBlock(out_width)


class _ShuffleNet(nn.Module):
    """What both versions share: the stem and three stages of 4, 8 and 4 blocks."""

    def __init__(self, block: Callable[[int, int, int], nn.Module], widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv1 = conv1x1(3, STEM_WIDTH)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.relu = nn.ReLU()
        self.layer1 = stage(block, STEM_WIDTH, widths[0], n_blocks=4, stride=2)
        self.layer2 = stage(block, widths[0], widths[1], n_blocks=8, stride=2)
        self.layer3 = stage(block, widths[1], widths[2], n_blocks=4, stride=2)

    @property
    def feature_layers(self) -> FeatureLayers:
        """Where to look inside."""
        stages = {"layer1": 3, "layer2": 7, "layer3": 3}
        preact = (f"{stage}.{last}.preact" for stage, last in stages.items())
        return FeatureLayers(("relu", *stages), ("relu", *preact), pool="pool", classifier="linear")

    def stages(self, image: Tensor) -> Tensor:
        check_image(image, MIN_IMAGE_SIZE)
        x = self.relu(self.bn1(self.conv1(image)))
        maps: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return maps


class ShuffleNetV1(_ShuffleNet):
    """ShuffleNetV1 for CIFAR, 3 groups, stage widths 240/480/960.

    Paths of the published feature maps: ``relu``, ``layer1``, ``layer2``, ``layer3`` and, pooled, ``pool``; before a
    block's last ReLU they are its ``preact``, for example ``layer3.3.preact``.

    Args:
        num_classes: Size of the classifier.

    Raises:
        ValueError: If ``num_classes`` < 1.
    """

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__(GroupedBlock, (240, 480, 960))
        self.pool = global_pool()
        self.linear = nn.Linear(960, check_count("num_classes", num_classes))

    def forward(self, image: Tensor) -> Tensor:
        """Classify images of any size from 8x8 on; the published weights expect 32x32.

        Args:
            image: Shape ``(B, 3, H, W)``.

        Returns:
            Logits, shape ``(B, num_classes)``.

        Raises:
            ValueError: If ``image`` is no such batch.
        """
        logits: Tensor = self.linear(self.pool(self.stages(image)))
        return logits


class ShuffleNetV2(_ShuffleNet):
    """ShuffleNetV2 for CIFAR, size 1x, stage widths 116/232/464.

    Paths of the published feature maps: ``relu``, ``layer1``, ``layer2``, ``layer3`` and, pooled, ``pool``; before a
    block's last ReLU and shuffle they are its ``preact``, for example ``layer3.3.preact``.

    Args:
        num_classes: Size of the classifier.

    Raises:
        ValueError: If ``num_classes`` < 1.
    """

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__(split_or_down, (116, 232, 464))
        self.conv2 = conv1x1(464, 1024)
        self.bn2 = nn.BatchNorm2d(1024)
        self.pool = global_pool()
        self.linear = nn.Linear(1024, check_count("num_classes", num_classes))

    def forward(self, image: Tensor) -> Tensor:
        """Classify images of any size from 8x8 on; the published weights expect 32x32.

        Args:
            image: Shape ``(B, 3, H, W)``.

        Returns:
            Logits, shape ``(B, num_classes)``.

        Raises:
            ValueError: If ``image`` is no such batch.
        """
        x = relu(self.bn2(self.conv2(self.stages(image))))
        logits: Tensor = self.linear(self.pool(x))
        return logits


def shufflenetv1(num_classes: int = 100) -> ShuffleNetV1:
    """ShuffleNetV1 with 3 groups."""
    return ShuffleNetV1(num_classes)


def shufflenetv2(num_classes: int = 100) -> ShuffleNetV2:
    """ShuffleNetV2 of size 1x."""
    return ShuffleNetV2(num_classes)
