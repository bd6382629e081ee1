"""What keeping a run costs: the seconds that a checkpoint takes, as a share of the time at the default frequency."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torchvision.models import resnet18

from kdlit.callbacks import LastCheckpoint, RandomState
from kdlit.files import WholeCheckpointIO
from kdlit.losses import KDLoss
from kdlit.models import resnet8x4
from kdlit.modules import ClassificationDistillation

# Student, size of a picture, classes, steps of an epoch (batch 64 of CIFAR-100, batch 256 of ImageNet).
STUDENTS = {
    "resnet8x4, CIFAR-100": (resnet8x4, 32, 100, 782),
    "resnet18, ImageNet": (resnet18, 64, 1000, 5005),
}
STEP = 0.005  # seconds, of a fast GPU


class _Saver(L.Callback):
    def __init__(self, times: int) -> None:
        self.times, self.seconds = times, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            last = next(one for one in trainer.callbacks if isinstance(one, LastCheckpoint))
            for _ in range(self.times):
                last.save(trainer)
                self.seconds.append(last._took[-1])


def measure(folder: Path, times: int = 7) -> dict[str, dict[str, Any]]:
    """For each student: ``seconds`` of a checkpoint (median), its ``megabytes``, and ``percent`` of the time.

    Args:
        folder: scratch folder; the checkpoints lie on its disk.
        times: how many checkpoints are written of each.
    """
    found = {}
    for name, (build, side, classes, steps) in STUDENTS.items():
        module = ClassificationDistillation(
            build(num_classes=classes), {"kd": KDLoss()}, teacher=_Flat(classes), input_size=(3, side, side)
        )
        last, saver = LastCheckpoint(str(folder / build.__name__)), _Saver(times)
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=2,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[RandomState(), saver, last],
            plugins=[WholeCheckpointIO()],
        )
        pictures = [{"image": torch.randn(2, 3, side, side), "target": torch.zeros(2, dtype=torch.long)}] * 2
        trainer.fit(module, torch.utils.data.DataLoader(pictures, batch_size=None))
        seconds, epoch = statistics.median(saver.seconds), steps * STEP
        # One at the start of each epoch and one every so many minutes within, unless that takes too much of the time.
        gap = max(min(epoch, 60 * last.every_minutes), seconds / last.share)
        found[name] = {
            "seconds": seconds,
            "megabytes": last.path.stat().st_size / 1e6,
            "percent": 100 * seconds / gap,
            "minutes_between": gap / 60,
        }
    return found


class _Flat(torch.nn.Module):
    """A teacher that takes no time."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.fc(image.mean((2, 3)))
