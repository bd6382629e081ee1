"""Random generators across a resume."""

from __future__ import annotations

import random

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from kdlit.callbacks import LastCheckpoint, RandomState
from kdlit.losses import CrossEntropyLoss
from kdlit.modules import ClassificationDistillation
from tests.conftest import TinyData, TinyNet


class Forgetful(TinyNet):
    """Draws from torch's generator in every step."""

    def __init__(self):
        super().__init__()
        self.act = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))


class Saver(L.Callback):
    def __init__(self, step, path):
        self.step, self.path, self.drawn = step, path, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.drawn.append((random.random(), np.random.rand()))
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [3, 4])  # inside an epoch of four steps, and at its end
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trainer, tmp_path, step):
    path = tmp_path / "at.ckpt"

    def run(ckpt_path, save_at):
        module = ClassificationDistillation(Forgetful(), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))
        saver = Saver(save_at, path)
        fitting = trainer(max_epochs=3, callbacks=[RandomState(), saver])
        fitting.fit(module, TinyData(), ckpt_path=ckpt_path)
        return module.student.state_dict(), saver.drawn

    whole, drawn = run(None, step)
    L.seed_everything(5, verbose=False)
    resumed, drawn_later = run(path, None)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert drawn_later == drawn[step:]


class PlainData(L.LightningDataModule):
    """A user's own, with torch's own loader, whose order is drawn when an epoch begins."""

    def train_dataloader(self):
        data = TinyData()
        data.prepare_data()
        data.setup("fit")
        train = data.datasets["train"]
        train.augmented = False
        return DataLoader([train[index] for index in range(64)], batch_size=16, shuffle=True)


def test_data_that_cannot_be_taken_up_within_an_epoch_is_taken_up_at_its_start(trainer, tmp_path):
    def run(name, ckpt_path=None, stop_at=None):
        class Stop(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                drawn.append(batch["index"].tolist())
                if trainer.global_step == stop_at:
                    raise KeyboardInterrupt

        drawn = []
        L.seed_everything(0 if ckpt_path is None else 5, verbose=False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = ClassificationDistillation(Forgetful(), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))
        last = LastCheckpoint(str(tmp_path / name), every_minutes=1e-9, share=1.0)
        fitting = trainer(max_epochs=3, callbacks=[RandomState(), Stop(), last], enable_checkpointing=True)
        try:
            fitting.fit(module, PlainData(), ckpt_path=ckpt_path)
        except SystemExit:
            assert stop_at
        return module.student.state_dict(), drawn

    whole, drawn = run("whole")
    run("broken", stop_at=6)
    saved = tmp_path / "broken" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 4, "not within the epoch"
    resumed, drawn_later = run("broken", ckpt_path=saved)
    assert drawn_later == drawn[4:]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
