"""Folders of runs, read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from kdlit.runs import find_runs

LOG = """step,lr-SGD,train/loss,epoch,val/top1
0,0.1,,,
4,,2.0,0,
5,0.01,,,
9,,1.0,1,
9,,,1,0.25
10,,,2,0.5
"""


def write(folder, config, record=None, log=LOG):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))
    if log:
        (folder / "metrics.csv").write_text(log)


def test_what_is_logged_belongs_to_an_epoch(tmp_path):
    write(tmp_path / "run", {"seed_everything": 3}, {"starts": []})
    (run,) = find_runs([tmp_path / "run"])
    assert run.seed == 3
    assert run.series() == {
        "lr-SGD": {0: 0.1, 1: 0.01},
        "train/loss": {0: 2.0, 1: 1.0},
        "val/top1": {1: 0.5},  # measured after the last epoch
    }
    assert run.results() == {}


def test_a_validation_within_an_epoch_that_goes_on_is_not_of_the_one_before(tmp_path):
    write(tmp_path / "run", {}, {"starts": []}, log=LOG.replace("10,,,2,0.5", "11,,,2,0.5") + "12,-,,2")
    (run,) = find_runs([tmp_path / "run"])
    assert run.series()["val/top1"] == {1: 0.25, 2: 0.5}, "and half of a row is none"


def test_runs_are_found_at_any_depth_and_students_one_by_one(tmp_path):
    write(tmp_path / "a" / "version_0", {"seed_everything": 0}, {"starts": [1]})
    write(tmp_path / "b", {"students": {"kd": {}, "dkd": {}}}, {"starts": [2]})
    for name in ("kd", "dkd"):
        write(tmp_path / "b" / name, {"seed_everything": 1})
    (tmp_path / "b" / "kd" / "test.json").write_text('{"epochs": 2, "test/top1": 0.5}')
    runs = find_runs([tmp_path])
    assert sorted((run.path.name, run.student, run.record["starts"][0]) for run in runs) == [
        ("dkd", "dkd", 2),
        ("kd", "kd", 2),
        ("version_0", "", 1),
    ]
    (one,) = find_runs([tmp_path / "b" / "kd"])
    assert (one.student, one.results()["test"]["test/top1"]) == ("kd", 0.5)
    assert len(find_runs([tmp_path, tmp_path / "b"])) == 3, "none comes twice"


def test_one_of_several_students_has_the_speed_of_the_whole_run(tmp_path):
    whole = "step,kd/train/loss,train/images_per_s,epoch\n3,,70.0,0\n3,2.0,,0\n7,,80.0,1\n7,1.0,,1\n"
    write(tmp_path / "b", {"students": {"kd": {}}}, {"starts": []}, whole)
    write(tmp_path / "b" / "kd", {}, log="step,train/loss,epoch\n3,2.0,0\n7,1.0,1\n")
    (run,) = find_runs([tmp_path / "b"])
    assert run.series() == {"train/images_per_s": {0: 70.0, 1: 80.0}, "train/loss": {0: 2.0, 1: 1.0}}


def test_a_config_of_the_users_own_hides_no_run_below_it(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    write(tmp_path / "runs" / "a", {}, {"starts": []})
    assert [run.path.name for run in find_runs([tmp_path])] == ["a"]
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("{}")
    assert [run.path.name for run in find_runs([tmp_path / "begun"])] == ["begun"]


def test_folders_without_runs_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_runs([tmp_path / "nothing"])
    with pytest.raises(FileNotFoundError, match="holds no run"):
        find_runs([tmp_path])
    write(tmp_path / "broken", {}, {"starts": []})
    (tmp_path / "broken" / "config.yaml").write_text("{")
    with pytest.raises(ValueError, match=r"broken/config.yaml cannot be read"):
        find_runs([tmp_path / "broken"])


CONFIG = """
trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false, callbacks: [{class_path: LearningRateMonitor}]}
data: {class_path: tests.faults.network.Data}
model:
  class_path: kdlit.modules.ClassificationDistillation
  init_args: {student: {class_path: tests.faults.network.Net}, input_size: [3, 8, 8], losses: {ce: {loss: {class_path: CrossEntropyLoss}}}}
"""


def test_a_run_is_built_again_as_its_last_checkpoint_has_it(kdlit_cli):
    Path("run.yaml").write_text(CONFIG)
    kdlit_cli("fit", "--config=run.yaml", "--run_dir=run")
    (run,) = find_runs(["run"])
    module, data = run.rebuild()
    kept = torch.load("run/student.pt", weights_only=True)["model"]
    assert all(torch.equal(value, kept[name]) for name, value in module.student.state_dict().items())
    assert not module.training
    data.setup("validate")
    assert len(next(iter(data.val_dataloader()))["image"])
    for path in Path("run/checkpoints").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="run has no checkpoint"):
        run.rebuild()


def test_code_that_is_not_found_from_here_is_named(kdlit_cli):
    Path("run.yaml").write_text(CONFIG)
    kdlit_cli("fit", "--config=run.yaml", "--run_dir=run")
    config = Path("run/config.yaml")
    config.write_text(config.read_text().replace("tests.faults.network.Net", "not_found_from_here.Net"))
    (run,) = find_runs(["run"])
    with pytest.raises(ValueError, match="names code in a module not_found_from_here that is not found from here"):
        run.rebuild()
