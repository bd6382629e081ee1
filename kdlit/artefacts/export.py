"""Taking students out of runs: each format written aside, checked, and only then given its name."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdlit.artefacts import SUFFIXES, cost, describe
from kdlit.artefacts.formats import TRACED, ExportError, Leaving, check_packages, logits_from
from kdlit.artefacts.pictures import (
    TOLERANCE,
    Shown,
    are_classes,
    check_parity,
    differences,
    logits_in_batches,
    raw,
    real_pictures,
    said_of_class,
)
from kdlit.data.inputs import NetworkInput, Views
from kdlit.files import WriteError, load_whole, write_whole
from kdlit.fingerprint import of_network
from kdlit.models.size import count_multiply_adds, count_parameters
from kdlit.modules import DistillationModule, MutualLearning
from kdlit.run_record import write_text
from kdlit.runs import Run, find_runs

_RUNTIMES = {"torch_export": "torch.export", "onnx": "ONNX Runtime"}


def export(
    run_dir: str | Path,
    formats: Sequence[str],
    *,
    checkpoint: str = "last",
    output: str | Path | None = None,
    with_preprocessing: bool = False,
    pictures: int = 256,
    seconds: float = 3.0,
    settings: Sequence[str] = (),
) -> list[str]:
    """Export the student of a run, or all students of a folder with several; print how they compare.

    Args:
        run_dir: folder of the run.
        formats: names of formats.
        checkpoint: ``last``, ``best``, or a file.
        output: folder to write to; by default ``export`` in that of the run. Of several runs each has its own in it.
        with_preprocessing: whether traced networks take uint8 pictures and normalise them.
        pictures: how many to check with.
        seconds: how long to measure times, for each of both batch sizes.
        settings: of the data, ``--data.NAME=VALUE``.

    Returns:
        What could not be exported, and why, a line each.

    Raises:
        FileExistsError: If there is a file in place of the folder, or another student in it.
        FileNotFoundError: If there is no run, checkpoint or data.
        ImportError: If a package is missing.
        ValueError: If a checkpoint or a config cannot be used.
        WriteError: If the folder cannot be written into.
    """
    check_packages(list(formats))
    problems = []
    folders = [
        (run, run.path / "export" if output is None else Path(output) / run.path.relative_to(run_dir))
        for run in find_runs([run_dir])
    ]
    for _, folder in folders:
        with _aside(folder):  # rather now than after all the work
            pass
    for run, folder in folders:
        chosen = describe.choose(run, checkpoint)
        if said := describe.unfinished(run, chosen) if checkpoint == "last" else "":
            print(f"kdlit: warning: {said}", file=sys.stderr)
        if not chosen.own:
            said = f"{chosen.path} is not of {run.path / 'checkpoints'}, so the figures of {run.name} are left out"
            print(f"kdlit: warning: {said}", file=sys.stderr)
        print(f"{run.name}: {chosen.path.name}, {chosen.epochs} epochs trained: {chosen.why}")
        module, data = _rebuilt(run, chosen, settings)
        shown = real_pictures(data, pictures)
        views = getattr(data, "views", None)
        student_input = views.student if isinstance(views, Views) else None
        batch_size = getattr(data, "batch_size", None)
        for name, network in _students(module).items():
            one = _Export(run, folder, f"student_{name}" if name else "student", with_preprocessing, student_input)
            one.check_folder(of_network(network))
            said_of = describe.about(run, chosen, name, network, module, data)
            size = batch_size if isinstance(batch_size, int) else 64
            problems += one.export(network, formats, shown, module.teacher, said_of, size, seconds)
    return problems


def _rebuilt(run: Run, chosen: describe.Chosen, settings: Sequence[str]) -> tuple[DistillationModule, Any]:
    """Module and data of a run, the student as a checkpoint has it, without the hooks of losses."""
    module, data = run.rebuild(*settings)
    content = load_whole(chosen.path)  # anew, as the module adds its teacher to what it is given
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"])
    for tap in (module._student_tap, *getattr(module, "_taps", {}).values()):
        tap.remove()
    return module, data


def _students(module: DistillationModule) -> dict[str, nn.Module]:
    """Students by name, the first without one."""
    peers = dict(module.peers.items()) if isinstance(module, MutualLearning) else {}
    return {"": module.student, **peers}


@contextlib.contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """Make a folder, and one within it to write files aside; in the end remove that, and what is left empty.

    Args:
        folder: where the files are to lie.

    Raises:
        FileExistsError: If it is a file.
        WriteError: If it cannot be made or written into.
    """
    with contextlib.ExitStack() as stack:
        try:
            made = [one for one in (folder, *folder.parents) if not one.exists()]
            stack.callback(_remove_empty, made)
            folder.mkdir(parents=True, exist_ok=True)
            aside = stack.enter_context(tempfile.TemporaryDirectory(prefix=".", suffix=".kdlit", dir=folder))
        except FileExistsError as error:
            raise FileExistsError(f"--output: {folder} is a file; name a folder") from error
        except OSError as error:
            raise WriteError(
                f"cannot write into {folder}: {error.strerror}; name another folder by --output"
            ) from error
        yield Path(aside)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


class _Export:
    """Exports one student into a folder.

    Args:
        run: where it is from.
        folder: where to write.
        stem: how its files are named.
        with_preprocessing: whether traced networks normalise their pictures.
        student_input: how the data prepares pictures for it, if it says.

    Raises:
        ValueError: If networks are to normalise pictures, and the data does not say how.
    """

    def __init__(
        self, run: Run, folder: Path, stem: str, with_preprocessing: bool, student_input: NetworkInput | None
    ) -> None:
        if with_preprocessing and student_input is None:
            raise ValueError("--with_preprocessing: the data of this run does not say how it normalises its pictures")
        self.run = run
        self.folder = folder
        self.stem = stem
        self.inside = student_input if with_preprocessing else None
        self.student_input = student_input
        self.record = folder / f"{stem}.json"
        self.earlier: dict[str, Any] = {}

    def check_folder(self, weights: str) -> None:
        """Refuse a folder with files of another student; remember what is there of the same one.

        Args:
            weights: fingerprint of the student.

        Raises:
            FileExistsError: If another one is there.
        """
        there = [path.name for suffix in SUFFIXES.values() if (path := self.folder / f"{self.stem}{suffix}").exists()]
        if not there:
            return
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            same = record["student"]["weights"] == weights
            self.earlier = {name: record["files"][name] for name in there if name in record["files"]} if same else {}
        except (OSError, ValueError, LookupError, TypeError):
            same = False
        if not same:
            raise FileExistsError(
                f"{self.folder} holds {', '.join(there)} of another student or checkpoint; delete it, or name another "
                "folder by --output"
            )

    def export(
        self,
        network: nn.Module,
        formats: Sequence[str],
        shown: Shown,
        teacher: nn.Module | None,
        about: dict[str, Any],
        batch_size: int,
        seconds: float,
    ) -> list[str]:
        """Write all formats and ``student.json``, and print the comparison.

        Args:
            network: the student.
            formats: names of formats.
            shown: real pictures.
            teacher: its teacher.
            about: what is said of it.
            batch_size: of the run.
            seconds: how long to measure times, for each batch size.

        Returns:
            What failed, a line each.

        Raises:
            ValueError: If the student gives logits that are not finite.
        """
        image = raw(shown.image, self.inside) if self.inside else shown.image
        student = Leaving(network, image[:2], self.inside)
        trained = logits_in_batches(logits_from(network), shown.image, batch_size)
        if not trained.isfinite().all():
            raise ValueError(f"the student of {self.run.name} gives logits that are not finite; train it again")
        difference, relative = differences(logits_in_batches(logits_from(network), shown.image, batch_size), trained)
        if not relative <= TOLERANCE:
            return [
                f"{self.folder} gets no {self.stem}: shown the same pictures twice, the trained "
                f"{type(network).__name__} gives logits {difference:.3g} apart, so no file can be checked against it. "
                "Its forward draws random numbers in eval mode, or remembers earlier pictures; let it do so only if "
                "self.training, as by F.dropout(x, p, self.training), and export again"
            ]
        rows = list(_networks(self.stem, network, teacher, shown, trained, batch_size))
        files, problems, new = dict(self.earlier), [], []
        shape = shown.image.shape[1:]
        forms = {
            kind: {**about, "input": describe.about_input(shape, self.student_input, self._normalises(kind))}
            for kind in (*formats, "")
        }
        with _aside(self.folder) as aside:
            for kind in formats:
                path = aside / f"{self.stem}{SUFFIXES[kind]}"
                given = image if kind in TRACED else shown.image
                try:
                    write_whole(path, functools.partial(student.write, kind, forms[kind]))
                    read = functools.partial(student.read, kind, path)
                    parity, logits = check_parity(read, given, trained, shown, batch_size)
                except ExportError as error:
                    problems.append(f"{self.folder / path.name} is not written: {error}")
                    continue
                size = path.stat().st_size / 1e6
                files[path.name] = {"format": kind, "sha256": _sha256(path), "megabytes": size}
                files[path.name] |= {"input": forms[kind]["input"], "parity": parity._asdict()}
                if kind in TRACED:
                    rows.append(cost.Row(path.name, _RUNTIMES[kind], read(), given, size, _top1(logits, shown)))
                os.replace(path, self.folder / path.name)
                new.append(path.name)
                print(
                    f"{self.folder / path.name}: as the trained student on {parity.pictures} {parity.split} "
                    f"pictures, off by {parity.relative_difference:.1e} of the largest logit at most"
                    + said_of_class(parity)
                )
        if new:
            content = {**forms[""], "files": files}
            self._write_record(content)  # already now: the files that it is about are there
            rounds = cost.measure_times(rows, list(dict.fromkeys((1, batch_size))), seconds)
            self._write_record({**content, "comparison": _as_data(rows, rounds, shown)})
            cost.print_comparison(rows, rounds, shown.split, len(shown.image))
        return problems

    def _normalises(self, kind: str) -> bool:
        return self.inside is not None and kind in TRACED

    def _write_record(self, content: dict[str, Any]) -> None:
        write_text(self.record, json.dumps(content, indent=1) + "\n")


def _networks(
    stem: str, student: nn.Module, teacher: nn.Module | None, shown: Shown, trained: torch.Tensor, batch_size: int
) -> Iterator[cost.Row]:
    """Teacher and student as they are."""
    networks = [(stem, student, shown.image)]
    if teacher is not None:
        networks.insert(0, ("teacher", teacher, shown.image_teacher))
    for name, network, image in networks:
        predict = logits_from(network)
        logits = trained if network is student else logits_in_batches(predict, image, batch_size)
        yield cost.Row(
            name,
            "torch",
            predict,
            image,
            cost.megabytes(network),
            _top1(logits, shown),
            count_parameters(network),
            count_multiply_adds(network, image[:1]),
        )


def _top1(logits: torch.Tensor, shown: Shown) -> float | None:
    return float((logits.argmax(1) == shown.target).double().mean()) if are_classes(shown.target, logits) else None


def _as_data(rows: Sequence[cost.Row], rounds: dict[int, int], shown: Shown) -> dict[str, Any]:
    columns = ("name", "runtime", "parameters", "multiply_adds", "megabytes", "milliseconds", "top1")
    return {
        "machine": cost.machine(),
        "milliseconds": "of one picture, by batch size: median of runs by turns",
        "runs": rounds,
        "top1": cost.about_top1(rows, shown.split, len(shown.image)),
        "rows": [{name: getattr(row, name) for name in columns} for row in rows],
        "teacher / student": cost.ratios(rows),
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
