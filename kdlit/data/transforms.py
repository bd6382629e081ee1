"""What happens to a batch of pictures on its way to the network: whole batches at once, on the device they lie on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop(image: Tensor, padding: int) -> Tensor:
    """Pad every picture with black and cut a window of the old size at a place of its own.

    Same distribution as ``torchvision.transforms.RandomCrop(size, padding=padding)`` applied to each picture.

    Args:
        image: shape ``(B, C, H, W)``, any type.
        padding: pixels added on each side, >= 0; 0 leaves the pictures as they are.
    """
    if padding == 0:
        return image
    top, left = torch.randint(0, 2 * padding + 1, (2, len(image)), device=image.device)
    return crop(image, padding, top, left)


def crop(image: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Cut windows of the old size out of the padded pictures, ``top`` and ``left`` (B,) in 0..2 * padding."""
    batch, channels, height, width = image.shape
    padded = F.pad(image, (padding,) * 4)
    rows = top[:, None] + torch.arange(height, device=image.device)
    columns = left[:, None] + torch.arange(width, device=image.device)
    samples = torch.arange(batch, device=image.device)[:, None, None, None]
    colours = torch.arange(channels, device=image.device)[None, :, None, None]
    return padded[samples, colours, rows[:, None, :, None], columns[:, None, None, :]]


def random_flip(image: Tensor) -> Tensor:
    """Mirror each picture, shape ``(B, C, H, W)``, left to right with probability one half."""
    flipped = torch.rand(len(image), device=image.device) < 0.5
    return torch.where(flipped[:, None, None, None], image.flip(-1), image)


def cutout(image: Tensor, size: int) -> Tensor:
    """Cover a grey square of ``size`` pixels around a random pixel of each uint8 picture, shape ``(B, C, H, W)``."""
    height, width = image.shape[-2:]
    top = torch.randint(0, height, (len(image), 1), device=image.device) - size // 2
    left = torch.randint(0, width, (len(image), 1), device=image.device) - size // 2
    rows, columns = torch.arange(height, device=image.device), torch.arange(width, device=image.device)
    in_rows = (rows >= top) & (rows < top + size)
    in_columns = (columns >= left) & (columns < left + size)
    return image.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 127)


def normalize(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn uint8 pictures, shape ``(B, C, H, W)``, into float32 with ``(image / 255 - mean) / std`` a channel."""
    scale = 255 * torch.tensor(std, device=image.device)[:, None, None]
    shift = 255 * torch.tensor(mean, device=image.device)[:, None, None]
    return (image.float() - shift) / scale
