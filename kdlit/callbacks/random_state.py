"""A resumed run draws what an uninterrupted one would have drawn."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import torch


class RandomState(L.Callback):
    """Keeps the state of the random generators of Python, NumPy and torch in the checkpoint.

    Dropout, negative samples and the like then go on as if nothing had happened. (The data draws from generators of its
    own.) Of several processes the state of the first is kept: they all draw alike.
    """

    def __init__(self) -> None:
        self._saved: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """What the generators are at now."""
        name, keys, *rest = np.random.get_state()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
            "python": random.getstate(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember it until training starts."""
        self._saved = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the generators, after all that comes before the first step has drawn from them."""
        if not self._saved:
            return
        saved, self._saved = self._saved, {}
        torch.set_rng_state(saved["torch"].cpu())
        if len(saved["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([state.cpu() for state in saved["cuda"]])
        name, keys, *rest = saved["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        version, state, gauss = saved["python"]
        random.setstate((version, tuple(state), gauss))
