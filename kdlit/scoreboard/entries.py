"""What a run measured: each accuracy with the pictures and the choice of epoch that it stands for."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kdlit.runs import Run, find_runs
from kdlit.scoreboard import settings as names

LAST_EPOCHS = 10  # of which the mean is taken
_NOTHING = "no top-1 accuracy that counts; kdlit test --ckpt_path=last measures it"


class Figure(NamedTuple):
    """A kind of accuracy.

    Attributes:
        key: short name, for tables that programs read.
        split: the pictures it is measured on: ``test`` or ``val``.
        epoch_choice: which epoch's student is measured.
        chosen_on: the pictures by which that epoch was chosen.
        title: all of that, as the head of a column.
        suffix: what follows each value in its cell.
    """

    key: str
    split: str
    epoch_choice: str
    chosen_on: str
    title: str
    suffix: str = ""

    @property
    def is_biased(self) -> bool:
        """Whether the epoch was chosen by the pictures it is measured on, which makes the figure too good."""
        return self.chosen_on == self.split


LAST_TEST = Figure("last_epoch_test", "test", "last", "nothing", "last epoch, test")
CHOSEN_TEST = Figure(
    "best_val_epoch_test", "test", "best on val", "val", "epoch chosen on val, test", "epoch chosen on val"
)
LAST_VAL = Figure("last_epoch_val", "val", "last", "nothing", "last epoch, val")
MEAN_VAL = Figure("mean_of_last_10_epochs_val", "val", "last 10", "nothing", "mean of last 10 epochs, val")
BEST_VAL = Figure(
    "best_epoch_val", "val", "best", "val", "best epoch, val (chosen on these pictures: biased up)", "best on val"
)
BEST_TEST = Figure(
    "best_epoch_on_test",
    "test",
    "best on test",
    "test",
    "BEST EPOCH ON TEST, or on pictures that may be it (chosen on these pictures: biased up)",
    "best on TEST",
)
# In the order of the columns, which is that in which a figure is preferred for comparisons; biased ones never are.
FIGURES = (LAST_TEST, CHOSEN_TEST, LAST_VAL, MEAN_VAL, BEST_VAL, BEST_TEST)


@dataclass(frozen=True)
class Entry:
    """A run as the scoreboard sees it.

    Attributes:
        name: its folder.
        seed: what sets it apart from the other runs of its row.
        started: when it was started last, for telling the newer of two copies.
        settings: all that defines it but the seed; from :func:`kdlit.scoreboard.settings.settings_of`.
        method: as ``KD + LS``.
        student: name of the network.
        teacher: likewise; empty if there is none.
        data: class of the data module.
        epochs: trained for.
        planned: as its config wants; None if that says no number.
        finished: whether its training ended as planned.
        pictures: what its validation pictures are: ``held out`` of the training pictures, the ``test`` pictures, or
            ``unknown``.
        figures: accuracies, fractions of 1.
        teacher_top1: accuracy of the teacher on the test pictures, a fraction; None if it was not measured.
        version: of kdlit.
        shared_order: the seed of the pictures' order, where it is not that of the run.
        notes: what a reader has to know.
    """

    name: str
    seed: str
    started: str
    settings: dict[str, Any]
    method: str
    student: str
    teacher: str
    data: str
    epochs: int
    planned: int | None
    finished: bool
    pictures: str
    figures: dict[Figure, float]
    teacher_top1: float | None
    version: str
    shared_order: int | None
    notes: tuple[str, ...]


def read_entries(folders: Iterable[str | Path]) -> tuple[list[Entry], list[str]]:
    """Read the runs in some folders.

    Args:
        folders: runs, or folders that hold runs at any depth.

    Returns:
        The runs, sorted by folder, and what is wrong with those that cannot be read.
    """
    runs: dict[Path, Run] = {}
    problems: list[str] = []
    for folder in folders:
        found, wrong = _found(Path(folder))
        runs |= {run.path.resolve(): run for run in found}
        problems += wrong
    logs: dict[Path, _Log] = {}
    for path, run in sorted(runs.items()):
        try:
            logs[path] = _Log.of(run)
        except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
            problems.append(f"{run.name}: left out: {error}")
    # Pictures of unknown origin that one run shows to be the test pictures are that for every run on the same data.
    on_test = {log.data for log in logs.values() if log.val_is_test}
    entries = [
        log.entry("test" if log.origin == "unknown" and log.data in on_test else log.origin) for log in logs.values()
    ]
    problems += [
        "; ".join([f"{entry.name}: left out: {_NOTHING}", *entry.notes]) for entry in entries if not entry.figures
    ]
    return [entry for entry in entries if entry.figures], sorted(set(map(names.printable, problems)))


def _found(folder: Path) -> tuple[list[Run], list[str]]:
    """The runs of a folder; those beside one that cannot be read are found all the same."""
    try:
        return find_runs([folder]), []
    except FileNotFoundError as error:
        return [], [str(error)]
    except (OSError, ValueError) as error:
        if (folder / "config.yaml").exists():
            return [], [f"{folder}: left out: {error}"]
    runs: list[Run] = []
    problems: list[str] = []
    for child in sorted(path for path in folder.iterdir() if path.is_dir()):
        inner, wrong = _found(child)
        runs += inner
        problems += [text for text in wrong if "holds no run" not in text]
    return runs, problems


@dataclass(frozen=True)
class _Log:
    """What a run wrote down."""

    run: Run
    assistants: list[Run]  # that stand above it in a chain, the nearest first
    settings: dict[str, Any]
    data: str  # the settings of its data
    origin: str  # of its validation pictures, as far as its record tells
    val: dict[int, float]
    test: dict[str, Any]
    test_top1: float | None
    teacher_top1: float | None
    test_epochs: int | None
    epochs: int
    planned: int | None
    val_is_test: bool

    @classmethod
    def of(cls, run: Run) -> _Log:
        series = run.series()
        test = run.results("test").get("test", {})
        epochs_of_test = test.get("epochs")
        test_epochs = epochs_of_test if isinstance(epochs_of_test, int) else None
        trained = [epoch + 1 for name in series for epoch in series[name] if name.startswith(("train/", "val/"))]
        trainer = run.config.get("trainer")
        trainer = trainer if isinstance(trainer, dict) else {}
        epochs = max([*trained, test_epochs or 0])
        steps = trainer.get("max_steps")
        enough = isinstance(steps, int) and 0 < steps <= max(
            (int(row["step"]) + 1 for row in run.rows if "step" in row and "train/loss" in row), default=0
        )
        wanted = epochs if enough else trainer.get("max_epochs")
        assistants = _assistants(run)
        settings = _settings([run, *assistants])
        held_out = run.record.get("data")
        held_out = held_out.get("val") if isinstance(held_out, dict) else None
        known = isinstance(held_out, dict) and bool(held_out.get("size"))
        return cls(
            run,
            assistants,
            settings,
            data=json.dumps({k: v for k, v in settings.items() if k.startswith("data.")}, sort_keys=True, default=str),
            origin="held out" if known else "unknown",
            val=_fractions(series.get("val/top1", {}), "val/top1"),
            test=test,
            test_top1=_fraction(test.get("test/top1"), "test/top1"),
            teacher_top1=_fraction(test.get("test/teacher_top1"), "test/teacher_top1"),
            test_epochs=test_epochs,
            epochs=epochs,
            planned=wanted if isinstance(wanted, int) and wanted > 0 else None,
            val_is_test=_same_pictures(series, test, test_epochs, _chance(settings)),
        )

    @property
    def finished(self) -> bool:
        """Whether the training ended as planned, allowing for epochs in which nothing was logged."""
        if self.planned is not None and self.test_epochs is not None and self.test_epochs >= self.planned:
            return True
        if not (self.run.path / "student.pt").exists():
            return False
        logged = sorted({epoch for values in self.run.series().values() for epoch in values})
        gap = max((after - before for before, after in zip([-1, *logged], logged, strict=False)), default=1)
        return self.planned is None or self.planned - self.epochs < gap

    def entry(self, pictures: str) -> Entry:
        notes: list[str] = []
        finished = self.finished
        epochs = self.planned if finished and self.planned is not None else self.epochs
        figures = self._of_val(epochs, pictures) | self._of_test(epochs, finished, pictures, notes)
        if self.val and pictures == "unknown":
            notes.append("its data module does not say what its validation pictures are: they may be the test pictures")
        if self.val and pictures == "test":
            notes.append("its validation pictures may well be its test pictures: both give the same figures")
        if not finished:
            plan = f"{self.planned} epochs" if self.planned else "an unstated number of epochs"
            missing = "" if (self.run.path / "student.pt").exists() else "; no student.pt, which the end writes"
            notes.append(f"unfinished: {self.epochs} of {plan}{missing}")
        student, teacher = names.student_and_teacher(self.run.config)
        method = names.method_name(self.run.config)
        if self.assistants:
            above = names.student_and_teacher(self.assistants[-1].config)[1]
            if above and {method, *(names.method_name(one.config) for one in self.assistants)} == {"KD"}:
                method, teacher = names.CHAIN, above
            notes.append(
                f"its teacher is the student of {self.assistants[0].name}, and known by the settings of that run"
            )
        elif Path(path := _teacher_path(self.run)).name == "student.pt":
            notes.append(f"its teacher is the student of a run, {path}: only runs with that very teacher share its row")
        data = self.run.config.get("data")
        arguments = data.get("init_args") if isinstance(data, dict) and names.is_own_data(self.run.config) else None
        order = arguments.get("seed") if isinstance(arguments, dict) else None
        order = order if isinstance(order, int) and order != self.run.seed else None
        seed = f"unknown, {self._mark()}" if self.run.seed is None else str(self.run.seed)
        starts = self.run.record.get("starts")
        start = starts[-1] if isinstance(starts, list) and starts and isinstance(starts[-1], dict) else {}
        versions = start.get("versions")
        log = self.run.path / "metrics.csv"
        return Entry(
            names.printable(self.run.name),
            seed=seed if order is None else f"{seed} (pictures {order})",
            started=f"{start.get('time', '')} {log.stat().st_mtime if log.exists() else 0:.0f}",
            settings=self.settings,
            method=method,
            student=student,
            teacher=teacher,
            data=names.data_name(self.run.config),
            epochs=epochs,
            planned=self.planned,
            finished=finished,
            pictures=pictures,
            figures=figures,
            teacher_top1=None if self._measured_otherwise() else self.teacher_top1,
            version=str(versions.get("kdlit", "")) if isinstance(versions, dict) else "",
            shared_order=order,
            notes=tuple(notes),
        )

    def _mark(self) -> str:
        """What tells a run that names no seed from others, which drew theirs as well, but not from its copies."""
        starts, log = self.run.record.get("starts"), self.run.path / "metrics.csv"
        start = starts[0].get("time") if isinstance(starts, list) and starts and isinstance(starts[0], dict) else None
        if start is None and not log.exists():
            return names.printable(self.run.name)
        content = log.read_bytes() if log.exists() else b""
        return hashlib.sha256(str(start).encode() + content).hexdigest()[:8]

    def _measured_otherwise(self) -> str:
        """Why ``test.json`` is not of all test pictures as in training; empty if it is, as far as it tells."""
        trainer = self.run.config.get("trainer")
        planned = trainer.get("limit_test_batches") if isinstance(trainer, dict) else None
        limit = self.test.get("limit_batches", planned)
        if limit is not None and not (isinstance(limit, float) and limit == 1):  # the integer 1 is one batch
            return f"it is of a part of the test pictures, limit_test_batches {limit!r}"
        otherwise = self.test.get("otherwise")
        return f"the data were other than in training: {otherwise}" if otherwise else ""

    def _of_val(self, epochs: int, pictures: str) -> dict[Figure, float]:
        """Figures of the validation curve."""
        if not self.val:
            return {}
        best = BEST_VAL if pictures == "held out" else BEST_TEST
        figures = {best: max(self.val.values())}
        if epochs - 1 in self.val:
            figures[LAST_VAL] = self.val[epochs - 1]
        ending = [self.val[epoch] for epoch in range(epochs - LAST_EPOCHS, epochs) if epoch in self.val]
        if len(ending) == LAST_EPOCHS:
            figures[MEAN_VAL] = math.fsum(ending) / LAST_EPOCHS
        return figures

    def _of_test(self, epochs: int, finished: bool, pictures: str, notes: list[str]) -> dict[Figure, float]:
        """The figure of ``kdlit test``, by the checkpoint that it measured."""
        if (value := self.test_top1) is None:
            return {}
        if self.test_epochs is None:
            notes.append("test.json does not count: it names no checkpoint that was measured")
            return {}
        if why := self._measured_otherwise():
            notes.append(f"test.json does not count: {why}")
            return {}
        checkpoint = Path(str(self.test.get("checkpoint")))
        keeper = self.run.config.get("checkpoint")
        keeper = keeper if isinstance(keeper, dict) else {}
        folder = checkpoint.parent.parent.name
        if folder not in ("", self.run.path.name, self.run.path.parent.name):
            notes.append(f"test.json names a checkpoint of a folder of another name: {checkpoint}")
        monitor = keeper.get("monitor", "val/top1")
        prefix = str(keeper.get("filename") or "best").partition("{")[0]
        if monitor and checkpoint.name not in ("last.ckpt", "previous.ckpt") and checkpoint.name.startswith(prefix):
            if str(monitor).startswith("train/"):
                notes.append(f"test.json does not count: its epoch was chosen by {monitor}")
                return {}
            return {CHOSEN_TEST if pictures == "held out" else BEST_TEST: value}
        if self.test_epochs != epochs:
            notes.append(
                f"test.json does not count: it is of epoch {self.test_epochs}, not {epochs}; measure the last by "
                "kdlit test --ckpt_path=last"
            )
            return {}
        return {LAST_TEST: value}


def _teacher_path(run: Run) -> str:
    """The file of the teacher's weights, as the config names it; empty for none."""
    value: Any = run.config
    for key in ("model", "init_args", "teacher", "init_args", "path"):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else ""


def _assistants(run: Run) -> list[Run]:
    """The links of a chain above a run, the nearest first; they lie beside it."""
    links = [run]
    while Path(path := _teacher_path(links[-1])).name == "student.pt":
        folder = run.path.parent / Path(path).parent.name
        paths = {one.path.resolve() for one in links}
        files = (run.path / "link.yaml", folder / "link.yaml", folder / "config.yaml")
        if folder.resolve() in paths or not all(file.exists() for file in files):
            break
        links += find_runs([folder])
    return links[1:]


def _settings(links: list[Run]) -> dict[str, Any]:
    """Those of a run; a teacher that is a link of its chain is known by its settings, as each seed has its own."""
    settings = names.settings_of(links[0].config, links[0].record)
    if len(links) > 1:
        settings = {key: one for key, one in settings.items() if not key.startswith(f"{names.TEACHER}.")}
        settings |= {f"{names.TEACHER}.{key}": one for key, one in _settings(links[1:]).items()}
    return settings


def _chance(settings: Mapping[str, Any]) -> float:
    """The accuracy of a guess, 1 if the config does not tell the number of classes."""
    counts = (one for key, one in settings.items() if re.match(r"model\.students?\..*num_classes$", key))
    return 1 / next((one for one in counts if isinstance(one, int) and one > 0), 1)


def _fraction(value: Any, name: str) -> float | None:
    """A finite accuracy; None if there is none.

    Raises:
        ValueError: If it is no number from 0 to 1.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")
    if not math.isfinite(value):
        return None
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a share from 0 to 1, got {value}")
    return float(value)


def _fractions(values: Mapping[int, float], name: str) -> dict[int, float]:
    return {epoch: one for epoch, value in values.items() if (one := _fraction(value, name)) is not None}


def _same_pictures(
    series: Mapping[str, Mapping[int, float]], test: Mapping[str, Any], epochs: int | None, chance: float
) -> bool:
    """Whether one student has the same figures on validation and test pictures, a sign that these are the same.

    All three have to be there and agree to a share of 1e-4, as a GPU need not repeat them to the digit. A student that
    guesses has the same figures on any pictures.
    """
    if epochs is None:
        return False
    figures = ("top1", "top5", "cross_entropy")
    pairs = [(series.get(f"val/{name}", {}).get(epochs - 1), test.get(f"test/{name}")) for name in figures]
    known = [(val, value) for val, value in pairs if val is not None and isinstance(value, (int, float))]
    if len(known) < len(figures) or known[0][0] <= 1.5 * chance:
        return False
    return all(math.isclose(val, value, rel_tol=1e-4) for val, value in known)
