"""Weights & Biases that can neither stop nor slow a training run."""

from __future__ import annotations

import atexit
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

# Seconds; W&B's own limits are minutes, or none.
_LOGIN = 5  # in which the server accepts the key
_START = 60  # beyond all that starting a run waits for
_CALL = 30  # beyond what a slow disk makes any call wait for
_ENVIRONMENT = {
    "WANDB_INIT_TIMEOUT": "10",
    "WANDB_FINISH_TIMEOUT": "30",
    "WANDB_ERROR_REPORTING": "false",  # the end of the process waits for reports, and nothing limits that
}

_Method = TypeVar("_Method", bound=Callable[..., Any])
_Job = tuple["Future[Any]", Callable[[], Any]]


def _patient(method: _Method) -> _Method:
    """The same method, whose failures and hangs become warnings."""

    @functools.wraps(method)
    def call(self: PatientWandbLogger, *args: Any, **kwargs: Any) -> Any:
        return self._patiently(method.__name__, lambda: method(self, *args, **kwargs))

    return call  # type: ignore[return-value]


class PatientWandbLogger(WandbLogger):
    """Lightning's W&B logger; training never feels the network, the login, the server or the disk of W&B.

    Before a run starts online, the server has 5 s to accept the key. If it does not, the run is kept on disk as with
    ``offline=True``. Later, what fails inside W&B ends in a warning; what hangs there for 30 s (which W&B's own process
    can bring about, but no server) ends in a warning and no more logging. At the end of the process, uploads may take
    30 s, or what ``WANDB_FINISH_TIMEOUT`` says, and a W&B that hangs as much again. Warnings say how to upload a run
    later. W&B's reports on itself are off unless ``WANDB_ERROR_REPORTING`` is set: they can delay the end, too.

    ``use_artifact`` and ``download_artifact``, whose results the caller needs, and what is called on :attr:`experiment`
    itself fail as they do in Lightning. Server and key are those of the environment or of ``wandb login``.

    Arguments are those of ``WandbLogger``. A logger that exists becomes patient by
    ``logger.__class__ = PatientWandbLogger``.
    """

    _gave_up = False
    _jobs: SimpleQueue[_Job] | None = None
    _worker: threading.Thread | None = None
    _warned: frozenset[str] = frozenset()

    watch = _patient(WandbLogger.watch)
    log_hyperparams = _patient(WandbLogger.log_hyperparams)
    log_metrics = _patient(WandbLogger.log_metrics)
    log_table = _patient(WandbLogger.log_table)
    log_text = _patient(WandbLogger.log_text)
    log_image = _patient(WandbLogger.log_image)
    log_audio = _patient(WandbLogger.log_audio)
    log_video = _patient(WandbLogger.log_video)
    after_save_checkpoint = _patient(WandbLogger.after_save_checkpoint)
    finalize = _patient(WandbLogger.finalize)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started where there is none yet; a stand-in that ignores all calls where W&B fails or hangs."""
        if self._experiment is None and not self._gave_up:
            try:
                self._patiently("start", self._start)
            finally:
                self._gave_up = self._experiment is None
        return self._experiment or _DummyExperiment()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process."""
        return super().__getstate__() | {"_jobs": None, "_worker": None}

    def _start(self) -> None:
        """Start the best run that can be had: online, else on disk, else one that forgets what it is given."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import wandb

        init = self._wandb_init
        mode = init.get("mode") or ("offline" if self._offline else None)
        goes_on = wandb.run is not None or getattr(self, "_attach_id", None) is not None
        problem = None
        if not goes_on and (mode or wandb.setup().settings.mode) not in ("offline", "dryrun", "disabled"):
            problem = _login_problem()
        for init["mode"] in ("offline", "disabled") if problem else (mode, "offline", "disabled"):
            try:
                self._experiment = super().experiment
                break
            except Exception as error:
                problem = error
        atexit.register(self._finish)  # later than W&B's own, hence run before it
        if problem:
            self._warn("start", problem)

    def _finish(self) -> None:
        """End the run within its limit."""
        if (run := self._experiment) is None:
            return
        limit = run.settings.finish_timeout
        self._patiently("finish", run.finish, limit + _CALL if limit else None)
        if getattr(run, "_finish_timed_out", False):
            self._warn("finish", TimeoutError(f"not all was uploaded within {limit:g} s (WANDB_FINISH_TIMEOUT)"))

    def _patiently(self, name: str, call: Callable[[], Any], limit: float | None = _CALL) -> Any:
        """What a call gives, or after a warning None; no more than ``limit`` seconds are spent on it."""
        if self._gave_up:
            return None
        if threading.current_thread() is self._worker:  # one call within another
            return call()
        if self._jobs is None:
            self._jobs = SimpleQueue()
            self._worker = threading.Thread(target=_work, args=(self._jobs,), daemon=True)
            self._worker.start()
        result: Future[Any] = Future()
        self._jobs.put((result, call))
        if self._experiment is None:
            limit = _START
        try:
            return result.result(limit)
        except Exception as error:
            if result.done():
                self._warn(name, error)
            else:
                self._warn(name, TimeoutError(f"hangs for {limit:g} s already, so nothing more is logged there"))
                self._give_up()
        return None

    def _warn(self, name: str, problem: Exception) -> None:
        """Say once what went wrong and what to do about it."""
        if name in self._warned:
            return
        self._warned |= {name}
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0].rstrip(".")
        run = self._experiment
        if run is None or run.disabled:
            todo = "nothing is kept of this run there"
        else:
            todo = f"upload the run later by `wandb sync --include-online {os.path.relpath(Path(run.dir).parent)}`"
        rank_zero_warn(f"W&B, {name}: {reason}. Training is not affected; {todo}")

    def _give_up(self) -> None:
        """Leave W&B alone from now on, and let the process end without it."""
        run, self._gave_up = self._experiment, True
        if run is not None:
            self._id, self._experiment = run.id, None
            _attempt(run.unwatch)  # its hooks are called by training itself
            _attempt(run.finish)  # gives back standard output
        import wandb

        _attempt(wandb.teardown)  # else the end of the process would wait for it


def _work(jobs: SimpleQueue[_Job]) -> None:
    """Do jobs one by one, so that whoever waits for one can stop waiting."""
    while True:
        result, call = jobs.get()
        try:
            result.set_result(call())
        except BaseException as error:  # belongs to whoever waits
            result.set_exception(error)


def _attempt(call: Callable[[], Any]) -> None:
    """Make a call that may fail or hang; a second is spent on it."""

    def attempt() -> None:
        with suppress(Exception):
            call()

    thread = threading.Thread(target=attempt, daemon=True)
    with suppress(RuntimeError):  # newer Pythons start none at their end
        thread.start()
        thread.join(1)


def _login_problem() -> Exception | None:
    """Why a run could not start online; None where the server accepts the key."""
    import wandb

    url, given = wandb.setup().settings.base_url, os.environ.get("WANDB_HTTP_TIMEOUT")
    limit = os.environ["WANDB_HTTP_TIMEOUT"] = given or str(_LOGIN)
    try:
        if not wandb.login(verify=True, prompt=False):
            return ValueError(f"no API key for {url}, see `wandb login`")
    except Exception as error:
        return ConnectionError(f"{url} did not accept the API key within {limit} s ({error})")
    finally:
        if given is None:
            del os.environ["WANDB_HTTP_TIMEOUT"]
    return None
