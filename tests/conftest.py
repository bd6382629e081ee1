"""Small networks, small data and a command line in this process, for all tests."""

from __future__ import annotations

import csv
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from kdlit.callbacks.throughput import without_times
from kdlit.data import PictureDataModule, Pictures

SHARED = Path(__file__).parents[2] / "shared"
LONG = ("test_notebooks.py", "test_runs.py", "test_real_photographs.py")  # minutes each


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that no process waits for another at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def _quiet_and_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread (two that wait for each other are slower on small networks), fixed seeds, no network."""
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("KDLIT_RUN_DIR", raising=False)


@pytest.fixture
def shared() -> Path:
    """The folder with reference material and real pictures, which not every checkout has beside it."""
    if not SHARED.exists():
        pytest.skip(f"no reference material in {SHARED}")
    return SHARED


class TinyNet(nn.Module):
    """A network with a stage, a batch norm and a head; trains in milliseconds."""

    def __init__(self, num_classes: int = 5, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.fc(self.act(self.bn(self.stem(image))).mean((2, 3)))


class TinyData(PictureDataModule):
    """Five classes, told apart by brightness; 96 training and 40 test pictures of 3x8x8."""

    def __init__(self, val_size: float = 32, batch_size: int = 16, **kwargs: object) -> None:
        super().__init__(
            mean=(0.5,) * 3, std=(0.25,) * 3, val_size=val_size, batch_size=batch_size, padding=1, **kwargs
        )

    def load(self) -> dict[str, Pictures]:
        self.class_names = list("abcde")
        return {"train": self._draw(96, 1), "test": self._draw(40, 2)}

    @staticmethod
    def _draw(size: int, seed: int) -> Pictures:
        generator = torch.Generator().manual_seed(seed)
        target = torch.arange(size) % 5
        noise = torch.randint(0, 40, (size, 3, 8, 8), generator=generator)
        return Pictures((noise + 45 * target[:, None, None, None]).to(torch.uint8), target)


class Diary(L.Callback):
    """Remembers the training batches; saves a checkpoint where asked."""

    def __init__(self, save_at=None, path=None):
        self.batches, self.save_at, self.path = [], save_at, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append((trainer.current_epoch, batch["index"].tolist(), batch["image"].double().sum().item()))
        if trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.path)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """Makes a silent trainer that writes into a scratch folder."""

    def make(**kwargs: object) -> L.Trainer:
        settings = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path),
        }
        return L.Trainer(**(settings | kwargs))

    return make


@pytest.fixture
def kdlit_cli(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs ``kdlit ARGUMENTS`` in this process and in a scratch folder; returns what it printed, errors included."""
    from kdlit.__main__ import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["kdlit", *map(str, arguments)])
        monkeypatch.delenv("KDLIT_RUN_DIR", raising=False)
        capsys.readouterr()
        try:
            main()
        except SystemExit as stop:
            captured = capsys.readouterr()
            return captured.out + captured.err + (stop.code if isinstance(stop.code, str) else f"exit {stop.code}")
        captured = capsys.readouterr()
        return captured.out + captured.err

    return run


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """Lets this process hear Ctrl-C also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def repeatable_log(folder: Path | str) -> list[dict[str, str]]:
    """The rows of ``metrics.csv`` without what is measured by the clock."""
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        rows = [without_times({key: value for key, value in row.items() if value}) for row in csv.DictReader(file)]
    return [row for row in rows if row.keys() - {"epoch", "step"}]


def write_cifar_layout(root: Path, classes: int = 3, train: int = 24, test: int = 9) -> Path:
    """Write random pictures as ``root/cifar-100-python/{train,test,meta}``."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name, size in (("train", train), ("test", test)):
        content = {
            "data": generator.integers(0, 256, (size, 3072), dtype=np.uint8),
            "fine_labels": [index % classes for index in range(size)],
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"c{i}" for i in range(classes)]}, protocol=2))
    return folder


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    """A small data set in the layout of CIFAR-100, below ``tmp_path``."""
    return write_cifar_layout(tmp_path)


@pytest.fixture
def as_nobody():
    """Run what follows without root's right to read everything; gives the rights back at the end."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
