"""What a run says about itself on the terminal: the networks before training, the result after it."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import nn

from kdlit.modules import DistillationModule


class StudentSummary(L.Callback):
    """Prints the sizes of the student's parts, and of the teacher as a whole, before training."""

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table."""
        if not isinstance(pl_module, DistillationModule):
            return
        student, teacher = pl_module.student, pl_module.teacher
        table = Table("Network", "Type", "Parameters", title="What is trained")
        table.columns[2].justify = "right"
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
