"""A stream of random numbers of one's own, among others that draw from the same global generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class RandomStream:
    """What the global generators of torch, CUDA, NumPy and Python would give to somebody who was alone with them.

    Args:
        seed: starts the stream; by default it goes on from where the generators are now.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = torch.initial_seed() if seed is None else seed
        self._state = read_generators()
        if seed is not None:
            self.restart()

    def restart(self) -> None:
        """Go back to what the seed alone gives, as ``seed_everything`` does."""
        outer = read_generators()
        torch.default_generator.manual_seed(self.seed)
        np.random.seed(self.seed % 2**32)
        random.seed(self.seed)
        self._state = read_generators()
        set_generators(outer)

    @contextmanager
    def flowing(self, device: torch.device) -> Iterator[None]:
        """Let the global generators be this stream for a while; others find them as they were.

        Args:
            device: whose generator is part of the stream, beside those of the CPU.
        """
        gpu = device if device.type == "cuda" else None
        outer = read_generators(gpu)
        set_generators(self._state, gpu)
        if gpu is not None and "cuda" not in self._state:
            torch.cuda.default_generators[gpu.index or 0].manual_seed(self.seed)
        try:
            yield
        finally:
            self._state = read_generators(gpu)
            set_generators(outer, gpu)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as plain data."""
        return {**as_plain(self._state), "cuda": [self._state["cuda"]] if "cuda" in self._state else []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._state = from_plain(state_dict)
        if state_dict["cuda"]:
            self._state["cuda"] = state_dict["cuda"][0].cpu()


def as_plain(state: dict[str, Any]) -> dict[str, Any]:
    """What :func:`read_generators` gave of the CPU's generators, as data that a checkpoint may hold."""
    name, keys, *rest = state["numpy"]
    numpy = (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
    return {"torch": state["torch"], "numpy": numpy, "python": state["python"]}


def from_plain(plain: dict[str, Any]) -> dict[str, Any]:
    """The way back from :func:`as_plain`, for :func:`set_generators`."""
    name, keys, *rest = plain["numpy"]
    version, words, gauss = plain["python"]
    return {
        "torch": plain["torch"].cpu(),
        "numpy": (name, keys.cpu().numpy().astype(np.uint32), *rest),
        "python": (version, tuple(words), gauss),
    }


def read_generators(gpu: torch.device | None = None) -> dict[str, Any]:
    """Where the global generators are, with that of a GPU if one is named.

    Args:
        gpu: whose generator to add.
    """
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    return state if gpu is None else {**state, "cuda": torch.cuda.get_rng_state(gpu)}


def set_generators(state: dict[str, Any], gpu: torch.device | None = None) -> None:
    """Put the global generators where :func:`read_generators` found them.

    Args:
        state: what it gave.
        gpu: whose generator to set.
    """
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if gpu is not None and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], gpu)
