"""Several students by the command line: each is what its separate run would be, and lies in a folder like it."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from kdlit.models import from_checkpoint
from tests.conftest import repeatable_log

CONFIGS = Path(__file__).parents[1] / "configs"

OWN = """
import torch
from torch import nn
from tests.conftest import TinyData, TinyNet


class Net(TinyNet):
    pass


class Dropped(TinyNet):
    def __init__(self, num_classes: int = 5, width: int = 8):
        super().__init__(num_classes, width)
        self.act = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))


class Teacher(TinyNet):
    def __init__(self, width: int = 16):
        super().__init__(5, width)
        generator = torch.Generator().manual_seed(4)
        for value in self.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) - (0.5 if value.ndim > 1 else 0.0))


class Data(TinyData):
    def __init__(self, batch_size: int = 16, val_size: float = 32, seed: int | None = None):
        super().__init__(val_size=val_size, batch_size=batch_size, seed=seed)


class Unseeded(TinyData):
    def __init__(self, batch_size: int = 16):
        super().__init__(batch_size=batch_size)
"""

BASE = """
trainer: {max_epochs: 3, accelerator: cpu, enable_progress_bar: false}
data: {class_path: own.Data}
model:
  class_path: kdlit.modules.ClassificationDistillation
  init_args:
    student: {class_path: own.Net}
    teacher: {class_path: own.Teacher}
    input_size: [3, 8, 8]
    lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 1, gamma: 0.5}}
"""

COMPARE = """
students:
  kd: {config: methods/kd.yaml}
  dkd_1: {config: [methods/dkd.yaml], seed: 1, set: {model.student: own.Dropped}}
  wide:
    config: methods/kd.yaml
    set: {model.student: {class_path: own.Dropped, init_args: {width: 12}}, model.optimizer: torch.optim.Adam, model.lr_scheduler: null}
"""

# What is said of a student above, as the arguments of its separate run.
ALONE = {
    "kd": ["--config=methods/kd.yaml"],
    "dkd_1": ["--config=methods/dkd.yaml", "--model.student=own.Dropped", "--seed_everything=1"],
    "wide": [
        "--config=methods/kd.yaml", "--model.student=own.Dropped", "--model.student.width=12",
        "--model.optimizer=torch.optim.Adam", "--model.lr_scheduler=null",
    ],
}  # fmt: skip

TERMS = "{ce: {loss: {class_path: CrossEntropyLoss}}, NAME: {loss: {class_path: CLASS}}}"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with networks, data and configs, as the working directory."""
    monkeypatch.chdir(tmp_path)
    files = {"own.py": OWN, "base.yaml": BASE, "compare.yaml": COMPARE}
    for name, loss in (("kd", "KDLoss"), ("dkd", "DKDLoss")):
        terms = TERMS.replace("NAME", name).replace("CLASS", loss)
        files[f"methods/{name}.yaml"] = f"model: {{init_args: {{losses: {terms}}}}}"
    (tmp_path / "methods").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path), str(Path(__file__).parents[1])])
    yield tmp_path
    sys.modules.pop("own", None)


FIT = ("fit", "--config=base.yaml", "--config=compare.yaml")


def exported(folder):
    return torch.load(Path(folder) / "student.pt", weights_only=True)


def assert_same_student(folder, other):
    ours, theirs = exported(folder), exported(other)
    assert ours["metrics"] == theirs["metrics"]
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])
    assert repeatable_log(folder) == repeatable_log(other)


def test_every_student_and_its_folder_are_those_of_its_separate_run(project, kdlit_cli):
    out = kdlit_cli(*FIT, "--run_dir=all")
    assert "teacher" in out
    assert all(name in out for name in ALONE)
    for name, arguments in ALONE.items():
        kdlit_cli("fit", "--config=base.yaml", *arguments, "--data.seed=0", f"--run_dir=alone/{name}")
        assert_same_student(f"all/{name}", f"alone/{name}")
        ours, theirs = (yaml.safe_load(Path(f"{run}/{name}/config.yaml").read_text()) for run in ("all", "alone"))
        assert ours == theirs
        for kept in ("last.ckpt", "best.ckpt"):
            ours, theirs = (
                torch.load(f"{run}/{name}/checkpoints/{kept}", weights_only=True) for run in ("all", "alone")
            )
            assert ours.keys() == theirs.keys()
            assert ours["epoch"] == theirs["epoch"]
            assert ours["hyper_parameters"] == theirs["hyper_parameters"]
            assert ours["callbacks"].keys() == theirs["callbacks"].keys()
            assert all(torch.equal(ours["state_dict"][key], value) for key, value in theirs["state_dict"].items())
    files = {str(path.relative_to("all")) for path in Path("all").rglob("*") if path.is_file()}
    own = {"config.yaml", "metrics.csv", "student.pt", "checkpoints/last.ckpt", "checkpoints/best.ckpt"}
    group = {"config.yaml", "run.json", "metrics.csv", "checkpoints/last.ckpt", "checkpoints/previous.ckpt"}
    assert files == group | {f"{name}/{file}" for name in ALONE for file in own}

    # Each goes on by itself as it would have in the group, and both are as if nothing had happened.
    longer = ("--trainer.max_epochs=4", "--accept_changes=true")
    kdlit_cli("fit", "--config=all/dkd_1/config.yaml", "--ckpt_path=all/dkd_1/checkpoints/last.ckpt", *longer,
              "--run_dir=two")  # fmt: skip
    assert "last.ckpt" in kdlit_cli(*FIT, "--run_dir=all", "--ckpt_path=last", *longer)
    straight = exported("all/dkd_1")["model"]
    for run in ("two",):
        assert all(torch.equal(exported(run)["model"][key], value) for key, value in straight.items())

    assert "all/checkpoints/last.ckpt" in kdlit_cli("test", "--config=all/config.yaml", "--ckpt_path=last")
    whole = json.loads(Path("all/wide/test.json").read_text())
    kdlit_cli("test", "--config=all/wide/config.yaml", "--ckpt_path=last")
    single = json.loads(Path("all/wide/test.json").read_text())
    assert single.pop("checkpoint") == "all/wide/checkpoints/last.ckpt"
    assert single == {key: value for key, value in whole.items() if key != "checkpoint"}
    kdlit_cli("predict", "--config=all/config.yaml", "--ckpt_path=last")
    with Path("all/wide/predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 40
    import own

    network = from_checkpoint(own.Dropped(width=12), "all/wide/checkpoints/last.ckpt")
    assert torch.equal(network.fc.weight, exported("all/wide")["model"]["fc.weight"])


def test_a_group_resumes_bit_for_bit_and_its_config_repeats_it(project, kdlit_cli):
    often = ("--last.every_n_steps=5",
             "--trainer.callbacks=kdlit.callbacks.PlainBaseline", "--model.losses.ce.weight=0.5")  # fmt: skip
    kdlit_cli(*FIT, *often, "--run_dir=straight")
    assert "val/plain_top1" in exported("straight/dkd_1")["metrics"]
    kdlit_cli(*FIT, *often, "--run_dir=broken", "--trainer.max_steps=7")
    assert torch.load("broken/checkpoints/previous.ckpt", weights_only=True)["global_step"] == 5
    kdlit_cli(*FIT, *often, "--run_dir=resumed", "--ckpt_path=broken/checkpoints/previous.ckpt",
              "--accept_changes=true")  # fmt: skip
    kdlit_cli("fit", "--config=straight/config.yaml", "--run_dir=repeated")
    kdlit_cli("fit", "--config=straight/dkd_1/config.yaml", "--run_dir=alone")
    for name in ALONE:
        assert_same_student(f"repeated/{name}", f"straight/{name}")
        ours, theirs = exported(f"resumed/{name}"), exported(f"straight/{name}")
        assert ours["metrics"] == theirs["metrics"]
        assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])
    assert_same_student("alone", "straight/dkd_1")
    assert "weight: 0.5" in Path("repeated/kd/config.yaml").read_text()


MISTAKES = {
    "file": ("{a: {config: methods/no.yaml}}", (), ["there is no file", "methods/no.yaml", "mistake.yaml, line 1"]),
    "key of a student": ("{a: {confg: methods/kd.yaml}}", (), ["unknown key 'confg'", "did you mean 'config'?"]),
    "key in a student": ("{a: {set: {model.studnt: own.Net}}}", (), ["student a: unknown key 'studnt'", "'student'"]),
    "value": (
        "{a: {config: methods/kd.yaml, set: {model.losses.kd.loss.temperature: -1}}}", (), ["student a: temperature must be > 0"]),
    "not whole": ("{a: {}}", (), ["student a: model: the following arguments are required: losses"]),
    "data": (
        "{a: {config: methods/kd.yaml}, b: {config: methods/kd.yaml, set: {data.batch_size: 8}}}", (),
        ["data.init_args.batch_size is 16 for a and 8 for b", "--data.batch_size="]),
    "trainer": (
        "{a: {config: methods/kd.yaml}, b: {config: methods/kd.yaml, set: {trainer.max_epochs: 8}}}", (),
        ["trainer.max_epochs is 3 for a and 8 for b"]),
    "order": (
        "{a: {config: methods/kd.yaml}, b: {config: methods/kd.yaml, set: {data.seed: 8}}}", (), ["seed is 0 for a and 8 for b"]),
    "folder": ("{a: {config: methods/kd.yaml, set: {run_dir: x}}}", (), ["students.a.set: run_dir cannot be set"]),
    "teacher": (
        "{a: {config: methods/kd.yaml}, b: {config: methods/kd.yaml, set: {model.teacher.width: 8}}}", (),
        ["those of a and b differ in their layers"]),
    "names alike": (
        "{a: {config: methods/kd.yaml}, A: {config: methods/kd.yaml}}", (), ["differ in more than upper and lower case"]),
    "name": ("{a.b: {config: methods/kd.yaml}}", (), ["letters, digits, _ and -"]),
    "name of a folder": ("{checkpoints: {config: methods/kd.yaml}}", (), ["not be checkpoints"]),
    "number as a name": ("{1: {config: methods/kd.yaml}}", (), ["got 1"]),
    "seed": ("{a: {config: methods/kd.yaml, seed: -1}}", (), ["students.a.seed must lie in 0..4294967295, got -1"]),
    "no seed": ("{a: {config: methods/kd.yaml}}", ("--seed_everything=false",), ["seed_everything must be a number"]),
    "stopping": (
        "{a: {config: methods/kd.yaml}}", ("--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/top1"),
        ["EarlyStopping watches val/top1", "a/val/top1"]),
    "option": ("{a: {config: methods/kd.yaml}}", ("--trainer.max_epoch=3",), ["student a: unknown key 'trainer.max_epoch'"]),
    "in training": ("{a: {config: methods/kd.yaml}}", ("--data.batch_size=1000",), ["batch_size is 1000, but only 64"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_the_student_and_leave_nothing_behind(project, kdlit_cli, mistake):
    students, arguments, expected = MISTAKES[mistake]
    (project / "mistake.yaml").write_text(f"students: {students}\n")
    before = {path for path in project.rglob("*") if "__pycache__" not in path.parts}
    out = kdlit_cli("fit", "--config=base.yaml", "--config=mistake.yaml", *arguments)
    assert "kdlit: error:" in out, out
    assert "Traceback" not in out
    for part in expected:
        assert part in out, out
    assert {path for path in project.rglob("*") if "__pycache__" not in path.parts} == before


def test_data_without_a_seed_of_its_own_is_warned_of(project, kdlit_cli):
    with pytest.warns(UserWarning, match="own.Unseeded has no argument seed, .* separate run of dkd_1 would"):
        kdlit_cli(*FIT, "--data=own.Unseeded", "--trainer.fast_dev_run=1")


def test_an_explicit_seed_of_the_data_survives_a_resume(project, kdlit_cli):
    one = ("fit", "--config=base.yaml", "--config=methods/kd.yaml")
    kdlit_cli(*one, "--data.seed=7", "--run_dir=straight")
    kdlit_cli(*one, "--data.seed=7", "--run_dir=resumed", "--trainer.max_epochs=1")
    kdlit_cli(*one, "--data.seed=7", "--run_dir=resumed", "--ckpt_path=last", "--accept_changes=true")
    assert_same_student("resumed", "straight")
    kdlit_cli(*one, "--run_dir=other")
    assert exported("other")["metrics"] != exported("straight")["metrics"]
    out = kdlit_cli(*one, "--data.seed=8", "--run_dir=resumed", "--ckpt_path=last", "--accept_changes=true")
    assert "data.seed is 8, but the run that is resumed draws by 7" in out


def test_the_example_builds_and_prints_the_config_of_every_student(project, kdlit_cli):
    out = kdlit_cli(
        "fit", "--config", CONFIGS / "quickstart.yaml", "--config", CONFIGS / "compare.yaml", "--print_config"
    )
    configs = {text.split("\n")[0]: yaml.safe_load(f"# {text}") for text in out.split("exit")[0].split("# ")[1:]}
    assert set(configs) == {f"{name}config.yaml" for name in ("", "alone/", "kd/", "kd_seed1/", "dkd/", "dkd_seed1/")}
    assert configs["dkd_seed1/config.yaml"]["seed_everything"] == 1
    assert {config["data"]["init_args"]["seed"] for config in configs.values()} == {0}
