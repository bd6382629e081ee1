r"""ViTKD: Yang et al. 2022, ViTKD: Practical Guidelines for ViT feature knowledge distillation, equations 1 to 4.

The tokens of the first two blocks of a vision transformer are mimicked; those of the last block are generated: a part
of the student's tokens is replaced by one learned token, and two convolutions over the square of patches shall give the
teacher's there. The released code is followed, with its sums over tokens and channels, so the published weights
``alpha`` and ``beta`` of the order of 1e-5 are inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from kdlit.losses.feature import FeatureLoss, Shape
from kdlit.losses.functional import check_not_negative
from kdlit.models.layers import FeatureLayers

MOST_PREFIX_TOKENS = 2  # class and distillation token


def token_mask(noise: Tensor, ratio: float) -> Tensor:
    r"""Which tokens are masked: all but the :math:`\lfloor N (1 - \lambda) \rfloor` of smallest noise in each sample.

    Args:
        noise: shape ``(B, N)``.
        ratio: :math:`\lambda`, share of masked tokens, > 0 and <= 1.

    Returns:
        Boolean, shape ``(B, N)``.

    Example:
        >>> import torch
        >>> token_mask(torch.tensor([[0.3, 0.1, 0.9, 0.2]]), 0.5)
        tensor([[ True, False,  True, False]])
    """
    kept = int(noise.shape[1] * (1 - ratio))
    return noise.argsort(dim=1).argsort(dim=1) >= kept


class ViTKDLoss(FeatureLoss):
    r"""Mimics the tokens of early blocks and generates those of the last (Yang et al. 2022).

    .. math:: L = \frac{\alpha}{B} \sum_k \lVert A_k s_k - t_k \rVert^2 + \frac{\beta}{\lambda B} \sum_{\text{masked}}
              \lVert G(A s) - t \rVert^2

    Linear maps ``align_low0``, ``align_low1`` and ``align_high`` (only where the widths differ), ``mask_token`` and the
    convolutions ``gen0`` and ``gen1`` train with the student. By default the first two blocks and the last one. Which
    tokens are masked is drawn at every step.

    Args:
        student_layers: dotted paths of layers that give tokens, ``(B, N, D)``, at least two: the last is generated, the
            others are mimicked; None: where the network says its blocks are.
        teacher_layers: likewise of the teacher, as many, with as many patches.
        alpha: :math:`\alpha`, weight of mimicking, >= 0.
        beta: :math:`\beta`, weight of generation, >= 0.
        mask_ratio: :math:`\lambda`, share of tokens that are masked, > 0 and <= 1.
        prefix_tokens: how many tokens before those of the patches, of student and of teacher; None: at most two, as
            many as are left over by a square.

    Raises:
        ValueError: If a weight is negative, ``mask_ratio`` out of range or a number of prefix tokens negative, or, at
            :meth:`setup`, if pictures are not square, a network does not say where to look, its layers give no tokens
            on a square grid, or both networks' grids differ.
    """

    def __init__(
        self,
        student_layers: Sequence[str] | None = None,
        teacher_layers: Sequence[str] | None = None,
        alpha: float = 3e-5,
        beta: float = 3e-6,
        mask_ratio: float = 0.5,
        prefix_tokens: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.alpha = check_not_negative("alpha", alpha)
        self.beta = check_not_negative("beta", beta)
        if not 0 < mask_ratio <= 1:
            raise ValueError(f"mask_ratio must be > 0 and <= 1, got {mask_ratio!r}")
        if prefix_tokens is not None and (len(prefix_tokens) != 2 or min(prefix_tokens) < 0):
            raise ValueError(f"prefix_tokens must be two numbers >= 0, of student and teacher, got {prefix_tokens!r}")
        self.mask_ratio = mask_ratio
        self.prefix_tokens = prefix_tokens

    def default_layers(self, layers: FeatureLayers) -> Sequence[str]:
        """The first two blocks and the last."""
        return (*layers.maps[:2], layers.maps[-1]) if len(layers.maps) > 2 else ()

    def setup(
        self, student: nn.Module, teacher: nn.Module | None, example: Tensor, teacher_example: Tensor | None = None
    ) -> None:
        """Settle the layers and make the heads, once the pictures are seen to be square."""
        for picture in (example, example if teacher_example is None else teacher_example):
            if picture.shape[-2] != picture.shape[-1]:
                raise ValueError(f"ViTKDLoss needs square pictures, got input_size {tuple(picture.shape[1:])}")
        super().setup(student, teacher, example, teacher_example)

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> None:
        """Make the linear maps and the generator."""
        if len(student) < 2:
            raise ValueError(
                f"ViTKDLoss needs two or more layers of each network, got {', '.join(self.student_layers)}"
            )
        given = self.prefix_tokens or (None, None)
        roles = ("student", self.student_layers, student), ("teacher", self.teacher_layers, teacher)
        found = [self._settle(*role, prefix) for role, prefix in zip(roles, given, strict=True)]
        (self._student_prefix, side), (self._teacher_prefix, teacher_side) = found
        if side != teacher_side:
            raise ValueError(
                f"student and teacher must have the same patches, but the student's are {side}x{side} and the "
                f"teacher's {teacher_side}x{teacher_side}; give both pictures or patches of such sizes"
            )
        widths = [(ours[2], theirs[2]) for ours, theirs in zip(student, teacher, strict=True)]
        names = [*(f"align_low{index}" for index in range(len(widths) - 1)), "align_high"]
        for name, (ours, theirs) in zip(names, widths, strict=True):
            self.add_module(name, nn.Identity() if ours == theirs else nn.Linear(ours, theirs))
        width = widths[-1][1]
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.gen0 = nn.Conv2d(width, width, 3, padding=1)
        self.gen1 = nn.Conv2d(width, width, 3, padding=1)

    def _settle(self, role: str, paths: Sequence[str], shapes: Sequence[Shape], prefix: int | None) -> tuple[int, int]:
        """How many prefix tokens a network has, and how many patches its pictures are high and wide."""
        counts = {shape[1] for shape in shapes}
        for path, shape in zip(paths, shapes, strict=True):
            if len(shape) != 3 or len(counts) > 1:
                raise ValueError(
                    f"{role}_layers: {path!r} gives {shape}, but all must give tokens (B, N, D), as many of each layer"
                )
        count = counts.pop()
        side = math.isqrt(count - (prefix or 0)) if count > (prefix or 0) else 0
        found = count - side**2 if prefix is None else prefix
        if not side or side**2 + found != count or (prefix is None and found > MOST_PREFIX_TOKENS):
            raise ValueError(
                f"the {role}'s {count} tokens at {paths[0]!r} are not a square of patches behind "
                f"{f'at most {MOST_PREFIX_TOKENS}' if prefix is None else prefix} others; set prefix_tokens"
            )
        return found, side

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Mimic and generate, with a mask drawn anew."""
        student = [tokens[:, self._student_prefix :] for tokens in student]
        teacher = [tokens[:, self._teacher_prefix :] for tokens in teacher]
        noise = torch.rand(student[-1].shape[:2], device=student[-1].device)
        return self.mimicking(student[:-1], teacher[:-1]) + self.generation(student[-1], teacher[-1], noise)

    def mimicking(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Weighted squared distance of early tokens, ``(B, N, D)`` each, without prefix tokens."""
        distances = [
            (self.get_submodule(f"align_low{index}")(ours) - theirs).square().sum()
            for index, (ours, theirs) in enumerate(zip(student, teacher, strict=True))
        ]
        return self.alpha * torch.stack(distances).sum() / len(student[0])

    def generation(self, student: Tensor, teacher: Tensor, noise: Tensor) -> Tensor:
        """Weighted squared distance of generated last tokens, ``(B, N, D)`` without prefix; ``noise`` is ``(B, N)``."""
        aligned: Tensor = self.get_submodule("align_high")(student)
        batch, count, width = aligned.shape
        masked = token_mask(noise, self.mask_ratio).unsqueeze(2)
        grid = torch.where(masked, self.mask_token, aligned).mT.reshape(batch, width, math.isqrt(count), -1)
        generated = self.gen1(relu(self.gen0(grid))).flatten(2).mT
        return self.beta / self.mask_ratio * torch.where(masked, generated - teacher, 0.0).square().sum() / batch
