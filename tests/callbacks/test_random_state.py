"""Random generators across a resume."""

from __future__ import annotations

import random

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from kdlit.callbacks import RandomState
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
