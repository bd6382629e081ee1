"""Handwritten numbers 00 to 99 for trying things out: real pictures that come with scikit-learn, no download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits

from kdlit.data.base import PictureDataModule, Pictures, hold_out

_TEST_DIGITS, _VAL_DIGITS = 500, 297  # of 1,797; the other 1,000 are for training


class DigitPairs(PictureDataModule):
    """Pairs of handwritten digits side by side: 100 classes, pictures of 3x8x16.

    The 1,797 digits (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, test part) are split
    first, 1,000 for training, 297 for validation and 500 for testing; pairs are drawn within each part, as many of each
    class. So no pen stroke is in two parts. Training pictures are shifted by up to one pixel.

    Args:
        train_size: training pairs, a multiple of 100.
        val_size: validation pairs, a multiple of 100.
        test_size: test pairs, a multiple of 100.
        mean: mean of each channel, for pictures scaled to 0..1.
        std: standard deviation of each channel, likewise.
        padding: black pixels around a training picture before a window of its size is cut out at random.
        **kwargs: of :class:`~kdlit.data.PictureDataModule`.

    Raises:
        ValueError: If a number of pairs is not a positive multiple of 100.
    """

    def __init__(
        self,
        train_size: int = 300,
        val_size: int = 2000,
        test_size: int = 5000,
        mean: Sequence[float] = (0.305, 0.305, 0.305),
        std: Sequence[float] = (0.376, 0.376, 0.376),
        padding: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(mean=mean, std=std, padding=padding, flip=False, **kwargs)
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        for split, size in self.sizes.items():
            if size < 100 or size % 100:
                raise ValueError(f"{split}_size must be a positive multiple of 100, one for each class, got {size}")

    def load(self) -> dict[str, Pictures]:
        """Draw the pairs of all three parts; ``split_seed`` settles which."""
        self.class_names = [f"{number:02d}" for number in range(100)]
        digits = load_digits()
        image = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
        target = torch.from_numpy(digits.target).long()
        test = hold_out(target, _TEST_DIGITS, self.split_seed)
        rest = (~test).nonzero().squeeze(1)
        val = rest[hold_out(target[rest], _VAL_DIGITS, self.split_seed)]
        train = rest[~torch.isin(rest, val)]
        parts = {"train": train, "val": val, "test": test.nonzero().squeeze(1)}
        generator = torch.Generator().manual_seed(self.split_seed)
        return {split: _pairs(image[part], target[part], self.sizes[split], generator) for split, part in parts.items()}


def _pairs(image: torch.Tensor, target: torch.Tensor, size: int, generator: torch.Generator) -> Pictures:
    """Draw ``size`` pairs of digits, equally many of each class, each digit with replacement."""
    members = [(target == digit).nonzero().squeeze(1) for digit in range(10)]
    number = torch.arange(100).repeat_interleave(size // 100)

    def draw(digits: torch.Tensor) -> torch.Tensor:
        chance = torch.rand(len(digits), generator=generator).tolist()
        return torch.stack([members[d][int(c * len(members[d]))] for d, c in zip(digits.tolist(), chance, strict=True)])

    left, right = image[draw(number // 10)], image[draw(number % 10)]
    pair = torch.cat([left, right], dim=2)
    return Pictures(pair.unsqueeze(1).repeat(1, 3, 1, 1), number)
