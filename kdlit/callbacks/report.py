"""What a run says about itself on the terminal: the networks before training, the result after it."""

from __future__ import annotations

import datetime
import math
import time
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import nn

from kdlit.callbacks.throughput import Throughput
from kdlit.modules import DistillationModule, ManyStudents


class Progress(RichProgressBar):
    """Says how a run is doing: losses, accuracies, pictures per second, time left of the whole run.

    On a terminal a bar that is told of steps once a second and of the last one, as drawing costs time; elsewhere a
    line an epoch, at most one in ``every_s`` seconds, so that a log stays short. Losses are those of the step that was
    last looked at (``log_every_n_steps`` of the trainer), ``train`` is the accuracy there, ``val`` that of the last
    validation.

    Args:
        every_s: at least so many seconds lie between two lines where there is no terminal.
        **kwargs: of ``RichProgressBar``.
    """

    def __init__(self, every_s: float = 10.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.every_s = every_s
        self._told = 0.0
        self._began: tuple[float, int] = (0.0, 0)  # when training did, and at which batch

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Draw no bar where nobody would see it move."""
        super().setup(trainer, pl_module, stage)
        self.console = Console(**self._console_kwargs)
        if not self.console.is_terminal:
            self.disable()

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Epoch, bar and batches; time and speed are told among the figures, which need the room."""
        return super().configure_columns(trainer)[:3]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the watch."""
        super().on_train_start(trainer, pl_module)
        self._began = (time.monotonic(), _batches_done(trainer))
        self._told = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell of the epoch before, whose figures are known by now."""
        super().on_train_epoch_start(trainer, pl_module)
        self._tell(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on, if it is time."""
        if not self.is_enabled:
            return
        if time.monotonic() - self._told > 1.0 or batch_idx + 1 == trainer.num_training_batches:
            self._told = time.monotonic()
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell of the last epoch, whenever the one before was told."""
        super().on_train_end(trainer, pl_module)
        self._told = 0.0
        self._tell(trainer, pl_module)

    def _tell(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print a line, unless there is a bar, one was printed a moment ago, or no epoch has ended yet."""
        is_due = time.monotonic() - self._told > self.every_s
        done = trainer.fit_loop.epoch_progress.current.completed
        if self.is_enabled or not trainer.is_global_zero or not is_due or not done:
            return
        self._told = time.monotonic()
        told = "  ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items())
        self.console.print(f"epoch {done}{_of_epochs(trainer)}  {told}", soft_wrap=True, highlight=False)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What is shown besides the epoch, by name, in the order in which it is shown."""
        known = trainer.callback_metrics
        shown: dict[str, Any] = getattr(pl_module, "shown", {})
        if not self.is_enabled:  # a line is about a whole epoch, a bar about this moment
            shown = {key: value for key, value in known.items() if key.startswith(("train/loss", "train/top1"))}
            ends = "/train/loss"
            shown |= {f"train/loss/{key.removesuffix(ends)}": known[key] for key in known if key.endswith(ends)}
        told: dict[str, Any] = {
            key.removeprefix("train/").removeprefix("loss/"): f"{float(value):.3f}"
            for key, value in shown.items()
            if key.startswith("train/loss")
        }
        accuracies = {key: value for key, value in known.items() if key.endswith("val/top1")}
        if "train/top1" in shown:
            accuracies = {"train/top1": shown["train/top1"]} | accuracies
        for key, value in accuracies.items():
            told[key.removesuffix("/top1").replace("/", " ")] = f"{100 * float(value):.1f}%"
        others = super().get_metrics(trainer, pl_module)
        for key in others:
            if key != "v_num" and not f"/{key}".endswith(("/loss", "/val/top1")):
                told[key] = others[key]
        callbacks: list[L.Callback] = cast("Any", trainer).callbacks
        speed = next((one.images_per_s for one in callbacks if isinstance(one, Throughput)), None)
        if not self.is_enabled and "train/images_per_s" in known:
            speed = float(known["train/images_per_s"])
        if speed is not None:
            told["images/s"] = f"{speed:,.0f}"
        if left := self._seconds_left(trainer):
            told["left"] = str(datetime.timedelta(seconds=round(left)))
        return told

    def _get_train_description(self, current_epoch: int) -> str:
        """Epochs counted from 1, as in the lines."""
        return f"Epoch {current_epoch + 1}{_of_epochs(self.trainer)}"

    def _seconds_left(self, trainer: L.Trainer) -> float | None:
        """Of the whole run, validation included, as far as that can be told."""
        began, first = self._began
        done = _batches_done(trainer)
        steps = trainer.estimated_stepping_batches if trainer.max_epochs != -1 or trainer.max_steps != -1 else math.inf
        whole = steps * trainer.accumulate_grad_batches
        if done <= first or not math.isfinite(whole):
            return None
        return (time.monotonic() - began) / (done - first) * max(whole - done, 0)


def _of_epochs(trainer: L.Trainer) -> str:
    return f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""


def _batches_done(trainer: L.Trainer) -> int:
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


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
    elif figures := {name: float(value) for name, value in metrics.items() if name.startswith("val/")}:
        table = Table("Figure", "value", title=str(table.title))
        table.columns[1].justify = "right"
        for name, number in figures.items():
            table.add_row(name, f"{number:.4g}")
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
