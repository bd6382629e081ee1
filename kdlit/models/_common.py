"""What the CIFAR networks share: checks, convolution and stage builders, pooling, initialisation."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import relu

MIN_IMAGE_SIZE = 4  # two stages of stride 2: a smaller image has no position left to pool over


def check_count(name: str, value: int) -> int:
    """Return ``value`` if it is an integer >= 1.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return value


def blocks_per_stage(depth: int, offset: int) -> int:
    """Return ``n`` of a three-stage network whose depth is ``6n + offset``.

    Raises:
        ValueError: If no such ``n >= 1`` exists.
    """
    if not isinstance(depth, int) or depth < 6 + offset or (depth - offset) % 6:
        raise ValueError(f"depth must be 6n+{offset} with n >= 1, got {depth!r}")
    return (depth - offset) // 6


def check_image(image: Tensor, min_size: int = MIN_IMAGE_SIZE) -> None:
    """Refuse what is not a batch of RGB images, ``(B, 3, H, W)``, with H and W of at least ``min_size``.

    Raises:
        ValueError: If the rank, the channel count or the image size is wrong.
    """
    if image.ndim != 4 or image.shape[1] != 3 or min(image.shape[2:]) < min_size:
        raise ValueError(f"image must have shape (B, 3, H, W) with H and W >= {min_size}, got {tuple(image.shape)}")


def conv3x3(in_width: int, out_width: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution, padding 1, no bias."""
    return nn.Conv2d(in_width, out_width, kernel_size=3, stride=stride, padding=1, bias=False)


def conv1x1(in_width: int, out_width: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """1x1 convolution."""
    return nn.Conv2d(in_width, out_width, kernel_size=1, stride=stride, groups=groups, bias=bias)


def depthwise3x3(width: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """3x3 convolution of every channel by itself, padding 1."""
    return nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, groups=width, bias=bias)


class ResidualBlock(nn.Module):
    """A residual branch added to the block's input; ``preact`` is the sum before the last ReLU.

    Where width or size change, the input is projected: a 1x1 convolution and BatchNorm. Sub-classes build the branch,
    then call ``add_shortcut``, because the published weights have the projection last.
    """

    shortcut_name = "downsample"  # what the published weights call the projection

    def add_shortcut(self, in_width: int, out_width: int, stride: int) -> None:
        """Create the projection, or what passes the input on as it is."""
        projection = (
            nn.Identity()
            if stride == 1 and in_width == out_width
            else nn.Sequential(conv1x1(in_width, out_width, stride), nn.BatchNorm2d(out_width))
        )
        self.add_module(self.shortcut_name, projection)
        self.preact = nn.Identity()  # gives the sum a path that a forward hook can name

    def residual(self, x: Tensor) -> Tensor:
        """Map ``(B, in_width, H, W)`` to ``(B, out_width, H / stride, W / stride)``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_width, H, W)`` to ``(B, out_width, H / stride, W / stride)``."""
        return relu(self.preact(self.residual(x) + self.get_submodule(self.shortcut_name)(x)))


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions added to the block's input."""

    def __init__(self, in_width: int, out_width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_width, out_width, stride)
        self.bn1 = nn.BatchNorm2d(out_width)
        self.conv2 = conv3x3(out_width, out_width)
        self.bn2 = nn.BatchNorm2d(out_width)
        self.add_shortcut(in_width, out_width, stride)

    def residual(self, x: Tensor) -> Tensor:
        """Map ``(B, in_width, H, W)`` to ``(B, out_width, H / stride, W / stride)``."""
        branch: Tensor = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return branch


def stage(
    block: Callable[[int, int, int], nn.Module], in_width: int, out_width: int, n_blocks: int, stride: int
) -> nn.Sequential:
    """``n_blocks`` of ``block(in_width, out_width, stride)`` in a row; the first alone changes width and size."""
    first = block(in_width, out_width, stride)
    return nn.Sequential(first, *(block(out_width, out_width, 1) for _ in range(n_blocks - 1)))


def global_pool() -> nn.Sequential:
    """Mean over all positions: ``(B, C, H, W)`` to ``(B, C)``, for any H and W."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def init_convs(model: nn.Module) -> None:
    """Draw every k x k convolution anew, in module order, from a normal of variance ``2 / (k * k * out_width)``.

    Their biases, where they have any, become 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_classifier(linear: nn.Linear) -> None:
    """Draw the weight anew from a normal of standard deviation 0.01; the bias becomes 0."""
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
