"""Several teachers as one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdlit.models.ensemble import MeanEnsemble, MostConfidentEnsemble


class Constant(nn.Module):
    """Gives the same logits for every picture of a batch of their number."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, image: Tensor) -> Tensor:
        return self.logits


IMAGE = torch.zeros(2, 3, 4, 4)
FIRST = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
SECOND = 7 + torch.tensor([[1.0, 1.0], [1.0, 9.0]]).log()


def test_probabilities_are_averaged_not_logits() -> None:
    log_p = MeanEnsemble([Constant(FIRST), Constant(SECOND)])(IMAGE)
    torch.testing.assert_close(log_p.exp(), torch.tensor([[0.625, 0.375], [0.3, 0.7]]))


def test_weights_are_shares() -> None:
    log_p = MeanEnsemble([Constant(FIRST), Constant(SECOND)], weights=[3, 1])(IMAGE)
    torch.testing.assert_close(log_p.exp(), torch.tensor([[0.6875, 0.3125], [0.4, 0.6]]))
    alone = MeanEnsemble([Constant(FIRST), Constant(SECOND)], weights=[1, 0])(IMAGE)
    torch.testing.assert_close(alone, FIRST.log_softmax(dim=-1))


def test_the_surest_member_speaks_for_each_picture() -> None:
    log_p = MostConfidentEnsemble([Constant(FIRST), Constant(SECOND)])(IMAGE)
    torch.testing.assert_close(log_p.exp(), torch.tensor([[0.75, 0.25], [0.1, 0.9]]))


def test_of_equally_sure_members_the_first_speaks() -> None:
    log_p = MostConfidentEnsemble([Constant(FIRST), Constant(FIRST.flip(1))])(IMAGE)
    torch.testing.assert_close(log_p, FIRST.log_softmax(dim=-1))


@pytest.mark.parametrize("ensemble", [MeanEnsemble, MostConfidentEnsemble])
def test_extreme_and_half_precision_logits(ensemble: type[nn.Module]) -> None:
    members = [Constant(1e4 * FIRST.sign()), Constant(-1e4 * torch.ones(2, 2))]
    assert ensemble(members)(IMAGE).isfinite().all()
    half = ensemble([Constant(FIRST.bfloat16()), Constant(SECOND.bfloat16())])(IMAGE)
    assert half.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ensemble(members)(IMAGE).dtype == torch.float32


def test_members_are_found_by_path_and_saved() -> None:
    ensemble = MeanEnsemble([nn.Linear(1, 2), nn.Linear(1, 2)])
    assert set(ensemble.state_dict()) == {f"members.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"weights must hold one number for each of the 2 members, got \[1.0\]"),
        ([1.0, -1.0], r"weights must be finite, >= 0 and not all 0, got \[1.0, -1.0\]"),
        ([0.0, 0.0], r"weights must be finite, >= 0 and not all 0, got \[0.0, 0.0\]"),
        ([1.0, float("nan")], r"weights must be finite.*nan"),
    ],
)
def test_bad_weights(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeanEnsemble([Constant(FIRST), Constant(SECOND)], weights)


def test_bad_members() -> None:
    with pytest.raises(ValueError, match="members must hold at least one network"):
        MostConfidentEnsemble([])
    with pytest.raises(ValueError, match=r"members must give logits of one shape, got \(2, 2\), \(2, 3\)"):
        MeanEnsemble([Constant(FIRST), Constant(torch.zeros(2, 3))])(IMAGE)
