"""The command line end to end, with networks, data and a loss of a user's own."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time

import pytest
import torch
import yaml

from kdlit.__main__ import COMMANDS

OWN = '''
"""A user's own file: nothing of it is known to kdlit."""
import torch
from torch import nn
from kdlit.losses import DistillationLoss
from tests.conftest import TinyData, TinyNet


class OwnNet(TinyNet):
    pass


def own_builder(num_classes: int = 5) -> OwnNet:
    return OwnNet(num_classes)


class OwnData(TinyData):
    def __init__(self, val_size: float = 32, batch_size: int = 16):
        super().__init__(val_size=val_size, batch_size=batch_size)


class OwnLoss(DistillationLoss):
    def __init__(self, strength: float = 1.0):
        super().__init__()
        self.strength = strength

    def forward(self, student, teacher, batch):
        return self.strength * (student.logits - teacher.logits).square().mean()
'''

CONFIG = """
trainer: {max_epochs: 2, accelerator: cpu, log_every_n_steps: 2}
data: {class_path: own.OwnData}
model:
  class_path: kdlit.modules.ClassificationDistillation
  init_args:
    student: {class_path: own.own_builder}
    teacher: {class_path: own.OwnNet, init_args: {width: 16}}
    input_size: [3, 8, 8]
    losses:
      ce: {loss: {class_path: CrossEntropyLoss}}
      kd: losses/kd.yaml
    lr_scheduler:
      class_path: torch.optim.lr_scheduler.MultiStepLR
      init_args: {milestones: [1, 3], gamma: 0.1}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a user's file and configs, as the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "kd.yaml").write_text(
        "loss: {class_path: KDLoss, init_args: {temperature: 2.0}}\nweight: 0.9\nwarmup_epochs: 2\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path), os.path.dirname(os.path.dirname(__file__))])
    yield tmp_path
    sys.modules.pop("own", None)


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_fit_resume_validate_test_predict(project, kdlit_cli):
    out = kdlit_cli("fit", "--config", "tiny.yaml", "--model.losses.own.loss.class_path=own.OwnLoss")
    run = project / "runs" / "tiny" / "version_0"
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    checkpoints = {f"checkpoints/{name}.ckpt" for name in ("best", "last", "previous")}
    assert files == {"config.yaml", "run.json", "metrics.csv", "student.pt", *checkpoints}
    assert "teacher" in out
    assert "student, distilled" in out
    assert "Checkpoint: runs/tiny/version_0/checkpoints/last.ckpt" in out
    log = rows(run / "metrics.csv")
    assert {"train/loss", "train/loss/ce", "train/loss/kd", "train/loss/own", "val/top1", "val/agreement"} <= set(
        log[0]
    )

    kdlit_cli("fit", "--config", "tiny.yaml", "--model.losses.own.loss.class_path=own.OwnLoss",
              "--ckpt_path=last", "--trainer.max_epochs=4", "--accept_changes=true")  # fmt: skip
    assert not (project / "runs" / "tiny" / "version_1").exists()
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 16
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.05 * 0.1**2)
    assert "max_epochs: 4" in (run / "config.yaml").read_text()
    assert "max_epochs: 2" in (run / "config.0.yaml").read_text()
    resumed = rows(run / "metrics.csv")
    assert [row["val/top1"] for row in resumed if row["val/top1"]][:2] == [
        row["val/top1"] for row in log if row["val/top1"]
    ]
    epochs = [row["epoch"] for row in resumed if row["val/top1"]]
    assert epochs == ["0", "1", "2", "3"]
    assert [row["epoch"] for row in resumed if row["train/top1"]] == ["0", "1", "2", "3"]

    saved = str(run / "config.yaml")
    for command in ("validate", "test"):
        kdlit_cli(command, "--config", saved, "--ckpt_path=last")
    figures = json.loads((run / "test.json").read_text())
    assert figures["checkpoint"].endswith("last.ckpt")
    assert 0 <= figures["test/top1"] <= 1
    last = [row for row in resumed if row["val/top1"]][-1]
    assert json.loads((run / "validate.json").read_text())["val/top1"] == pytest.approx(float(last["val/top1"]))
    kdlit_cli("predict", "--config", saved, "--ckpt_path", str(run / "checkpoints" / "best.ckpt"))
    predictions = rows(run / "predictions.csv")
    assert len(predictions) == 40
    assert set(predictions[0]) == {"index", "label", "class", "confidence", "target"}
    assert not (project / "runs" / "config").exists()


def test_the_saved_config_repeats_the_run_bit_for_bit(project, kdlit_cli):
    kdlit_cli("fit", "--config", "tiny.yaml", "--seed_everything=3")
    kdlit_cli("fit", "--config", "runs/tiny/version_0/config.yaml")
    a, b = (torch.load(project / f"runs/tiny/version_{n}/student.pt", weights_only=True)["model"] for n in (0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_no_run_writes_into_the_folder_of_another(project, kdlit_cli):
    kdlit_cli("fit", "--config", "tiny.yaml")
    first = project / "runs/tiny/version_0"
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    kdlit_cli("fit", "--config", "runs/tiny/version_0/config.yaml", "--seed_everything=5")
    kdlit_cli("fit", "--config", "tiny.yaml", "--ckpt_path=runs/tiny/version_0/checkpoints/best.ckpt",
              "--trainer.max_epochs=3", "--accept_changes=true")  # fmt: skip
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in (project / "runs/tiny").iterdir()) == ["version_0", "version_1", "version_2"]
    saved = (first / "config.yaml").read_text()
    assert "version_0" not in saved, "a saved config must not point into the folder of its run"
    for number in (1, 2):
        assert (project / f"runs/tiny/version_{number}/checkpoints/best.ckpt").exists()


def test_a_checkpoint_of_a_command_line_run_rebuilds_everything(project, kdlit_cli):
    from kdlit.modules import ClassificationDistillation

    kdlit_cli("fit", "--config", "tiny.yaml")
    module = ClassificationDistillation.load_from_checkpoint(
        "runs/tiny/version_0/checkpoints/last.ckpt", weights_only=True
    )
    assert list(module.losses) == ["ce", "kd"]
    assert module.losses["kd"].weight == 0.9
    assert type(module.student).__name__ == "OwnNet"
    exported = torch.load("runs/tiny/version_0/student.pt", weights_only=True)["model"]
    assert torch.equal(module.student.fc.weight, exported["fc.weight"])


def test_printed_config_can_be_fed_back(project, kdlit_cli):
    printed = kdlit_cli("fit", "--config", "tiny.yaml", "--model.losses.kd.loss.temperature=3", "--print_config")
    (project / "again.yaml").write_text(printed.split("exit")[0])
    assert "temperature: 3.0" in printed
    assert "temperature: 3.0" in kdlit_cli("fit", "--config", "again.yaml", "--print_config")


def test_an_explicit_run_dir_starts_resumes_and_is_never_overwritten(project, kdlit_cli):
    again = ("fit", "--config", "tiny.yaml", "--run_dir=here", "--ckpt_path=last")
    assert "starting afresh" in kdlit_cli(*again)
    assert "here/checkpoints/last.ckpt" in kdlit_cli(*again, "--trainer.max_epochs=3")
    assert "here/checkpoints/last.ckpt" in kdlit_cli("test", "--config", "here/config.yaml", "--ckpt_path=last")
    assert (project / "here" / "test.json").exists()
    out = kdlit_cli("fit", "--config", "tiny.yaml", "--run_dir=here")
    assert "here already holds a run; go on with it by --ckpt_path=last" in out


def test_the_last_checkpoint_is_of_the_last_epoch_also_when_another_was_best(project, kdlit_cli):
    kdlit_cli("fit", "--config", "tiny.yaml", "--trainer.max_epochs=4", "--model.optimizer=torch.optim.SGD",
              "--model.optimizer.lr=1e-9")  # fmt: skip
    checkpoints = project / "runs/tiny/version_0/checkpoints"
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 16
    assert torch.load(checkpoints / "best.ckpt", weights_only=True)["global_step"] < 16


def test_without_validation_only_the_last_is_kept(project, kdlit_cli):
    out = kdlit_cli("fit", "--config", "tiny.yaml", "--data.val_size=0")
    assert [path.name for path in (project / "runs/tiny/version_0/checkpoints").glob("[!p]*")] == ["last.ckpt"]
    assert "student, distilled" not in out
    assert "Student alone: runs/tiny/version_0/student.pt" in out


def test_rare_validation_still_saves_the_last_every_epoch(project, kdlit_cli):
    kdlit_cli("fit", "--config", "tiny.yaml", "--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2")
    checkpoints = project / "runs/tiny/version_0/checkpoints"
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 12
    assert torch.load(checkpoints / "best.ckpt", weights_only=True)["epoch"] == 1


def test_other_loggers_come_beside_the_log_of_the_run(project, kdlit_cli):
    wandb = ("--trainer.logger=WandbLogger", "--trainer.logger.offline=true", "--trainer.logger.save_dir=runs")
    kdlit_cli("fit", "--config", "tiny.yaml", *wandb)
    assert (project / "runs/tiny/version_0/metrics.csv").exists()
    assert list((project / "runs" / "wandb").glob("offline-run-*"))


def test_loggers_can_be_switched_off(project, kdlit_cli):
    kdlit_cli("fit", "--config", "tiny.yaml", "--trainer.logger=false")
    assert not (project / "runs/tiny/version_0/metrics.csv").exists()
    assert (project / "runs/tiny/version_0/student.pt").exists()


MISTAKES = {
    "loss of a reserved name": (("ce:", "type:"), (), ["a loss cannot be named 'type'"]),
    "no accumulation": (None, ("--trainer.accumulate_grad_batches=0",), ["accumulate_grad_batches must be >= 1, got 0"]),
    "no threads": (None, ("--torch_threads=0",), ["torch_threads must be >= 1, got 0"]),
    "checkpoint elsewhere": (None, ("--checkpoint.filename=../best",), ["must stay in the folder of the run"]),
    "checkpoint of no name": (None, ("--checkpoint.filename={epoch}{",), ["no name with figures in braces"]),
    "misspelled key in the main config": (
        ("student:", "studnt:"), (), ["unknown key 'studnt'", "tiny.yaml, line 7", "'student'"]),
    "misspelled key of a class": (
        ("{width: 16}", "{widht: 16}"), (), ["unknown key 'widht' of own.OwnNet in", "tiny.yaml, line 8", "'width'"]),
    "misspelled trainer key": (
        ("max_epochs", "max_epoch"), (), ["unknown key 'trainer.max_epoch'", "tiny.yaml, line 2", "'trainer.max_epochs'"]),
    "misspelled section": (("data:", "dta:"), (), ["unknown key 'dta.class_path'", "line 3"]),
    "unknown loss": (
        ("CrossEntropyLoss", "CrossEntropyLos"), (),
        ["unknown class 'CrossEntropyLos'", "tiny.yaml, line 11", "'CrossEntropyLoss'"]),
    "unknown loss on the command line": (
        None, ("--model.losses.kd.loss=DKDD",), ["unknown class 'DKDD' on the command line", "'DKDLoss'"]),
    "misspelled value on the command line": (
        None, ("--model.losses.kd.loss.temprature=3",), ["unknown key 'temprature' of kdlit.losses.KDLoss", "'temperature'"]),
    "misspelled trainer key on the command line": (
        None, ("--trainer.max_epoch=3",), ["unknown key 'trainer.max_epoch' on the command line", "'trainer.max_epochs'"]),
    "misspelled term": (None, ("--model.losses.kdd.weight=2",), ["a term has no loss; is its name misspelled?"]),
    "misspelled option with a name": (
        None, ("--model.performance=quick",), ["model.performance: must be one of 'plain', 'exact', 'fast'", "'quick' on the command line"]),
    "misspelled logger": (None, ("--trainer.logger=WandbLoger",), ["unknown class 'WandbLoger'", "'WandbLogger'"]),
    "option that does not exist": (None, ("--modle.x=1",), ["unknown key 'modle.x' on the command line"]),
    "name missing in a module": (
        ("own.own_builder", "torchvision.models.resnet19"), (),
        ["torchvision.models has no 'resnet19'", "line 7", "'resnet18'"]),
    "file that a config names": (("losses/kd.yaml", "losses/kdd.yaml"), (), ["there is no file 'losses/kdd.yaml'", "line 12"]),
    "wrong type": (None, ("--model.losses.kd.weight=abc",), ["losses.weight", "abc"]),
    "temperature": (None, ("--model.losses.kd.loss.temperature=-1",), ["temperature must be > 0, got -1.0"]),
    "class counts": (
        None, ("--model.student.num_classes=6",), ["student gives 6 logits and the teacher 5; set num_classes"]),
    "classes of the data": (
        ("{width: 16}", "{width: 16, num_classes: 6}"), ("--model.student.num_classes=6",), ["the data has 5 classes"]),
    "no teacher": (None, ("--model.teacher=null",), ["losses.kd (KDLoss) needs a teacher"]),
    "missing checkpoint": (None, ("--ckpt_path=no/such.ckpt",), ["--ckpt_path: there is no file", "no/such.ckpt"]),
    "missing teacher file": (
        ("{class_path: own.OwnNet, init_args: {width: 16}}",
         "{class_path: kdlit.models.from_checkpoint, init_args: {model: {class_path: own.OwnNet}, path: no.pt}}"),
        (), ["no.pt", "no such file"]),
    "missing config": (None, ("--config=nothing.yaml",), ["nothing.yaml"]),
    "unreadable yaml": (("trainer:", "trainer: ["), (), ["Problems parsing config"]),
    "batch": (None, ("--data.batch_size=1000",), ["batch_size is 1000, but only 64 training pictures"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_clear_message_and_leave_nothing_behind(project, kdlit_cli, mistake):
    change, arguments, expected = MISTAKES[mistake]
    if change:
        text = (project / "tiny.yaml").read_text()
        assert change[0] in text
        (project / "tiny.yaml").write_text(text.replace(*change))
    before = {path for path in project.rglob("*") if "__pycache__" not in path.parts}
    out = kdlit_cli("fit", "--config", "tiny.yaml", *arguments)
    assert "kdlit: error:" in out
    assert "Traceback" not in out
    for part in expected:
        assert part in out, out
    assert len(out[out.index("kdlit: error:") :].splitlines()) <= 6, out
    assert {path for path in project.rglob("*") if "__pycache__" not in path.parts} == before


def test_classes_go_by_their_short_names(project, kdlit_cli):
    for option in ("--data.help=DigitPairs", "--data.help=CIFAR100", "--model.losses.help=DKDLoss"):
        out = kdlit_cli("fit", option)
        assert "usage: kdlit [--" in out, out
        assert "error" not in out
    out = kdlit_cli("fit", "--config", "tiny.yaml", "--data=DigitPairs", "--print_config")
    assert "class_path: kdlit.data.DigitPairs" in out


YAML_COMPOSITION = """
model:
  init_args:
    losses:
      ce: {loss: {class_path: CrossEntropyLoss}}
      ls_dkd_ctkd:
        weight: 9.0
        warmup_epochs: 4
        loss:
          class_path: LogitStandardization
          init_args:
            loss:
              class_path: GlobalTemperature
              init_args: {loss: {class_path: DKDLoss, init_args: {beta: 2.0}}}
      ea_mlkd:
        weight: 0.5
        loss: {class_path: EntropyWeighting, init_args: {loss: {class_path: MLKDLoss}}}
"""


def test_wrappers_compose_from_yaml_alone_and_every_term_is_logged(project, kdlit_cli):
    (project / "composed.yaml").write_text(YAML_COMPOSITION)
    kdlit_cli("fit", "--config", "tiny.yaml", "--config", "composed.yaml", "--run_dir=out")
    log = [row for row in rows(project / "out" / "metrics.csv") if row["train/loss"]]
    assert len(log) == 2
    for epoch, row in enumerate(log):
        value = {name: float(row[f"train/loss/{name}"]) for name in ("ce", "ls_dkd_ctkd", "ea_mlkd")}
        expected = value["ce"] + 9 * (epoch + 1) / 4 * value["ls_dkd_ctkd"] + 0.5 * value["ea_mlkd"]
        assert float(row["train/loss"]) == pytest.approx(expected, rel=1e-4)
    state = torch.load(project / "out" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    learned = state["losses.ls_dkd_ctkd.loss.loss.global_score"]
    assert learned != 1.0, "the temperature must have been learned, and saved"
    assert not [name for name in torch.load(project / "out" / "student.pt")["model"] if "score" in name]


BAD_STEPS = {
    "vector": ("logits).square().mean()", "logits).square()", "losses.own (OwnLoss) must return a scalar tensor, got shape (16, 5)"),
    "number": ("return self.strength * (student.logits - teacher.logits).square().mean()", "return 1.0",
               "losses.own (OwnLoss) must return a scalar tensor, got float"),
    "nothing": ("return self.strength * ", "", "losses.own (OwnLoss) must return a scalar tensor, got NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BAD_STEPS)
def test_what_a_users_loss_gives_back_is_checked_and_a_failed_run_leaves_nothing(project, kdlit_cli, mistake):
    before, after, expected = BAD_STEPS[mistake]
    text = OWN.replace(before, after)
    if mistake == "nothing":
        text = text.replace(
            "(student.logits - teacher.logits).square().mean()",
            "(student.logits - teacher.logits)\n        return None",
        )
        text = text.replace("        (student", "        _ = (student")
    (project / "own.py").write_text(text)
    out = kdlit_cli("fit", "--config", "tiny.yaml", "--model.losses.own.loss.class_path=own.OwnLoss")
    assert expected in out
    assert not (project / "runs").exists()


BAD_DATA = {
    "float labels": ("b['target'].float()", "target must hold one integer class index"),
    "labels out of range": ("b['target'] + 3", "target must lie in 0..4"),
    "labels with an axis too many": (
        "b['target'][:, None]",
        "target must hold one integer class index for each of the",
    ),
}


@pytest.mark.parametrize("mistake", BAD_DATA)
def test_labels_of_a_users_data_are_checked(project, kdlit_cli, mistake):
    expression, expected = BAD_DATA[mistake]
    (project / "own.py").write_text(
        OWN + f"\n\nclass BadData(OwnData):\n    collate = staticmethod(lambda b: (b['image'], {expression}))\n"
    )
    out = kdlit_cli("fit", "--config", "tiny.yaml", "--data=own.BadData")
    assert f"kdlit: error: {expected}" in out


def test_pictures_of_a_users_data_are_checked(project, kdlit_cli):
    for expression, expected in (
        ("b['image'].byte()", "image must be floating point of shape (batch, 3, height, width), got torch.uint8"),
        ("b['image'][:, :1]", "got torch.float32 of shape"),
        ("b['image'].double()", "image is float64, but the networks are float32"),
    ):
        sys.modules.pop("own", None)
        (project / "own.py").write_text(
            OWN + f"\n\nclass BadData(OwnData):\n    collate = staticmethod(lambda b: ({expression}, b['target']))\n"
        )
        assert expected in kdlit_cli("fit", "--config", "tiny.yaml", "--data=own.BadData")


def test_a_part_of_the_batch_that_is_missing_is_named(project, kdlit_cli):
    (project / "own.py").write_text(
        OWN + "\n\nclass Unlabelled(OwnData):\n    collate = staticmethod(lambda b: {'image': b['image']})\n"
    )
    out = kdlit_cli("fit", "--config", "tiny.yaml", "--data=own.Unlabelled", "--data.val_size=0")
    assert "losses.ce needs 'target' in the batch, which has only image" in out


def test_a_file_beside_the_config_is_found_from_anywhere(project, kdlit_cli, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(project)])
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    out = kdlit_cli("fit", "--config", project / "tiny.yaml", "--print_config")
    assert "class_path: own.OwnData" in out, out


def test_files_that_are_no_checkpoint_of_this_run_are_refused(project, kdlit_cli):
    kdlit_cli("fit", "--config", "tiny.yaml", "--run_dir=here")
    out = kdlit_cli("fit", "--config", "tiny.yaml", "--ckpt_path=here/student.pt")
    assert "student.pt is not a checkpoint of a run, such as checkpoints/last.ckpt" in out
    out = kdlit_cli("test", "--config", "tiny.yaml", "--model.student=own.OwnNet", "--model.student.width=9",
                    "--ckpt_path=here/checkpoints/last.ckpt")  # fmt: skip
    assert "the checkpoint is not of this student and these losses" in out
    last = project / "here" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:5000])
    out = kdlit_cli("fit", "--config", "tiny.yaml", "--run_dir=here", f"--ckpt_path={last}")
    assert "last.ckpt is not a whole checkpoint: File is not a zip file" in out
    assert "previous.ckpt is the newest whole one beside it" in out
    assert "Traceback" not in out


def test_run_folders_that_cannot_be_are_refused(project, kdlit_cli, request):
    (project / "file").write_text("")
    assert "--run_dir:" in (out := kdlit_cli("fit", "--config", "tiny.yaml", "--run_dir=file/x"))
    assert "is a file, not a folder" in out
    assert "monitor" in (out := kdlit_cli("fit", "--config", "tiny.yaml", "--checkpoint.monitor=val/acc"))
    assert "Traceback" not in out


def test_the_table_after_a_resume_is_of_the_last_epoch(project, kdlit_cli):
    run = ("fit", "--config", "tiny.yaml", "--run_dir=here", "--ckpt_path=last", "--trainer.check_val_every_n_epoch=2")
    kdlit_cli(*run)
    for epochs in (3, 3):  # a resume that ends between validations, and one with nothing left to do
        out = kdlit_cli(*run, f"--trainer.max_epochs={epochs}", "--accept_changes=true")
        assert "after epoch 3" in out
        assert "teacher" in out.split("after epoch 3")[1]
        assert "student, distilled" in out
    out = kdlit_cli("test", "--config", "here/config.yaml", "--ckpt_path=last")
    assert json.loads((project / "here" / "test.json").read_text())["epochs"] == 3
    assert "warning" in kdlit_cli("test", "--config", "tiny.yaml", "--run_dir=other")


def test_without_epochs_no_file_is_promised(project, kdlit_cli):
    out = kdlit_cli("fit", "--config", "tiny.yaml", "--trainer.max_epochs=0")
    for line in out.splitlines():
        if line.startswith(("Checkpoint:", "Student alone:")):
            assert (project / line.split(": ")[1]).exists(), line


def test_a_loss_cannot_be_taken_out_on_the_command_line(project, kdlit_cli):
    assert "set the weight of a loss to 0 instead" in kdlit_cli(
        "fit", "--config", "tiny.yaml", "--model.losses.ce=null"
    )


def test_evaluating_a_run_that_never_was_is_an_error(project, kdlit_cli):
    out = kdlit_cli("test", "--config", "tiny.yaml", "--ckpt_path=last")
    assert "no run in" in out
    assert "has a checkpoint yet" in out


def test_a_bug_in_a_users_own_code_keeps_its_traceback(project, kdlit_cli):
    (project / "own.py").write_text(OWN.replace("return self.strength *", "return undefined_name *"))
    with pytest.raises(NameError, match="undefined_name"):
        kdlit_cli("fit", "--config", "tiny.yaml", "--model.losses.own.loss.class_path=own.OwnLoss")


def test_help_and_version_answer_without_loading_torch():
    for option, expected in (("--help", "usage: kdlit {fit,validate,test,predict}"), ("--version", "kdlit 0.")):
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "kdlit", option], capture_output=True, text=True, check=True
        )
        assert expected in done.stdout
        assert " torch" not in done.stderr
        assert time.monotonic() - start < 3


@pytest.mark.parametrize("command", ["report", "export", "compare", "fit"])
def test_ctrl_c_ends_in_one_line_wherever_it_comes(command, kdlit_cli, monkeypatch):
    class Pressed:
        """Found wherever the command looks for its room, or what that imports."""

        def find_spec(self, name, path=None, target=None):
            if name in (*COMMANDS.values(), "kdlit.cli"):
                raise KeyboardInterrupt

    for name in (*COMMANDS.values(), "kdlit.cli"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Pressed(), *sys.meta_path])
    assert kdlit_cli(command, "there") == "kdlit: stopped by Ctrl-C\nexit 130"
    monkeypatch.setenv("KDLIT_TRACEBACK", "1")
    with pytest.raises(KeyboardInterrupt):
        kdlit_cli(command, "there")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["dashboard", "--print"], ["--help"]])
def test_a_reader_that_has_gone_ends_the_command_in_silence(arguments, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "kdlit", *arguments],
            stdout=gone, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_pipe_that_breaks_is_not_taken_for_the_output(kdlit_cli, monkeypatch):
    def broken(arguments):
        raise BrokenPipeError

    monkeypatch.setattr("kdlit.workspace.main", broken)
    with pytest.raises(BrokenPipeError):
        kdlit_cli("dashboard")


def test_two_processes_train_one_student(project):
    script = project / "two.py"
    script.write_text(
        "import sys\nfrom kdlit.cli import main\n"
        "sys.argv[1:] = 'fit --config tiny.yaml --trainer.strategy=ddp --trainer.devices=2 --torch_threads=1'.split()\n"
        "if __name__ == '__main__':\n    main()\n"
    )
    path = os.pathsep.join([str(project), os.path.dirname(os.path.dirname(__file__))])
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True, text=True, cwd=project, timeout=300,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = project / "runs" / "tiny"
    assert [path.name for path in run.iterdir()] == ["version_0"]
    checkpoint = torch.load(run / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4  # 2 epochs of 64 pictures, 16 on each of 2 processes a step
    assert not [name for name in checkpoint["state_dict"] if name.startswith("teacher.")]
    assert done.stdout.count("Student alone:") == 1


def test_data_options_can_be_given_on_the_command_line(project, kdlit_cli):
    (project / "classes.yaml").write_text(
        "data:\n  class_path: tests.conftest.TinyData\n  init_args:\n    subset: 0.5\n    label_noise: 0.1\n"
        "    strong_view: true\n    teacher_input: {size: 4, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}\n"
        "    transforms: [{class_path: torchvision.transforms.v2.RandomHorizontalFlip}]\n"
        "    subset_by:\n      class_path: kdlit.data.TeacherConfidence\n"
        "      init_args: {teacher: {class_path: own.OwnNet}, keep: least}\n"
        "model: {init_args: {teacher_input_size: [3, 4, 4]}}\n"
    )
    out = kdlit_cli("fit", "--config", "tiny.yaml", "--config", "classes.yaml", "--data.subset_by.keep=most",
                    "--run_dir=here", "--trainer.max_epochs=1")  # fmt: skip
    assert "error" not in out, out
    config = yaml.safe_load((project / "here" / "config.yaml").read_text())
    assert config["data"]["init_args"]["subset_by"]["init_args"]["keep"] == "most"
    with (project / "here" / "metrics.csv").open() as file:
        steps = max(int(row["step"]) for row in csv.DictReader(file))
    assert steps == 1  # 32 of 64 pictures in batches of 16


def test_a_figure_that_nobody_logs_is_refused_with_the_way_to_name_another(project, kdlit_cli):
    told = kdlit_cli("fit", "--config", "tiny.yaml", "--checkpoint.monitor=val/error")
    assert "could not find the monitored key" in told
    assert "name a figure that is logged: --checkpoint.monitor=val/NAME --checkpoint.mode=min" in told
