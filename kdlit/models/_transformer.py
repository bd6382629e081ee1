"""What the vision transformers share: attention, blocks, checks, initialisation."""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torchvision.ops import StochasticDepth


def check_drop_path(value: float) -> float:
    """Return ``value`` if it is a probability below 1.

    Raises:
        ValueError: If it is not.
    """
    if not 0 <= value < 1:
        raise ValueError(f"drop_path must be >= 0 and < 1, got {value!r}")
    return value


def check_image_size(value: int, multiple: int) -> int:
    """Return ``value`` if it is a positive multiple of ``multiple``.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, int) or value < multiple or value % multiple:
        raise ValueError(f"image_size must be a positive multiple of {multiple}, got {value!r}")
    return value


def check_square_image(image: Tensor, size: int) -> None:
    """Refuse what is not a batch of RGB images of ``size`` pixels each way.

    Raises:
        ValueError: If it is not.
    """
    if image.ndim != 4 or image.shape[1:] != (3, size, size):
        raise ValueError(
            f"image must have shape (B, 3, {size}, {size}), got {tuple(image.shape)}; the position embeddings belong "
            "to one size: resize the pictures or build the network with their image_size"
        )


def attend(heads: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Multi-head softmax attention.

    Args:
        heads: Number of groups that the C channels are split into.
        query: Shape ``(B, N, C)``.
        key: Shape ``(B, M, C)``.
        value: Shape ``(B, M, C)``.

    Returns:
        Shape ``(B, N, C)``.
    """
    query, key, value = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def drop_path_rates(last: float, depth: int) -> Sequence[float]:
    """Probabilities that rise evenly from 0 in the first block to ``last`` in the last."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]


def to_square(tokens: Tensor) -> Tensor:
    """Map tokens of a square picture, row by row, ``(B, S * S, C)``, to ``(B, C, S, S)``."""
    batch, n_tokens, width = tokens.shape
    side = math.isqrt(n_tokens)
    return tokens.mT.reshape(batch, width, side, side)


class Mlp(nn.Module):
    """Two linear layers with GELU between them, on the last dimension."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., width)`` to the same shape."""
        y: Tensor = self.fc2(gelu(self.fc1(x)))
        return y


class Block(nn.Module):
    """Attention, then an MLP, each on the LayerNorm of its input and added to it.

    Args:
        width: Channels of a token.
        attention: Maps ``(B, N, width)`` to the same shape.
        hidden: Channels inside the MLP.
        drop_path: Probability that a branch is left out for a picture, in training.
        eps: Of the LayerNorms.
    """

    def __init__(self, width: int, attention: nn.Module, hidden: int, drop_path: float, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, N, width)`` to the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        y: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return y


def init_linears(model: nn.Module) -> None:
    """Draw the weight of every linear layer anew from a truncated normal of deviation 0.02; biases become 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
