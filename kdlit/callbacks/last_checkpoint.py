"""The checkpoint that a run is resumed from: written between two steps, so that nothing is lost or done twice."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from kdlit.data.sampling import EpochSampler, ResumableLoader
from kdlit.files import remove_scratch, scratch_for
from kdlit.loggers import RunLogger

PREEMPTED = 75  # exit status: the run has saved and can go on, "temporary failure" of sysexits.h
INTERRUPTED = 130  # exit status after Ctrl-C, as of a shell
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if hasattr(signal, name)]
_AGREE_EVERY = 16  # steps after which several processes agree whether to save or to stop


class Stopped(SystemExit):
    """The run was asked to stop by a signal, and has saved."""


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``, from which a run goes on as if it had never stopped, and ``previous.ckpt``, the one before.

    It is written when an epoch starts and when training ends, within an epoch every few minutes, and always between two
    steps of the optimizer; within an epoch only if the training data can be taken up there, as that of kdlit can.

    SIGTERM and SIGUSR1, by which clusters announce that a job's time is up, SIGHUP, which a terminal sends when it is
    closed, and Ctrl-C save after the step at hand and end the process with status 75, or 130 after Ctrl-C; a second
    Ctrl-C ends it at once. A signal that the process ignores, as under ``nohup``, is left so. Of several processes the
    first is asked.

    Args:
        dirpath: folder of both files.
        every_minutes: time after which one is written within an epoch, too.
        every_n_steps: write one after that many steps of the optimizer instead; null for none.
        share: largest part of the time to spend on writing; an epoch so short that it would take more is passed over.
            Does not hold for ``every_n_steps``.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_minutes: float = 5.0,
        every_n_steps: int | None = None,
        share: float = 0.01,
    ) -> None:
        super().__init__()
        if not every_minutes > 0:
            raise ValueError(f"every_minutes must be > 0, got {every_minutes!r}")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be >= 1 or null, got {every_n_steps!r}")
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share!r}")
        self.dirpath = dirpath
        self.every_minutes = every_minutes
        self.every_n_steps = every_n_steps
        self.share = share
        self.signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._metrics: dict[str, torch.Tensor] = {}
        self._saved_at, self._took, self._step = time.monotonic(), 0.0, 0

    @property
    def path(self) -> Path:
        """Where the checkpoint lies."""
        return Path(self.dirpath or "checkpoints") / "last.ckpt"

    # When

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the files into the folder of the trainer, unless told another."""
        self.dirpath = self.dirpath or os.path.join(trainer.default_root_dir, "checkpoints")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Clear up after an earlier process, and listen for signals."""
        if trainer.is_global_zero:
            remove_scratch(self.path.parent)
        trainer.callback_metrics.update(self._metrics)
        self._saved_at, self._took, self._step = time.monotonic(), 0.0, trainer.global_step
        self._listen()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what the epoch before has made, if it is time."""
        if trainer.global_step > self._step:
            self._act(trainer, self._agreed(trainer, self._is_time(trainer, at_boundary=True)))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save what the steps before have made, if it is time."""
        alone = trainer.world_size == 1
        agreed = alone or batch_idx % _AGREE_EVERY == 0 or self.every_n_steps is not None
        # Gradients that no step has taken yet are in no checkpoint.
        if batch_idx == 0 or not agreed or batch_idx % trainer.accumulate_grad_batches:
            return
        wish = self._agreed(trainer, self._is_time(trainer, at_boundary=False))
        if can_go_on_within_epoch(trainer):
            self._act(trainer, wish)
        elif wish:
            self._stop(trainer, wish)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop in the middle of a validation, which will then be run again; several processes finish it first."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.world_size == 1:
            if can_go_on_within_epoch(trainer):
                self._act(trainer, self.signal)
            elif self.signal is not None:
                self._stop(trainer, self.signal)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what the run has made."""
        self._ignore()
        if trainer.global_step > self._step or not self.path.exists():
            self.save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave signals to whoever listened before."""
        self._ignore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Likewise."""
        self._ignore()

    def _is_time(self, trainer: L.Trainer, at_boundary: bool) -> bool:
        if self.every_n_steps is not None:
            return trainer.global_step - self._step >= self.every_n_steps
        elapsed = time.monotonic() - self._saved_at
        is_cheap = self._took <= self.share * elapsed
        return is_cheap and (at_boundary or elapsed > 60 * self.every_minutes)

    def _agreed(self, trainer: L.Trainer, is_time: bool) -> int | None:
        """What the first process wants: None, 0 to save, or the signal after which to stop."""
        wish = self.signal if self.signal is not None else 0 if is_time else None
        return wish if trainer.world_size == 1 else trainer.strategy.broadcast(wish)

    def _act(self, trainer: L.Trainer, wish: int | None) -> None:
        if wish is None:
            return
        self.save(trainer)
        if wish:
            self._stop(trainer, wish)

    def _stop(self, trainer: L.Trainer, number: int) -> None:
        status = INTERRUPTED if number == signal.SIGINT else PREEMPTED
        why = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        where = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        lost = trainer.global_step - self._step
        rank_zero_only(print)(
            f"kdlit: stopped by {why} at {where}; the same command with --ckpt_path=last goes on from {self.path}"
            + (f", {lost} steps before: this data cannot be taken up within an epoch" if lost else "")
            + f" (exit status {status})",
            file=sys.stderr,
            flush=True,
        )
        raise Stopped(status if trainer.is_global_zero else 0)

    # Signals

    def _listen(self) -> None:
        self.signal = None
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._note) for number in heard}

    def _ignore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._handlers = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.signal == number:
                raise KeyboardInterrupt
            os.write(2, b"\nkdlit: stopping after this step; Ctrl-C once more stops at once, without saving\n")
        self.signal = number

    # What

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint; the one before it is kept as ``previous.ckpt``.

        Args:
            trainer: one that is between two steps.
        """
        if not getattr(trainer, "fast_dev_run", False):
            started = time.monotonic()
            self.write(trainer)
            self._took = time.monotonic() - started
        self._saved_at, self._step = time.monotonic(), trainer.global_step

    def write(self, trainer: L.Trainer) -> None:
        """Write the files; whoever keeps more than these does so here."""
        if trainer.is_global_zero and self.path.exists():
            with contextlib.suppress(OSError):  # not every file system has links
                scratch = scratch_for(self.path)
                os.link(self.path, scratch)
                scratch.replace(self.path.with_name("previous.ckpt"))
                scratch.unlink(missing_ok=True)  # it stays if both were the same file before
        trainer.save_checkpoint(self.path, weights_only=False)

    def state_dict(self) -> dict[str, Any]:
        """The newest value of every figure: what comes later may ask for those of an earlier epoch."""
        return {"metrics": self._metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember them until training starts."""
        self._metrics = dict(state_dict["metrics"])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Describe where the run is in the one way from which the trainer goes on without a step lost or repeated."""
        figures = {name: torch.as_tensor(value).detach().cpu() for name, value in trainer.callback_metrics.items()}
        checkpoint["callbacks"][self.state_key] = {"metrics": figures}
        if trainer.state.fn == "fit":
            _settle(checkpoint["loops"]["fit_loop"], trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Forget what was logged about steps that will be run again, and find the best in a folder that was moved."""
        if trainer.state.fn == "fit":
            _forget(trainer, checkpoint["global_step"])
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint) and callback.state_key in checkpoint["callbacks"]:
                    _follow(checkpoint["callbacks"][callback.state_key], str(callback.dirpath))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Likewise of a run that was killed before it had a checkpoint."""
        if not trainer.ckpt_path:
            _forget(trainer, 0)


def can_go_on_within_epoch(trainer: L.Trainer) -> bool:
    """Whether the training data can be taken up in the middle of an epoch, at the very next batch.

    Args:
        trainer: one that trains.
    """
    loader = trainer.fit_loop._combined_loader
    return all(
        isinstance(one.sampler, EpochSampler) if isinstance(one, ResumableLoader) else hasattr(one, "load_state_dict")
        for one in ([] if loader is None else loader.flattened)
    )


def _follow(state: dict[str, Any], folder: str) -> None:
    """Let the state of a ModelCheckpoint name its files where they are now, if they are there."""

    def moved(path: str) -> str:
        return os.path.join(folder, os.path.relpath(path, state["dirpath"])) if path else path

    files = {moved(path): score for path, score in state["best_k_models"].items()}
    if all(map(os.path.exists, files)):
        names = ("best_model_path", "kth_best_model_path", "last_model_path")
        state.update({name: moved(state[name]) for name in names}, best_k_models=files, dirpath=folder)


def _forget(trainer: L.Trainer, step: int) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            logger.forget_from(step)


def _settle(loops: dict[str, Any], trainer: L.Trainer) -> None:
    """Take back what the trainer has counted of that which comes next."""
    epoch, batch = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    validation = loops["epoch_loop.val_loop.batch_progress"]
    if epoch["current"]["ready"] > epoch["current"]["started"]:  # the next epoch
        _count(epoch, ready=-1)
    elif batch["current"]["ready"] > batch["current"]["started"]:  # the next step
        _count(batch, ready=-1)
        batch["is_last_batch"] = False
        if _validation_was_due(trainer):  # the trainer will count this step anew when it passes over the validation
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    elif validation["current"]["processed"] > validation["current"]["completed"]:  # the rest of the validation
        validation["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        validation["current"] = dict.fromkeys(validation["total"], 0)
        validation["is_last_batch"] = False


def _count(progress: dict[str, Any], **by: int) -> None:
    for part in ("total", "current"):
        for name, number in by.items():
            progress[part][name] += number


def _validation_was_due(trainer: L.Trainer) -> bool:
    """Whether there was one after the step before, other than by the clock."""
    loop, every = trainer.fit_loop.epoch_loop, trainer.val_check_batch
    if every is None or not loop._should_check_val_epoch():
        return False
    progress = loop.batch_progress.total if trainer.check_val_every_n_epoch is None else loop.batch_progress.current
    return progress.completed % every == 0
