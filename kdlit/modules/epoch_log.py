"""Figures of a training epoch, handed to callbacks and loggers at once."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import torch
from torch import Tensor


def log_epoch(trainer: L.Trainer, figures: Mapping[str, Tensor | float]) -> None:
    """Log figures of the epoch that ends: what ``self.log`` does in ``on_train_epoch_end``, for a tenth of its time.

    ``self.log`` makes a metric of each figure, to average it over steps and processes; these are averaged already.

    Args:
        trainer: one whose training epoch ends.
        figures: scalars by name, the same in all processes.
    """
    if not figures:
        return
    found = {name: torch.as_tensor(value) for name, value in figures.items()}
    trainer.callback_metrics.update(found)
    trainer.logged_metrics.update(found)
    row = {name: value.item() for name, value in found.items()} | {"epoch": trainer.current_epoch}
    for logger in trainer.loggers:
        logger.log_metrics(row, step=trainer.fit_loop.epoch_loop._batches_that_stepped - 1)
        logger.save()
