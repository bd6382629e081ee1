"""FitNet's regressors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdlit.losses.fitnet import FitNetLoss
from tests.losses.feature_cases import Golden, set_up
from tests.losses.test_golden import assert_agrees


@pytest.mark.parametrize("number", range(3))
def test_golden_regressed_map(number: int) -> None:
    run = Golden("fitnet", number, FitNetLoss, ["use_relu"], dtype=torch.float64)
    expected = run.case["student_feat_proj_0"]
    assert_agrees(run.loss.heads[0](run.student[0]).detach(), expected, run.case.rtol, f"case {number}")


@pytest.mark.parametrize(
    ("size", "goal", "kind", "kernel"),
    [
        ((8, 8), (8, 8), nn.Conv2d, (1, 1)),
        ((8, 8), (4, 4), nn.Conv2d, (3, 3)),
        ((4, 4), (8, 8), nn.ConvTranspose2d, (4, 4)),
        ((8, 8), (5, 5), nn.Conv2d, (4, 4)),
        ((8, 6), (2, 6), nn.Conv2d, (7, 1)),
    ],
)
def test_the_regressor_gives_the_teachers_shape(size, goal, kind, kernel) -> None:
    student, teacher = torch.randn(2, 3, *size), torch.randn(2, 5, *goal)
    for use_relu in (True, False):
        regressor = set_up(FitNetLoss, [student], [teacher], use_relu=use_relu).heads[0]
        assert type(regressor.conv) is kind
        assert regressor.conv.kernel_size == kernel
        output = regressor(student)
        assert output.shape == teacher.shape
        assert (output >= 0).all() == use_relu


def test_a_size_that_cannot_be_regressed_is_named() -> None:
    with pytest.raises(ValueError, match="the student's is 4 x 4 and the teacher's 6 x 6; name other layers"):
        set_up(FitNetLoss, [torch.randn(2, 3, 4, 4)], [torch.randn(2, 3, 6, 6)])
