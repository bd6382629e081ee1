"""Published accuracies, the settings behind them, and whether a row of the scoreboard may be held against one.

``published.csv`` has a row for each accuracy that the papers and repositories print of a cell of ``configs/cells.csv``,
and for each network trained alone (``alone``): in per cent, with the standard deviation and number of trials where they
are printed with it, the places, and which epoch is reported: ``last``, ``best on test`` or ``not stated``. No paper
says it; what its released code reports is taken for what it ran itself; copies of CRD's table are of the last epoch.
``recipe`` names parts of ``recipes.csv`` that hold the settings, and ``settings`` says whether these were published or
had to be ``guessed``; both are empty where they are not known. ``defaults`` in ``recipes.csv`` is what a loss takes
where a recipe says nothing.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, NamedTuple

from kdlit.scoreboard import settings as names
from kdlit.scoreboard.statistics import Sample

TYPICAL_STD = 0.25  # points over seeds, the size of most that the papers print
TEACHER_TOLERANCE = 0.1  # points by which the published teacher may differ when it is measured again
# Settings that a published recipe leaves as they are unless it says otherwise.
_USUAL: dict[str, tuple[Any, ...]] = {
    "data.val_size": (0,),
    "data.subset": (1,),
    "data.subset_by": (None,),
    "data.size": (None,),
    "data.interpolation": ("bilinear",),
    "data.classes": (None,),
    "data.teacher_input": (None,),
    "data.label_noise": (0,),
    "data.auto_augment": (False,),
    "data.strong_view": (False,),
    "data.transforms": (None,),
    "trainer.limit_train_batches": (None, 1.0),
    "trainer.overfit_batches": (0,),
    "trainer.fast_dev_run": (False,),
    "trainer.sync_batchnorm": (False,),
    "trainer.accumulate_grad_batches": (1,),
    "trainer.gradient_clip_val": (None,),
    "trainer.max_steps": (-1,),
    "trainer.precision": (None, "32", "32-true", 32),
    "trainer.callbacks": ([],),
    "model.optimizer.nesterov": (False,),
    "model.optimizer.dampening": (0,),
    "model.optimizer.maximize": (False,),
    "model.lr_scheduler.last_epoch": (-1,),
    "model.non_finite": ("stop", "raise"),
    "model.performance": ("exact", "plain"),
    "model.student.groups": (1,),
    "model.student.width_per_group": (64,),
    "model.student": (None, False),  # weights to begin with, for one; but for what else is named here
}
_OF_NO_MATTER = re.compile(r"model\.student\..*\b(class|num_classes|progress)$")
_USUAL_OF_TERMS: dict[str, Any] = {"warmup_epochs": 0, "gather": False}


class Published(NamedTuple):
    """A published accuracy.

    Attributes:
        dataset: as ``cifar100``.
        teacher: name of the network in kdlit; empty for a network trained alone.
        student: likewise.
        method: as ``kd+ls``.
        top1: per cent.
        std: points; None if none is printed with it.
        trials: number of runs; None if none is printed with it.
        source: papers or repositories with their tables.
        checkpoint: which epoch is reported.
        recipe: the settings behind it, as flat settings; None if they are not known.
        guessed: whether these were not published, but are those of released code, of other pairs, or of other papers.
    """

    dataset: str
    teacher: str
    student: str
    method: str
    top1: float
    std: float | None
    trials: int | None
    source: str
    checkpoint: str
    recipe: dict[str, Any] | None
    guessed: bool


class Verdict(NamedTuple):
    """A row of the scoreboard against a published value.

    Attributes:
        published: the value.
        difference: ours less theirs, in points; None if we have no figure of the last epoch on the test pictures.
        word: ``agrees``, ``above``, ``below`` or ``not comparable``.
        tolerance: points within which both agree; None if not comparable.
        why: why not.
    """

    published: Published
    difference: float | None
    word: str
    tolerance: float | None
    why: str


@functools.cache
def all_published() -> tuple[Published, ...]:
    """Every value in ``published.csv``."""
    recipes = _recipes()
    table = []
    for row in _rows("published.csv"):
        parts = row["recipe"].split()
        recipe = {key: value for part in parts for key, value in recipes[part].items()} if parts else None
        std = float(row["std"]) if row["std"] else None
        trials = int(row["trials"]) if row["trials"] else None
        cell = (row["dataset"], row["teacher"], row["student"], row["method"], float(row["top1"]), std, trials)
        table.append(Published(*cell, row["source"], row["checkpoint"], recipe, row["settings"] == "guessed"))
    return tuple(table)


@functools.cache
def _recipes() -> dict[str, dict[str, Any]]:
    recipes: dict[str, dict[str, Any]] = {}
    for row in _rows("recipes.csv"):
        recipes.setdefault(row["recipe"], {})[row["key"]] = json.loads(row["value"])
    return recipes


def _rows(name: str) -> Iterator[dict[str, str]]:
    with (resources.files("kdlit.scoreboard") / name).open("r", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def find_published(data: str, teacher: str, student: str, method: str) -> list[Published]:
    """The published values of a cell, those with the most sources first.

    Args:
        data: class of the data module, as ``CIFAR100``.
        teacher: name of the network, whose arguments do not matter; of a student alone it does not matter at all.
        student: likewise.
        method: as ``KD + LS``.
    """
    wanted = "+".join(sorted(method.lower().split(" + ")))
    teacher, wanted = ("", "alone") if method == names.ALONE else (teacher, wanted)
    cell = (data.lower(), teacher.partition("(")[0], student.partition("(")[0], wanted)
    found = [
        one
        for one in all_published()
        if (one.dataset, one.teacher, one.student, "+".join(sorted(one.method.split("+")))) == cell
    ]
    return sorted(found, key=lambda one: (-one.source.count(";"), one.top1))


def tolerance(ours: Sample, published: Published) -> float:
    """Points by which two means may differ and still agree.

    Twice the standard error of their difference, with one standard deviation for both: the largest of ours, the printed
    one and ``TYPICAL_STD``. Few seeds thus cannot look more certain than they are. Where no number of trials is printed
    it is taken for 1.

    Args:
        ours: our values.
        published: theirs.
    """
    std = max(ours.std or 0.0, published.std or 0.0, TYPICAL_STD)
    return 2 * std * math.sqrt(1 / len(ours.values) + 1 / (published.trials or 1))


def verdict(
    published: Published, ours: Sample | None, settings: Mapping[str, Any], teacher_top1: float | None, lacking: str
) -> Verdict:
    """Hold our figure of the last epoch on the test pictures against a published value.

    Args:
        published: the value.
        ours: our figure; None if there is none.
        settings: of our runs.
        teacher_top1: accuracy of our teacher on the test pictures, a share; None if not measured.
        lacking: why nothing of ours may be compared, if so; else empty.
    """
    if ours is None:
        why = "no figure of the last epoch on the test pictures; kdlit test --ckpt_path=last gives it"
        return Verdict(published, None, "not comparable", None, why)
    difference = ours.mean - published.top1
    why = lacking or _other_recipe(published, settings) or _other_teacher(published, teacher_top1)
    if why:
        return Verdict(published, difference, "not comparable", None, why)
    limit = tolerance(ours, published)
    word = "agrees" if abs(difference) <= limit else "above" if difference > 0 else "below"
    return Verdict(published, difference, word, limit, "")


def _other_recipe(published: Published, settings: Mapping[str, Any]) -> str:
    """In what our settings are others than those behind a value; empty if in nothing."""
    if published.recipe is None:
        return "the settings behind this value are not known"
    recipe = published.recipe
    odd = [
        f"{_short(key)} {settings.get(key, 'absent')!r}, theirs {value!r}"
        for key, value in sorted(recipe.items())
        if settings.get(key, "absent") != value
    ]
    for key in sorted(settings.keys() - recipe.keys()):
        place = next((one for one in _USUAL if key == one or key.startswith(f"{one}.")), None)
        if place and settings[key] not in _USUAL[place] and not _OF_NO_MATTER.match(key):
            odd.append(f"{_short(key)} {settings[key]!r}, theirs {_USUAL[place][0]!r}")
    terms = {key.split(".")[2] for key in recipe if key.startswith(f"{names.LOSSES}.")}
    for key, value in sorted(settings.items()):
        if not key.startswith(f"{names.LOSSES}.") or key in recipe:
            continue
        term, _, rest = key.removeprefix(f"{names.LOSSES}.").partition(".")
        if term not in terms:
            odd += [f"{term} added"] if rest == "weight" else []
        elif value != (usual := _usual_of_term(term, rest)):
            odd.append(f"{_short(key)} {value!r}, theirs {usual!r}")
    more = f"; and {len(odd) - 3} more" if len(odd) > 3 else ""
    return f"other recipe: {'; '.join(odd[:3])}{more}" if odd else ""


def _usual_of_term(term: str, rest: str) -> Any:
    """What an argument of a term is where a recipe does not name it.

    Args:
        term: the name of a loss with those that it wraps, as ``LogitStandardization(KDLoss)``.
        rest: the argument, with ``loss.`` once for each class, as ``loss.loss.temperature``.
    """
    argument = re.sub(r"^(loss\.)+", "", rest)
    depth = rest.removesuffix(argument).count("loss.")
    if not depth:
        return _USUAL_OF_TERMS.get(rest, "absent")
    classes = re.findall(r"[\w.]+", term)
    return _recipes()["defaults"].get(f"{classes[depth - 1]}.{argument}", "absent")


def _short(key: str) -> str:
    return key.replace(f"{names.LOSSES}.", "").replace(".loss.", ".")


def _other_teacher(published: Published, top1: float | None) -> str:
    """That ours is not the published teacher, by its accuracy."""
    theirs = [
        one.top1
        for one in all_published()
        if (one.dataset, one.student, one.method) == (published.dataset, published.teacher, "alone")
    ]
    if not published.teacher or not theirs:
        return ""
    if top1 is None:
        return "teacher not measured on the test pictures; kdlit test --ckpt_path=last does that"
    if min(abs(100 * top1 - value) for value in theirs) <= TEACHER_TOLERANCE:
        return ""
    return f"other teacher: top-1 {100 * top1:.2f}, theirs {theirs[0]:.2f}"
