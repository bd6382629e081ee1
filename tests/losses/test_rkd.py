"""RKD against its plain form, its named terms, and the memory that the angles take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdlit.losses import rkd
from kdlit.losses.rkd import RKDLoss, rkd_loss
from tests.losses.test_golden import assert_agrees, load


def plain_angles(student: Tensor, teacher: Tensor) -> Tensor:
    """All B^3 cosines at once, degenerate ones as 0."""

    def cosines(x: Tensor) -> Tensor:
        edges = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=-1)
        return edges @ edges.mT

    return F.smooth_l1_loss(cosines(student), cosines(teacher))


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        sizes = [
            one.untyped_storage().nbytes() // one.element_size()
            for one in tree_leaves(output)
            if isinstance(one, Tensor)
        ]
        self.elements = max([self.elements, *sizes])
        return output


@pytest.mark.parametrize("number", range(3))
def test_golden_terms(number: int) -> None:
    case = load("rkd", number)
    for name in ("distance", "angle"):
        weights = {f"{term}_weight": float(term == name) for term in ("distance", "angle")}
        value = rkd_loss(case["student_feat_0"], case["teacher_feat_0"], **weights)
        assert_agrees(value.detach(), case[name], case.rtol, f"case {number}, {name}")


@pytest.mark.parametrize("elements", [1, 500, 2**22])
def test_parts_of_the_batch_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rkd, "ELEMENTS", elements)
    student, teacher = 3 * torch.randn(13, 5, dtype=torch.float64), torch.randn(13, 7, dtype=torch.float64)
    student.requires_grad_()
    value = rkd_loss(student, teacher, distance_weight=0.0, angle_weight=1.0)
    expected = plain_angles(student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(one, student)[0] for one in (3 * value, 3 * expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_memory_does_not_grow_with_the_cube_of_the_batch() -> None:
    student, teacher = torch.randn(320, 16, requires_grad=True), torch.randn(320, 24)
    with Largest() as seen:
        rkd_loss(student, teacher, distance_weight=25.0, angle_weight=50.0).backward()
    assert 320**2 <= seen.elements <= rkd.ELEMENTS < 320**3


def test_squared_distances_by_hand() -> None:
    """Squares 1, 4, 1 and 1, 9, 4, in units of their means 2 and 14/3."""
    student, teacher = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [3.0]])
    value = rkd_loss(student, teacher, distance_weight=1.0, angle_weight=0.0, squared=True)
    gaps = [1 / 2 - 3 / 14, 2 - 27 / 14, 1 / 2 - 12 / 14]
    torch.testing.assert_close(value, torch.tensor(sum(gap**2 for gap in gaps) / 9))


def test_huge_means_do_not_drown_small_distances() -> None:
    student, teacher = torch.randn(2, 8, 16)
    weights = {"distance_weight": 25.0, "angle_weight": 50.0}
    shifted = rkd_loss(student + 1000, teacher, **weights)
    torch.testing.assert_close(shifted, rkd_loss(student, teacher, **weights), rtol=1e-3, atol=0)


def test_samples_that_coincide_give_each_other_no_gradient() -> None:
    student = torch.randn(6, 8)
    student[1] = student[0]
    student.requires_grad_()
    rkd_loss(student, torch.randn(6, 8), distance_weight=25.0, angle_weight=50.0).backward()
    assert student.grad.abs().max() < 100
    alike = torch.ones(6, 8, requires_grad=True)
    rkd_loss(alike, torch.randn(6, 8), distance_weight=25.0, angle_weight=50.0).backward()
    assert not alike.grad.any()


def test_defaults_and_ranges() -> None:
    loss = RKDLoss()
    assert (loss.distance_weight, loss.angle_weight, loss.squared, loss.eps) == (25.0, 50.0, False, 1e-12)
    for name in ("distance_weight", "angle_weight"):
        with pytest.raises(ValueError, match=f"{name} must be >= 0, got -1"):
            RKDLoss(**{name: -1.0})
    with pytest.raises(ValueError, match="eps must be > 0, got 0"):
        RKDLoss(eps=0.0)
