"""What lies in the folder of a run, read again: its config, its log, its figures, and the networks that it trained."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    import lightning as L

    from kdlit.modules import DistillationModule


@dataclass(frozen=True)
class Run:
    """One trained student: the folder of a run, or that of one student in a run of several.

    Reading needs no torch but in :meth:`rebuild`.

    Attributes:
        path: folder with ``config.yaml``, ``metrics.csv``, ``checkpoints/``, ``student.pt``.
        config: ``config.yaml`` as plain data.
        record: ``run.json`` as plain data, that of the whole run for one of several students; empty if absent.
        student: name of the student in a run of several; empty otherwise.
    """

    path: Path
    config: dict[str, Any]
    record: dict[str, Any]
    student: str = ""

    @property
    def name(self) -> str:
        """The folder, as seen from the working directory."""
        name = os.path.relpath(self.path)
        return str(self.path) if name.startswith("..") else name

    @property
    def seed(self) -> int | None:
        """The seed of the run; None if it had none."""
        seed = self.config.get("seed_everything")
        return seed if isinstance(seed, int) and not isinstance(seed, bool) else None

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        """The whole rows of ``metrics.csv``; none if there is no such file."""
        path = self.path / "metrics.csv"
        if not path.exists():
            return []
        whole, _, _ = path.read_bytes().decode("utf-8", errors="replace").rpartition("\n")  # without half of a row
        table = csv.DictReader(io.StringIO(whole, newline=""))
        return [{key: value for key, value in row.items() if key and value} for row in table]

    def series(self) -> dict[str, dict[int, float]]:
        """The values of everything logged by name and epoch, from 0; the last of each epoch.

        What is logged without an epoch, as learning rates are, belongs to the epoch that is logged next; what is
        measured after the last epoch belongs to that. One of several students also has the speed of the whole run.
        """
        trained = [row for row in self.rows if "epoch" in row and "train/loss" in row]
        last, at = (int(trained[-1][key]) for key in ("epoch", "step")) if trained else (None, 0)
        series: dict[str, dict[int, float]] = defaultdict(dict)
        waiting: list[dict[str, str]] = []
        for row in self.rows:
            waiting.append(row)
            if "epoch" not in row:
                continue
            epoch = int(row["epoch"])
            if last is not None and epoch > last and int(row.get("step", 0)) <= at + 1:
                epoch = last  # nothing was trained since
            for one in waiting:
                for name, value in one.items():
                    if name not in ("epoch", "step"):
                        series[name][epoch] = float(value)
            waiting = []
        if self.student:  # speed and memory are those of the whole run, which logs them
            whole = Run(self.path.parent, {}, {}).series()
            return {name: values for name, values in whole.items() if name.startswith("train/")} | series
        return dict(series)

    def results(self, *stems: str) -> dict[str, dict[str, Any]]:
        """What ``kdlit test`` and ``kdlit validate`` left in ``test.json`` and ``validate.json``, by stem.

        Args:
            *stems: which to read; both by default.
        """
        paths = {stem: self.path / f"{stem}.json" for stem in stems or ("test", "validate")}
        return {stem: _mapping(path, json.loads) for stem, path in paths.items() if path.exists()}

    def rebuild(self, *settings: str) -> tuple[DistillationModule, L.LightningDataModule]:
        """Build the module and the data of the run again, the student as the last checkpoint has it.

        Code that the config names is imported and called, as by ``kdlit test``.

        Args:
            *settings: other settings than those of the run, as ``--data.root=FOLDER`` where the pictures have moved.

        Returns:
            The module, on the CPU and in eval mode; and the data module, whose ``setup`` has yet to be called.

        Raises:
            FileNotFoundError: If the run has no checkpoint.
            ValueError: If its checkpoint is broken, or of another student.
        """
        from kdlit.cli import rebuilt

        return rebuilt(self.path, settings)


def find_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Return the runs in some folders: those of runs, or folders that hold them at any depth.

    Args:
        folders: a run of several students counts as one run each.

    Raises:
        FileNotFoundError: If a folder is not there or holds no run.
        ValueError: If a ``config.yaml`` or ``run.json`` cannot be read.
    """
    runs: dict[Path, Run] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        configs = [folder / "config.yaml"]
        if not _is_run(folder) or not configs[0].exists():
            below = [path for path in sorted(folder.rglob("config.yaml")) if _is_run(path.parent)]
            configs = below or configs  # one that has just begun has nothing else yet
        found = {run.path.resolve(): run for path in configs if path.exists() for run in _runs_in(path.parent)}
        if not found:
            raise FileNotFoundError(f"{folder} holds no run: there is no config.yaml beside a metrics.csv in it")
        runs |= found
    return list(runs.values())


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("metrics.csv", "run.json", "checkpoints"))


def _runs_in(folder: Path) -> list[Run]:
    config = _mapping(folder / "config.yaml", yaml.safe_load)
    record = folder / "run.json"
    of_several = not record.exists() and (folder.parent / "run.json").exists()
    record = folder.parent / "run.json" if of_several else record
    content = _mapping(record, json.loads) if record.exists() else {}
    if not config.get("students"):
        return [Run(folder, config, content, folder.name if of_several else "")]
    own = {name: folder / name / "config.yaml" for name in config["students"]}
    return [
        Run(path.parent, _mapping(path, yaml.safe_load), content, name) for name, path in own.items() if path.exists()
    ]


def _mapping(path: Path, read: Any) -> dict[str, Any]:
    try:
        content = read(path.read_text(encoding="utf-8"))
        json.dumps(content, skipkeys=True, default=str)  # refuses what holds itself, as YAML may
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold names with values, got {type(content).__name__}")
    return content
