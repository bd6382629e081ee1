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
        self._state = _generators()
        if seed is not None:
            self.restart()

    def restart(self) -> None:
        """Go back to what the seed alone gives, as ``seed_everything`` does."""
        outer = _generators()
        torch.default_generator.manual_seed(self.seed)
        np.random.seed(self.seed % 2**32)
        random.seed(self.seed)
        self._state = _generators()
        _set_generators(outer)

    @contextmanager
    def flowing(self, device: torch.device) -> Iterator[None]:
        """Let the global generators be this stream for a while; others find them as they were.

        Args:
            device: whose generator is part of the stream, beside those of the CPU.
        """
        gpu = device if device.type == "cuda" else None
        outer = _generators(gpu)
        _set_generators(self._state, gpu)
        if gpu is not None and "cuda" not in self._state:
            torch.cuda.default_generators[gpu.index or 0].manual_seed(self.seed)
        try:
            yield
        finally:
            self._state = _generators(gpu)
            _set_generators(outer, gpu)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as plain data."""
        name, keys, *rest = self._state["numpy"]
        numpy = (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
        cuda = [self._state["cuda"]] if "cuda" in self._state else []
        return {"torch": self._state["torch"], "cuda": cuda, "numpy": numpy, "python": self._state["python"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        name, keys, *rest = state_dict["numpy"]
        version, words, gauss = state_dict["python"]
        self._state = {
            "torch": state_dict["torch"].cpu(),
            "numpy": (name, keys.cpu().numpy().astype(np.uint32), *rest),
            "python": (version, tuple(words), gauss),
        }
        if state_dict["cuda"]:
            self._state["cuda"] = state_dict["cuda"][0].cpu()


def _generators(gpu: torch.device | None = None) -> dict[str, Any]:
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    return state if gpu is None else {**state, "cuda": torch.cuda.get_rng_state(gpu)}


def _set_generators(state: dict[str, Any], gpu: torch.device | None = None) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if gpu is not None and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], gpu)
