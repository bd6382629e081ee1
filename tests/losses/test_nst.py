"""NST's two forms, and what its kernel does not see."""

from __future__ import annotations

import pytest
import torch

from kdlit.losses.nst import _kernel, nst_loss


@pytest.mark.parametrize(("channels", "side"), [((12, 7), 3), ((5, 7), 3)])
def test_both_forms_are_the_published_kernel(channels: tuple[int, int], side: int) -> None:
    """More channels than positions, and fewer."""
    student, teacher = (torch.randn(4, width, side, side, dtype=torch.float64) for width in channels)
    student.requires_grad_()
    s, t = (one.flatten(2) / one.flatten(2).norm(dim=-1, keepdim=True) for one in (student, teacher))
    expected = _kernel(t, t) + _kernel(s, s) - 2 * _kernel(s, t)
    value = nst_loss(student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(one, student)[0] for one in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_order_sign_and_scale_of_channels_do_not_matter() -> None:
    student, teacher = torch.randn(2, 4, 6, 5, 5, dtype=torch.float64)
    changed = student[:, torch.randperm(6)] * torch.tensor([1.0, -2.0, 3.0, 0.1, -1.0, 5.0]).view(-1, 1, 1)
    torch.testing.assert_close(nst_loss(changed, teacher), nst_loss(student, teacher))


@pytest.mark.parametrize("width", [6, 40])
def test_a_dead_channel_gets_no_gradient(width: int) -> None:
    student, teacher = torch.randn(2, 3, width, 5, 5)
    student[:, 2] = 0
    student.requires_grad_()
    nst_loss(student, teacher).backward()
    assert not student.grad[:, 2].any()
    assert student.grad[:, 1].any()
