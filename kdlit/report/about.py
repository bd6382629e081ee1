"""What a run was, what a reader has to be warned of, and what it reached: from its files alone."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kdlit.report.curves import Series
from kdlit.runs import Run
from kdlit.scoreboard.settings import data_name, method_name, student_and_teacher

_Value = TypeVar("_Value")

LAST = 10  # epochs in the mean
_TESTED = {"test": "test", "val": "validate"}  # where `kdlit test` and `kdlit validate` leave their figures
_PARTS = {"val": "Validation", "test": "Test", "train": "Training"}
# Logged figures of a split, in the order of the table; a unit of % stands for fractions of 1.
_FIGURES = {
    "top1": ("Top-1", "%"),
    "top5": ("Top-5", "%"),
    "cross_entropy": ("Cross-entropy", "nats"),
    "agreement": ("Agreement with the teacher", "%"),
    "agreement5": ("Teacher's class among the student's five", "%"),
    "kl": ("KL(teacher ‖ student)", "nats"),
    "kl_softened": ("KL(softened teacher ‖ student)", "nats"),
    "entropy": ("Entropy", "nats"),
    "logit_mean": ("Mean of the logits", ""),
    "logit_std": ("Standard deviation of the logits", ""),
    "ece": ("Calibration error (ECE)", "%"),
}
_MISTAKES = {"right": "right", "same": "repeats the mistake", "other": "wrong otherwise"}


@dataclass(frozen=True)
class Warned:
    """Something that a reader has to know.

    Attributes:
        text: one or two sentences.
        level: ``warning``, or ``note`` where nothing is wrong.
    """

    text: str
    level: str = "warning"


@dataclass
class Cell:
    """A figure of the tables.

    Attributes:
        value: as logged; None where there is none.
        text: as shown.
        hint: what to know about this one.
    """

    value: float | None
    text: str
    hint: str = ""


@dataclass
class Mistakes:
    """What the student does where the teacher is wrong.

    Attributes:
        part: whose pictures.
        wrong: share of pictures on which the teacher is wrong.
        rows: what the student does, share of all pictures and of the teacher's mistakes.
    """

    part: str
    wrong: Cell
    rows: list[tuple[str, Cell, Cell]]


@dataclass
class Summary:
    """A run as the page tells it.

    Attributes:
        name: of its folder.
        key: makes ids on the page.
        method: in few words.
        student: name of the network.
        teacher: likewise; empty if there is none.
        facts: everything else about it, by heading.
        series: what it logged.
        epochs: how many are logged.
        planned: how many the config asks for; None if that is no number.
        warnings: what a reader has to know.
        top1: rows of the table of accuracies: who, and a cell for each column.
        figures: rows of the table of all figures: part, figure, unit, student's and teacher's cells.
        mistakes: for each part that has them.
        tiles: the figures that matter most: label, text, hint.
    """

    name: str
    key: str
    method: str = ""
    student: str = ""
    teacher: str = ""
    data: str = ""
    seed: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    series: Series = field(default_factory=dict)
    epochs: int = 0
    planned: int | None = None
    warnings: list[Warned] = field(default_factory=list)
    top1: list[tuple[str, dict[str, Cell]]] = field(default_factory=list)
    figures: list[tuple[str, str, str, list[Cell]]] = field(default_factory=list)
    mistakes: list[Mistakes] = field(default_factory=list)
    tiles: list[tuple[str, str, str]] = field(default_factory=list)


# The columns of the table of accuracies.
VAL_LAST, VAL_MEAN, VAL_BEST, TEST = "val last", "val mean", "val best", "test"
HEADS = {
    VAL_LAST: "validation, last epoch",
    VAL_MEAN: f"validation, mean of last {LAST} epochs",
    VAL_BEST: "validation, best epoch: chosen on these pictures, too good",
    TEST: "test",
}


def summary(run: Run, key: str) -> Summary:
    """Read all that the files of a run say; whatever is broken becomes a warning.

    Args:
        run: its folder may lack any file but ``config.yaml``.
        key: makes ids on the page.
    """
    about = Summary(run.name, key)

    def attempt(what: str, read: Callable[[], _Value], otherwise: _Value) -> _Value:
        try:
            return read()
        except Exception as error:  # files that anybody may have edited
            about.warnings.append(Warned(f"{what} cannot be read: {_line(error)}"))
            return otherwise

    about.series = attempt("metrics.csv", run.series, {})
    nothing: dict[str, dict[str, Any]] = {}
    results = attempt("test.json or validate.json", run.results, nothing)
    about.method = attempt("The config", lambda: method_name(run.config), "unknown method")
    about.student, about.teacher = attempt("The config", lambda: student_and_teacher(run.config), ("", ""))
    about.data = attempt("The config", lambda: data_name(run.config), "")
    about.seed = "none" if run.seed is None else str(run.seed)
    about.epochs = max((max(points) + 1 for points in about.series.values() if points), default=0)
    planned = _within(run.config, "trainer", "max_epochs")
    about.planned = planned if isinstance(planned, int) and planned > 0 else None
    about.facts = attempt("run.json", lambda: _facts(run, about), {})
    attempt("run.json", lambda: _warn(run, about), None)
    attempt("test.json", lambda: _results(about, results), None)
    return about


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _within(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _starts(run: Run) -> list[dict[str, Any]]:
    starts = run.record.get("starts")
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def _facts(run: Run, about: Summary) -> dict[str, str]:
    starts = _starts(run)
    start = starts[-1] if starts else {}
    git = _within(start, "git", "kdlit")
    machine = _within(start, "machine") or {}
    versions = _within(start, "versions")
    command = start.get("command")
    facts = {
        "Folder": str(run.path),
        "Student": about.student,
        "Teacher": about.teacher or "none",
        "Losses": "; ".join(_losses(run.config)),
        "Optimizer": _spec(_within(run.config, "model", "init_args", "optimizer")),
        "Schedule": _spec(_within(run.config, "model", "init_args", "lr_scheduler")),
        "Data": _spec(run.config.get("data")),
        "Pictures": ", ".join(
            f"{part} {about_part['size']:,}"
            for part, about_part in (run.record.get("data") or {}).items()
            if isinstance(about_part, dict) and isinstance(about_part.get("size"), int)
        ),
        "Epochs": f"{about.epochs} logged" + (f" of {about.planned}" if about.planned else ""),
        "Seed": about.seed,
        "Started": str(start.get("time", "")) + (f" (start {len(starts)})" if len(starts) > 1 else ""),
        "Command": shlex.join(map(str, command)) if isinstance(command, list) else str(command or ""),
        "Machine": ", ".join(str(machine[name]) for name in ("name", "device", "system") if machine.get(name)),
        "Versions": ", ".join(f"{name} {value}" for name, value in (versions or {}).items()),
    }
    if isinstance(git, dict):
        changed = git.get("changed") or []
        facts["Commit of kdlit"] = f"{git.get('commit')}, {'changed' if changed else 'unchanged'}"
    elif starts:
        facts["Commit of kdlit"] = "not known: not run from a git checkout"
    return {name: value for name, value in facts.items() if value}


def _losses(config: Mapping[str, Any]) -> list[str]:
    """Each loss with weight, warm-up and settings, as ``dkd: DKDLoss(beta=4.0), weight 1.0, warm-up 5 epochs``."""
    losses = _within(config, "model", "init_args", "losses")
    texts = []
    for name, term in (losses if isinstance(losses, dict) else {}).items():
        settings = _within(term, "init_args") or {}
        loss = settings.get("loss", term) if isinstance(settings, dict) else term
        text = f"{name}: {_spec(loss)}"
        if "weight" in settings:
            text += f", weight {settings['weight']}"
        if settings.get("warmup_epochs"):
            text += f", warm-up {settings['warmup_epochs']} epochs"
        texts.append(text)
    return texts


def _spec(value: Any) -> str:
    """A class of the config with its settings, in one line; what is off or absent is left out."""
    if isinstance(value, dict) and isinstance(value.get("class_path"), str):
        arguments = value.get("init_args")
        inner = ", ".join(
            f"{name}={_spec(one)}"
            for name, one in (arguments.items() if isinstance(arguments, dict) else ())
            if one is not None and one is not False
        )
        return f"{value['class_path'].rpartition('.')[2]}({inner})"
    return "" if value is None else str(value)


def _warn(run: Run, about: Summary) -> None:
    def warn(text: str, level: str = "warning") -> None:
        about.warnings.append(Warned(text, level))

    if not about.series:
        warn("Nothing was logged, or the log cannot be read.")
    elif about.planned is not None and about.epochs < about.planned:
        warn(
            f"Unfinished, or stopped early: the log ends after epoch {about.epochs} of {about.planned}. "
            "“Last epoch” is the last that was logged."
        )
    if not run.record:
        warn(
            "There is no run.json: command, versions, commit and the teacher's measured accuracy are not known.", "note"
        )
    measured, recorded = (_number(_within(run.record, "teacher", name)) for name in ("top1", "recorded_top1"))
    if measured is not None and recorded is not None and measured < recorded:
        pictures = _within(run.record, "teacher", "pictures") or 0
        error = math.sqrt(recorded * (1 - recorded) / pictures) if pictures else 0.0
        text = (
            f"The teacher was right on {_percent(measured)} % of {pictures:,} pictures before training, "
            f"{_percent(recorded - measured)} points below the {_percent(recorded)} % on its record "
            f"(standard error {_percent(error)})."
        )
        warn(text, "warning" if recorded - measured > 0.02 + 3 * error else "note")
    for number, start in enumerate(_starts(run)):
        changes = start.get("changes")
        if number and isinstance(changes, dict) and changes:
            listed = "; ".join(f"{key}: {_change(change)}" for key, change in list(changes.items())[:8])
            more = f"; and {len(changes) - 8} more" if len(changes) > 8 else ""
            warn(f"Went on with other settings at start {number + 1} ({start.get('time', 'no date')}): {listed}{more}")
    changed = _within(_starts(run)[-1], "git", "kdlit", "changed") if _starts(run) else None
    if isinstance(changed, list) and changed:
        files = ", ".join(map(str, changed[:5])) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        warn(f"Made with sources of kdlit that were not committed: {files}.")
    noise = _number(_within(run.config, "data", "init_args", "label_noise"))
    if noise:
        warn(f"{_percent(noise)} % of the training labels were replaced by wrong ones (label_noise).", "note")
    not_finite = [name for name, points in about.series.items() if not all(map(math.isfinite, points.values()))]
    if not_finite:
        warn(f"Not finite in some epochs: {', '.join(not_finite[:8])}{' …' if len(not_finite) > 8 else ''}.")
    if skipped := max(about.series.get("train/skipped", {}).values(), default=0.0):
        warn(f"{skipped:g} training batches were skipped because something was not finite.")


def _change(change: Any) -> str:
    return " → ".join(map(str, change)) if isinstance(change, list) and len(change) == 2 else str(change)


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def shown(value: float | None, unit: str = "%", hint: str = "") -> Cell:
    """A figure as text: fractions in per cent with two decimals, all else with four significant digits.

    Args:
        value: as logged; None for a dash.
        unit: ``%`` for fractions.
        hint: what to know about it.
    """
    if value is None:
        return Cell(None, "-", hint)
    if not math.isfinite(value):
        return Cell(value, "not finite", hint)
    return Cell(value, _percent(value) if unit == "%" else f"{value:.4g}", hint)


def _results(about: Summary, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Fill the tables, and say what is special about their figures."""
    test, series = results.get("test", {}), about.series
    hint = ""
    if test:
        checkpoint = Path(str(test.get("checkpoint", ""))).name
        hint = f"{checkpoint or 'unknown checkpoint'}, epoch {test.get('epochs', 'unknown')}"
        if checkpoint not in ("last.ckpt", "previous.ckpt"):
            about.warnings.append(
                Warned(
                    f"The test figures are of {checkpoint or 'an unknown checkpoint'}, not of the last epoch"
                    + (": its epoch was chosen on the validation pictures." if checkpoint.startswith("best") else ".")
                )
            )
        elif test.get("epochs") != about.epochs:
            about.warnings.append(
                Warned(f"The test figures are of epoch {test.get('epochs', 'unknown')}; {about.epochs} are logged.")
            )
        limit = test.get("limit_batches")
        if limit is not None and (isinstance(limit, int) or limit != 1.0):  # 1 is one batch, 1.0 all
            about.warnings.append(
                Warned(f"The test figures are of a part of the pictures: limit_test_batches {limit}.")
            )
        if test.get("otherwise"):
            about.warnings.append(Warned(f"The student was tested otherwise than trained: {test['otherwise']}."))
    if series.get("val/top1") and len(series["val/top1"]) > 1:
        about.warnings.append(
            Warned(
                "The best epoch was chosen on the validation pictures that it is measured on, which makes it look "
                "better than it is. Compare last epochs.",
                "note",
            )
        )
    if series and not any(name.startswith("val/") for name in series):
        about.warnings.append(Warned("No pictures were held out: there is no validation.", "note"))
    peers = [match[1] for name in series if (match := re.fullmatch(r"val/([^/]+)/top1", name))]
    who = {"student": "top1", **{f"student {peer}": f"{peer}/top1" for peer in peers}}
    who |= {"same student, trained alone": "plain_top1", "teacher": "teacher_top1"}
    for name, key in who.items():
        cells = _of_epochs(series.get(f"val/{key}", {}))
        cells[TEST] = shown(_number(test.get(f"test/{key}")), hint=hint if f"test/{key}" in test else "")
        if key == "teacher_top1":  # it does not change, so there is nothing to choose
            cells[VAL_BEST], cells[VAL_MEAN] = shown(None), shown(None)
        if any(cell.value is not None for cell in cells.values()):
            about.top1.append((name, cells))
    _all_figures(about, results)
    for name, cells in about.top1:
        column = VAL_LAST if cells[VAL_LAST].value is not None else TEST
        part = "validation" if column == VAL_LAST else "test"
        about.tiles.append((name, f"{cells[column].text} %", f"top-1, {part}, {cells[column].hint}"))
    if agreement := series.get("val/agreement"):
        about.tiles.append(("agreement", f"{shown(agreement[max(agreement)]).text} %", "of validation pictures"))


def _of_epochs(points: Mapping[int, float]) -> dict[str, Cell]:
    """Last, mean of the last ten, and best of what was measured."""
    if not points:
        return {VAL_LAST: shown(None), VAL_MEAN: shown(None), VAL_BEST: shown(None)}
    end = max(points)
    ending = [points[epoch] for epoch in sorted(points) if epoch > end - LAST]
    finite = {epoch: value for epoch, value in points.items() if math.isfinite(value)}
    best = max(finite, key=lambda epoch: (finite[epoch], -epoch), default=None)
    few = f"of {len(ending)} measured" if len(ending) < LAST else ""
    return {
        VAL_LAST: shown(points[end], hint=f"epoch {end + 1}"),
        VAL_MEAN: shown(math.fsum(ending) / len(ending), hint=few),
        VAL_BEST: shown(None) if best is None else shown(finite[best], hint=f"epoch {best + 1}"),
    }


def _all_figures(about: Summary, results: Mapping[str, Mapping[str, Any]]) -> None:
    for part, heading in _PARTS.items():
        points = {
            name.removeprefix(f"{part}/"): values[max(values)]
            for name, values in about.series.items()
            if name.startswith(f"{part}/") and values
        }
        for name, value in results.get(_TESTED.get(part, ""), {}).items():
            if name.startswith(f"{part}/") and (number := _number(value)) is not None and part == "test":
                points[name.removeprefix("test/")] = number
        for key, (title, unit) in _FIGURES.items():
            if key in points:
                cells = [shown(points[key], unit), shown(points.get(f"teacher_{key}"), unit)]
                about.figures.append((heading, title, unit, cells))
        if (wrong := points.get("teacher_wrong")) is not None:
            rows = []
            for key, text in _MISTAKES.items():
                share = points.get(f"teacher_wrong_student_{key}")
                rows.append((text, shown(share), shown(share / wrong if share is not None and wrong else None)))
            about.mistakes.append(Mistakes(heading, shown(wrong), rows))


def differences(runs: Sequence[Run]) -> list[Warned]:
    """What keeps some runs from being compared: other pictures, another teacher, other versions.

    Args:
        runs: those on one page.
    """
    warned = []
    for text, keys in (
        ("The runs were not validated on the same pictures", ("data", "val", "pictures")),
        ("The runs were not trained on the same pictures", ("data", "train", "pictures")),
        ("The runs do not share their teacher", ("teacher", "weights")),
    ):
        values = {run.name: _within(run.record, *keys) for run in runs}
        known = {str(value) for value in values.values() if value is not None}
        if len(known) > 1:
            warned.append(
                Warned(f"{text} (fingerprints in run.json differ), so their figures cannot be compared directly.")
            )
    versions = {str(_within(_starts(run)[-1], "versions", "kdlit")) for run in runs if _starts(run)}
    if len(versions) > 1:
        warned.append(Warned(f"The runs were made by different versions of kdlit: {', '.join(sorted(versions))}."))
    return warned
