"""Figures of training reach whoever reads them, as if each had been given to ``self.log``."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from kdlit.callbacks import Throughput
from kdlit.losses import CrossEntropyLoss, KDLoss
from kdlit.modules import ClassificationDistillation, ManyStudents
from kdlit.runs import Run
from tests.conftest import TinyData, TinyNet


class ThroughLightning(ClassificationDistillation):
    """Gives every figure to ``self.log``."""

    def log_epoch(self, figures):
        for name, value in figures.items():
            self.log(name, float(value))


def module(kind=ClassificationDistillation, **kwargs):
    L.seed_everything(0, verbose=False)
    return kind(TinyNet(), {"ce": CrossEntropyLoss(), "kd": KDLoss()}, TinyNet(), input_size=(3, 8, 8), **kwargs)


class Reader(L.Callback):
    """Remembers what a callback that watches figures is told at the end of each epoch."""

    def __init__(self):
        self.told = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.told.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    on_train_end = on_train_epoch_start


@pytest.mark.parametrize("accumulate", [1, 4], ids=["every_batch", "accumulated"])
def test_all_is_as_with_lightnings_own_log(trainer, tmp_path, accumulate):
    rows, told, logged = {}, {}, {}
    for kind in (ClassificationDistillation, ThroughLightning):
        reader = Reader()
        run = trainer(
            max_epochs=3,
            log_every_n_steps=2,
            accumulate_grad_batches=accumulate,
            logger=CSVLogger(tmp_path, kind.__name__, version=""),
            callbacks=[reader],
        )
        run.fit(module(kind), TinyData())
        rows[kind] = Run(tmp_path / kind.__name__, {}, {}).rows
        told[kind] = reader.told
        logged[kind] = {name: float(value) for name, value in run.logged_metrics.items()}
    assert len(rows[ThroughLightning]) == 6, "a row of validation and one of training in each epoch"
    for one, other in zip(rows[ClassificationDistillation], rows[ThroughLightning], strict=True):
        assert {name: float(value) for name, value in one.items()} == pytest.approx(
            {name: float(value) for name, value in other.items()}, rel=1e-6
        )
    assert told[ClassificationDistillation] == told[ThroughLightning]
    assert logged[ClassificationDistillation] == logged[ThroughLightning]


def test_training_figures_can_be_watched(trainer, tmp_path):
    best = ModelCheckpoint(tmp_path, "{epoch}", "train/loss", save_top_k=-1, save_on_train_epoch_end=True)
    never_enough = EarlyStopping("train/loss", min_delta=1e6, patience=1, check_on_train_epoch_end=True)
    run = trainer(max_epochs=9, callbacks=[best, never_enough], enable_checkpointing=True)
    run.fit(module(), TinyData())
    assert run.current_epoch == 2, "stopped when the second epoch was not better by a million"
    assert len(best.best_k_models) == 2
    assert float(run.callback_metrics["train/loss"]) in map(float, best.best_k_models.values())


def test_any_bar_is_told_the_loss(trainer):
    run = trainer(log_every_n_steps=1)
    run.fit(one := module(), TinyData())
    assert run.progress_bar_metrics["loss"] == one.shown["train/loss"]

    run = trainer(log_every_n_steps=1)
    run.fit(several := ManyStudents({"a": module(), "b": module()}), TinyData())
    shown = {name: value for name, value in run.progress_bar_metrics.items() if name.endswith("loss")}
    assert shown == {f"{name}/loss": student.shown["train/loss"] for name, student in several.students.items()}


def test_what_other_callbacks_log_is_kept_beside_it(trainer, tmp_path):
    class Own(ClassificationDistillation):
        def on_train_epoch_end(self):
            super().on_train_epoch_end()
            self.log("train/own", torch.tensor(float(self.current_epoch)))

    run = trainer(max_epochs=2, logger=CSVLogger(tmp_path, "own", version=""), callbacks=[Throughput()])
    run.fit(module(Own), TinyData())
    series = Run(tmp_path / "own", {}, {}).series()
    assert series["train/own"] == {0: 0.0, 1: 1.0}
    for name in ("train/loss", "train/images_per_s", "train/share/data", "val/top1"):
        assert sorted(series[name]) == [0, 1], name


def test_without_a_logger_nothing_is_missing(trainer):
    run = trainer(callbacks=[Throughput()])
    run.fit(module(), TinyData())
    assert {"train/loss", "train/loss/kd", "train/weighted/kd", "train/images_per_s"} <= run.callback_metrics.keys()
