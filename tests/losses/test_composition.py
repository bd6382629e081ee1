"""Losses from configuration alone, and from a loop that has no lightning."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from jsonargparse import ArgumentParser

from kdlit import losses
from kdlit.losses import DistillationLoss
from kdlit.types import Batch, ModelOutput


def build(config: str) -> DistillationLoss:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=DistillationLoss)
    parser.add_argument("--config", action="config")
    return parser.instantiate(parser.parse_args(["--config", config])).loss


def test_nested_wrappers() -> None:
    loss = build(
        """
        loss:
          class_path: kdlit.losses.WeightedLoss
          init_args:
            weight: 9.0
            warmup_epochs: 20
            loss:
              class_path: kdlit.losses.LogitStandardization
              init_args:
                unbiased: false
                eps: 0.0
                loss:
                  class_path: kdlit.losses.GlobalTemperature
                  init_args:
                    loss:
                      class_path: kdlit.losses.DKDLoss
                      init_args: {alpha: 1.0, beta: 8.0}
        """
    )
    assert isinstance(loss, losses.WeightedLoss)
    assert isinstance(loss.loss, losses.LogitStandardization)
    assert isinstance(loss.loss.loss, losses.GlobalTemperature)
    assert isinstance(loss.innermost, losses.DKDLoss)
    assert loss.innermost.beta == 8.0


def test_entropy_weights_around_the_levels_of_mlkd() -> None:
    loss = build(
        """
        loss:
          class_path: kdlit.losses.EntropyWeighting
          init_args:
            loss:
              class_path: kdlit.losses.MLKDLoss
              init_args:
                temperatures: [2.0, 4.0]
                levels: [instance, class]
        """
    )
    assert loss.innermost.temperatures == (2.0, 4.0)
    assert loss.innermost.levels == ("instance", "class")


NAMES = [
    name
    for name in losses.__all__
    if isinstance(getattr(losses, name), type)
    and issubclass(getattr(losses, name), DistillationLoss)
    and not issubclass(getattr(losses, name), losses.FeatureLoss)  # these have networks of their own in their tests
    and name not in ("DistillationLoss", "LossWrapper")
]


@pytest.mark.parametrize("name", NAMES)
def test_every_class_has_defaults_and_gives_a_scalar(name: str) -> None:
    kind = getattr(losses, name)
    options = "{loss: {class_path: kdlit.losses.KDLoss}}" if issubclass(kind, losses.LossWrapper) else "{}"
    loss = build(f"loss: {{class_path: kdlit.losses.{name}, init_args: {options}}}")
    network = torch.nn.Sequential()
    network.add_module("fc", torch.nn.Linear(6, 5))
    loss.setup(network, network, torch.zeros(1, 6))
    logits = 5 * torch.randn(4, 4, 5)
    batch: Batch = {"image": torch.zeros(4, 6), "target": logits[2].argmax(dim=-1)}
    logits.requires_grad_()
    student, teacher = ModelOutput(logits[0], {"head": logits[0]}, logits[1]), ModelOutput(logits[2], {}, logits[3])
    value = loss(student, teacher.detach(), batch)
    value.backward()
    assert value.shape == ()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[0].any()
    assert logits.grad[1].any() == loss.needs_strong_view


def test_lightning_is_not_imported() -> None:
    code = (
        "import sys, kdlit.losses; print(sorted(m for m in sys.modules if m.split('.')[0] in ('lightning', 'wandb')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
