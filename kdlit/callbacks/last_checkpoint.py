"""The checkpoint that a run is resumed from: written between two steps, so that nothing is lost or done twice."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from kdlit.callbacks.throughput import without_times
from kdlit.data.sampling import EpochSampler, ResumableLoader
from kdlit.files import remove_scratch, scratch_for
from kdlit.loggers import RunLogger

PREEMPTED = 75  # exit status: the run has saved and can go on, "temporary failure" of sysexits.h
INTERRUPTED = 130  # exit status after Ctrl-C, as of a shell
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if hasattr(signal, name)]
_LONGEST = 3600.0  # seconds without a checkpoint, however long one takes
_AGREE_EVERY = 16  # steps after which several processes agree whether to save or to stop


class Stopped(SystemExit):
    """The run was asked to stop by a signal."""


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Let signals, but Ctrl-C, end the process at once with the documented status, where there is nothing to save.

    Raises:
        Stopped: When one comes.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        os.write(2, f"kdlit: stopped by {name} outside of training; the same command goes on\n".encode())
        raise Stopped(PREEMPTED)

    with _heard(stop, (number for number in _SIGNALS if number != signal.SIGINT)):
        yield


@contextlib.contextmanager
def _heard(handler: Callable[[int, FrameType | None], None], numbers: Iterable[int]) -> Iterator[None]:
    """Let a handler answer signals for a while, those left out that the process ignores."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, signal.SIG_DFL if former is None else former)


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
        share: largest part of the time to spend on writing; an epoch so short that it would take more is passed over,
            but never for more than an hour. Does not hold for ``every_n_steps``.
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
        self.finished = False  # by itself, before the last epoch
        self._listening = contextlib.ExitStack()
        self._restored: dict[str, Any] = {}
        self._to_forget: tuple[int, list[int]] | None = None  # step and rows of what was logged
        self._saved_at, self._step = time.monotonic(), 0
        self._took: deque[float] = deque([0.0], maxlen=3)  # seconds of the newest checkpoints
        self._moved = False  # something has been done since the newest
        self._is_whole = False  # what lies under the final name, as far as this process knows

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
        self._forget(trainer)
        if trainer.is_global_zero:
            remove_scratch(self.path.parent)
        trainer.callback_metrics.update(self._restored.get("metrics", {}))
        self._saved_at, self._step, self._moved = time.monotonic(), trainer.global_step, False
        self._listen()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what the epoch before has made, if it is time."""
        if self._moved:
            self._act(trainer, self._agreed(trainer, self._is_time(trainer, at_boundary=True)))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save what the steps before have made, if it is time."""
        alone = trainer.world_size == 1
        agreed = alone or batch_idx % _AGREE_EVERY == 0 or self.every_n_steps is not None
        # Gradients that no step has taken yet are in no checkpoint.
        self._moved = True
        if batch_idx > 0 and agreed and batch_idx % trainer.accumulate_grad_batches == 0:
            self._act_within_epoch(trainer, self._agreed(trainer, self._is_time(trainer, at_boundary=False)))

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop in the middle of a validation, which will then be run again; several processes finish it first."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.world_size > 1:
            return
        self._moved = True
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if progress.is_last_batch or progress.current.ready % trainer.accumulate_grad_batches == 0:
            self._act_within_epoch(trainer, self.signal)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let schedules that watch a figure move on at the end of an epoch that was taken up in its middle."""
        trainer.fit_loop._restarting = False  # or they would stand still, as figures are in no checkpoint but this

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what the run has made."""
        self._ignore()
        self.finished = trainer.should_stop
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
        is_cheap = min(self._took) <= self.share * elapsed or elapsed > _LONGEST
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

    def _act_within_epoch(self, trainer: L.Trainer, wish: int | None) -> None:
        if wish is None or can_go_on_within_epoch(trainer):
            self._act(trainer, wish)
        elif wish:
            self._stop(trainer, wish)

    def _stop(self, trainer: L.Trainer, number: int) -> None:
        status = INTERRUPTED if number == signal.SIGINT else PREEMPTED
        why = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        where = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        lost = trainer.global_step - self._step
        rank_zero_only(print)(
            f"kdlit: stopped by {why} at {where}; the same command with --ckpt_path=last goes on from {self.path}"
            + (f", which is {lost} steps older: {self._why_older(trainer)}" if lost else "")
            + f" (exit status {status})",
            file=sys.stderr,
            flush=True,
        )
        raise Stopped(status if trainer.is_global_zero else 0)

    def _why_older(self, trainer: L.Trainer) -> str:
        return self._failure(trainer) or "this data cannot be taken up within an epoch"

    def _failure(self, trainer: L.Trainer) -> str | None:
        """Why the newest checkpoint could not be written, if it could not."""
        failed: dict[str, str] = getattr(trainer.strategy.checkpoint_io, "failed", {})
        return failed.get(str(self.path))

    # Signals

    def _listen(self) -> None:
        self.signal = None
        self._ignore()
        self._listening.enter_context(_heard(self._note, _SIGNALS))

    def _ignore(self) -> None:
        self._listening.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.signal == number:
                raise KeyboardInterrupt
            os.write(2, b"\nkdlit: stopping after this step; Ctrl-C once more stops at once, without saving\n")
            self.signal = self.signal or number  # a cluster that has asked before is told so
        else:
            self.signal = number

    # What

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint; the one before it is kept as ``previous.ckpt``.

        Args:
            trainer: one that is between two steps.
        """
        if getattr(trainer, "fast_dev_run", False):
            return
        started = time.monotonic()
        for logger in _logs(trainer):
            logger.flush()
        self.write(trainer)
        self._saved_at = time.monotonic()
        self._took.append(self._saved_at - started)
        if self._failure(trainer) is None:
            self._step, self._moved, self._is_whole = trainer.global_step, False, True

    def write(self, trainer: L.Trainer) -> None:
        """Write the files; whoever keeps more than these does so here."""
        if trainer.is_global_zero and self._is_whole and self.path.exists():
            with contextlib.suppress(OSError):  # not every file system has links
                scratch = scratch_for(self.path)
                os.link(self.path, scratch)
                scratch.replace(self.path.with_name("previous.ckpt"))
                scratch.unlink(missing_ok=True)  # it stays if both were the same file before
        trainer.save_checkpoint(self.path, weights_only=False)

    def state_dict(self) -> dict[str, Any]:
        """Made when a checkpoint is saved."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember it until training starts."""
        self._restored = state_dict
        self.finished = bool(state_dict.get("finished"))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Describe where the run is in the one way from which the trainer goes on without a step lost or repeated.

        The newest value of every figure is part of it: what comes later may ask for those of an earlier epoch.
        """
        figures = without_times(trainer.callback_metrics)
        figures = {name: torch.as_tensor(value).detach().cpu() for name, value in figures.items()}
        # Of the step before a validation there will be more rows, which have to be told from those that are there.
        rows = [logger.rows for logger in _logs(trainer)] if trainer.validating else []
        checkpoint["callbacks"][self.state_key] = {"metrics": figures, "finished": self.finished, "rows": rows}
        if trainer.state.fn == "fit":
            _settle(checkpoint["loops"]["fit_loop"], trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note what was logged about steps that will be run again, and find the best in a folder that was moved."""
        if trainer.state.fn == "fit":
            rows = checkpoint["callbacks"].get(self.state_key, {}).get("rows", [])
            self._to_forget = checkpoint["global_step"], rows
            self._is_whole = self.path.exists() and Path(str(trainer.ckpt_path)).resolve() == self.path.resolve()
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint) and callback.state_key in checkpoint["callbacks"]:
                    try:
                        _follow(checkpoint["callbacks"][callback.state_key], str(callback.dirpath))
                    except (TypeError, KeyError, AttributeError) as error:
                        raise ValueError(
                            f"{trainer.ckpt_path} is damaged: what {type(callback).__name__} kept cannot be read "
                            f"({type(error).__name__}: {error})"
                        ) from None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget what will be logged again, now that nobody has refused to go on; what has finished stays so."""
        trainer.should_stop = self.finished
        if not trainer.ckpt_path:
            self._to_forget = 0, []  # of a run that was killed before it had a checkpoint
        self._forget(trainer)

    def _forget(self, trainer: L.Trainer) -> None:
        if self._to_forget is None:
            return
        (step, rows), self._to_forget = self._to_forget, None
        for logger, count in zip_longest(_logs(trainer), rows):
            if logger is not None:
                logger.forget_from(step, count)


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


def _logs(trainer: L.Trainer) -> list[RunLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, RunLogger)]


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
    elif _is_validating(trainer):  # the rest of the validation
        validation["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        validation["current"] = dict.fromkeys(validation["total"], 0)
        validation["is_last_batch"] = False


def _is_validating(trainer: L.Trainer) -> bool:
    """Whether a batch of a validation within the training has just been measured."""
    progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.current
    return trainer.state.fn == "fit" and progress.processed > progress.completed


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
