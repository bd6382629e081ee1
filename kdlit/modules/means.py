"""Means over samples that are summed up where the values lie and read once, when an epoch ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class RunningMeans:
    """Means of some figures over all samples seen since they were last taken.

    A step costs one small addition on the device of the values, however many figures there are, and nothing waits for
    it. Batches may hold different figures: each is averaged over the samples of the batches that have it.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def add(self, values: Mapping[str, Tensor], size: int) -> None:
        """Count the figures of one batch.

        Args:
            values: means over the batch, scalars without a graph.
            size: samples in the batch.
        """
        names, row = tuple(values), torch.stack([*values.values(), _one(next(iter(values.values())).device)])
        sums = self._sums.get(names)
        self._sums[names] = row * size if sums is None else sums.to(row.device).add_(row, alpha=size)

    def take(self, over_processes: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the means by name, scalars, and start anew.

        Args:
            over_processes: gives the sum of a tensor over all processes, which must all have counted the same figures.
        """
        totals: dict[str, Tensor] = {}
        for names, sums in self._sums.items():
            summed = over_processes(sums)
            for name, total in zip(names, summed[:-1], strict=True):
                totals[name] = totals.get(name, 0) + torch.stack((total, summed[-1]))
        self._sums = {}
        return {name: total / count for name, (total, count) in totals.items()}

    def state_dict(self) -> dict[tuple[str, ...], Tensor]:
        """What an epoch has counted so far, for a checkpoint in the middle of it."""
        return {names: sums.clone() for names, sums in self._sums.items()}

    def load_state_dict(self, state_dict: Mapping[Any, Tensor]) -> None:
        """Go on counting from there."""
        self._sums = dict(state_dict)


_ONES: dict[torch.device, Tensor] = {}


def _one(device: torch.device) -> Tensor:
    """The number 1 on a device, sent there once."""
    if device not in _ONES:
        _ONES[device] = torch.ones((), device=device)
    return _ONES[device]
