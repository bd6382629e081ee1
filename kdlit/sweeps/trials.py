"""The trials of a sweep: shared by all processes that work on it, each trained once, none lost when a process ends."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import IO, TYPE_CHECKING, Any

import yaml

from kdlit.command_files import STOPPED, CommandFileError, differences, passed_on_to
from kdlit.runs import Run
from kdlit.sweeps.file import Sweep, SweepError, options

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial

_TAKEN_UP = 2  # times that a run which something kills is taken up again at once


class TrialError(Exception):
    """One trial has no value; others may have."""


class Trials:
    """The trials of a sweep, in an Optuna study that all its processes share.

    Args:
        sweep: what the file says.
        base: all values that the trials share.
        storage: URL of the database that holds the study; None for a file in the folder of the sweep.

    Raises:
        SweepError: If the folder was begun with other settings, or its study is not to be found.
    """

    def __init__(self, sweep: Sweep, base: dict[str, Any], storage: str | None = None) -> None:
        self.sweep = sweep
        try:
            with self._alone():
                self.study = self._join(base, storage)
        except CommandFileError:
            raise
        except Exception as error:  # of the database, its driver, or a damaged file
            what = f"--storage {storage}" if storage else f"{sweep.folder} cannot be used"
            raise SweepError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())}") from None

    def _join(self, base: dict[str, Any], storage: str | None) -> Study:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        from kdlit.files import write_whole

        folder, settings = self.sweep.folder, self.sweep.settings
        record, log = folder / "sweep.yaml", str(folder / "study.log")
        now = {key: value for key, value in settings.items() if key != "trials"} | {"values": base}
        now = json.loads(json.dumps(now, default=str))
        place = storage or JournalStorage(JournalFileBackend(log, JournalFileOpenLock(log)))
        if not record.exists():
            if left := sorted(folder.glob("trial_*")):
                raise SweepError(
                    f"{left[0]} is there, but no {record} that says of which sweep; name another --run_dir, or delete "
                    f"{folder} to begin anew"
                )
            name = f"{folder.name}-{uuid.uuid4().hex[:8]}"
            study = optuna.create_study(storage=place, study_name=name, direction=settings["direction"])
            text = yaml.safe_dump({"study": name} | now, sort_keys=False).encode()
            write_whole(record, lambda file: file.write(text))
            return study
        before = yaml.safe_load(record.read_text(encoding="utf-8"))
        if not isinstance(before, dict) or "study" not in before:
            raise SweepError(
                f"{record} is not what a sweep writes there; name another --run_dir, or delete {folder} to begin anew"
            )
        name = before.pop("study")
        if before != now:
            raise SweepError(
                f"{folder} was begun with other settings: {differences(before, now)}; name another --run_dir, or "
                "delete it to begin anew"
            )
        try:
            return optuna.load_study(study_name=name, storage=place)
        except KeyError:
            raise SweepError(
                f"the trials of {folder} are not in this storage; give the --storage it began with"
            ) from None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from taking or ending trials for this moment."""
        from optuna.storages.journal import JournalFileOpenLock

        self.sweep.folder.mkdir(parents=True, exist_ok=True)
        lock = JournalFileOpenLock(str(self.sweep.folder / "sweep"))
        lock.acquire()
        try:
            yield
        finally:
            with contextlib.suppress(RuntimeError):  # another process waited for 30 s, and then went ahead
                lock.release()

    def all(self) -> list[FrozenTrial]:
        """All trials there are, by number."""
        return self.study.get_trials(deepcopy=False)

    def folder(self, number: int) -> Path:
        """Where a trial lies."""
        return self.sweep.folder / f"trial_{number:03d}"

    def notes(self, number: int) -> dict[str, Any]:
        """What is known of a finished trial: its ``values``, one for each seed, and the ``reason`` if it failed."""
        return self.study.user_attrs.get(f"trial {number}") or {"values": [], "reason": ""}

    def take(self) -> tuple[FrozenTrial, IO[bytes]] | None:
        """The next trial for this process: one that was stopped or killed, or a new one.

        Returns:
            The trial, and a file whose lock keeps it for whatever process has it open; None if there is no trial left.
        """
        from optuna.trial import TrialState

        with self._alone():
            trials = self.all()
            for trial in trials:
                if trial.state == TrialState.RUNNING and (lock := _kept(self.folder(trial.number))):
                    return trial, lock
            number = len(trials)
            if number >= self.sweep.trials:
                return None
            if (lock := _kept(self.folder(number))) is None:
                raise SweepError(f"another process has {self.folder(number)}, though it is not of this sweep")
            self.study.sampler = self._sampler(number)
            self.study.ask(self.sweep.parameters)
            return self.all()[number], lock

    def _sampler(self, number: int) -> BaseSampler:
        """What draws a trial: by its number and the trials before it, however often the sweep was stopped."""
        from optuna.samplers import PartialFixedSampler, RandomSampler, TPESampler

        kind, own = self.sweep.settings["sampler"], f"{self.sweep.settings['seed']} {number}"
        seed = int(hashlib.sha256(own.encode()).hexdigest()[:8], 16)
        if kind == "tpe":
            return TPESampler(seed=seed, constant_liar=True)  # keeps away from points that are in training
        return (
            RandomSampler(seed) if kind == "random" else PartialFixedSampler(self.sweep.grid[number], RandomSampler())
        )

    def train(self, trial: FrozenTrial, lock: IO[bytes]) -> list[float]:
        """Train what is left of a trial.

        Returns:
            Its value for each seed.

        Raises:
            TrialError: If it has none.
            SweepError: If no trial can have one.
            KeyboardInterrupt, SystemExit: If a signal told it to stop.
        """
        values, seeds = [], self.sweep.settings["seeds"]
        for seed in seeds:
            run = self.folder(trial.number) / (f"seed_{seed}" if len(seeds) > 1 else "")
            if not (run / "student.pt").exists():
                point = [*self.sweep.arguments, *options(trial.params), f"--seed_everything={seed}"]
                _fit([*point, "--run_dir", str(run), "--ckpt_path=last"], run, lock)
            values.append(self._value(run))
        return values

    def _value(self, run: Path) -> float:
        metric, choose = self.sweep.settings["metric"], self.sweep.settings["choose"]
        logged = Run(run, {}, {}).series()
        if not logged.get(metric):
            names = ", ".join(sorted(name for name in logged if name.startswith("val/")))
            known = f"but {names}" if names else "nor anything else of validation pictures: its data holds none out"
            raise SweepError(f"{run} logged no {metric}, by which the sweep is to choose, {known}")
        values = logged[metric]
        if wrong := [value for value in values.values() if not math.isfinite(value)]:
            raise TrialError(f"{metric} is {wrong[0]}")
        if choose == "best":
            return max(values.values()) if self.sweep.settings["direction"] == "maximize" else min(values.values())
        since = max(values) - (9 if choose == "mean_last_10" else 0)
        return fmean(value for epoch, value in values.items() if epoch >= since)

    def end(self, number: int, values: Sequence[float], reason: str = "") -> None:
        """Note how a trial ended.

        Args:
            number: of the trial.
            values: one for each seed; none if it failed.
            reason: why it failed.
        """
        from optuna.trial import TrialState

        with self._alone():
            self.study.set_user_attr(f"trial {number}", {"values": list(values), "reason": reason})
            self.study.tell(number, fmean(values) if values else None, None if values else TrialState.FAIL)
            self._write_table()

    def _write_table(self) -> None:
        from kdlit.files import write_whole

        settings, text = self.sweep.settings, io.StringIO(newline="")
        seeds = [f"seed_{seed}" for seed in settings["seeds"]]
        names = ["trial", "state", *self.sweep.parameters, settings["metric"], *seeds, "folder", "reason"]
        table = csv.DictWriter(text, names)
        table.writeheader()
        for trial in self.all():
            notes = self.notes(trial.number)
            row = {"trial": trial.number, "state": trial.state.name.lower(), **trial.params}
            row |= {settings["metric"]: trial.value} | dict(zip(seeds, notes["values"], strict=False))
            table.writerow(row | {"folder": self.folder(trial.number), "reason": notes["reason"]})
        write_whole(self.sweep.folder / "trials.csv", lambda file: file.write(text.getvalue().encode()))


def _kept(folder: Path) -> IO[bytes] | None:
    """A file whose lock keeps a folder for those who have it open; None if others have."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise SweepError(f"{folder} is a file, where the folder of a trial should be; move it away") from None
    file = (folder / ".taken").open("wb")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # as on Windows, where a sweep has one process
        pass
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        file.close()
        raise SweepError(
            f"{folder}: no locks on this file system ({error.strerror}), so that two processes could train one trial; "
            "name a --run_dir elsewhere"
        ) from None
    return file


def _fit(arguments: Sequence[str], run: Path, lock: IO[bytes]) -> None:
    """Run ``kdlit fit`` in a process of its own; all that it prints goes to ``log.txt``.

    Raises:
        TrialError: If it fails.
        KeyboardInterrupt, SystemExit: If a signal told it to stop.
    """
    run.mkdir(parents=True, exist_ok=True)
    status = 0
    for _ in range(1 + _TAKEN_UP):
        with (run / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "kdlit", "fit", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=() if sys.platform == "win32" else [lock.fileno()],  # outlives this process if that is killed
            )
            with passed_on_to(process):
                status = process.wait()
        if status >= 0:
            break
    if status in STOPPED:
        print(f"kdlit: {run} was stopped; kdlit sweep with the same arguments goes on", file=sys.stderr)
        sys.exit(status)
    if status or not (run / "student.pt").exists():
        ended = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        raise TrialError(f"{ended}: {_last_words(run / 'log.txt')}; see {run / 'log.txt'}")


def _last_words(log: Path) -> str:
    """The last error in a log, or else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    errors = [line.partition("kdlit: error: ")[2] for line in lines if "kdlit: error: " in line]
    return (errors or [line for line in lines if line] or ["it said nothing"])[-1][:500]
