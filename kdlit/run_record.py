"""What a run was made of: its config, and in ``run.json`` versions, sources, seeds, fingerprints of data and teacher.

A run that goes on is compared with what its checkpoint was made of, and whatever differs is said.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

import kdlit
from kdlit.callbacks import LastCheckpoint, TeacherCheck
from kdlit.command_files import flat
from kdlit.data import SplitDataModule
from kdlit.data.base import without_addresses
from kdlit.data.sampling import EpochDataset
from kdlit.files import write_whole
from kdlit.fingerprint import of_network, of_tensors, of_text
from kdlit.modules.many_students import frozen_teacher_of
from kdlit.students import MADE_OF, Students

_PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "jsonargparse", "numpy")
# How a run is watched and kept, not what it computes; where it runs is compared by what it comes to.
_FREE = (
    *("accept_changes", "checkpoint", "last", "torch_threads", "data.init_args.num_workers"),
    *(
        f"trainer.{name}"
        for name in (
            *("accelerator", "devices", "num_nodes", "precision"),
            *("logger", "log_every_n_steps", "enable_progress_bar", "enable_model_summary", "profiler"),
            *("enable_checkpointing", "max_time", "num_sanity_val_steps", "benchmark", "detect_anomaly"),
            *("limit_test_batches", "limit_predict_batches", "inference_mode"),
        )
    ),
)
_PLACE = tuple(f"data.init_args.{name}" for name in ("root", "download", "verify"))
_TEACHER = ("model.init_args.teacher", "the teacher")
_IN_CHECKPOINT = ("model.init_args.optimizer", "model.init_args.lr_scheduler")
_WATCHERS = (  # callbacks that change nothing
    *("DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "RichProgressBar", "TQDMProgressBar"),
    *("ModelSummary", "RichModelSummary", "PlainBaseline", "Progress", "StudentSummary", "TeacherCheck"),
    *("GradientWatch", "Throughput"),
)
# What a network that is measured is and sees; the pictures that are taken for what, and how, may well be others.
_SEEN = ("data", "model.init_args.student", "model.init_args.input_size", "model.init_args.teacher_input_size")
_UNSEEN = tuple(
    f"data.init_args.{name}"
    for name in (
        *("root", "download", "verify", "num_workers", "batch_size", "eval_batch_size", "seed", "broken"),
        *("val_size", "split_seed", "subset", "subset_by", "label_noise", "noise_seed"),
        *("strong_view", "transforms", "padding", "flip", "auto_augment"),
    )
)


class RunRecord(SaveConfigCallback):
    """Writes ``config.yaml`` and ``run.json`` once nothing is left to refuse; a resume adds to them.

    Args:
        students: of a run that has several; each then has a config of its own, too.
        *args: of the base.
        **kwargs: likewise.

    Raises:
        ValueError: If a run goes on with other data, another teacher or another config, and is not told to accept it;
            or with another optimizer or schedule, whose settings are part of the checkpoint.
    """

    def __init__(self, *args: Any, students: Students | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.students = students
        self.made_of: dict[str, Any] = {}
        self._before: dict[str, Any] = {}
        self._went_on_from: dict[str, Any] | None = None
        self._is_written = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: the data and the networks may still turn out not to fit."""

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember what the checkpoint was made of."""
        self._before = checkpoint.get(MADE_OF, {})
        self._went_on_from = {"checkpoint": str(trainer.ckpt_path), "step": checkpoint["global_step"]}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what is another than before, and refuse it unless it is accepted."""
        self.made_of = {
            "configs": self.configs(),
            "data": _about_data(getattr(trainer, "datamodule", None)),
            "teacher": _about_teacher(pl_module),
            "run": {
                "processes": trainer.world_size,
                "precision": str(trainer.precision),
                "device": trainer.strategy.root_device.type,
            },
        }
        changes = differences(self._before, self.made_of) if self._before else {}
        bound = {key: change for key, change in changes.items() if not _is(key, _FREE)}
        if fixed := {key: change for key, change in bound.items() if _is(key, _IN_CHECKPOINT)}:
            raise ValueError(
                f"{trainer.ckpt_path} holds the settings of the optimizer and its schedule, which would be used "
                f"instead of these: {_listed(fixed)}. Set them back, or start a new run from the student's weights "
                "(student.pt, kdlit.models.from_checkpoint)"
            )
        if bound and not self.config.accept_changes:
            raise ValueError(
                f"{trainer.ckpt_path} was made with other settings: {_listed(bound)}. A run that goes on with others "
                "is no longer the run its folder says it is: set them back, start a new run, or say "
                "--accept_changes=true"
            )
        if self._went_on_from and not self._before:
            rank_zero_warn(f"{trainer.ckpt_path} does not say what it was made with, so nothing was compared")
        if changes:
            rank_zero_warn(f"the run goes on with other settings than before: {_listed(changes)}")
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, LastCheckpoint):
                    callback.finished = False  # it may have more to do now
        self._changes = changes

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Write both files, now that the data has shown to go on, too."""
        self._write(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Likewise, where a run goes on with a validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer)

    @rank_zero_only
    def _write(self, trainer: L.Trainer) -> None:
        if self._is_written:
            return
        self._is_written = True
        for name, text in self.made_of["configs"].items():
            path = Path(trainer.default_root_dir) / name
            before = path.read_text(encoding="utf-8") if path.exists() else text
            if before != text:
                earlier = len(list(path.parent.glob("config.*.yaml")))
                write_text(path.with_name(f"config.{earlier}.yaml"), before)
            write_text(path, text)
        path = Path(trainer.default_root_dir) / "run.json"
        start = {
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": sys.argv,
            "from": self._went_on_from,
            "changes": {key: list(change) for key, change in self._changes.items()},
            "seed": self.config.seed_everything,
            "processes": trainer.world_size,
            "versions": _versions(),
            "git": {"kdlit": _git(Path(kdlit.__file__).parent), "folder": _git(Path.cwd())},
            "machine": _machine(trainer),
        }
        earlier = _read(path).get("starts", []) if self._went_on_from else []
        about = {"data": self.made_of["data"], "teacher": self.made_of["teacher"]}
        if about["teacher"] is not None and (measured := _measured(trainer)):
            about["teacher"] = {**about["teacher"], **measured}
        write_text(path, json.dumps({"starts": [*earlier, start], **about}, indent=1) + "\n")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint what it was made of."""
        if self.made_of:
            checkpoint[MADE_OF] = self.made_of

    def configs(self) -> dict[str, str]:
        """The resolved config files of the run by name."""
        if self.students is not None:
            return self.students.config_files()
        config = self.config.clone()
        config.run_dir = config.ckpt_path = config.trainer.default_root_dir = None
        config.checkpoint.dirpath = config.last.dirpath = None
        config.accept_changes = False
        return {"config.yaml": self.parser.dump(config, skip_none=False)}


def seen_otherwise(content: Mapping[str, Any], configs: Mapping[str, str]) -> str:
    """Say in what a checkpoint is about to be measured otherwise than it was trained; empty if in nothing that counts.

    Args:
        content: of the checkpoint.
        configs: the resolved config files by name.
    """
    before = {"configs": content.get(MADE_OF, {}).get("configs", configs)}
    changes = differences(before, {"configs": configs})
    counts = {key: change for key, change in changes.items() if _is(key, _SEEN) and not _is(key, _UNSEEN)}
    return _listed(counts) if counts else ""


def write_text(path: Path, text: str) -> None:
    """Write a text file whole.

    Args:
        path: its name.
        text: its content.
    """
    write_whole(path, lambda file: file.write(text.encode()))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Values that differ by dotted key: before and now; ``absent`` where there is none.

    Args:
        before: what a checkpoint holds under ``MADE_OF``.
        now: the same of the run that goes on from it.
    """
    old, new = (_values(made_of) for made_of in (before, now))
    same: list[str] = []  # settings that came to the same
    if before.get("teacher") is not None and before["teacher"] == now.get("teacher"):
        same += _TEACHER
    if before.get("data") == now.get("data") and any(key.endswith("pictures") and new[key] for key in new):
        same += _PLACE
    return {
        key: (old.get(key, "absent"), new.get(key, "absent"))
        for key in {**old, **new}
        if old.get(key, "absent") != new.get(key, "absent") and not _is(key, same)
    }


def _values(made_of: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, text in made_of.get("configs", {}).items():
        folder = str(Path(name).parent)
        prefix = "" if folder == "." else f"{folder}: "
        values |= {f"{prefix}{key}": value for key, value in flat(yaml.safe_load(text)).items()}
    if "trainer.callbacks" in values:
        values["trainer.callbacks"] = _acting(values["trainer.callbacks"])
    for part in ("data", "teacher", "run"):
        values |= {f"the {part}: {key}": value for key, value in flat(made_of.get(part)).items()}
    return values


def _acting(callbacks: Any) -> list[Any]:
    """Those that may change what is trained."""
    given = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    return [
        one
        for one in given
        if not isinstance(one, dict) or str(one.get("class_path")).rpartition(".")[2] not in _WATCHERS
    ]


def _is(key: str, settings: Sequence[str]) -> bool:
    """Whether a key is that of one of some settings, or lies within."""
    key = key.partition(":")[0] if key.startswith("the ") else key.rpartition(": ")[2]
    return any(key == setting or key.startswith(f"{setting}.") for setting in settings)


def _listed(changes: Mapping[str, tuple[Any, Any]], most: int = 6) -> str:
    texts = [f"{key.replace('.init_args', '')} {_short(old)} -> {_short(new)}" for key, (old, new) in changes.items()]
    return "; ".join(texts[:most]) + (f"; and {len(texts) - most} more" if len(texts) > most else "")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:20]}...{text[-20:]}"


def _about_data(data: L.LightningDataModule | None) -> dict[str, Any] | None:
    """Fingerprints of the pictures and labels of each part, of data that tells."""
    if data is None:
        return None
    parts = {}
    if isinstance(data, SplitDataModule):
        for name, dataset in data.datasets.items():
            if isinstance(dataset, EpochDataset) and name != "test":
                try:
                    print_of = dataset.fingerprint(times=False) if len(dataset) else None
                except NotImplementedError:
                    print_of = None
                labels = of_tensors({"labels": dataset.labels}) if len(dataset) else None
                parts[name] = {"size": len(dataset), "pictures": print_of, "labels": labels}
    return {"class": type(data).__qualname__, **parts}


def _about_teacher(module: L.LightningModule) -> dict[str, Any] | None:
    if (frozen := frozen_teacher_of(module)) is None:
        return None
    network = frozen.network
    return {
        "class": type(network).__qualname__,
        "layers": of_text(without_addresses(network)),
        "weights": of_network(network),
    }


def _measured(trainer: L.Trainer) -> dict[str, Any]:
    """How good the teacher was found to be."""
    check = next((one for one in cast("Any", trainer).callbacks if isinstance(one, TeacherCheck)), None)
    if check is None or check.top1 is None:
        return {}
    return {"top1": check.top1, "pictures": check.pictures_seen, "part": check.part, "recorded_top1": check.recorded}


def _versions() -> dict[str, str]:
    versions = {"kdlit": kdlit.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def _machine(trainer: L.Trainer) -> dict[str, Any]:
    device = trainer.strategy.root_device
    return {
        "name": platform.node(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "job": os.environ.get("SLURM_JOB_ID"),
    }


def _git(folder: Path) -> dict[str, Any] | None:
    """The commit of the sources in a folder, and which of its files are not as committed; None outside of git."""

    def ask(*command: str) -> str:
        answer = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        return answer.stdout

    try:
        changed = [line[3:] for line in ask("status", "--porcelain", "--", ".").splitlines()]
        return {"commit": ask("rev-parse", "HEAD").strip(), "changed": changed[:50]}
    except (OSError, subprocess.SubprocessError):
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or one that somebody has edited
        return {}
    return content if isinstance(content, dict) else {}
