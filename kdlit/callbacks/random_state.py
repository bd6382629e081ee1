"""A resumed run draws what an uninterrupted one would have drawn."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
import torch

from kdlit.callbacks.last_checkpoint import can_go_on_within_epoch
from kdlit.modules.streams import as_plain, from_plain, read_generators, set_generators


class RandomState(L.Callback):
    """Keeps the state of the random generators of Python, NumPy and torch in the checkpoint.

    Dropout, negative samples and the like then go on as if nothing had happened. (The data draws from generators of its
    own.) Of several processes the state of the first is kept: they all draw alike.
    """

    def __init__(self) -> None:
        self._saved: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """What the generators are at now."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {**as_plain(read_generators()), "cuda": cuda}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember it until training starts."""
        self._saved = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the generators, after all that comes before the first step has drawn from them."""
        if not self._saved:
            return
        saved, self._saved = self._saved, {}
        set_generators(from_plain(saved))
        if not can_go_on_within_epoch(trainer):
            iter(cast("Any", trainer.fit_loop._data_fetcher))  # draws the order of the epoch that begins
        if len(saved["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([state.cpu() for state in saved["cuda"]])
