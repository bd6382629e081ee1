"""SP by hand and at its edges."""

from __future__ import annotations

import pytest
import torch

from kdlit.losses.sp import sp_loss


def test_one_sample_is_as_similar_to_itself_in_both_networks() -> None:
    assert sp_loss(torch.randn(1, 3, 2, 2), torch.randn(1, 7)) == 0


def test_tokens_and_maps_are_flattened() -> None:
    student, teacher = torch.randn(4, 5, 6), torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(sp_loss(student, teacher), sp_loss(student.flatten(1), teacher.flatten(1)))


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.2])
def test_two_samples_at_an_angle(angle: float) -> None:
    """Rows (1, c) and (c, 1) over their norm, against (1, 0) and (0, 1)."""
    turn = torch.tensor(angle, dtype=torch.float64)
    student = torch.stack([torch.tensor([1.0, 0.0], dtype=torch.float64), torch.stack([turn.cos(), turn.sin()])])
    cosine, norm = turn.cos(), (1 + turn.cos() ** 2).sqrt()
    expected = 2 * ((1 / norm - 1) ** 2 + (cosine / norm) ** 2) / 4
    torch.testing.assert_close(sp_loss(student, torch.eye(2, dtype=torch.float64)), expected)
