"""Logit losses alone, against a training step with plain KD.

All logit methods share one forward pass of each network and one backward pass of the student; they differ in the loss
alone. So the loss is timed alone, forward and backward on logits, all losses in turn within each round, and set against
a whole training step with plain KD. Medians.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdlit import losses, models
from kdlit.benchmark.measure import add_pair, heading, interleaved, table, timed
from kdlit.losses import DistillationLoss
from kdlit.types import Batch, ModelOutput

LOSSES: dict[str, Callable[[], DistillationLoss]] = {
    "kd": losses.KDLoss,
    "dkd": losses.DKDLoss,
    "dkd, beta by itself": losses.AutoBetaDKDLoss,
    "nkd": losses.NKDLoss,
    "ttm": losses.TTMLoss,
    "wttm": losses.WTTMLoss,
    "mlkd, paper": losses.MLKDLoss,
    "mlkd, one view": losses.MLKDSingleViewLoss,
    "mlkd, two views": losses.MLKDTwoViewLoss,
    "rld": losses.RLDLoss,
    "dist": losses.DISTLoss,
    "la": losses.LALoss,
    "rc": losses.RCLoss,
    "lr": losses.LRLoss,
    "dml": losses.DMLLoss,
    "crld, two views": losses.CRLDLoss,
    "renyi": losses.RenyiEntropyLoss,
    "kd, standardised": lambda: losses.LogitStandardization(losses.KDLoss()),
    "dkd, standardised": lambda: losses.LogitStandardization(losses.DKDLoss()),
    "kd, learned temperature": lambda: losses.GlobalTemperature(losses.KDLoss()),
    "kd, weighted by entropy": lambda: losses.EntropyWeighting(losses.KDLoss()),
    "wkd (Sinkhorn)": losses.WKDLoss,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    add_pair(parser)
    parser.add_argument("--rounds", type=int, default=20, help="times that every loss is measured, default: 20")


def measure(teacher: str, student: str, batch_size: int, device: str, rounds: int) -> dict[str, Any]:
    """Time every logit loss alone.

    Args:
        teacher: name of a network in :mod:`kdlit.models`.
        student: likewise.
        batch_size: pictures a step.
        device: where to run.
        rounds: times that every loss is measured.
    """
    place = torch.device(device)
    networks = getattr(models, student)().to(place), getattr(models, teacher)().to(place).eval().requires_grad_(False)
    image = torch.randn(batch_size, 3, 32, 32, device=place)
    target = torch.randint(0, 100, (batch_size,), device=place)
    step = statistics.median(timed(partial(_step, *networks, image), place) for _ in range(5))
    terms = {name: make().to(place) for name, make in LOSSES.items()}
    for term in terms.values():
        term.setup(*networks, image[:1])
    runs = {name: partial(timed, partial(_loss, term, target), place) for name, term in terms.items()}
    medians = {name: statistics.median(values) for name, values in interleaved(runs, rounds, title="losses").items()}
    rows = {
        name: {"loss_ms": 1e3 * value, "step_ratio": 1 + (value - medians["kd"]) / step}
        for name, value in medians.items()
    }
    return {"pair": [teacher, student], "batch_size": batch_size, "kd_step_ms": 1e3 * step, "losses": rows}


def report(result: Mapping[str, Any]) -> str:
    """Write the result as Markdown."""
    rows = ([name, f"{row['loss_ms']:.2f}", f"{row['step_ratio']:.4f}"] for name, row in result["losses"].items())
    return (
        heading(result, f"{' -> '.join(result['pair'])}, batch {result['batch_size']}")
        + f"a step with plain KD: {result['kd_step_ms']:.1f} ms\n\n"
        + table(["loss", "alone, ms", "step against that of KD"], rows)
    )


def _step(student: torch.nn.Module, teacher: torch.nn.Module, image: Tensor) -> None:
    with torch.no_grad():
        teacher_logits = teacher(image)
    student.zero_grad()
    losses.kd_loss(student(image), teacher_logits, temperature=4.0).backward()  # type: ignore[no-untyped-call]


def _loss(term: DistillationLoss, target: Tensor) -> None:
    shape = (2, len(target), 100)
    student = torch.randn(shape, device=target.device).mul_(3).requires_grad_()
    teacher = torch.randn(shape, device=target.device).mul_(3)
    batch: Batch = {"image": target, "target": target}
    value = term(ModelOutput(student[0], {}, student[1]), ModelOutput(teacher[0], {}, teacher[1]), batch)
    value.backward()
