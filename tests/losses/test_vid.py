"""VID's variances."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kdlit.losses.vid import VIDLoss
from tests.losses.feature_cases import Golden, apply, set_up
from tests.losses.test_golden import assert_agrees, load

OPTIONS = ["eps", "init_pred_var"]


@pytest.mark.parametrize("number", range(3))
def test_golden_initial_log_scale(number: int) -> None:
    case = load("vid", number)
    fresh = set_up(
        VIDLoss, *([case[f"{role}_feat_0"]] for role in ("student", "teacher")), **{k: case.params[k] for k in OPTIONS}
    )
    log_scale = fresh.heads[0].log_scale
    assert log_scale.shape == case["param/log_scale"].shape
    torch.testing.assert_close(
        log_scale.detach().double(), case["initial_log_scale"].expand_as(log_scale), rtol=1e-6, atol=0
    )
    variance = F.softplus(log_scale) + case.eps
    torch.testing.assert_close(variance, torch.full_like(variance, case.init_pred_var))


def test_variances_that_stay() -> None:
    """As in mdistiller: the same value and the same names in a checkpoint, but nothing to train."""
    run = Golden("vid", 0, VIDLoss, OPTIONS, dtype=torch.float64)
    fixed = set_up(VIDLoss, run.student, run.teacher, learn_variance=False).double()
    fixed.load_state_dict(run.loss.state_dict())
    value = apply(fixed, run.student, run.teacher)
    assert_agrees(value.detach(), run.case["loss"], 1e-9, "loss")
    value.backward()
    trained = {name for name, value in fixed.named_parameters() if value.requires_grad}
    assert trained == {f"heads.0.conv{index}.weight" for index in range(3)}
    assert fixed.heads[0].log_scale.grad is None


@pytest.mark.parametrize("init_pred_var", [1e-3, 5.0, 1000.0])
def test_any_initial_variance(init_pred_var: float) -> None:
    loss = set_up(VIDLoss, [torch.randn(2, 3, 4, 4)], [torch.randn(2, 3, 4, 4)], init_pred_var=init_pred_var)
    variance = loss.heads[0](torch.randn(2, 3, 4, 4))[1]
    torch.testing.assert_close(variance, torch.full_like(variance, init_pred_var), rtol=1e-4, atol=0)


def test_ranges() -> None:
    with pytest.raises(ValueError, match=r"init_pred_var must be > eps = 0\.1, got 0\.05"):
        VIDLoss(eps=0.1, init_pred_var=0.05)
    with pytest.raises(ValueError, match="eps must be > 0, got 0"):
        VIDLoss(eps=0)
