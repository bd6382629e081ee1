"""Which checkpoints a run keeps."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor


class BestAndLast(ModelCheckpoint):
    """Keeps ``last.ckpt`` and, if the run has validation data, the best by ``monitor`` as ``best.ckpt``.

    Args:
        dirpath: folder of the checkpoints; by default ``checkpoints`` in the run folder.
        monitor: logged value that says what is best; measured on held-out training pictures, never on the test set.
        mode: ``max`` or ``min``: which end of ``monitor`` is best.
        every_n_epochs: how often to save.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str = "val/top1",
        mode: str = "max",
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            every_n_epochs=every_n_epochs,
            save_last=True,
            save_on_train_epoch_end=True,
            auto_insert_metric_name=False,
        )

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.monitor in monitor_candidates:  # absent until the first validation, where that is not every epoch
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the last checkpoint only, if there is nothing to tell the best by."""
        super().on_train_start(trainer, pl_module)
        if not sum(trainer.num_val_batches):
            self.monitor, self.save_top_k = None, 0
