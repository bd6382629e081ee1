"""Every logit method against vectors from the authors' code: values, named terms and gradients in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdlit import losses
from kdlit.types import Batch, ModelOutput

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-9


@dataclass
class Case:
    """One case of a file: its arrays as tensors, those with a gradient as leaves, and its hyper-parameters."""

    method: str
    number: int
    params: dict[str, Any]
    arrays: dict[str, Tensor] = field(repr=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def logits(self) -> tuple[Tensor, Tensor]:
        return self["student_logits"], self["teacher_logits"]

    def labelled(self) -> tuple[Tensor, Tensor, Tensor]:
        return *self.logits(), self["target"]

    def views(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        names = ("student_logits_weak", "teacher_logits_weak", "student_logits_strong", "teacher_logits_strong")
        return tuple(self[name] for name in names)  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["params"][name]


def load(method: str, number: int) -> Case:
    with np.load(GOLDEN / f"{method}.npz", allow_pickle=False) as archive:
        prefix = f"case{number}/"
        arrays = {name.removeprefix(prefix): archive[name] for name in archive if name.startswith(prefix)}
    params = json.loads(str(arrays.pop("params")))
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    for name in params["differentiated"]:
        tensors[name].requires_grad_()
    return Case(method, number, params, tensors)


def of_class(loss: losses.DistillationLoss, case: Case, strong: bool = False) -> Tensor:
    """What a loss class gives for a case; its parameters in float64."""
    student, teacher = case.views()[:2] if strong else case.logits()
    student_strong, teacher_strong = case.views()[2:] if strong else (None, None)
    batch: Batch = {"image": torch.zeros(len(student), 1), "target": case["target"]}
    return loss.double()(
        ModelOutput(student, logits_strong=student_strong), ModelOutput(teacher, logits_strong=teacher_strong), batch
    )


def dkd(case: Case, **changed: float) -> Tensor:
    weights = {"alpha": case.alpha, "beta": case.beta} | changed
    return losses.dkd_loss(*case.labelled(), **weights, temperature=case.T)


def rld(case: Case, mask: str = "ge", **changed: Any) -> Tensor:
    options = {"alpha": case.alpha, "beta": case.beta, "confidence_temperature": case.alpha_T} | changed
    return losses.rld_loss(*case.labelled(), temperature=case.T, mask=mask, **options)


def standardized(case: Case, loss: losses.DistillationLoss, **options: Any) -> Tensor:
    return of_class(losses.LogitStandardization(loss, **options), case)


def mlkd(case: Case, *levels: Any) -> Tensor:
    return losses.mlkd_loss(*case.logits(), temperatures=case.temperatures, **({"levels": levels} if levels else {}))


def two_view(case: Case, *levels: Any, standardize: bool = False) -> Tensor:
    options = {"levels": levels} if levels else {}
    loss = losses.MLKDTwoViewLoss(case.T, standardize=standardize, **options)
    return case.kd_weight * of_class(loss, case, strong=True)


def single_view(case: Case, *levels: Any) -> Tensor:
    options: dict[str, Any] = {"levels": levels} if levels else {}
    options["standardize"] = case.params.get("logit_stand", False)
    return case.kd_weight * losses.mlkd_single_view_loss(*case.logits(), temperature=case.T, **options)


def shares(case: Case) -> tuple[Tensor, Tensor]:
    """The released masks, seen from outside: what they leave of the batch and class terms."""
    view = case.views()[:2] if "teacher_logits_weak" in case.arrays else case.logits()
    pool = (case.T, 3.0, 5.0, 2.0, 6.0)
    batch = sum(losses.batch_relation_loss(*view, temperature=t) for t in pool)
    classes = sum(losses.class_relation_loss(*view, temperature=t) for t in pool)
    return (
        losses.mlkd_single_view_loss(*view, temperature=case.T, levels=["batch"]) / batch,
        losses.mlkd_single_view_loss(*view, temperature=case.T, levels=["class"]) / classes,
    )


def global_temperature(case: Case) -> tuple[losses.GlobalTemperature, Tensor]:
    options = {name: case.params[name] for name in ("t_start", "t_end", "decay_max", "decay_min", "decay_loops")}
    wrapper = losses.GlobalTemperature(losses.KDLoss(), **options).double()
    with torch.no_grad():
        wrapper.global_score.copy_(case["global_T"])
    wrapper.on_train_epoch_start(case.epoch - 1, max_epochs=240)
    loss = of_class(wrapper, case)
    case["global_T"].grad = torch.autograd.grad(loss, wrapper.global_score, retain_graph=True)[0]
    return wrapper, loss


def lr(case: Case, **changed: float) -> Tensor:
    options = {"lambda1": case.lambda1, "lambda2": case.lambda2, "eta": case.eta} | changed
    return losses.lr_loss(*case.labelled(), **options)


def rc(case: Case, **changed: float) -> Tensor:
    weights = {"kd_weight": case.kd_weight, "rc_weight": case.rc_weight} | changed
    return losses.rc_loss(*case.labelled(), temperature=case.T, **weights)


def lr_label_term(case: Case) -> Tensor:
    return losses.teacher_right_cross_entropy_loss(*case.labelled())


def dist(case: Case, **changed: float) -> Tensor:
    return losses.dist_loss(
        *case.logits(), **({"beta": case.beta, "gamma": case.gamma} | changed), temperature=case.tau
    )


TCKD, NCKD = {"alpha": 1.0, "beta": 0.0}, {"alpha": 0.0, "beta": 1.0}
PAPER = {"unbiased": False, "eps": 0.0}

# For each file, how its loss and its named terms are computed.
TERMS: dict[str, dict[str, Callable[[Case], Any]]] = {
    "kd": {
        "loss": lambda c: losses.kd_loss(*c.logits(), temperature=c.T),
        "loss_repdistiller": lambda c: of_class(losses.KDLoss(c.T), c),
    },
    "dkd": {"loss": dkd, "tckd": lambda c: dkd(c, **TCKD), "nckd": lambda c: dkd(c, **NCKD)},
    "nkd": {
        "loss": lambda c: losses.nkd_loss(*c.labelled(), gamma=c.gamma, temperature=c.T),
        "target_term": lambda c: losses.nkd_loss(*c.labelled(), gamma=0.0, temperature=c.T),
        "nontarget_term": lambda c: (
            losses.nkd_loss(*c.labelled(), gamma=c.gamma, temperature=c.T)
            - losses.nkd_loss(*c.labelled(), gamma=0.0, temperature=c.T)
        ),
    },
    "ttm": {"loss": lambda c: losses.ttm_loss(*c.logits(), gamma=c.gamma)},
    "wttm": {
        "loss": lambda c: losses.wttm_loss(*c.logits(), gamma=c.gamma),
        "power_sum": lambda c: losses.power_sum(c["teacher_logits"], gamma=c.gamma),
    },
    "mlkd_paper": {
        "loss": mlkd,
        "instance": lambda c: mlkd(c, "instance"),
        "batch": lambda c: mlkd(c, "batch"),
        "class": lambda c: mlkd(c, "class"),
        "instance_sum": lambda c: len(c["target"]) * mlkd(c, "instance"),
        "loss_instance_sum": lambda c: len(c["target"]) * mlkd(c, "instance") + mlkd(c, "batch", "class"),
    },
    "mlkd_official": {
        "loss": two_view,
        "instance": lambda c: two_view(c, "instance"),
        "batch": lambda c: two_view(c, "batch"),
        "class": lambda c: two_view(c, "class"),
        "instance_mask_fraction": lambda c: shares(c)[0],
        "class_mask_fraction": lambda c: shares(c)[1],
    },
    "mlkd_noaug": {
        "loss": single_view,
        "instance": lambda c: single_view(c, "instance"),
        "batch": lambda c: single_view(c, "batch"),
        "class": lambda c: single_view(c, "class"),
        "instance_mask_fraction": lambda c: shares(c)[0],
        "class_mask_fraction": lambda c: shares(c)[1],
    },
    "lskd_kd": {
        "loss": lambda c: standardized(c, losses.KDLoss(c.T)),
        "loss_paper": lambda c: standardized(c, losses.KDLoss(c.T), **PAPER),
    },
    "lskd_dkd": {
        "loss": lambda c: standardized(c, losses.DKDLoss(c.alpha, c.beta, c.T)),
        "tckd": lambda c: standardized(c, losses.DKDLoss(**TCKD, temperature=c.T)),
        "nckd": lambda c: standardized(c, losses.DKDLoss(**NCKD, temperature=c.T)),
        "loss_paper": lambda c: standardized(c, losses.DKDLoss(c.alpha, c.beta, c.T), **PAPER),
    },
    "lskd_rld": {
        "loss": lambda c: standardized(c, losses.RLDLoss(c.alpha, c.beta, c.T, c.alpha_T)),
        "scd": lambda c: standardized(c, losses.RLDLoss(**TCKD, temperature=c.T, confidence_temperature=c.alpha_T)),
        "mcd": lambda c: standardized(c, losses.RLDLoss(**NCKD, temperature=c.T, confidence_temperature=c.alpha_T)),
    },
    "lskd_mlkd": {
        "loss": lambda c: two_view(c, standardize=True),
        "instance": lambda c: two_view(c, "instance", standardize=True),
        "batch": lambda c: two_view(c, "batch", standardize=True),
        "class": lambda c: two_view(c, "class", standardize=True),
        "instance_mask_fraction": lambda c: shares(c)[0],
        "class_mask_fraction": lambda c: shares(c)[1],
    },
    "lskd_ctkd": {
        "loss": lambda c: losses.kd_loss(*map(losses.standardize_logits, c.logits()), temperature=c["temperature"]),
        "loss_paper": lambda c: losses.kd_loss(
            *(losses.standardize_logits(x, **PAPER) for x in c.logits()), temperature=c["temperature"]
        ),
    },
    "rld": {
        "loss": rld,
        "scd": lambda c: rld(c, **TCKD),
        "mcd": lambda c: rld(c, **NCKD),
        "loss_paper": lambda c: rld(c, confidence_temperature=None),
    },
    "rld_g": {
        "loss": lambda c: rld(c, mask="g"),
        "scd": lambda c: rld(c, mask="g", **TCKD),
        "mcd": lambda c: rld(c, mask="g", **NCKD),
        "loss_paper": lambda c: rld(c, mask="g", confidence_temperature=None),
    },
    "la": {
        "loss": lambda c: losses.la_loss(*c.labelled(), temperature=c.T),
        "swapped_teacher_logits": lambda c: losses.swap_label_logit(c["teacher_logits"], c["target"]),
    },
    "rc": {
        "loss": rc,
        "kd": lambda c: rc(c, kd_weight=1.0, rc_weight=0.0),
        "rc": lambda c: rc(c, kd_weight=0.0, rc_weight=1.0),
    },
    "lr": {
        "loss": lr,
        "mse_right": lambda c: lr(c, lambda1=1.0, lambda2=0.0),
        "mse_wrong": lambda c: lr(c, lambda1=0.0, lambda2=1.0),
        "ce_right": lr_label_term,
        "loss_with_ce": lambda c: lr(c) + lr_label_term(c),
    },
    "ctkd_global": {
        "loss": lambda c: global_temperature(c)[1],
        "temperature": lambda c: global_temperature(c)[0].current_temperature(*map(ModelOutput, c.logits())),
        "grl_coefficient": lambda c: torch.tensor(global_temperature(c)[0].coefficient, dtype=torch.float64),
    },
    "ctkd_schedule": {
        "coefficient": lambda c: torch.tensor(
            [
                losses.reversal_coefficient(
                    epoch, decay_max=c.decay_max, decay_min=c.decay_min, decay_loops=c.decay_loops
                )
                for epoch in c["epoch"].tolist()
            ],
            dtype=torch.float64,
        ),
    },
    "ctkd_instance": {
        "loss": lambda c: losses.instance_temperature_kd_loss(
            *c.logits(), temperature=c["temperature"], teacher_eps=c.teacher_eps
        )
    },
    "dist": {
        "loss": dist,
        "loss_hunto": lambda c: of_class(losses.DISTLoss(c.beta, c.gamma, c.tau), c),
        "inter": lambda c: dist(c, beta=1.0, gamma=0.0),
        "intra": lambda c: dist(c, beta=0.0, gamma=1.0),
    },
    "dml": {"loss": lambda c: losses.dml_loss(*c.logits())},
}
CASES = [
    (method, number)
    for method in TERMS
    for number in range(json.loads(str(np.load(GOLDEN / f"{method}.npz")["meta"]))["n_cases"])
]


def assert_agrees(value: Tensor, expected: Tensor, relative: float, what: str) -> None:
    """Differences are measured against the largest entry."""
    gap = (value - expected).abs().max().item()
    bound = TOLERANCE * 1e-3 + min(relative, TOLERANCE) * expected.abs().max().item()
    assert gap <= bound, f"{what}: off by {gap}, at most {bound} allowed; got {value}, expected {expected}"


@pytest.mark.parametrize(("method", "number"), CASES)
def test_value_and_terms(method: str, number: int) -> None:
    case = load(method, number)
    known = {"student_logits", "teacher_logits", "target", "temperature", "global_T", "epoch"} - set(TERMS[method])
    unchecked = {name for name in case.arrays if "grad_" not in name and "_logits_" not in name} - known
    unchecked |= {name for name in case.arrays if name == "swapped_teacher_logits"}
    assert unchecked == set(TERMS[method])
    for name, compute in TERMS[method].items():
        assert_agrees(compute(case).detach(), case[name], case.rtol, f"{method} case {number}, {name}")


@pytest.mark.parametrize(("method", "number"), [case for case in CASES if case[0] != "ctkd_schedule"])
def test_gradients(method: str, number: int) -> None:
    case = load(method, number)
    TERMS[method]["loss"](case).backward()
    for name in case.differentiated:
        gradient = case[name].grad
        assert gradient is not None, name
        assert_agrees(gradient, case[f"grad_{name}"], case.rtol_grad, f"{method} case {number}, grad_{name}")


@pytest.mark.parametrize(("method", "number"), [case for case in CASES if not case[0].startswith("ctkd_")])
def test_float32(method: str, number: int) -> None:
    case = load(method, number)
    for name, value in case.arrays.items():
        if value.is_floating_point() and not name.startswith("grad_"):
            case.arrays[name] = value.detach().float().requires_grad_(name in case.differentiated)
    loss = TERMS[method]["loss"](case)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), case["loss"].float(), rtol=1e-4, atol=1e-6)
    assert all(case[name].grad.isfinite().all() for name in case.differentiated)


def test_the_instance_form_of_ctkd_is_kd_but_for_the_constant() -> None:
    case = load("ctkd_instance", 0)
    exact = losses.kd_loss(*case.logits(), temperature=case["temperature"])
    without = losses.instance_temperature_kd_loss(*case.logits(), temperature=case["temperature"], teacher_eps=0.0)
    torch.testing.assert_close(without, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(exact, case["loss"], rtol=1e-3, atol=0)
