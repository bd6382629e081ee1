"""What each method costs: ``python -m kdlit.benchmark {losses,steps}``.

``losses``: all logit methods share one forward pass of each network and one backward pass of the student; they differ
in the loss alone. So the loss is timed alone, forward and backward on logits, all losses in turn within each round, and
set against a whole training step with plain KD.

``steps``: whole training steps of every method, its optimizer included, with peak memory and extra parameters.

Methods take turns within each round. Of losses the median counts, of steps the fastest: what else runs on a machine
only ever adds to so long a time. Ratios mean more than milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from json import dumps

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from kdlit import losses, models
from kdlit.losses import DistillationLoss, WeightedLoss
from kdlit.modules import ClassificationDistillation
from kdlit.modules.base import run_loss
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


# With weights as published; what is measured does not depend on them.
METHODS: dict[str, Callable[[], dict[str, WeightedLoss | DistillationLoss]]] = {
    "KD": lambda: {"kd": losses.KDLoss()},
    "DKD": lambda: {"dkd": losses.DKDLoss()},
    "NKD": lambda: {"nkd": losses.NKDLoss()},
    "WTTM": lambda: {"wttm": losses.WTTMLoss()},
    "MLKD": lambda: {"mlkd": losses.MLKDTwoViewLoss()},
    "KD, standardised": lambda: {"kd": losses.LogitStandardization(losses.KDLoss())},
    "RLD": lambda: {"rld": losses.RLDLoss()},
    "CTKD": lambda: {"kd": losses.GlobalTemperature(losses.KDLoss())},
    "DIST": lambda: {"dist": losses.DISTLoss()},
    "FitNet": lambda: {"fitnet": WeightedLoss(losses.FitNetLoss(), 100.0)},
    "AT": lambda: {"at": WeightedLoss(losses.ATLoss(), 1000.0)},
    "VID": lambda: {"vid": losses.VIDLoss()},
    "RKD": lambda: {"rkd": losses.RKDLoss()},
    "CC": lambda: {"cc": WeightedLoss(losses.CCLoss(), 0.02)},
    "SP": lambda: {"sp": WeightedLoss(losses.SPLoss(), 3000.0)},
    "NST": lambda: {"nst": WeightedLoss(losses.NSTLoss(), 50.0)},
    "PKT": lambda: {"pkt": WeightedLoss(losses.PKTLoss(), 30000.0)},
    "CRD": lambda: {"crd": WeightedLoss(losses.CRDLoss(), 0.8)},
    "OFD": lambda: {"ofd": WeightedLoss(losses.OFDLoss(), 0.001)},
    "ReviewKD": lambda: {"reviewkd": losses.ReviewKDLoss()},
    "SimKD": lambda: {"simkd": losses.SimKDLoss()},
    "CAT-KD": lambda: {"catkd": losses.CATKDLoss()},
    "ITRD": lambda: {"itrd": losses.ITRDLoss()},
    "SRRL": lambda: {"srrl": losses.SRRLLoss()},
    "WTTM + CRD": lambda: {"wttm": losses.WTTMLoss(), "crd": WeightedLoss(losses.CRDLoss(), 0.8)},
}


def main() -> None:
    """Time everything and print a Markdown table, or JSON."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--teacher", default="resnet32x4", help="name of a network in kdlit.models")
    common.add_argument("--student", default="resnet8x4", help="name of a network in kdlit.models")
    common.add_argument("--batch_size", type=int, default=64)
    common.add_argument("--threads", type=int, default=1, help="CPU threads")
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    common.add_argument("--json", action="store_true", help="print JSON instead of a table")
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m kdlit.benchmark", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="{losses,steps}")
    command = commands.add_parser("losses", parents=[common], help="logit losses alone")
    command.add_argument("--rounds", type=int, default=20, help="times that every loss is measured")
    command.set_defaults(run=time_losses)
    command = commands.add_parser("steps", parents=[common], help="training steps of all methods")
    command.add_argument("--rounds", type=int, default=5, help="times that every method is measured")
    command.add_argument("--num_samples", type=int, default=50_000, help="training samples, for memory banks")
    command.add_argument("--plot", metavar="FILE", help="draw extra parameters over step time; needs matplotlib")
    command.set_defaults(run=time_steps)
    options = vars(parser.parse_args())
    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    options.pop("run")(**options)


def time_losses(
    teacher: str, student: str, batch_size: int, threads: int, device: str, json: bool, rounds: int
) -> None:
    """Time every logit loss alone.

    Args:
        teacher: name of a network in :mod:`kdlit.models`.
        student: likewise.
        batch_size: pictures a step.
        threads: CPU threads, for the heading.
        device: where to run.
        json: whether to print JSON.
        rounds: times that every loss is measured.
    """
    place = torch.device(device)
    networks = getattr(models, student)().to(place), getattr(models, teacher)().to(place).eval().requires_grad_(False)
    image = torch.randn(batch_size, 3, 32, 32, device=place)
    target = torch.randint(0, 100, (batch_size,), device=place)
    step = statistics.median(_timed(partial(_step, *networks, image), place) for _ in range(5))
    terms = {name: make().to(place) for name, make in LOSSES.items()}
    for term in terms.values():
        term.setup(*networks, image[:1])
    runs = {name: partial(_loss, term, target) for name, term in terms.items()}
    medians = _interleaved(runs, rounds, place)
    rows = {
        name: {"loss_ms": 1e3 * value, "step_ratio": 1 + (value - medians["kd"]) / step}
        for name, value in medians.items()
    }
    if json:
        print(dumps({"pair": [teacher, student], "batch_size": batch_size, "kd_step_ms": 1e3 * step, "losses": rows}))
        return
    print(f"{teacher} -> {student}, batch {batch_size}, {place.type}, threads {threads}")
    print(f"a step with plain KD: {1e3 * step:.1f} ms\n\n| loss | alone, ms | step against that of KD |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['loss_ms']:.2f} | {row['step_ratio']:.4f} |")


def time_steps(
    teacher: str,
    student: str,
    batch_size: int,
    threads: int,
    device: str,
    json: bool,
    rounds: int,
    num_samples: int,
    plot: str | None,
) -> None:
    """Time whole training steps of every method.

    Args:
        teacher: name of a network in :mod:`kdlit.models`.
        student: likewise.
        batch_size: pictures a step.
        threads: CPU threads, for the heading.
        device: where to run.
        json: whether to print JSON.
        rounds: times that every method is measured.
        num_samples: training samples, for memory banks.
        plot: file to draw to.
    """
    place = torch.device(device)
    trainings = {
        name: _Training(getattr(models, teacher)(), getattr(models, student)(), terms(), num_samples, place)
        for name, terms in METHODS.items()
    }
    image = torch.randn(batch_size, 3, 32, 32, device=place)
    index = torch.randperm(num_samples)[:batch_size].to(place)
    batch: Batch = {"image": image, "target": torch.randint(0, 100, (batch_size,), device=place), "index": index}
    batch["image_strong"] = image.flip(-1)
    fastest = _interleaved({name: partial(one.step, batch) for name, one in trainings.items()}, rounds, place, min)
    rows = {
        name: {
            "step_ms": 1e3 * fastest[name],
            "ratio_to_kd": fastest[name] / fastest["KD"],
            "peak_mb": one.peak_bytes(batch) / 1e6,
            "extra_parameters": one.extra_parameters,
        }
        for name, one in trainings.items()
    }
    if plot:
        _draw(rows, f"{teacher} -> {student}, batch {batch_size}, {place.type}", plot)
    if json:
        print(dumps({"pair": [teacher, student], "batch_size": batch_size, "methods": rows}))
        return
    print(f"{teacher} -> {student}, batch {batch_size}, {place.type}, threads {threads}\n")
    print("| method | step, ms | against KD | peak memory of a step, MB | extra parameters |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['step_ms']:.0f} | {row['ratio_to_kd']:.2f} | {row['peak_mb']:.0f} | "
            f"{row['extra_parameters']:,} |"
        )


class _Training:
    """One method at work, without a trainer around it."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        terms: dict[str, WeightedLoss | DistillationLoss],
        num_samples: int,
        device: torch.device,
    ) -> None:
        plain = sum(parameter.numel() for parameter in student.parameters())
        if "simkd" not in terms:  # which is trained by its own loss alone
            terms = {"ce": losses.CrossEntropyLoss(), **terms}
        self.module = ClassificationDistillation(student, terms, teacher).to(device).train()
        target = torch.randint(0, 100, (num_samples,))
        for term in self.module._terms().values():
            term.on_fit_start(target)
        trainable = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trainable, lr=1e-4, momentum=0.9)
        self.extra_parameters = sum(parameter.numel() for parameter in trainable) - plain

    def step(self, batch: Batch) -> None:
        """Both forward passes, all losses, one backward pass, one step of the optimizer."""
        teacher, student = self.module.run_teacher(batch), self.module.run_student(batch)
        terms = self.module._terms()
        objective = torch.stack(
            [one.factor * run_loss(name, one, student, teacher, batch) for name, one in terms.items()]
        )
        self.optimizer.zero_grad()
        objective.sum().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        for term in terms.values():
            term.on_train_batch_end(student.detach(), teacher.detach(), batch)

    def peak_bytes(self, batch: Batch) -> int:
        """How much more memory a step takes at its peak than before it."""
        if batch["image"].device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step(batch)
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.step(batch)
        assert profiler.profiler is not None
        events = profiler.profiler.kineto_results.events()
        changes = [event.nbytes() for event in events if event.name() == "[memory]"]
        return max(accumulate(changes), default=0)


def _draw(rows: dict[str, dict[str, float]], title: str, path: str) -> None:
    """Step time against extra parameters, a point for each method, as figures of efficiency in the papers do."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    line = {"arrowstyle": "-", "color": "0.7", "linewidth": 0.5}
    by_time = sorted(rows.items(), key=lambda item: (item[1]["extra_parameters"] > 1, item[1]["ratio_to_kd"]))
    for number, (name, row) in enumerate(by_time):
        place = row["ratio_to_kd"], row["extra_parameters"]
        # Many stand close together at the bottom, so that their names must be spread out.
        up = 4 + 9 * (number % 3) if row["extra_parameters"] > 1 else 8 + 11 * (number % 12)
        axes.scatter(*place, color="#0072B2", s=20, zorder=3)
        axes.annotate(name, place, xytext=(4, up), textcoords="offset points", size=7, arrowprops=line)
    axes.set_yscale("symlog", linthresh=1_000)
    axes.set(xlabel="training step, times that of KD", ylabel="parameters beside the student's", title=title)
    axes.set_ylim(-200, 10 * max(row["extra_parameters"] for row in rows.values()))
    axes.grid(alpha=0.3)
    figure.savefig(path)


def _interleaved(
    runs: Mapping[str, Callable[[], None]],
    rounds: int,
    device: torch.device,
    typical: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Typical seconds of each, all in turn within a round; the first two rounds warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            taken = _timed(run, device)
            if number >= 2:
                seconds[name].append(taken)
    return {name: typical(values) for name, values in seconds.items()}


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
