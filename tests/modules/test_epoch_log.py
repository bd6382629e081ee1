"""Figures of training reach whoever reads them, as if each had been given to ``self.log``."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from kdlit.callbacks import Throughput
from kdlit.loggers import RunLogger
from kdlit.losses import CrossEntropyLoss, KDLoss
from kdlit.modules import ClassificationDistillation, ManyStudents
from kdlit.runs import Run
from tests.conftest import TinyData, TinyNet


class ThroughLightning(ClassificationDistillation):
    """Gives every figure to ``self.log``."""

    def _log_training(self, figures):
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
    assert run.callback_metrics["loss"] == pytest.approx(one.shown["train/loss"])

    run = trainer(log_every_n_steps=1)
    run.fit(several := ManyStudents({"a": module(), "b": module()}), TinyData())
    shown = {name: value for name, value in run.progress_bar_metrics.items() if name.endswith("loss")}
    assert shown == {f"{name}/loss": student.shown["train/loss"] for name, student in several.students.items()}


class Figures(ClassificationDistillation):
    """Logs a figure of its own of every epoch."""

    own = None

    def figures(self, stage):
        return super().figures(stage) | ({"train/own": self.own()} if stage == "train" else {})


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (lambda self: self.student.fc.weight.norm() * 0 + 2, 2.0),
        (lambda self: torch.tensor([3.0]), 3.0),
        (lambda self: torch.tensor(True), 1.0),
        (lambda self: 4, 4.0),
        (lambda self: torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (lambda self: nn.Parameter(torch.tensor(6.0)), 6.0),
    ],
    ids=["graph", "one_element", "bool", "int", "bfloat16", "parameter"],
)
def test_numbers_in_any_form_become_plain_ones(trainer, tmp_path, own, expected):
    best = ModelCheckpoint(tmp_path / "kept", "{train/own:.2f}", "train/own", save_on_train_epoch_end=True)
    run = trainer(logger=RunLogger(str(tmp_path)), callbacks=[best], enable_checkpointing=True)
    one = module(Figures)
    one.own = own.__get__(one)
    run.fit(one, TinyData())
    figure = run.callback_metrics["train/own"]
    assert (float(figure), figure.dtype, figure.shape, figure.requires_grad) == (expected, torch.float32, (), False)
    assert Run(tmp_path, {}, {}).series()["train/own"] == {0: expected}


def test_what_is_logged_stays_as_it_was(trainer):
    one = module(Figures)
    one.own = (lambda self: self.student.bn.num_batches_tracked).__get__(one)
    run = trainer()
    run.fit(one, TinyData())
    one.student.bn.num_batches_tracked += 10
    assert run.callback_metrics["train/own"] == 4


@pytest.mark.parametrize("own", [torch.zeros(3), None, {}], ids=["three", "none", "dictionary"])
def test_what_is_no_number_is_named(trainer, own):
    one = module(Figures)
    one.own = (lambda self: own).__get__(one)
    with pytest.raises(ValueError, match="what is logged of an epoch must be numbers, but train/own is"):
        trainer().fit(one, TinyData())


def test_whoever_overrides_log_sees_all(trainer):
    class Renamed(ClassificationDistillation):
        def log(self, name, *args, **kwargs):
            super().log(f"my/{name}", *args, **kwargs)

    run = trainer()
    run.fit(module(Renamed), TinyData())
    assert {"my/train/loss", "my/val/top1", "my/train/weighted/kd"} <= run.callback_metrics.keys()
    assert "train/loss" not in run.callback_metrics


def test_loggers_are_called_as_lightning_calls_them(trainer):
    class Odd(DummyLogger):
        rows = []

        def log_metrics(self, *, step, metrics):
            self.rows.append((step, metrics))

    trainer(logger=Odd()).fit(module(), TinyData())
    assert [step for step, row in Odd.rows if "train/loss" in row] == [3]
    assert all(isinstance(value, (int, float)) for _, row in Odd.rows for value in row.values())


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
