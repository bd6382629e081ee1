"""Networks, data and a clock for runs that are broken off; named in configs as ``tests.faults.network.NAME``."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import lightning as L
import torch
from torch import nn

from tests.conftest import TinyData, TinyNet

PHASES = {"start": 0, "training": 1, "validation": 2, "saving": 3}


class Net(TinyNet):
    """Draws from torch's generator in every training step, and has features to look at."""

    def __init__(self, num_classes: int = 5, width: int = 8) -> None:
        super().__init__(num_classes, width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(self.pool(self.act(self.bn(self.stem(image)))).flatten(1)))


class Teacher(Net):
    """A frozen one with weights of its own, the same in every process."""

    def __init__(self, num_classes: int = 5, width: int = 12) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            super().__init__(num_classes, width)


class Data(TinyData):
    """With augmentation, a strong view and, if asked for, worker processes."""

    def __init__(self, num_workers: int = 0, batch_size: int = 16) -> None:
        super().__init__(num_workers=num_workers, batch_size=batch_size, strong_view=True)


class Clock(L.Callback):
    """Tells the process that will kill this one what it is doing, and takes its time about it.

    Args:
        pace: seconds that every step takes at least.
    """

    def __init__(self, pace: float = 0.0) -> None:
        self.pace = pace
        path = os.environ.get("KDLIT_TEST_CLOCK")
        self.shared = None
        if path:
            with Path(path).open("r+b") as file:
                self.shared = mmap.mmap(file.fileno(), 16)

    def tell(self, phase: str) -> None:
        if self.shared is not None:
            self.shared[0] = PHASES[phase]
            count = int.from_bytes(self.shared[8:16], "little") + 1
            self.shared[8:16] = count.to_bytes(8, "little")
        time.sleep(self.pace)

    def on_train_batch_start(self, *_):
        self.tell("training")

    def on_validation_batch_start(self, *_):
        self.tell("validation")
