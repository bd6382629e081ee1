"""Pyramid Vision Transformer, first version, one of the transformer students of the distillation literature.

Wang et al. 2021, "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions"
(arXiv:2102.12122). Parameters are named as in the published weights. timm has the second version only, another network.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdlit.models._common import check_count
from kdlit.models._transformer import (
    Block,
    attend,
    check_drop_path,
    check_image_size,
    check_square_image,
    drop_path_rates,
    init_linears,
    to_square,
)
from kdlit.models.layers import FeatureLayers

STAGES = (  # channels, heads, MLP ratio, spatial reduction of keys and values, size of a patch
    (64, 1, 8, 8, 4),
    (128, 2, 8, 4, 2),
    (320, 5, 4, 2, 2),
    (512, 8, 4, 1, 2),
)
STRIDE = 32  # product of the patch sizes; no reduction needs more
EPS = 1e-6


class SpatialReductionAttention(nn.Module):
    """Softmax self-attention of a square of tokens, whose keys and values are made from a smaller square.

    Args:
        width: Channels of a token.
        heads: Attention heads.
        reduction: Side of the squares of tokens that a strided convolution makes one of; 1 for none.
    """

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.reduction = reduction
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        if reduction > 1:
            self.sr = nn.Conv2d(width, width, kernel_size=reduction, stride=reduction)
            self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, N, width)`` to the same shape."""
        source = x
        if self.reduction > 1:
            source = self.norm(self.sr(to_square(x)).flatten(2).mT)
        y: Tensor = self.proj(attend(self.heads, self.q(x), *self.kv(source).chunk(2, dim=-1)))
        return y


class PatchEmbedding(nn.Module):
    """Square patches as tokens: a strided convolution and LayerNorm."""

    def __init__(self, in_width: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_width, width, kernel_size=patch, stride=patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_width, S, S)`` to ``(B, (S / patch) ** 2, width)``."""
        tokens: Tensor = self.norm(self.proj(x).flatten(2).mT)
        return tokens


class PVT(nn.Module):
    """PVT: four stages of transformer blocks on ever fewer and wider tokens; the last has a class token.

    Paths of feature maps, of shape ``(B, N, C)``: ``block1.1``, ``block2.1``, ``block3.1``, ``block4.1`` (with the
    class token first) and, normalised, ``norm``.

    Args:
        depths: Number of blocks in each of the four stages.
        num_classes: Size of the classifier.
        image_size: Height and width of the pictures, a multiple of 32.
        drop_path: Probability that a branch of the last block is left out for a picture; rises evenly from 0.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_classes: int = 100,
        image_size: int = 224,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        if len(depths) != 4:
            raise ValueError(f"depths must be four integers, one a stage, got {depths!r}")
        self.image_size = side = check_image_size(image_size, STRIDE)
        n_blocks = sum(check_count("depths", depth) for depth in depths)
        rates = iter(drop_path_rates(check_drop_path(drop_path), n_blocks))
        in_width = 3
        for i, (depth, (width, heads, ratio, reduction, patch)) in enumerate(zip(depths, STAGES, strict=True), start=1):
            side //= patch
            n_tokens = side**2 + (i == len(STAGES))
            positions = nn.init.trunc_normal_(torch.empty(1, n_tokens, width), std=0.02)
            self.register_parameter(f"pos_embed{i}", nn.Parameter(positions))
            self.add_module(f"patch_embed{i}", PatchEmbedding(in_width, width, patch))
            blocks = (
                Block(width, SpatialReductionAttention(width, heads, reduction), ratio * width, next(rates), EPS)
                for _ in range(depth)
            )
            self.add_module(f"block{i}", nn.Sequential(*blocks))
            in_width = width
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, in_width), std=0.02))
        self.norm = nn.LayerNorm(in_width, eps=EPS)
        self.head = nn.Linear(in_width, check_count("num_classes", num_classes))
        init_linears(self)

    @property
    def feature_layers(self) -> FeatureLayers:
        """Where to look inside."""
        maps = tuple(f"block{stage}.{len(getattr(self, f'block{stage}')) - 1}" for stage in range(1, 5))
        return FeatureLayers(maps, maps, pool="head.input", classifier="head")

    def forward(self, image: Tensor) -> Tensor:
        """Classify images.

        Args:
            image: Shape ``(B, 3, image_size, image_size)``.

        Returns:
            Logits, shape ``(B, num_classes)``.

        Raises:
            ValueError: If ``image`` is no such batch.
        """
        check_square_image(image, self.image_size)
        x = image
        for i in range(1, len(STAGES) + 1):
            tokens = self.get_submodule(f"patch_embed{i}")(x)
            if i == len(STAGES):
                tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
            tokens = self.get_submodule(f"block{i}")(tokens + self.get_parameter(f"pos_embed{i}"))
            if i < len(STAGES):
                x = to_square(tokens)
        logits: Tensor = self.head(self.norm(tokens)[:, 0])
        return logits


def pvt_tiny(num_classes: int = 100, image_size: int = 224, drop_path: float = 0.1) -> PVT:
    """PVT-Tiny: two blocks a stage."""
    return PVT(num_classes=num_classes, image_size=image_size, drop_path=drop_path)
