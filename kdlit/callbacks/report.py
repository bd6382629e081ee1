"""What a run says about itself on the terminal: the networks before training, the result after it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import nn

from kdlit.modules import DistillationModule, ManyStudents


class Progress(RichProgressBar):
    """The progress bar of Lightning, told of steps twice a second and of the last one: drawing costs time."""

    _told = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on, if it is time."""
        if time.monotonic() - self._told > 0.5 or batch_idx + 1 == trainer.num_training_batches:
            self._told = time.monotonic()
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class StudentSummary(L.Callback):
    """Prints the sizes of the student's parts, and of the teacher as a whole, before training."""

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table."""
        table = Table("Network", "Type", "Parameters", title="What is trained")
        table.columns[2].justify = "right"
        if isinstance(pl_module, ManyStudents):
            for name, module in pl_module.students.items():
                table.add_row(
                    f"student {name}", type(module.student).__name__, f"{_size(module.student):,}", style="bold"
                )
                if extra := _size(module.losses):
                    table.add_row("  losses (not exported)", ", ".join(module.losses), f"{extra:,}")
            for shared in {module.teacher for module in pl_module.students.values()} - {None}:
                table.add_row("teacher (frozen)", type(shared).__name__, f"{_size(cast('nn.Module', shared)):,}")
            Console().print(table)
            return
        if not isinstance(pl_module, DistillationModule):
            return
        student, teacher = pl_module.student, pl_module.teacher
        for name, child in student.named_children():
            table.add_row(f"  student.{name}", type(child).__name__, f"{_size(child):,}")
        table.add_row("student", type(student).__name__, f"{_size(student):,}", style="bold")
        for name, peer in getattr(pl_module, "peers", {}).items():
            table.add_row(f"student {name}", type(peer).__name__, f"{_size(peer):,}")
        if teacher is not None:
            table.add_row("teacher (frozen)", type(teacher).__name__, f"{_size(teacher):,}")
        if extra := _size(pl_module.losses):
            table.add_row("losses (not exported)", ", ".join(pl_module.losses), f"{extra:,}")
        Console().print(table)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def print_result(trainer: L.Trainer, run_dir: str) -> None:
    """Print what a run reached: teacher, student trained alone (if measured) and student; and where its files lie.

    The figures are those of the last epoch; the best epoch is named as such.

    Args:
        trainer: one that has fitted.
        run_dir: folder of the run.
    """
    metrics = trainer.callback_metrics
    if isinstance(trainer.lightning_module, ManyStudents):
        _print_students(trainer, trainer.lightning_module, run_dir)
        return
    rows = [
        ("teacher", metrics.get("val/teacher_top1")),
        ("student trained alone", metrics.get("val/plain_top1")),
        ("student, distilled" if "val/teacher_top1" in metrics else "student", metrics.get("val/top1")),
    ]
    best = next((kept for kept in trainer.checkpoint_callbacks if getattr(kept, "monitor", None) == "val/top1"), None)
    if isinstance(best, ModelCheckpoint):
        rows.append(("  its best epoch, for comparison", best.best_model_score))
    peers = getattr(trainer.lightning_module, "peers", {})
    rows += [(f"student {name}", metrics.get(f"val/{name}/top1")) for name in peers]
    table = Table("Network", "top-1 %", title=f"Held-out validation pictures, after epoch {trainer.current_epoch}")
    table.columns[1].justify = "right"
    for name, value in rows:
        if value is not None:
            table.add_row(name, f"{100 * float(value):.2f}")
    console = Console()
    if table.row_count:
        console.print(table)
    elif Path(f"{run_dir}/config.yaml").exists():
        console.print("No validation pictures were held out. To measure the last epoch on the test pictures:")
        console.print(f"  kdlit test --config {run_dir}/config.yaml --ckpt_path=last", soft_wrap=True)
    for what, path in (("Checkpoint", f"{run_dir}/checkpoints/last.ckpt"), ("Student alone", f"{run_dir}/student.pt")):
        if Path(path).exists():
            console.print(f"{what}: {path}", soft_wrap=True)


def _print_students(trainer: L.Trainer, group: ManyStudents, run_dir: str) -> None:
    """The same for several students, one a row."""
    metrics = trainer.callback_metrics
    best = {
        getattr(kept, "student", ""): kept.best_model_score
        for kept in trainer.checkpoint_callbacks
        if isinstance(kept, ModelCheckpoint) and kept.monitor == "val/top1"
    }
    teacher = next((metrics[key] for name in group.names if (key := f"{name}/val/teacher_top1") in metrics), None)
    columns = {
        "last epoch": {"teacher": teacher} | {name: metrics.get(f"{name}/val/top1") for name in group.names},
        "best epoch": best,
        "trained alone": {name: metrics.get(f"{name}/val/plain_top1") for name in group.names},
    }
    columns = {head: values for head, values in columns.items() if any(value is not None for value in values.values())}
    title = f"After epoch {trainer.current_epoch}, top-1 % on held-out pictures"
    table = Table("Network", *columns, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in ("teacher", *group.names):
        values = [column.get(name) for column in columns.values()]
        if any(value is not None for value in values):
            table.add_row(name, *("" if value is None else f"{100 * float(value):.2f}" for value in values))
    console = Console()
    if table.row_count:
        console.print(table)
    for name, reason in group.dropped.items():
        console.print(f"Dropped: {name}: {reason.removeprefix(f'student {name}: ')}", soft_wrap=True)
    if Path(f"{run_dir}/checkpoints/last.ckpt").exists():
        console.print(f"Checkpoint of all: {run_dir}/checkpoints/last.ckpt", soft_wrap=True)
        console.print(f"Each student: {run_dir}/{{{','.join(group.names)}}}", soft_wrap=True)
