"""Means over samples: a step only notes its values, and they are added up where they lie, many steps at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_STEPS = 64  # that are added up at once: cheap for each, and little to hold


class RunningMeans:
    """Means of some figures over all samples seen since they were last taken.

    Nothing waits for the device before they are taken. Batches may hold different figures: each is averaged over the
    samples of the batches that have it.
    """

    def __init__(self) -> None:
        self._noted: dict[tuple[str, ...], list[tuple[Sequence[Tensor], int]]] = defaultdict(list)
        self._rows: dict[tuple[str, ...], Tensor] = {}  # of steps before a resume that are yet to be added up
        self._sums: dict[tuple[str, ...], Tensor] = {}  # in the last column the number of samples

    def add(self, values: Mapping[str, Tensor], size: int) -> None:
        """Count the figures of one batch.

        Args:
            values: without a graph: a mean over the batch, a scalar; or the value of each sample, shape ``(B,)``.
            size: samples in the batch.
        """
        names = tuple(values)
        noted = self._noted[names]
        noted.append((tuple(values.values()), size))
        if len(noted) + len(self._rows.get(names, ())) == _STEPS:
            self._add_up(names)

    def _not_added(self, names: tuple[str, ...]) -> Tensor:
        """Figures times samples of each step that is not added up yet, and its samples, shape ``(steps, figures + 1)``.

        These do not depend on when they are asked for, so that a resumed run adds up the same.
        """
        earlier = [self._rows[names]] if names in self._rows else []
        if not (noted := self._noted[names]):
            return earlier[0]
        columns = [_means(column) for column in zip(*(values for values, _ in noted), strict=True)]
        sizes = torch.tensor([size for _, size in noted], dtype=columns[0].dtype).to(columns[0].device)
        rows = torch.stack([*(column * sizes for column in columns), sizes], dim=1)
        return torch.cat([*(one.to(rows.device) for one in earlier), rows])

    def _add_up(self, names: tuple[str, ...]) -> None:
        rows = self._not_added(names)
        total = rows.sum(dim=0)
        self._sums[names] = total if names not in self._sums else self._sums[names].to(total.device) + total
        self._rows.pop(names, None)
        self._noted[names].clear()

    def take(self, over_processes: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the means by name, scalars, and start anew.

        Args:
            over_processes: gives the sum of a tensor over all processes, which must all have counted the same figures.
        """
        totals: dict[str, Tensor] = {}
        for names in {**self._sums, **self._rows, **self._noted}:
            if self._noted[names] or names in self._rows:
                self._add_up(names)
            summed = over_processes(self._sums[names])
            for name, total in zip(names, summed[:-1], strict=True):
                totals[name] = totals.get(name, 0) + torch.stack((total, summed[-1]))
        self._noted.clear()
        self._rows, self._sums = {}, {}
        return {name: total / count for name, (total, count) in totals.items()}

    def state_dict(self) -> dict[tuple[str, ...], dict[str, Tensor]]:
        """What an epoch has counted so far, for a checkpoint in the middle of it."""
        state: dict[tuple[str, ...], dict[str, Tensor]] = {}
        for names in {**self._sums, **self._rows, **self._noted}:
            state[names] = {"sums": self._sums[names].clone()} if names in self._sums else {}
            if self._noted[names] or names in self._rows:
                state[names]["rows"] = self._not_added(names).clone()
        return state

    def load_state_dict(self, state_dict: Mapping[Any, Mapping[str, Tensor]]) -> None:
        """Go on counting from there."""
        self._noted.clear()
        self._sums = {names: state["sums"] for names, state in state_dict.items() if "sums" in state}
        self._rows = {names: state["rows"] for names, state in state_dict.items() if "rows" in state}


def _means(values: Sequence[Tensor]) -> Tensor:
    """One mean a batch, in float32 or better, of scalars or of values of each sample."""
    if values[0].ndim == 0:
        stacked = torch.stack(list(values))
        return stacked if stacked.is_floating_point() and stacked.element_size() >= 4 else stacked.float()
    try:
        return torch.stack(list(values)).float().mean(dim=1)
    except RuntimeError:  # batches of different sizes
        return torch.stack([one.float().mean() for one in values])
