"""What a run says about itself, and what it refuses to go on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from kdlit.files import alone_in
from kdlit.run_record import differences
from tests.conftest import repeatable_log
from tests.faults.network import Teacher

CONFIG = """
trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false}
data: {class_path: tests.faults.network.Data}
model:
  class_path: kdlit.modules.ClassificationDistillation
  init_args:
    student: {class_path: tests.faults.network.Net}
    teacher:
      class_path: kdlit.models.from_checkpoint
      init_args: {model: {class_path: tests.faults.network.Net, init_args: {width: 12}}, path: teacher.pt}
    input_size: [3, 8, 8]
    losses: {kd: {loss: {class_path: KDLoss}}}
"""
FIT = ("fit", "--config=run.yaml", "--run_dir=run", "--ckpt_path=last")


@pytest.fixture
def run(kdlit_cli, tmp_path):
    """A run of two epochs in ``run``, and the command line."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    torch.save({"model": Teacher().state_dict()}, tmp_path / "teacher.pt")
    assert "starting afresh" in kdlit_cli(*FIT)
    return kdlit_cli


def test_the_folder_says_what_the_run_was_made_of(run):
    about = json.loads(Path("run/run.json").read_text())
    (start,) = about["starts"]
    assert start["seed"] == 0
    assert start["from"] is None
    assert start["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"kdlit", "python", "lightning", "numpy"} <= start["versions"].keys()
    assert start["command"][1] == "fit"
    assert len(start["git"]["kdlit"]["commit"]) == 40 if start["git"]["kdlit"] else True
    assert start["git"]["folder"] is None  # a scratch folder is in no repository
    assert about["data"]["class"] == "Data"
    assert {name: part["size"] for name, part in about["data"].items() if name != "class"} == {"train": 64, "val": 32}
    assert len(about["data"]["train"]["pictures"]) == len(about["data"]["train"]["labels"]) == 64
    assert len(about["teacher"]["weights"]) == 64
    assert about["teacher"]["pictures"] == 32
    assert 0 <= about["teacher"]["top1"] <= 1
    made_of = torch.load("run/checkpoints/last.ckpt", weights_only=True)["kdlit"]
    assert made_of["configs"]["config.yaml"] == Path("run/config.yaml").read_text()
    assert made_of["teacher"]["weights"] == about["teacher"]["weights"]


def test_a_changed_config_is_named_and_refused_unless_accepted(run):
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    longer = ("--trainer.max_epochs=3", "--model.losses.kd.loss.temperature=2", "--data.batch_size=8")
    out = run(*FIT, *longer)
    assert "run/checkpoints/last.ckpt was made with other settings" in out
    for change in ("trainer.max_epochs 2 -> 3", "temperature 4.0 -> 2.0", "data.batch_size 16 -> 8"):
        assert change in out
    assert "--accept_changes=true" in out
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before

    out = run(*FIT, *longer, "--accept_changes=true")
    assert "after epoch 3" in out
    starts = json.loads(Path("run/run.json").read_text())["starts"]
    assert starts[1]["from"] == {"checkpoint": "run/checkpoints/last.ckpt", "step": 8}
    assert starts[1]["changes"]["trainer.max_epochs"] == [2, 3]
    assert "max_epochs: 3" in Path("run/config.yaml").read_text()
    assert "max_epochs: 2" in Path("run/config.0.yaml").read_text()
    assert "accept_changes: false" in Path("run/config.yaml").read_text()


def test_what_computes_nothing_may_change(run):
    with pytest.warns(UserWarning, match="num_workers 0 -> 1"):
        out = run(*FIT, "--data.num_workers=1", "--last.every_minutes=1", "--trainer.log_every_n_steps=7")
    assert "after epoch 2" in out


def test_a_folder_that_was_moved_keeps_its_best(run):
    Path("run").rename("elsewhere")
    longer = ("--trainer.max_epochs=3", "--accept_changes=true")
    out = run("fit", "--config=run.yaml", "--run_dir=elsewhere", "--ckpt_path=last", *longer)
    assert "dirpath has changed" not in out
    state = torch.load("elsewhere/checkpoints/last.ckpt", weights_only=True)["callbacks"]
    (best,) = (own for own in state.values() if "best_model_score" in own)
    assert best["best_model_path"].endswith("elsewhere/checkpoints/best.ckpt")
    assert best["best_model_score"] is not None


def test_the_optimizer_of_a_run_that_goes_on_cannot_be_changed(run):
    out = run(*FIT, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.5", "--accept_changes=true")
    assert "holds the settings of the optimizer and its schedule" in out
    assert "start a new run from the student's weights" in out


def test_a_teacher_of_the_same_weights_may_lie_elsewhere(run):
    Path("teacher.pt").rename("teacher2.pt")
    with pytest.warns(UserWarning, match="num_sanity_val_steps"):
        out = run(*FIT, "--model.teacher.path=teacher2.pt", "--trainer.num_sanity_val_steps=1", "--trainer.devices=1",
                  "--trainer.precision=32-true")  # fmt: skip
    assert "after epoch 2" in out


def test_hyperparameters_never_come_from_the_checkpoint(run):
    out = run("fit", "--config=run.yaml", "--ckpt_path=run/checkpoints/last.ckpt", "--run_dir=other",
              "--model.losses.kd.weight=0.5", "--trainer.max_epochs=3", "--accept_changes=true")  # fmt: skip
    assert "after epoch 3" in out
    losses = yaml.safe_load(Path("other/config.yaml").read_text())["model"]["init_args"]["losses"]
    assert losses["kd"]["init_args"]["weight"] == 0.5


def test_another_teacher_and_other_data_are_refused(run):
    weights = Teacher().state_dict()
    weights["fc.bias"][0] += 1e-3
    torch.save({"model": weights}, "teacher.pt")
    assert "the teacher: weights" in run(*FIT)
    torch.save({"model": Teacher().state_dict()}, "teacher.pt")
    assert "after epoch 2" in run(*FIT)


def test_other_pictures_are_refused(run, monkeypatch):
    from tests.conftest import TinyData

    draw = TinyData._draw

    def redraw(size, seed):
        pictures = draw(size, seed)
        pictures.image[-1, 0, 0, 0] ^= 1
        return pictures

    monkeypatch.setattr(TinyData, "_draw", staticmethod(redraw))
    out = run(*FIT)
    assert "the data: train.pictures" in out or "the data: val.pictures" in out


def test_a_student_that_is_measured_otherwise_than_it_was_trained_is_said(run, tmp_path):
    assert "trained otherwise" not in run("test", "--config=run.yaml", "--ckpt_path=run/checkpoints/last.ckpt")
    other = CONFIG.replace("tests.faults.network.Net}\n", "tests.faults.network.Net, init_args: {num_classes: 5}}\n")
    (tmp_path / "other.yaml").write_text(other.replace("faults.network.Data", "conftest.TinyData"))
    out = run("test", "--config=other.yaml", "--ckpt_path=run/checkpoints/last.ckpt")
    assert "warning: the student was trained otherwise: data.class_path" in out


def test_two_processes_do_not_train_in_one_folder(run):
    with alone_in(Path("run")):
        assert "another process trains in run" in run(*FIT)


def test_a_run_killed_before_its_first_checkpoint_starts_afresh_in_its_folder(run):
    log = repeatable_log("run")
    for path in Path("run/checkpoints").iterdir():
        path.unlink()
    assert "starting afresh" in run(*FIT)
    assert repeatable_log("run") == log


def test_differences_name_keys_of_all_files():
    before = {"configs": {"config.yaml": "a: {b: 1, c: [1, 2]}", "kd/config.yaml": "a: 1"}, "data": {"class": "X"}}
    now = {"configs": {"config.yaml": "a: {b: 2, c: [1, 2]}", "kd/config.yaml": "a: 2"}, "data": {"class": "Y"}}
    assert differences(before, before) == {}
    assert differences(before, now) == {"a.b": (1, 2), "kd: a": (1, 2), "the data: class": ("X", "Y")}
