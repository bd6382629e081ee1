"""The recipe of vision transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdlit.optim import TransformerAdamW, WarmupCosine


def test_weights_of_layers_decay_and_nothing_else_does():
    tensors = {
        "linear": torch.ones(4, 3),
        "convolution": torch.ones(4, 3, 2, 2),
        "bias": torch.ones(4),
        "norm": torch.ones(4),
        "class token": torch.ones(1, 1, 4),
        "positions": torch.ones(1, 9, 4),
    }
    params = {name: nn.Parameter(value) for name, value in tensors.items()}
    optimizer = TransformerAdamW(params.values(), lr=0.1, weight_decay=0.5)
    for param in params.values():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    decayed = {name for name, param in params.items() if not torch.equal(param, torch.ones_like(param))}
    assert decayed == {"linear", "convolution"}
    assert params["linear"][0, 0].item() == pytest.approx(1 - 0.1 * 0.5)
    assert len(TransformerAdamW([nn.Parameter(torch.ones(3))]).param_groups) == 1


def rates(**kwargs):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, **kwargs)
    found = []
    for _ in range(kwargs["epochs"]):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found, optimizer.param_groups[0]["lr"]


def test_the_rate_rises_along_a_line_and_falls_along_a_cosine():
    found, last = rates(epochs=10, warmup_epochs=4, start=0.2, end=0.1)
    assert found[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert found[7] == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert found[4:] == sorted(found[4:], reverse=True)
    assert last == pytest.approx(0.2)


def test_it_equals_torchs_schedules_in_sequence():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
    parts = [
        torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-3, total_iters=20),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=280, eta_min=0.02),
    ]
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[20])
    expected = []
    for _ in range(300):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(epochs=300, warmup_epochs=20, end=0.01)[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_epochs": 10}, r"warmup_epochs must lie in 0\.\.epochs - 1, got 10 of 10"),
        ({"warmup_epochs": -1}, "got -1"),
        ({"start": 2.0}, r"start must lie in 0\.\.1, got 2.0"),
        ({"end": -0.1}, r"end must lie in 0\.\.1, got -0.1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        rates(epochs=10, **settings)
