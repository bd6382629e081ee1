"""The three-stage CIFAR ResNets of depth 6n+2.

He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), section 4.2, with the projection
shortcuts (the paper's option B) that the distillation literature uses; the x4 networks are those of Tian et al. 2020,
"Contrastive Representation Distillation" (arXiv:1910.10699). Parameters are named as in the published weights.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from kdlit.models._common import (
    BasicBlock,
    blocks_per_stage,
    check_count,
    check_image,
    conv3x3,
    global_pool,
    init_convs,
    stage,
)
from kdlit.models.layers import FeatureLayers

X4_WIDTHS = (32, 64, 128, 256)


class ResNet(nn.Module):
    """CIFAR ResNet: a 3x3 stem and three stages of ``(depth - 2) / 6`` basic blocks.

    Paths of the published feature maps: ``relu``, ``layer1``, ``layer2``, ``layer3`` and, pooled, ``pool``; the sum
    before a block's last ReLU is its ``preact``, for example ``layer3.2.preact``.

    Args:
        depth: 6n+2 with n >= 1: 8, 14, 20, ...
        widths: Channels of the stem and of the three stages.
        num_classes: Size of the classifier.

    Raises:
        ValueError: If ``depth`` is not 6n+2, ``widths`` not four integers >= 1 or ``num_classes`` < 1.
    """

    def __init__(self, depth: int, widths: Sequence[int] = (16, 16, 32, 64), num_classes: int = 100) -> None:
        super().__init__()
        n_blocks = blocks_per_stage(depth, offset=2)
        if len(widths) != 4:
            raise ValueError(f"widths must be four integers (the stem and three stages), got {widths!r}")
        stem, width1, width2, width3 = (check_count("widths", width) for width in widths)
        self.conv1 = conv3x3(3, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = stage(BasicBlock, stem, width1, n_blocks, stride=1)
        self.layer2 = stage(BasicBlock, width1, width2, n_blocks, stride=2)
        self.layer3 = stage(BasicBlock, width2, width3, n_blocks, stride=2)
        self.pool = global_pool()
        self.fc = nn.Linear(width3, check_count("num_classes", num_classes))
        init_convs(self)

    @property
    def feature_layers(self) -> FeatureLayers:
        """Where to look inside."""
        last = len(self.layer1) - 1
        stages = ("layer1", "layer2", "layer3")
        return FeatureLayers(
            ("relu", *stages),
            ("relu", *(f"{stage}.{last}.preact" for stage in stages)),
            tuple(f"{stage}.{last}.bn2" for stage in stages),
            pool="pool",
            classifier="fc",
        )

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
        x = self.relu(self.bn1(self.conv1(image)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.pool(x))
        return logits


def resnet8(num_classes: int = 100) -> ResNet:
    """ResNet of depth 8, widths 16/16/32/64."""
    return ResNet(8, num_classes=num_classes)


def resnet14(num_classes: int = 100) -> ResNet:
    """ResNet of depth 14, widths 16/16/32/64."""
    return ResNet(14, num_classes=num_classes)


def resnet20(num_classes: int = 100) -> ResNet:
    """ResNet of depth 20, widths 16/16/32/64."""
    return ResNet(20, num_classes=num_classes)


def resnet32(num_classes: int = 100) -> ResNet:
    """ResNet of depth 32, widths 16/16/32/64."""
    return ResNet(32, num_classes=num_classes)


def resnet44(num_classes: int = 100) -> ResNet:
    """ResNet of depth 44, widths 16/16/32/64."""
    return ResNet(44, num_classes=num_classes)


def resnet56(num_classes: int = 100) -> ResNet:
    """ResNet of depth 56, widths 16/16/32/64."""
    return ResNet(56, num_classes=num_classes)


def resnet110(num_classes: int = 100) -> ResNet:
    """ResNet of depth 110, widths 16/16/32/64."""
    return ResNet(110, num_classes=num_classes)


def resnet8x4(num_classes: int = 100) -> ResNet:
    """ResNet of depth 8, widths 32/64/128/256."""
    return ResNet(8, X4_WIDTHS, num_classes)


def resnet32x4(num_classes: int = 100) -> ResNet:
    """ResNet of depth 32, widths 32/64/128/256."""
    return ResNet(32, X4_WIDTHS, num_classes)
