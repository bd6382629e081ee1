"""What happens to a batch of pictures on its way to the network: whole batches at once, on the device they lie on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_flip(image: Tensor, padding: int, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Pad each picture with black, cut a window of the old size out of it, and mirror some left to right.

    With ``top`` and ``left`` uniform in ``0 .. 2 * padding`` and ``flip`` true for one half, this is the distribution
    of ``RandomCrop(size, padding=padding)`` and ``RandomHorizontalFlip()`` applied to each picture.

    Args:
        image: shape ``(B, C, H, W)``, any type.
        padding: pixels added on each side, >= 0.
        top: first row of each window in the padded picture, int64, shape ``(B,)``.
        left: first column, likewise.
        flip: whether to mirror what was cut out, bool, shape ``(B,)``.
    """
    batch, channels, height, width = image.shape
    padded = F.pad(image, (padding,) * 4)
    # A window is H runs of W neighbours in memory, and a mirrored one is so in the mirrored picture: index_select
    # copies runs, several times faster than gathering pixels.
    both = torch.stack((padded, padded.flip(-1)))
    rows, columns = padded.shape[-2:]
    left = torch.where(flip, columns - width - left, left)
    first = (flip * batch + torch.arange(batch, device=image.device)) * channels * rows * columns + top * columns + left
    planes = torch.arange(channels, device=image.device)[:, None] * rows * columns
    lines = (planes + torch.arange(height, device=image.device) * columns).flatten()
    runs = both.view(-1).unfold(0, width, 1)
    return runs.index_select(0, (first[:, None] + lines).flatten()).view(batch, channels, height, width)


def cutout(image: Tensor, size: int, row: Tensor, column: Tensor) -> Tensor:
    """Cover a grey square around one pixel of each uint8 picture; what lies outside the picture is cut off.

    Args:
        image: uint8, shape ``(B, C, H, W)``.
        size: side of the square in pixels.
        row: row of its centre, int64, shape ``(B,)``.
        column: column of its centre, likewise.
    """
    height, width = image.shape[-2:]
    top, left = row[:, None] - size // 2, column[:, None] - size // 2
    rows, columns = torch.arange(height, device=image.device), torch.arange(width, device=image.device)
    in_rows = (rows >= top) & (rows < top + size)
    in_columns = (columns >= left) & (columns < left + size)
    return image.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 127)


def one_by_one(transform: Callable[[Tensor], Tensor], image: Tensor | Sequence[Tensor], draw: Tensor) -> Tensor:
    """Apply a random transform to each picture of a batch by itself, seeded by a number for each.

    Args:
        transform: takes one uint8 picture, ``(C, H, W)``, and draws from torch's global generator.
        image: shape ``(B, C, H, W)``, or one ``(C, H, W)`` a picture.
        draw: numbers in [0, 1) that settle what is drawn, float64, shape ``(B,)``.

    Raises:
        ValueError: If the results differ in size or are not uint8.
    """
    done = []
    with torch.random.fork_rng(devices=[]):  # so that the generator is as before afterwards
        for one, number in zip(image, draw.tolist(), strict=True):
            torch.manual_seed(int(number * 2**53))
            done.append(transform(one))
    if any(one.dtype != torch.uint8 for one in done):
        raise ValueError(
            f"transforms must give uint8 pictures, got {done[0].dtype}; leave scaling and normalisation to mean and std"
        )
    if len({one.shape for one in done}) > 1:
        sizes = ", ".join(sorted({str(tuple(one.shape)) for one in done})[:3])
        raise ValueError(
            f"the transforms must give pictures of one size, got {sizes}; end them with a resize or a crop"
        )
    return torch.stack(done)
