"""What the CIFAR networks share: checks, convolution and stage builders, pooling, initialisation."""

from collections.abc import Callable

from torch import Tensor, nn

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


def check_image(image: Tensor) -> None:
    """Refuse what is not a batch of RGB images, ``(B, 3, H, W)``.

    Raises:
        ValueError: If the rank, the channel count or the image size is wrong.
    """
    if image.ndim != 4 or image.shape[1] != 3 or min(image.shape[2:]) < MIN_IMAGE_SIZE:
        raise ValueError(
            f"image must have shape (B, 3, H, W) with H and W >= {MIN_IMAGE_SIZE}, got {tuple(image.shape)}"
        )


def conv3x3(in_width: int, out_width: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution, padding 1, no bias."""
    return nn.Conv2d(in_width, out_width, kernel_size=3, stride=stride, padding=1, bias=False)


def conv1x1(in_width: int, out_width: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution, no bias."""
    return nn.Conv2d(in_width, out_width, kernel_size=1, stride=stride, bias=False)


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
    """Draw every k x k convolution anew, in module order, from a normal of variance ``2 / (k * k * out_width)``."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
