"""AT by hand."""

from __future__ import annotations

import pytest
import torch

from kdlit.losses.at import ATLoss, at_loss


def test_channels_are_averaged_and_the_larger_map_is_pooled() -> None:
    student = torch.tensor([[3.0, 0.0], [0.0, 0.0]]).expand(1, 2, 2, 2)  # attention (1, 0, 0, 0)
    teacher = torch.zeros(1, 1, 4, 4)
    teacher[0, 0, 2:, 2:] = 5.0  # attention (0, 0, 0, 1)
    torch.testing.assert_close(at_loss(student, teacher), torch.tensor(2 / 4))


def test_an_odd_power_keeps_the_sign() -> None:
    student, teacher = torch.tensor([[[[-1.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0]]]])
    assert at_loss(student, teacher, p=2) == 0
    assert at_loss(student, teacher, p=3) == 2


@pytest.mark.parametrize("p", [0, 1.5, -2])
def test_a_power_that_is_no_whole_number_is_named(p: float) -> None:
    with pytest.raises(ValueError, match=f"p must be a whole number >= 1, got {p}"):
        ATLoss(p=p)
    with pytest.raises(ValueError, match="p must be"):
        at_loss(torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2), p=p)
