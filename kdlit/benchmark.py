"""What each loss costs beside plain KD: ``python -m kdlit.benchmark``.

All methods share one forward pass of each network and one backward pass of the student; they differ in the loss alone.
So the loss is timed alone, forward and backward on logits, all losses in turn within each round, and set against a
whole training step with plain KD. Medians over rounds; ratios mean more than milliseconds on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kdlit import losses, models
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


def main() -> None:
    """Time everything and print a Markdown table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m kdlit.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="resnet32x4", help="name of a network in kdlit.models")
    parser.add_argument("--student", default="resnet8x4", help="name of a network in kdlit.models")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20, help="times that every loss is measured")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    student = getattr(models, options.student)().to(device)
    teacher = getattr(models, options.teacher)().to(device).eval().requires_grad_(False)
    image = torch.randn(options.batch_size, 3, 32, 32, device=device)
    target = torch.randint(0, 100, (options.batch_size,), device=device)

    step = statistics.median(_timed(partial(_step, student, teacher, image), device) for _ in range(5))
    terms = {name: make().to(device) for name, make in LOSSES.items()}
    for term in terms.values():
        term.setup(student, teacher, image[:1])
    seconds: dict[str, list[float]] = {name: [] for name in terms}
    for round_number in range(options.rounds + 2):
        for name, term in terms.items():
            taken = _timed(partial(_loss, term, target), device)
            if round_number >= 2:  # the first rounds warm up
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = {
        name: {"loss_ms": 1e3 * value, "step_ratio": 1 + (value - medians["kd"]) / step}
        for name, value in medians.items()
    }
    if options.json:
        print(json.dumps({"options": vars(options), "kd_step_ms": 1e3 * step, "losses": rows}, indent=2))
        return
    print(
        f"{options.teacher} -> {options.student}, batch {options.batch_size}, {device.type}, threads {options.threads}"
    )
    print(f"a step with plain KD: {1e3 * step:.1f} ms\n\n| loss | alone, ms | step against that of KD |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['loss_ms']:.2f} | {row['step_ratio']:.4f} |")


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


def _timed(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
