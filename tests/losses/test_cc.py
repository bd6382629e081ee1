"""CC's embeddings."""

from __future__ import annotations

import pytest
import torch

from kdlit.losses.cc import CCLoss
from tests.losses.feature_cases import Golden, set_up
from tests.losses.test_golden import assert_agrees


@pytest.mark.parametrize("number", range(3))
def test_golden_embeddings(number: int) -> None:
    run = Golden("cc", number, CCLoss, ["feat_dim"], dtype=torch.float64)
    embed = run.loss.heads[0]
    assert_agrees(embed.embed_s(run.student[0]).detach(), run.case["student_feat_proj_0"], 1e-9, "student")
    assert_agrees(embed.embed_t(run.teacher[0]).detach(), run.case["teacher_feat_proj_0"], 1e-9, "teacher")


def test_maps_are_flattened_into_feat_dim() -> None:
    embed = set_up(CCLoss, [torch.randn(2, 3, 2, 2)], [torch.randn(2, 5)]).heads[0]
    assert embed.embed_s.weight.shape == (128, 12)
    assert embed.embed_t.weight.shape == (128, 5)
    with pytest.raises(ValueError, match="feat_dim must be > 0, got 0"):
        CCLoss(feat_dim=0)
