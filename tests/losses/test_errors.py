"""Bad input raises ValueError with the name of the argument and its value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kdlit import losses
from kdlit.types import Batch, ModelOutput
from tests.losses.methods import METHODS, Loss

LABELLED = {"dkd", "tckd", "nckd", "nkd", "rld", "rld_g", "la", "rc", "lr", "wkd", "lskd_dkd", "lskd_rld"}
LABELLED |= {"cross_entropy", "teacher_right_ce"}
STUDENT_ONLY = {"renyi", "cross_entropy"}


def of(names: set[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("loss", [pytest.param(METHODS[name].loss, id=name) for name in sorted(names)])


def raises(*parts: str) -> Any:
    """Expect a ValueError whose message has all these parts, in this order."""
    return pytest.raises(ValueError, match=".*".join(map(re.escape, parts)))


S, T, Y = torch.zeros(3, 4), torch.ones(3, 4), torch.tensor([0, 1, 3])


@of(set(METHODS) - STUDENT_ONLY - {"wkd", "lskd_kd", "lskd_dkd", "lskd_rld"})
def test_shapes_that_differ(loss: Loss) -> None:
    with raises("student_logits", "teacher_logits", "(3, 4)", "(3, 5)"):
        loss(S, torch.ones(3, 5), Y)


@of(set(METHODS))
@pytest.mark.parametrize("shape", [(4,), (3, 4, 1), (0, 4), (3, 1)])
def test_logits_of_a_wrong_shape(loss: Loss, shape: tuple[int, ...]) -> None:
    with raises("logits must have shape", str(shape)):
        loss(torch.zeros(shape), torch.zeros(shape), Y)


@of(set(METHODS))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite(loss: Loss, value: float) -> None:
    student = S.clone()
    student[1, 2] = value
    with raises("logits must be finite", str(value), "sample 1", "class 2"):
        loss(student, T, Y)


@of(set(METHODS) - STUDENT_ONLY)
def test_teacher_logits_that_are_not_finite(loss: Loss) -> None:
    teacher = T.clone()
    teacher[2, 0] = math.nan
    with raises("logits must be finite", "nan", "sample 2", "class 0"):
        loss(S, teacher, Y)


@of(LABELLED)
@pytest.mark.parametrize("target", [torch.tensor([0, 1, 4]), torch.tensor([0, -1, 3])])
def test_labels_out_of_range(loss: Loss, target: torch.Tensor) -> None:
    with raises("target must lie in 0..3", f"{target.min()}..{target.max()}"):
        loss(S, T, target)


@of(LABELLED)
@pytest.mark.parametrize("target", [torch.tensor([0, 1]), torch.zeros(3), torch.zeros(3, 4, dtype=torch.int64)])
def test_labels_of_a_wrong_kind(loss: Loss, target: torch.Tensor) -> None:
    with raises("target must hold one integer class index", str(tuple(target.shape))):
        loss(S, T, target)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (losses.KDLoss, {"temperature": 0}),
        (losses.KDLoss, {"temperature": -1.0}),
        (losses.KDLoss, {"temperature": math.nan}),
        (losses.KDLoss, {"temperature": "4"}),
        (losses.DKDLoss, {"alpha": -1.0}),
        (losses.DKDLoss, {"beta": -0.5}),
        (losses.NKDLoss, {"gamma": -1.5}),
        (losses.NKDLoss, {"temperature": 0.0}),
        (losses.TTMLoss, {"gamma": 0.0}),
        (losses.WTTMLoss, {"gamma": -0.1}),
        (losses.MLKDLoss, {"temperatures": ()}),
        (losses.MLKDLoss, {"temperatures": (2.0, -3.0)}),
        (losses.MLKDLoss, {"levels": ()}),
        (losses.MLKDLoss, {"levels": ("sample",)}),
        (losses.MLKDSingleViewLoss, {"temperature": 0.0}),
        (losses.MLKDTwoViewLoss, {"temperature": math.inf}),
        (losses.MLKDTwoViewLoss, {"levels": ("pixel",)}),
        (losses.RLDLoss, {"alpha": -1.0}),
        (losses.RLDLoss, {"beta": -1.0}),
        (losses.RLDLoss, {"temperature": -4.0}),
        (losses.RLDLoss, {"confidence_temperature": 0.0}),
        (losses.RLDLoss, {"mask": "gt"}),
        (losses.DISTLoss, {"beta": -1.0}),
        (losses.DISTLoss, {"gamma": -1.0}),
        (losses.DISTLoss, {"temperature": -4.0}),
        (losses.LALoss, {"temperature": -4.0}),
        (losses.RCLoss, {"kd_weight": -1.0}),
        (losses.RCLoss, {"rc_weight": -0.1}),
        (losses.LRLoss, {"lambda1": -4.0}),
        (losses.LRLoss, {"lambda2": -1.0}),
        (losses.LRLoss, {"eta": 1.5}),
        (losses.DMLLoss, {"eps": -1e-8}),
        (losses.CRLDLoss, {"weak_threshold": 1.5}),
        (losses.CRLDLoss, {"strong_threshold": -0.5}),
        (losses.WKDLoss, {"regularization": 0.0}),
        (losses.WKDLoss, {"iterations": 0}),
        (losses.WKDLoss, {"sharpness": -1.0}),
        (losses.RenyiEntropyLoss, {"order": 0.0}),
        (losses.AutoBetaDKDLoss, {"beta_min": -1.0}),
        (losses.CrossEntropyLoss, {"label_smoothing": 1.5}),
    ],
)
def test_hyper_parameters_are_checked_at_construction(build: Callable[..., Any], options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    bad = next((item for item in value if item not in (2.0,)), value) if isinstance(value, tuple) else value
    with raises(name, f"got {bad!r}"):
        build(**options)


@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        (losses.WeightedLoss, {"weight": -1.0}),
        (losses.WeightedLoss, {"warmup_epochs": -1}),
        (losses.WeightedLoss, {"warmup_epochs": 0.5}),
        (losses.LogitStandardization, {"eps": -1e-7}),
        (losses.GlobalTemperature, {"t_start": 0.0}),
        (losses.GlobalTemperature, {"t_end": -20.0}),
        (losses.GlobalTemperature, {"decay_loops": 0}),
        (losses.InstanceTemperature, {"hidden": 0}),
        (losses.EntropyWeighting, {"entropy_temperature": 0.0}),
    ],
)
def test_wrappers_check_theirs(wrap: Callable[..., Any], options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with raises(name, f"got {value!r}"):
        wrap(losses.KDLoss(), **options)


@pytest.mark.parametrize("wrap", [losses.GlobalTemperature, losses.InstanceTemperature])
@pytest.mark.parametrize("loss", [losses.TTMLoss(), losses.MLKDLoss(), losses.LRLoss(), losses.CrossEntropyLoss()])
def test_learned_temperature_around_a_loss_without_one(wrap: Any, loss: losses.DistillationLoss) -> None:
    for inner in (loss, losses.LogitStandardization(losses.WeightedLoss(loss))):
        with raises("loss must have a temperature", type(loss).__name__):
            wrap(inner)


@pytest.mark.parametrize("loss", [losses.DISTLoss(), losses.LRLoss(), losses.CrossEntropyLoss()])
def test_entropy_weights_around_a_loss_that_reads_none(loss: losses.DistillationLoss) -> None:
    for inner in (loss, losses.LogitStandardization(loss)):
        with raises("loss must read sample weights", type(loss).__name__):
            losses.EntropyWeighting(inner)


@pytest.mark.parametrize("weight", [torch.ones(2), torch.ones(3, 1)])
def test_sample_weights_of_a_wrong_shape(weight: torch.Tensor) -> None:
    with raises("sample_weight", "3 samples", str(tuple(weight.shape))):
        losses.kd_loss(S, T, temperature=4.0, sample_weight=weight)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_sample_weights_out_of_range(value: float) -> None:
    with raises("sample_weight must be finite and >= 0", str(value)):
        losses.kd_loss(S, T, temperature=4.0, sample_weight=torch.tensor([1.0, value, 1.0]))


@pytest.mark.parametrize("loss", [losses.MLKDTwoViewLoss(), losses.CRLDLoss()])
def test_methods_of_two_views_say_what_is_missing(loss: losses.DistillationLoss) -> None:
    batch: Batch = {"image": torch.zeros(3, 1), "target": Y}
    assert loss.needs_strong_view
    with raises("logits_strong", "Tensor", "NoneType", "image_strong"):
        loss(ModelOutput(S, logits_strong=S), ModelOutput(T), batch)


def test_transport_checks_its_distances() -> None:
    def loss(distance: torch.Tensor, regularization: float = 0.1) -> None:
        losses.wkd_loss(
            S,
            T,
            Y,
            distance=distance,
            alpha=1.0,
            beta=1.0,
            temperature=1.0,
            regularization=regularization,
            iterations=1,
        )

    with raises("distance must have shape (4, 4)", "(3, 3)"):
        loss(torch.zeros(3, 3))
    with raises("distance must be finite and >= 0", "-1.0"):
        loss(-torch.eye(4))
    with raises("regularization must be at least 1/80", "1.0", "0.01"):
        loss(torch.eye(4), regularization=0.01)


def test_transport_needs_a_classifier() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    with raises("no layer 'fc'"):
        losses.WKDLoss().setup(network, network, torch.zeros(1, 4))
    with raises("teacher_classifier", "'0'"):
        losses.WKDLoss("0").setup(network, network, torch.zeros(1, 4))
    with raises("teacher_classifier", "'1'"):
        losses.WKDLoss("1").setup(network, None, torch.zeros(1, 4))
    with raises("weight must have shape", "(3,)"):
        losses.class_distance(torch.zeros(3))
