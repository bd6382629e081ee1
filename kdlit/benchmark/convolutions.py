"""What a machine can do at most: its rate in bare convolutions, and what a pair of networks needs of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdlit.benchmark.measure import timed
from kdlit.models.features import dry_run


@dataclass(frozen=True)
class Convolution:
    """One convolution, square in kernel, stride and padding.

    Attributes:
        weight: shape ``(out_channels, in_channels / groups, kernel, kernel)``.
        side: of the pictures it is given.
        stride: pixels.
        padding: pixels.
        groups: of channels.
    """

    weight: tuple[int, ...]
    side: int
    stride: int = 1
    padding: int = 0
    groups: int = 1

    def flops(self, batch_size: int) -> int:
        """Of a forward pass, a multiplication and an addition counting as two; each half of backward has as many."""
        side = (self.side + 2 * self.padding - self.weight[-1]) // self.stride + 1
        return 2 * batch_size * side**2 * math.prod(self.weight)


# 3x3 and 1x1, as CIFAR's ResNets, WRNs and bottlenecks have them
TYPICAL = (
    *(Convolution((width, width, 3, 3), side, padding=1) for width, side in ((64, 32), (128, 16), (256, 8), (512, 4))),
    *(Convolution((width, 4 * width, 1, 1), side) for width, side in ((64, 32), (128, 16), (256, 8), (512, 4))),
)


def convolutions_of(model: nn.Module, side: int = 32) -> Counter[Convolution]:
    """How often a network computes which convolution for one square picture."""
    found: Counter[Convolution] = Counter()

    def see(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        one = Convolution(
            tuple(layer.weight.shape), inputs[0].shape[-1], layer.stride[0], int(layer.padding[0]), layer.groups
        )
        found[one] += 1

    handles = [layer.register_forward_hook(see) for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    dry_run(model, torch.zeros(1, 3, side, side))
    for handle in handles:
        handle.remove()
    return found


def forward_flops(model: nn.Module, side: int = 32, device: str = "cpu") -> int:
    """Of a forward pass on one square picture, a multiplication and an addition counting as two."""
    with FlopCounterMode(display=False) as counter:
        dry_run(model, torch.zeros(1, 3, side, side, device=device))
    total: int = counter.get_total_flops()
    return total


@cache
def bare_seconds(one: Convolution, batch_size: int, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Least seconds of a convolution alone with channels last, forward and backward (to pictures and weights)."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)

    image, weight = draw(batch_size, one.weight[1] * one.groups, one.side, one.side), draw(*one.weight)
    places = [one.stride] * 2, [one.padding] * 2, [1, 1]

    def forward() -> Tensor:
        return F.conv2d(image, weight, None, *places, one.groups)

    gradient = draw(*forward().shape)

    def backward() -> None:
        torch.ops.aten.convolution_backward(
            gradient, image, weight, None, *places, False, [0, 0], one.groups, [True, True, False]
        )

    def fastest(run: Callable[[], object]) -> float:
        run()
        repeats = math.ceil(0.01 / max(timed(run, device), 1e-6))
        return min(timed(lambda: [run() for _ in range(repeats)], device) for _ in range(3)) / repeats

    return fastest(forward), fastest(backward)


def sum_of_bare(model: nn.Module, batch_size: int, dtype: torch.dtype, device: torch.device, trained: bool) -> float:
    """Seconds of all convolutions of a network alone, forward and, if it is trained, backward."""
    return sum(
        count * sum(bare_seconds(one, batch_size, dtype, device)[: 1 + trained])
        for one, count in convolutions_of(model).items()
    )


def peak_flops(batch_size: int, dtype: torch.dtype, device: torch.device, *models: nn.Module) -> float:
    """The most floating-point operations a second in any one convolution, typical ones or those of some networks."""
    every = {*TYPICAL, *(one for model in models for one in convolutions_of(model))}
    return max(one.flops(batch_size) / bare_seconds(one, batch_size, dtype, device)[0] for one in every)


def bound_seconds(
    flops: Mapping[str, float], peaks: Mapping[str, float], dtypes: Mapping[str, str], batch_size: int
) -> float:
    """Least time of a step: one forward pass of the teacher and three of the student at the peak.

    Args:
        flops: of a forward pass on one picture, of ``teacher`` and ``student``.
        peaks: operations a second by type of number.
        dtypes: type of number of ``teacher`` and ``student``.
        batch_size: pictures a step.
    """
    passes = {"teacher": 1, "student": 3}
    return sum(batch_size * count * flops[role] / peaks[dtypes[role]] for role, count in passes.items())
