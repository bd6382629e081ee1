"""MobileNetV2 in the two forms of the distillation literature.

Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (arXiv:1801.04381). For CIFAR: half width,
plain ReLU and a stem of stride 2. For Tiny-ImageNet: full width, ReLU6, convolutions with bias and a 1x1 convolution as
classifier. Both expand even where the factor is 1, which torchvision's MobileNetV2 does not, and have other strides:
its weights belong to another network. Parameters are named as in the published weights.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from kdlit.models._common import check_count, check_image, conv3x3, depthwise3x3, global_pool, init_classifier, init_convs
from kdlit.models._common import stage as repeat

LAST_WIDTH = 1280


def _bottleneck(
    in_width: int, out_width: int, stride: int, expansion: int, bias: bool, activation: Callable[[], nn.Module]
) -> nn.Sequential:
    """Expand, filter every channel by itself, and project, the last without activation."""
    width = expansion * in_width
    return nn.Sequential(
        *(nn.Conv2d(in_width, width, kernel_size=1, bias=bias), nn.BatchNorm2d(width), activation()),
        *(depthwise3x3(width, stride, bias=bias), nn.BatchNorm2d(width), activation()),
        *(nn.Conv2d(width, out_width, kernel_size=1, bias=bias), nn.BatchNorm2d(out_width)),
    )


class InvertedResidual(nn.Module):
    """Linear bottleneck with ReLU, added to its input where stride is 1 and widths agree."""

    def __init__(self, in_width: int, out_width: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.adds_input = stride == 1 and in_width == out_width
        self.conv = _bottleneck(in_width, out_width, stride, expansion, bias=False, activation=nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_width, H, W)`` to ``(B, out_width, H / stride, W / stride)``."""
        y: Tensor = self.conv(x)
        return x + y if self.adds_input else y


class InvertedResidual6(nn.Module):
    """The same with biases and ReLU6; its parameters have another prefix in the published weights."""

    def __init__(self, in_width: int, out_width: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.adds_input = stride == 1 and in_width == out_width
        self.residual = _bottleneck(in_width, out_width, stride, expansion, bias=True, activation=nn.ReLU6)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_width, H, W)`` to ``(B, out_width, H / stride, W / stride)``."""
        y: Tensor = self.residual(x)
        return x + y if self.adds_input else y
