"""PKT at its edges."""

from __future__ import annotations

import pytest
import torch

from kdlit.losses.pkt import PKTLoss, _neighbours, pkt_loss


def test_neighbours_are_probabilities_also_where_features_are_opposite() -> None:
    """In float32 a cosine can come out below -1."""
    half = torch.randn(50, 2048)
    p = _neighbours(torch.cat([half, -half]), eps=1e-12)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(dim=1), torch.ones(100))


def test_eps_is_positive() -> None:
    for make in (lambda: PKTLoss(eps=0.0), lambda: pkt_loss(torch.ones(2, 2), torch.ones(2, 2), eps=0.0)):
        with pytest.raises(ValueError, match=r"eps must be > 0, got 0\.0"):
            make()
