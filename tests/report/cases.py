"""Folders of runs as they may lie about, written by hand: hostile names, gaps, broken files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import yaml

HOSTILE = "<script>alert('x')</script>\"&$\\frac$"


def write_run(folder: Path, epochs: int = 3, planned: int = 3, everything: bool = False, **changes: object) -> Path:
    """Write the files of a run, with everything that may be logged or a part; ``changes`` replace files."""
    folder.mkdir(parents=True)
    config = {
        "seed_everything": 0,
        "trainer": {"max_epochs": planned},
        "model": {
            "class_path": "kdlit.modules.ClassificationDistillation",
            "init_args": {
                "student": {"class_path": "kdlit.models.resnet8x4", "init_args": {}},
                "teacher": {"class_path": "kdlit.models.resnet32x4", "init_args": {}},
                "losses": {HOSTILE: {"class_path": "kdlit.losses.KDLoss", "init_args": {"temperature": 4.0}}},
            },
        },
        "data": {"class_path": "kdlit.data.CIFAR100", "init_args": {"root": HOSTILE, "label_noise": 0.1}},
    }
    start = {
        "time": "2030-01-02T03:04:05+00:00",
        "command": ["kdlit", "fit", HOSTILE],
        "changes": {},
        "versions": {"kdlit": "0.1.0"},
        "git": {"kdlit": {"commit": "abc", "changed": [HOSTILE]}},
        "machine": {"name": HOSTILE, "device": "cpu"},
    }
    resumed = start | {"changes": {"data.init_args.batch_size": [64, HOSTILE]}}
    record = {
        "starts": [start, resumed],
        "data": {"train": {"size": 50, "pictures": "1"}, "val": {"size": 10, "pictures": str(folder)}},
        "teacher": {"weights": "w", "top1": 0.5, "recorded_top1": 0.9, "pictures": 1000},
    }
    test = {"checkpoint": "checkpoints/best.ckpt", "epochs": 2, "test/top1": 0.625, "test/teacher_top1": 0.75}
    contents = {
        "config.yaml": yaml.safe_dump(config),
        "run.json": json.dumps(record),
        "test.json": json.dumps(test),
        "metrics.csv": None,
    } | {name.replace("__", "."): content for name, content in changes.items()}
    for name, content in contents.items():
        if content is not None:
            (folder / name).write_text(str(content))
    if "metrics__csv" not in changes:
        write_log(folder / "metrics.csv", epochs, everything)
    return folder


def logged(epoch: int) -> dict[str, float]:
    """What the run logs in an epoch from 0."""
    both = {
        f"{stage}/{who}{name}": 0.1 * (place + epoch) + 0.01 * len(stage)
        for stage in ("train", "val")
        for who in ("", "teacher_")
        for place, name in enumerate(("top1", "top5", "entropy", "logit_mean", "logit_std"))
    }
    wrong = {
        f"val/teacher_wrong{end}": value
        for end, value in {"": 0.4, "_student_right": 0.1, "_student_same": 0.2, "_student_other": 0.1}.items()
    }
    shares = {f"train/share/{name}": 0.2 for name in ("data", "teacher", "student", "losses", "update")}
    own = {
        "train/loss": float("nan") if epoch == 1 else 2.0 / (epoch + 1),
        f"train/loss/{HOSTILE}": float("inf") if epoch == 1 else 10.0 ** -(3 * epoch),
        f"train/weight/{HOSTILE}": 1.0,
        f"train/grad_cosine/ce/{HOSTILE}": -0.5,
        f"train/my own {HOSTILE}": float("nan"),
        "val/ece": 0.05,
        "val/kl": 1.5,
        "lr-SGD": 0.1,
        "train/images_per_s": 100.0,
        "train/peak_memory_mb": 900.0,
    }
    return both | wrong | shares | own


def write_log(path: Path, epochs: int, everything: bool) -> None:
    parts = ("train/loss", "val/top1", "val/teacher_top1", "val/teacher_wrong")
    names = [name for name in logged(0) if everything or name.startswith(parts)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "epoch", *names], extrasaction="ignore")
        writer.writeheader()
        for epoch in range(epochs):
            writer.writerow({"step": epoch, "epoch": epoch, **logged(epoch)})
