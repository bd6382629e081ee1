"""What published recipes for vision transformers need and torch.optim has not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class TransformerAdamW(torch.optim.AdamW):
    """AdamW that decays the weights of linear layers and convolutions alone.

    Biases and norms (one dimension), and class tokens and position embeddings (``(1, N, C)``), are left out of the
    decay, as in the recipes of DeiT and of NKD (Yang et al. 2023).

    Args:
        params: tensors to optimise.
        lr: learning rate.
        betas: of the running means of gradient and squared gradient.
        weight_decay: for those that decay.
        **kwargs: further arguments of ``torch.optim.AdamW``.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.05,
        **kwargs: Any,
    ) -> None:
        params = list(params)
        decays = {True: weight_decay, False: 0.0}  # by whether this is the weight of a linear layer or a convolution
        members = {kind: [param for param in params if (param.ndim in (2, 4)) is kind] for kind in decays}
        groups = [{"params": members[kind], "weight_decay": decays[kind]} for kind in decays if members[kind]]
        super().__init__(groups, lr=lr, betas=betas, weight_decay=weight_decay, **kwargs)


class WarmupCosine(torch.optim.lr_scheduler.LambdaLR):
    """A linear warm-up, then half a cosine down; stepped once an epoch.

    In epoch ``e`` of ``E``, with ``W`` warm-up epochs, the rate is multiplied by ``s + (1 - s) e / W`` while ``e < W``
    and then by ``m + (1 - m) (1 + cos(pi (e - W) / (E - W))) / 2``.

    Args:
        optimizer: whose rate to set.
        epochs: length of the run, ``E``.
        warmup_epochs: length of the warm-up, ``W``.
        start: factor at the start of the warm-up, ``s``.
        end: factor at the end of the cosine, ``m``.

    Raises:
        ValueError: If the warm-up does not fit into the run or a factor lies outside 0..1.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        epochs: int,
        warmup_epochs: int = 0,
        start: float = 1e-3,
        end: float = 0.0,
    ) -> None:
        if not 0 <= warmup_epochs < epochs:
            raise ValueError(f"warmup_epochs must lie in 0..epochs - 1, got {warmup_epochs!r} of {epochs!r}")
        for name, value in (("start", start), ("end", end)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {value!r}")

        def factor(epoch: int) -> float:
            if epoch < warmup_epochs:
                return start + (1 - start) * epoch / warmup_epochs
            done = min((epoch - warmup_epochs) / (epochs - warmup_epochs), 1.0)
            return end + (1 - end) * (1 + math.cos(math.pi * done)) / 2

        super().__init__(optimizer, factor)
