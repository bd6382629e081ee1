"""What is said of an exported student: where it comes from, how to feed it, how good it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import nn

import kdlit
from kdlit.cli import epochs_of
from kdlit.data.inputs import NetworkInput
from kdlit.files import load_whole
from kdlit.fingerprint import of_network
from kdlit.modules import DistillationModule
from kdlit.runs import Run


class Chosen(NamedTuple):
    """The checkpoint whose student is exported.

    Attributes:
        path: its file.
        content: what it holds.
        epochs: how many whole epochs its student was trained for.
        why: how it was chosen.
        own: whether it lies in the folder of the run, so that what is logged there is about it.
    """

    path: Path
    content: dict[str, Any]
    epochs: int
    why: str
    own: bool


def choose(run: Run, wanted: str) -> Chosen:
    """Find and read a checkpoint.

    Args:
        run: the run.
        wanted: ``last``, ``best``, or a file.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is damaged.
    """
    folder = run.path / "checkpoints"
    there = sorted(path.name for path in folder.glob("*.ckpt"))
    if not there and wanted in ("last", "best"):
        raise FileNotFoundError(f"{run.path} has no checkpoint in checkpoints/; train it first")
    others = f"; name another by --checkpoint, of {', '.join(there)}" if there else ""
    path = Path(wanted) if wanted not in ("last", "best") else folder / "last.ckpt"
    content = _read(path, others)
    if wanted == "best":
        names = [Path(state["best_model_path"]).name for state in _watchers(content) if state["best_model_path"]]
        if not names:
            raise FileNotFoundError(
                f"{run.path} kept no best checkpoint, as nothing was measured during training; export the last one"
            )
        path = folder / names[0]
        content = _read(path, others)
    if "epoch" not in content or "loops" not in content:
        raise ValueError(f"{path} is not a checkpoint of a run, such as checkpoints/last.ckpt in its folder")
    own = path.resolve().parent == folder.resolve()
    return Chosen(path, content, epochs_of(str(path)), _why(path, content, wanted), own)


def _read(path: Path, others: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}{others}")
    try:
        content = load_whole(path)
    except ValueError as error:
        raise ValueError(f"{error}{others}") from None
    return content if isinstance(content, dict) else {}


def _watchers(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """States of what kept the best checkpoints by a figure."""
    states = content.get("callbacks", {}).items()
    return [state for key, state in states if key.startswith("ModelCheckpoint") and state.get("monitor")]


def _why(path: Path, content: Mapping[str, Any], wanted: str) -> str:
    best = [state for state in _watchers(content) if Path(state["best_model_path"]).name == path.name]
    if best:
        monitor = str(best[0]["monitor"])
        kind = "lowest" if best[0].get("mode") == "min" else "highest"
        part = {"val": "validation", "test": "test"}.get(monitor.partition("/")[0], monitor)
        return f"the {kind} {monitor} of all epochs measured; chosen on {part} pictures, so figures on these flatter it"
    return "the last epoch" if wanted == "last" else "named by hand"


def unfinished(run: Run, chosen: Chosen) -> str:
    """Say so if a run has epochs left to train; else empty."""
    trainer = run.config.get("trainer", {})
    most = trainer.get("max_epochs")
    stopped = chosen.content.get("callbacks", {}).get("LastCheckpoint", {}).get("finished")
    if not isinstance(most, int) or chosen.epochs >= most or stopped or trainer.get("max_steps", -1) != -1:
        return ""
    return f"{run.name} is not finished: {chosen.epochs} of {most} epochs are trained"


def about(
    run: Run, chosen: Chosen, name: str, network: nn.Module, module: DistillationModule, data: L.LightningDataModule
) -> dict[str, Any]:
    """Describe a student: plain data for JSON, the same for all formats.

    Args:
        run: where it was trained.
        chosen: its checkpoint.
        name: of one that learned with others; empty for one alone.
        network: the student.
        module: what trained it.
        data: the data of the run, set up.
    """
    model = run.config.get("model", {}).get("init_args", {})
    students = model.get("students")
    spec = model.get("student", model.get("backbone"))
    if isinstance(students, dict):
        spec = students.get(name, next(iter(students.values())))
    elif isinstance(students, list):
        spec = students[int(name or 0)]
    start = (run.record.get("starts") or [{}])[-1]
    classes = getattr(data, "class_names", None)
    teacher = None
    if module.teacher is not None:
        teacher = {"class": _class(module.teacher), "config": model.get("teacher")}
    note = {"note": network.note} if isinstance(getattr(network, "note", None), str) else {}
    return {
        "student": {"class": _class(network), "config": spec, **note, "weights": of_network(network)},
        "output": {
            "name": "logits",
            "shape": ["batch", module.num_classes],
            "dtype": "float32",
            "class_names": None if classes is None else list(map(str, classes)),
        },
        "checkpoint": {
            "file": chosen.path.name if chosen.own else str(chosen.path.resolve()),
            "epochs": chosen.epochs,
            "chosen": chosen.why,
        },
        "accuracy": _accuracy(run, chosen, name, list(getattr(module, "peers", ()))),
        "teacher": teacher,
        "run": {
            "folder": str(run.path.absolute()),
            "seed": run.seed,
            "module": run.config.get("model", {}).get("class_path"),
            "data": run.config.get("data", {}).get("class_path"),
            "trained_with": start.get("versions"),
            "commit": ((start.get("git") or {}).get("kdlit") or {}).get("commit"),
        },
        "exported_with": {"kdlit": kdlit.__version__, "torch": torch.__version__},
    }


def _class(network: nn.Module) -> str:
    return f"{type(network).__module__}.{type(network).__qualname__}"


def _accuracy(run: Run, chosen: Chosen, name: str, peers: Sequence[str]) -> dict[str, Any]:
    """Figures of this very student by where they are from: logged in training, ``kdlit test``, ``kdlit validate``.

    Args:
        run: where it was trained.
        chosen: its checkpoint; one that is not of the run has no figures.
        name: of one that learned with others; empty for the first, or one alone.
        peers: names of all but the first that learned together.
    """
    if not chosen.own:
        return {}
    last = chosen.epochs - 1
    logged = {name: values[last] for name, values in run.series().items() if name.startswith("val/") and last in values}
    found: dict[str, dict[str, Any]] = {"logged in training": logged}
    for stem, figures in run.results("test", "validate").items():
        if figures.get("epochs") == chosen.epochs and Path(str(figures.get("checkpoint"))).name == chosen.path.name:
            found[f"kdlit {stem}"] = figures
    own = {where: _of_student(figures, name, peers) for where, figures in found.items()}
    return {where: figures for where, figures in own.items() if figures}


def _of_student(figures: Mapping[str, Any], name: str, peers: Sequence[str]) -> dict[str, float]:
    """The finite figures of one student, ``STAGE/NAME/FIGURE`` of a peer as ``STAGE/FIGURE``."""
    own = {}
    for key, value in figures.items():
        stage, slash, figure = key.partition("/")
        owner, inner, rest = figure.partition("/")
        peer = owner if inner and owner in peers else ""
        if slash and peer == name and isinstance(value, float) and math.isfinite(value):
            own[f"{stage}/{rest if peer else figure}"] = value
    return own


def about_input(shape: Sequence[int], student: NetworkInput | None, inside: bool) -> dict[str, Any]:
    """Describe what a network takes.

    Args:
        shape: of one picture, ``(C, H, W)``.
        student: how the data prepares its pictures; None if it does not say.
        inside: whether the network normalises them itself.
    """
    takes: dict[str, Any] = {
        "name": "image",
        "layout": "NCHW",
        "shape": ["batch", *shape],
        "dtype": "uint8" if inside else "float32",
    }
    if student is None:
        return takes | {"preprocessing": "as the data module of the run does it, which does not describe it"}
    steps = []
    if student.size is not None:
        quality = f"{student.interpolation}{', antialiased' if student.antialias else ''}"
        steps.append(f"scale the shorter side to {student.resize or student.size} pixels ({quality})")
        steps.append(f"cut out the middle {student.size} x {student.size} pixels")
    normalisation = ["divide by 255", "subtract mean and divide by std, each channel its own"]
    return takes | {
        "channels": {3: "RGB", 1: "grey"}.get(shape[0], str(shape[0])),
        "preprocessing": [*steps, *([] if inside else normalisation)],
        "inside": normalisation if inside else [],
        "range_before_normalisation": [0, 1],
        "mean": list(student.mean),
        "std": list(student.std),
        "size": student.size,
        "resize": student.resize,
        "interpolation": student.interpolation,
        "antialias": student.antialias,
    }
