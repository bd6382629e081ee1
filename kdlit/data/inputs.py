"""How one network wants its pictures; teacher and student may differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

Interpolation = Literal["nearest", "bilinear", "bicubic"]


@dataclass
class NetworkInput:
    """Size and statistics of the pictures that a network was, or is to be, trained with.

    Args:
        mean: mean of each channel, for pictures scaled to 0..1.
        std: standard deviation of each channel, likewise.
        size: side in pixels; None leaves pictures as large as the data has them.
        interpolation: how pictures are scaled.
        antialias: whether scaling down averages over all pixels, as Pillow does.
        resize: shorter side before the middle ``size`` pixels are cut out for evaluation; None cuts nothing off.

    Raises:
        ValueError: If a value is out of range or ``mean`` and ``std`` do not fit each other.
    """

    mean: Sequence[float]
    std: Sequence[float]
    size: int | None = None
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    resize: int | None = None

    def __post_init__(self) -> None:
        self.mean, self.std = tuple(self.mean), tuple(self.std)
        if not self.mean or len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError(
                f"mean and std must have one value a channel, std above 0; got {self.mean!r} and {self.std!r}"
            )
        if max(self.mean) > 1 or max(self.std) > 1:
            raise ValueError(
                f"mean and std must be those of pictures scaled to 0..1, got {self.mean!r} and {self.std!r}; "
                "divide them by 255"
            )
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be >= 1, got {self.size!r}")
        if self.resize is not None and (self.size is None or self.resize < self.size):
            raise ValueError(f"resize must be >= size, got resize {self.resize!r} and size {self.size!r}")
        self._interpolation = InterpolationMode(self.interpolation)
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def training(self, image: Tensor) -> Tensor:
        """Scale a batch of augmented pictures to a square and normalise it: uint8 ``(B, C, H, W)`` in, float32 out."""
        return self.normalize(image if self.size is None else self._scale(image, [self.size, self.size]))

    def evaluation(self, image: Tensor | Sequence[Tensor]) -> Tensor:
        """Scale whole pictures, cut out the middle and normalise: float32 ``(B, C, H, W)``.

        Args:
            image: uint8, ``(B, C, H, W)`` or, where sizes differ, one ``(C, H, W)`` a picture.
        """
        if isinstance(image, Tensor):
            return self.normalize(self._middle(image))
        return self.normalize(torch.stack([self._middle(one) for one in image]))

    def _middle(self, image: Tensor) -> Tensor:
        if self.size is None:
            return image
        image = v2.center_crop(self._scale(image, [self.resize or self.size]), [self.size, self.size])
        return image

    def _scale(self, image: Tensor, size: list[int]) -> Tensor:
        if list(image.shape[-2:]) == size * (2 // len(size)):
            return image
        image = v2.resize(image, size, interpolation=self._interpolation, antialias=self.antialias)
        return image

    def normalize(self, image: Tensor) -> Tensor:
        """Turn uint8 pictures, shape ``(B, C, H, W)``, into float32 with ``(image / 255 - mean) / std`` a channel."""
        if image.device not in self._constants:  # made once: a copy to a GPU waits for what the GPU is doing
            mean, std = (torch.tensor(value, device=image.device)[:, None, None] for value in (self.mean, self.std))
            self._constants[image.device] = 1 / (255 * std), mean / std
        scale, shift = self._constants[image.device]
        return image.to(torch.float32, copy=True).mul_(scale).sub_(shift)


@dataclass
class Views:
    """What each network is shown of a batch of pictures.

    Args:
        student: how the student wants its pictures.
        teacher: how the teacher does, if not in the same way.

    Raises:
        ValueError: If they do not have the same channels.
    """

    student: NetworkInput
    teacher: NetworkInput | None = None

    def __post_init__(self) -> None:
        if self.teacher is not None and len(self.teacher.mean) != len(self.student.mean):
            raise ValueError(
                f"teacher_input has {len(self.teacher.mean)} channels, but the student's {len(self.student.mean)}"
            )

    def training(self, weak: Tensor, strong: Tensor | None = None) -> dict[str, Tensor]:
        """Give each network its form of augmented pictures.

        Args:
            weak: the standard view, uint8, shape ``(B, C, H, W)``.
            strong: the strong view, likewise; None for none.
        """
        views = {"image": self.student.training(weak)}
        if self.teacher is not None:
            views["image_teacher"] = self.teacher.training(weak)
        if strong is not None:
            views["image_strong"] = self.student.training(strong)
            if self.teacher is not None:
                views["image_teacher_strong"] = self.teacher.training(strong)
        return views

    def evaluation(self, image: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Give each network its form of pictures that are not augmented.

        Args:
            image: uint8, ``(B, C, H, W)`` or one ``(C, H, W)`` a picture.
        """
        views = {"image": self.student.evaluation(image)}
        return views if self.teacher is None else views | {"image_teacher": self.teacher.evaluation(image)}
