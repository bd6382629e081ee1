"""The student trained alone, beside the distilled one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torchmetrics.classification import MulticlassAccuracy

from kdlit.modules import DistillationModule, ManyStudents
from kdlit.modules.base import as_batch
from kdlit.types import Batch


def _for_each_student(hook: Callable[..., None]) -> Callable[..., None]:
    """Call a hook, of several students for each in its turn, on a callback of its own."""

    @functools.wraps(hook)
    def call(self: PlainBaseline, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        if not isinstance(pl_module, ManyStudents):
            hook(self, trainer, pl_module, *args, **kwargs)
            return
        for name in pl_module.going:
            own = self.of_students.setdefault(name, PlainBaseline(self.make_optimizer, self.make_lr_scheduler))
            own_args = [
                arg["students"].get(name) if isinstance(arg, dict) and "students" in arg else arg for arg in args
            ]
            with pl_module.turn(name) as student:
                hook(own, trainer, student, *own_args, **kwargs)

    return call


class PlainBaseline(L.Callback):
    """Trains a twin of the student by cross-entropy alone, on the very same batches, for comparison.

    The twin starts from the same weights. Nothing of it reaches the distilled student. Logged: ``val/plain_top1`` and
    ``test/plain_top1``. Give it the learning rate that suits it best, or the comparison flatters distillation. Of
    several students each has a twin.

    Args:
        optimizer: makes the twin's optimizer; by default the student's.
        lr_scheduler: makes the twin's schedule, stepped once an epoch; by default the student's.
    """

    def __init__(
        self, optimizer: OptimizerCallable | None = None, lr_scheduler: LRSchedulerCallable | None = None
    ) -> None:
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.of_students: dict[str, PlainBaseline] = {}
        self._restored: dict[str, Any] = {}

    @_for_each_student
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the student before its first step.

        Raises:
            ValueError: If the module has no student or the run has several processes.
        """
        if not isinstance(pl_module, DistillationModule):
            raise ValueError(f"PlainBaseline needs a DistillationModule, got {type(pl_module).__name__}")
        if trainer.world_size > 1:
            raise ValueError(f"PlainBaseline trains in one process, but this run has {trainer.world_size}")
        if stage == "fit" or not hasattr(self, "twin"):  # a test after the fit measures the twin that was trained
            self.twin = copy.deepcopy(pl_module.student)
        self.top1 = MulticlassAccuracy(pl_module.num_classes, average="micro")

    @_for_each_student
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the twin's optimizer, or go on where the checkpoint left it."""
        assert isinstance(pl_module, DistillationModule)
        self.twin.to(pl_module.device)
        pl_module.performance.lay_out(self.twin)
        self.optimizer = pl_module.fast_optimizer((self.make_optimizer or pl_module.optimizer)(self.twin.parameters()))
        make_lr_scheduler = self.make_lr_scheduler or pl_module.lr_scheduler
        self.lr_scheduler = make_lr_scheduler(self.optimizer) if make_lr_scheduler else None
        if isinstance(self.lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError(
                "PlainBaseline cannot follow ReduceLROnPlateau, which watches the student; give it an lr_scheduler of "
                "its own that goes by epochs"
            )
        if self._restored:
            self.optimizer.load_state_dict(self._restored["optimizer"])
            if self.lr_scheduler is not None:
                self.lr_scheduler.load_state_dict(self._restored["lr_scheduler"])

    @_for_each_student
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step of the twin, unless the student skipped the batch, and after an epoch's last one of its schedule."""
        assert isinstance(pl_module, DistillationModule)
        if outputs:
            self._step(trainer, pl_module, as_batch(batch))
        if self.lr_scheduler is not None and batch_idx + 1 == trainer.num_training_batches:
            self.lr_scheduler.step()

    def _step(self, trainer: L.Trainer, pl_module: DistillationModule, batch: Batch) -> None:
        self.twin.train()
        with trainer.precision_plugin.forward_context(), pl_module.student_precision(batch["image"].device):
            loss = F.cross_entropy(self.twin(batch["image"]).float(), batch["target"])
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def _measure(self, pl_module: L.LightningModule, batch: Any) -> None:
        assert isinstance(pl_module, DistillationModule)
        batch = as_batch(batch)
        self.twin.to(pl_module.device).eval()
        with torch.no_grad(), pl_module.student_precision(batch["image"].device):
            self.top1.to(pl_module.device).update(self.twin(batch["image"]), batch["target"])

    def _figure(self) -> torch.Tensor:
        """The twin's accuracy; NaN, after saying so, if it has diverged."""
        if all(bool(one.isfinite().all()) for one in self.twin.state_dict().values()):
            return self.top1.compute()
        rank_zero_warn(
            "PlainBaseline: the student trained alone has diverged, so there is nothing to compare with; give it an "
            "optimizer with a smaller learning rate"
        )
        return torch.tensor(float("nan"))

    @_for_each_student
    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Count the twin's hits on validation pictures."""
        self._measure(pl_module, batch)

    @_for_each_student
    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Count the twin's hits on test pictures."""
        self._measure(pl_module, batch)

    @_for_each_student
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the twin's accuracy."""
        pl_module.log("val/plain_top1", self._figure())
        self.top1.reset()

    @_for_each_student
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the twin's accuracy."""
        pl_module.log("test/plain_top1", self._figure())
        self.top1.reset()

    def state_dict(self) -> dict[str, Any]:
        """The twin and its optimizer, so that it resumes with the run."""
        if self.of_students:
            return {"students": {name: own.state_dict() for name, own in self.of_students.items()}}
        return {
            "twin": self.twin.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the twin of a checkpoint."""
        if "students" in state_dict:
            for name, own in state_dict["students"].items():
                self.of_students[name].load_state_dict(own)
            return
        self.twin.load_state_dict(state_dict["twin"])
        self._restored = state_dict
