"""Tokens-to-Token ViT, one of the transformer students of the distillation literature.

Yuan et al. 2021, "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet" (arXiv:2101.11986), with
the tokens-to-token module that attends through random features (Performer, Choromanski et al. 2021, arXiv:2009.14794).
Parameters are named as in the code of LSKD (Sun et al. 2024).
"""

import math

import torch
from torch import Tensor, nn

from kdlit.models._common import check_count
from kdlit.models._transformer import (
    Block,
    Mlp,
    attend,
    check_drop_path,
    check_image_size,
    check_square_image,
    drop_path_rates,
    init_linears,
    to_square,
)
from kdlit.models.layers import FeatureLayers

TOKEN_WIDTH = 64
SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride and padding of the three overlapping splits
STRIDE = 16  # their product


class PerformerAttention(nn.Module):
    r"""Attention with a kernel of positive random features, linear in the number of tokens.

    .. math:: y_i = v_i + W \frac{\sum_j \phi(q_i) \cdot \phi(k_j) \, v_j}{\sum_j \phi(q_i) \cdot \phi(k_j)}, \quad
              \phi(x) = \frac{1}{\sqrt m} \exp(\Omega x - \|x\|^2 / 2)

    The exponentials overflow in float16; bfloat16 is wide enough.

    Args:
        in_width: Channels of a token.
        width: Channels of a token after it; :math:`\Omega` has :math:`m = width / 2` orthogonal rows of length
            :math:`\sqrt m` and is not trained.
    """

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        rows = width // 2
        self.w = nn.Parameter(nn.init.orthogonal_(torch.empty(rows, width), gain=math.sqrt(rows)), requires_grad=False)
        self.qkv_transform = nn.Linear(in_width, 3 * width)
        self.projection = nn.Linear(width, width)

    def random_features(self, x: Tensor) -> Tensor:
        """Map ``(B, N, width)`` to ``(B, N, width / 2)``, all positive."""
        exponent = x @ self.w.mT - x.square().sum(-1, keepdim=True) / 2
        return exponent.exp() / math.sqrt(len(self.w))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, N, in_width)`` to ``(B, N, width)``."""
        query, key, value = self.qkv_transform(x).chunk(3, dim=-1)
        query, key = self.random_features(query), self.random_features(key)
        total = query @ key.sum(1).unsqueeze(-1)
        y: Tensor = value + self.projection(query @ (key.mT @ value) / (total + 1e-8))
        return y


class PerformerBlock(nn.Module):
    """Performer attention, then an MLP that is added to its input."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_width)
        self.attn = PerformerAttention(in_width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, N, in_width)`` to ``(B, N, width)``."""
        x = self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class TokensToToken(nn.Module):
    """Split a picture into overlapping patches three times over, with attention in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.splits = nn.ModuleList(nn.Unfold(kernel, stride=stride, padding=pad) for kernel, stride, pad in SPLITS)
        widths = [3 * SPLITS[0][0] ** 2, *(TOKEN_WIDTH * kernel**2 for kernel, _, _ in SPLITS[1:])]
        self.attention = nn.ModuleList(PerformerBlock(in_width, TOKEN_WIDTH) for in_width in widths[:-1])
        self.projection = nn.Linear(widths[-1], width)

    def forward(self, image: Tensor) -> Tensor:
        """Map ``(B, 3, S, S)`` to ``(B, (S / 16) ** 2, width)``."""
        x = self.splits[0](image).mT
        for attention, split in zip(self.attention, self.splits[1:], strict=True):
            x = split(to_square(attention(x))).mT
        tokens: Tensor = self.projection(x)
        return tokens


class Attention(nn.Module):
    """Softmax self-attention, no bias on what makes queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_transform = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, N, width)`` to the same shape."""
        y: Tensor = self.projection(attend(self.heads, *self.qkv_transform(x).chunk(3, dim=-1)))
        return y


class T2TViT(nn.Module):
    """T2T-ViT: tokens from overlapping patches, a class token, and a plain transformer with fixed sinusoidal positions.

    Paths of feature maps, of shape ``(B, N, C)`` with the class token first: ``t2t_module``, ``layers.0``,
    ``layers.3``, ``layers.6`` and, normalised, ``norm``.

    Args:
        depth: Number of blocks.
        width: Channels of a token, an even multiple of ``heads``.
        heads: Attention heads.
        mlp_ratio: Channels inside an MLP, in units of ``width``.
        num_classes: Size of the classifier.
        image_size: Height and width of the pictures, a multiple of 16.
        drop_path: Probability that a branch of the last block is left out for a picture; rises evenly from 0.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        depth: int = 7,
        width: int = 256,
        heads: int = 4,
        mlp_ratio: int = 2,
        num_classes: int = 100,
        image_size: int = 224,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        if check_count("width", width) % (2 * check_count("heads", heads)):
            raise ValueError(f"width must be an even multiple of heads, got {width} and {heads}")
        self.image_size = check_image_size(image_size, STRIDE)
        hidden = width * check_count("mlp_ratio", mlp_ratio)
        rates = drop_path_rates(check_drop_path(drop_path), check_count("depth", depth))
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        positions = sinusoids((image_size // STRIDE) ** 2 + 1, width)
        self.pos_embed = nn.Parameter(positions.unsqueeze(0), requires_grad=False)
        self.t2t_module = TokensToToken(width)
        self.layers = nn.Sequential(*(Block(width, Attention(width, heads), hidden, rate) for rate in rates))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, check_count("num_classes", num_classes))
        init_linears(self)

    @property
    def feature_layers(self) -> FeatureLayers:
        """Where to look inside."""
        maps = tuple(f"layers.{index}" for index in range(len(self.layers)))
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
        x = self.t2t_module(image)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.layers(x))[:, 0])
        return logits


def sinusoids(length: int, width: int) -> Tensor:
    """Positions as sines (even channels) and cosines (odd) of wavelengths from 2 pi on: shape ``(length, width)``."""
    frequency = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(length).unsqueeze(1) * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def t2t_vit_7(num_classes: int = 100, image_size: int = 224, drop_path: float = 0.1) -> T2TViT:
    """T2T-ViT-7: seven blocks of width 256."""
    return T2TViT(num_classes=num_classes, image_size=image_size, drop_path=drop_path)
