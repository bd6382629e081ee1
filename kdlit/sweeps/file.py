"""The sweep file: what is trained, and what is tried."""

from __future__ import annotations

import itertools
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kdlit.command_files import CommandFileError, close, flat, mapping, read_file, resolved

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

DEFAULTS: dict[str, Any] = {
    "metric": "val/top1",
    "direction": "maximize",
    "choose": "last",
    "trials": 20,
    "seeds": [0],
    "sampler": "tpe",
    "seed": 0,
}
_ONE_OF = {
    "direction": ("maximize", "minimize"),
    "choose": ("last", "mean_last_10", "best"),
    "sampler": ("tpe", "random", "grid"),
}
_NOT_TO_SET = dict.fromkeys(
    ("config", "run_dir", "ckpt_path", "print_config", "accept_changes"), "the sweep itself sets it; leave it out"
) | {
    "seed_everything": "the best of many seeds is luck; name them in seeds, and their mean counts",
    "students": "a sweep trains one student at a time",
}
_SAME_PICTURES = (  # to be equal in all trials, or they are compared on different ones
    *("trainer.limit_val_batches", "trainer.overfit_batches", "trainer.fast_dev_run"),
    *("data.class_path", "data.root", "data.classes", "data.train_size", "data.val_size", "data.split_seed"),
    "data.eval_batch_size",  # a limit of batches counts these
)
_LARGEST_GRID = 100_000


class SweepError(CommandFileError):
    """The sweep file, or what an earlier run of it left behind, does not allow to go on."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says.

    Attributes:
        folder: of the sweep.
        arguments: what all trials share, as arguments of ``kdlit fit``.
        final: the same for training the best point in earnest.
        parameters: what is tried, by option of ``kdlit fit``.
        settings: the keys from ``parameters`` on, as the file has them, with defaults.
    """

    folder: Path
    arguments: list[str]
    final: list[str]
    parameters: dict[str, BaseDistribution]
    settings: dict[str, Any]

    @cached_property
    def grid(self) -> list[dict[str, Any]]:
        """All points of a grid; empty for other samplers."""
        if self.settings["sampler"] != "grid":
            return []
        points = itertools.product(*map(_all_values, self.parameters.values()))
        return [dict(zip(self.parameters, point, strict=True)) for point in points]

    @property
    def trials(self) -> int:
        """How many trials there are to be."""
        asked = int(self.settings["trials"])
        return min(asked, len(self.grid) or asked)

    def check(self) -> dict[str, Any]:
        """Make sure that ``kdlit fit`` takes every trial, and that all are compared on the same held-out pictures.

        Returns:
            All values that the trials share.

        Raises:
            CommandFileError: If not.
        """
        base = resolved(self.arguments)
        known = _plainly(base)
        for key in self.parameters:
            if not any(f"{name}.".startswith(f"{_plain(key)}.") for name in known):
                raise SweepError(f"parameters: the config has no {key!r}{close(_plain(key), list(known))}")
        # A data module of a user may bring validation pictures along that are held out of nothing.
        ours = str(known.get("data.class_path")).startswith("kdlit.")
        for key, cure in (("data.val_size", 5000), ("trainer.limit_val_batches", 1.0)):
            if known.get(key) == 0 and (ours or not key.startswith("data.")):
                raise SweepError(
                    f"{key} is 0, which leaves nothing to choose on but the test pictures, and those are not for "
                    f"choosing; hold training pictures out, as by set: {{{key}: {cure}}}"
                )
        resolved(self.final)
        for point in self._extremes():
            tried = _plainly(resolved([*self.arguments, *options(point)]))
            for key in _SAME_PICTURES:
                if tried.get(key) != known.get(key):
                    raise SweepError(
                        f"parameters: {key} would be {tried.get(key)!r} where the config has {known.get(key)!r}, so "
                        "that trials would be compared on different pictures; put it under set"
                    )
        return base

    def _extremes(self) -> Iterator[dict[str, Any]]:
        """A few points in which both ends of every range occur, and all choices."""
        tried = {
            key: vars(one).get("choices") or (vars(one)["low"], vars(one)["high"])
            for key, one in self.parameters.items()
        }
        for number in range(max(map(len, tried.values()))):
            yield {key: values[number % len(values)] for key, values in tried.items()}


def options(point: Mapping[str, object]) -> list[str]:
    """Values as arguments of ``kdlit fit``."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in point.items()]


def _plain(key: object) -> str:
    return str(key).replace(".init_args.", ".")


def _plainly(config: Mapping[str, Any]) -> dict[str, object]:
    return {_plain(key): value for key, value in flat(config).items()}


def _count(distribution: BaseDistribution) -> int:
    """How many values a parameter can have; 0 if there is no end of them."""
    one = vars(distribution)
    if "choices" in one:
        return len(list(one["choices"]))
    return round((one["high"] - one["low"]) / one["step"]) + 1 if one["step"] else 0


def _all_values(distribution: BaseDistribution) -> list[Any]:
    """Every value that a parameter can have, if there is an end of them."""
    one = vars(distribution)
    if "choices" in one:
        return list(one["choices"])
    return [round(one["low"] + number * one["step"], 12) for number in range(_count(distribution))]


def read_sweep(path: Path, run_dir: str | None = None, trials: int | None = None) -> Sweep:
    """Read a sweep file; ``kdlit sweep --help`` shows its form.

    Args:
        path: the sweep file.
        run_dir: folder of the sweep; None for ``runs/sweeps/NAME``, NAME being that of the file.
        trials: how many there are to be; None for what the file says.

    Raises:
        CommandFileError: If a file is missing, or a key, type or range wrong.
    """
    content = read_file(path, ("config", "set", "parameters", *DEFAULTS, "final"))
    settings = DEFAULTS | content | ({} if trials is None else {"trials": trials})
    _check(settings, path)
    names = [settings["config"]] if isinstance(settings.get("config"), str) else settings.get("config")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise SweepError(f"{path}: config must be a list of at least one config file, got {names!r}")
    for name in names:
        if not (path.parent / name).is_file():
            raise SweepError(f"{path}: config: there is no file {name!r} in {path.parent.absolute()}")
        if _has_students(path.parent / name):
            raise SweepError(f"{path}: config: {name} has several students; {_NOT_TO_SET['students']}")
    fixed, final = (_values(settings, key, path) for key in ("set", "final"))
    tried = settings.get("parameters")
    if not isinstance(tried, dict) or not tried:
        raise SweepError(f"{path}: parameters must map options to what is tried, got {tried!r}")
    for key in map(_plain, tried):
        if key in _NOT_TO_SET:
            raise SweepError(f"{path}: parameters.{key}: {_NOT_TO_SET[key]}")
        if key in map(_plain, fixed):
            raise SweepError(f"{path}: {key} stands in set and in parameters; leave one out")
    parameters = {str(key): _distribution(value, f"{path}: parameters.{key}") for key, value in tried.items()}
    if settings["sampler"] == "grid":
        if endless := [key for key, one in parameters.items() if not _count(one)]:
            raise SweepError(f"{path}: parameters.{endless[0]}: a grid needs choices or a step")
        if (size := math.prod(map(_count, parameters.values()))) > _LARGEST_GRID:
            raise SweepError(
                f"{path}: parameters: a grid of {size:,} points, but it may have {_LARGEST_GRID:,} at most; take "
                "larger steps, or sampler: tpe"
            )
    configs = [f"--config={os.path.normpath(path.parent / name)}" for name in names]
    folder = Path(run_dir or f"runs/sweeps/{path.stem}")
    kept = {key: settings[key] for key in ("parameters", *DEFAULTS)}
    return Sweep(folder, configs + options(fixed), configs + options(fixed | final), parameters, kept)


def _has_students(config: Path) -> bool:
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError):
        return False  # whoever reads all of it says so
    return isinstance(content, dict) and bool(content.get("students"))


def _check(settings: Mapping[str, Any], path: Path) -> None:
    metric, seeds = settings["metric"], settings["seeds"]
    if not isinstance(metric, str) or not metric.startswith("val/"):
        raise SweepError(
            f"{path}: metric must be one of the validation pictures, such as val/top1, got {metric!r}: a choice made "
            "on test or training pictures says nothing about new ones"
        )
    for key, choices in _ONE_OF.items():
        if settings[key] not in choices:
            raise SweepError(f"{path}: {key} must be one of {', '.join(choices)}, got {settings[key]!r}")
    for key, least in (("trials", 1), ("seed", 0)):
        if type(settings[key]) is not int or settings[key] < least:
            raise SweepError(f"{path}: {key} must be a whole number >= {least}, got {settings[key]!r}")
    whole = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < 2**32 - 3 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise SweepError(f"{path}: seeds must be a list of different whole numbers >= 0, got {seeds!r}")


def _values(settings: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    values = settings.get(key) or {}
    if not isinstance(values, dict):
        raise SweepError(f"{path}: {key} must map options to values, got {values!r}")
    for name, value in values.items():
        if name in _NOT_TO_SET:
            raise SweepError(f"{path}: {key}.{name}: {_NOT_TO_SET[name]}")
        _text(value, f"{path}: {key}.{name}")
    return values


def _text(value: object, place: str) -> str:
    try:
        return json.dumps(value)
    except TypeError:
        raise SweepError(f"{place}: {value!r} is a date or the like, which no option takes; quote it") from None


def _distribution(content: object, place: str) -> BaseDistribution:
    """What a parameter is drawn from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    given = mapping(content, place, ("low", "high", "log", "step", "choices"))
    if "choices" in given:
        choices = given["choices"]
        if len(given) > 1 or not isinstance(choices, list) or not choices:
            raise SweepError(f"{place}: choices must be a list of at least one value, and stand alone, got {content!r}")
        texts = [one if isinstance(one, (str, int, float, type(None))) else _text(one, place) for one in choices]
        return CategoricalDistribution(texts)
    ends = [given.get("low"), given.get("high"), given.get("step", 1)]
    if not all(type(end) in (int, float) and math.isfinite(end) for end in ends):
        raise SweepError(f"{place}: must have the numbers low and high (and log or step), or choices, got {content!r}")
    low, high, step = ends
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise SweepError(f"{place}: log must be true or false, got {log!r}")
    if not low < high:
        raise SweepError(f"{place}: low must be below high, got {low} and {high}")
    if log and (low <= 0 or "step" in given):
        raise SweepError(f"{place}: log needs low above 0, and no step, got {content!r}")
    if "step" in given and not 0 < step <= high - low:
        raise SweepError(f"{place}: step must be > 0 and at most high - low, got {content!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an upper end that no step meets
        if all(isinstance(end, int) for end in ends):
            return IntDistribution(low, high, log, step)
        return FloatDistribution(low, high, log, given.get("step"))
