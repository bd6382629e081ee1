"""The main job on real photographs: teacher, DKD through the CIFAR-100 data module, resume, validate, predict."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CONFIGS = Path(__file__).parents[1] / "configs" / "cifar100"
PHOTOGRAPHS = (
    "--data.root=.", "--data.verify=false", "--data.val_size=500",
    "--data.mean=[0.4776, 0.4576, 0.4076]", "--data.std=[0.2579, 0.2504, 0.2688]",
    "--trainer.accelerator=cpu", "--torch_threads=1",
)  # fmt: skip


@pytest.fixture
def photographs(shared, tmp_path):
    """The 20-class slice in the file layout of CIFAR-100, in the scratch folder."""
    maker = shared / "data" / "make_cifar100_layout.py"
    subprocess.run([sys.executable, maker, shared / "data" / "tiny-imagenet-20-32", tmp_path], check=True)
    return tmp_path


def test_a_teacher_is_made_and_distilled(photographs, kdlit_cli):
    kdlit_cli(
        "fit", "--config", CONFIGS / "plain.yaml", *PHOTOGRAPHS, "--run_dir=teacher", "--trainer.max_epochs=2",
        "--model.student=kdlit.models.resnet14", "--model.student.num_classes=20",
    )  # fmt: skip
    run = (
        "fit", "--config", CONFIGS / "pairs" / "resnet56_resnet20.yaml", "--config", CONFIGS / "methods" / "dkd_beta2.yaml",
        *PHOTOGRAPHS, "--run_dir=dkd",
        "--model.teacher.model=kdlit.models.resnet14", "--model.teacher.model.num_classes=20",
        "--model.teacher.path=teacher/student.pt",
        "--model.student=kdlit.models.resnet8", "--model.student.num_classes=20",
    )  # fmt: skip
    kdlit_cli(*run, "--trainer.max_epochs=1")
    out = kdlit_cli(*run, "--trainer.max_epochs=2", "--ckpt_path=last", "--accept_changes=true")
    assert "student, distilled" in out
    with (photographs / "dkd" / "metrics.csv").open() as file:
        log = list(csv.DictReader(file))
    accuracies = [float(row["val/top1"]) for row in log if row["val/top1"]]
    teacher = {float(row["val/teacher_top1"]) for row in log if row["val/teacher_top1"]}
    assert len(accuracies) == 2
    assert accuracies[1] > 0.10  # chance is 0.05
    assert len(teacher) == 1, "the teacher must be the same before and after the resume"
    assert teacher.pop() > 0.10
    losses = [float(row["train/loss/dkd"]) for row in log if row["train/loss/dkd"]]
    assert losses[1] < losses[0]

    kdlit_cli("validate", "--config", "dkd/config.yaml", "--ckpt_path=last")
    validated = json.loads((photographs / "dkd" / "validate.json").read_text())
    assert validated["val/top1"] == pytest.approx(accuracies[1])
    kdlit_cli("predict", "--config", "dkd/config.yaml", "--ckpt_path=last")
    with (photographs / "dkd" / "predictions.csv").open() as file:
        predictions = list(csv.DictReader(file))
    assert len(predictions) == 1000
    right = sum(row["label"] == row["target"] for row in predictions) / 1000
    assert right > 0.10
    exported = torch.load(photographs / "dkd" / "student.pt", weights_only=True)
    assert exported["num_classes"] == 20
