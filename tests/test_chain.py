"""A chain of distillations: trained in turn, resumed, never trained twice, and its mistakes told beforehand."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from kdlit.chain import read_chain

ROOT = Path(__file__).parents[1]

OWN = '''
import os
import torch
from kdlit.losses import DistillationLoss


class Watch(DistillationLoss):
    """Keeps the teacher that it gets, writes down every epoch, and dies with the process where a test wants it."""

    def setup(self, student, teacher, example):
        self.width = student.fc.in_features
        torch.save(teacher.state_dict(), f"teacher_of_{self.width}.pt")

    def on_train_epoch_start(self, epoch, max_epochs):
        with open("epochs.txt", "a") as file:
            file.write(f"{self.width}:{epoch} ")
        if epoch == 2 and os.path.exists("die"):
            os._exit(9)

    def forward(self, student, teacher, batch):
        return (student.logits - teacher.logits).square().mean()
'''

PLAIN = """
trainer: {max_epochs: 4, accelerator: cpu, enable_progress_bar: false}
last: {every_n_steps: 1}
data: {class_path: tests.conftest.TinyData}
torch_threads: 1
model:
  class_path: kdlit.modules.ClassificationDistillation
  init_args:
    student: {class_path: tests.conftest.TinyNet}
    input_size: [3, 8, 8]
    losses:
      ce: {loss: {class_path: CrossEntropyLoss}}
"""

CHAIN = """
run_dir: runs/chain
links:
  teacher:
    configs: [plain.yaml]
    overrides: {model.student.width: 16, trainer.max_epochs: 1}
  assistant:
    configs: [plain.yaml]
    teacher: teacher
    overrides: {model.student.width: 12, model.losses.watch.loss: own.Watch}
  student:
    configs: [plain.yaml]
    teacher: assistant
    overrides: {model.losses.watch.loss: {class_path: own.Watch}, trainer.callbacks: null}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's folder, with the chain and its configs in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "chains").mkdir()
    (tmp_path / "chains" / "plain.yaml").write_text(PLAIN)
    (tmp_path / "chains" / "chain.yaml").write_text(CHAIN)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield tmp_path
    sys.modules.pop("own", None)


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def same_weights(path, exported):
    weights, expected = torch.load(path, weights_only=True), torch.load(exported, weights_only=True)["model"]
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)


def test_a_chain_is_trained_in_turn_resumes_and_is_never_trained_twice(project, kdlit_cli):
    command = ("chain", "--config", "chains/chain.yaml")
    run, epochs, die = project / "runs/chain", project / "epochs.txt", project / "die"
    (run / "teacher").mkdir(parents=True)
    (run / "teacher" / "metrics.csv").write_text("step\n0\n")  # of a process that ended in its first epoch

    die.touch()
    out = kdlit_cli(*command)
    assert (
        "kdlit: error: link 'assistant' failed with exit status 9; what it has done is in runs/chain/assistant" in out
    )
    assert out.endswith("exit 1")
    assert "Link 1 of 3, teacher, in runs/chain/teacher: begins" in out
    assert epochs.read_text().split() == ["12:0", "12:1", "12:2"]
    assert not (run / "assistant" / "student.pt").exists()
    teacher = contents(run / "teacher")

    die.unlink()
    out = kdlit_cli(*command)
    assert "teacher, in runs/chain/teacher: finished before" in out
    assert "assistant, in runs/chain/assistant: goes on" in out
    assert contents(run / "teacher") == teacher
    again = ["12:2", "12:3"]
    assert epochs.read_text().split() == ["12:0", "12:1", "12:2", *again, "8:0", "8:1", "8:2", "8:3"]
    for student, link in ((12, "teacher"), (8, "assistant")):
        assert same_weights(project / f"teacher_of_{student}.pt", run / link / "student.pt")
    table = [[cell.strip() for cell in line.split("│")] for line in out.splitlines()]
    for name, width in (("teacher", 16), ("assistant", 12), ("student", 8)):
        exported = torch.load(run / name / "student.pt", weights_only=True)
        (row,) = (row for row in table if len(row) == 7 and row[1] == name)
        assert row[2].startswith("TinyNet(")
        assert int(row[3]) == exported["num_parameters"] == 28 * width + 2 * width + 5 * width + 5
        assert row[4] == f"{100 * exported['metrics']['val/top1']:.2f}"

    finished = contents(project)
    assert "The chain" in kdlit_cli(*command)
    chain = project / "chains" / "chain.yaml"
    chain.write_text(CHAIN.replace("width: 12", "width: 10"))
    out = kdlit_cli(*command)
    assert out == (
        "kdlit: error: link 'assistant' was trained with another config: model.init_args.student.init_args.width was "
        "12, is now 10; name another --run_dir, or delete runs/chain/assistant to train it again\nexit 2"
    )
    chain.write_text(CHAIN)
    os.utime(chain, ns=(finished[chain][1], finished[chain][1]))
    assert contents(project) == finished

    shutil.rmtree(run / "teacher")
    out = kdlit_cli(*command)
    assert "link 'assistant' was trained by 'teacher', but runs/chain/teacher/student.pt is gone" in out
    assert not (run / "teacher").exists()


def test_a_run_that_is_not_of_a_chain_is_left_alone(project, kdlit_cli):
    (project / "here" / "teacher").mkdir(parents=True)
    (project / "here" / "teacher" / "student.pt").touch()
    out = kdlit_cli("chain", "--config", "chains/chain.yaml", "--run_dir", "here")
    assert "here/teacher holds a run that is not of a chain; name another --run_dir" in out
    assert out.endswith("exit 2")


CHILD = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path("ready").touch()
time.sleep(60)
"""


def test_signals_are_passed_on_and_the_status_is_that_of_the_link(project, kdlit_cli, monkeypatch):
    start = subprocess.Popen

    def started(command, **kwargs):
        assert command[1:4] == ["-m", "kdlit", "fit"]
        process = start([sys.executable, "-c", CHILD])
        threading.Thread(target=stop, daemon=True).start()
        return process

    def stop():
        while not Path("ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("kdlit.chain.subprocess.Popen", started)
    before = signal.getsignal(signal.SIGTERM)
    out = kdlit_cli("chain", "--config", "chains/chain.yaml")
    assert "link 'teacher' was stopped; kdlit chain with the same arguments goes on" in out
    assert out.endswith("exit 75")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_ends_the_chain_though_its_link_is_only_starting(project, kdlit_cli, monkeypatch):
    start = subprocess.Popen
    both = "import os, signal; os.kill(os.getppid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)"
    monkeypatch.setattr("kdlit.chain.subprocess.Popen", lambda _: start([sys.executable, "-S", "-c", both]))
    out = kdlit_cli("chain", "--config", "chains/chain.yaml")
    assert "link 'teacher' failed" not in out
    assert out.endswith("kdlit: stopped by Ctrl-C; kdlit chain with the same arguments goes on\nexit 130")


def test_a_link_may_have_a_teacher_of_its_configs_another_or_none(project):
    path = project / "chains" / "other.yaml"
    path.write_text(
        "links:\n"
        "  a: {configs: [plain.yaml]}\n"
        "  b: {configs: [plain.yaml], teacher: kdlit.models.resnet8}\n"
        "  c: {configs: [plain.yaml], teacher: {class_path: own.Net, init_args: {width: 3}}}\n"
        "  d: {configs: [plain.yaml], teacher: null}\n"
    )
    links = read_chain(path)
    assert [link.folder for link in links] == [Path("runs/other") / name for name in "abcd"]
    assert [link.arguments[1:] for link in links] == [
        [],
        ["--model.teacher=kdlit.models.resnet8"],
        ['--model.teacher={"class_path": "own.Net", "init_args": {"width": 3}}'],
        ["--model.teacher=null"],
    ]


def test_the_first_of_mutual_students_is_handed_on(project):
    path = project / "chains" / "mutual.yaml"
    path.write_text(
        "links:\n"
        "  a:\n"
        "    configs: [plain.yaml]\n"
        "    overrides:\n"
        "      model:\n"
        "        class_path: kdlit.modules.MutualLearning\n"
        "        init_args:\n"
        "          students: {p: {class_path: tests.conftest.TinyNet, init_args: {width: 5}}, "
        "q: {class_path: tests.conftest.TinyNet}}\n"
        "  b: {configs: [plain.yaml], teacher: a}\n"
    )
    links = read_chain(path)
    for link in links:
        link.resolve()
    assert links[1].config["model"]["init_args"]["teacher"] == {
        "class_path": "kdlit.models.from_checkpoint",
        "init_args": {
            "model": {"class_path": "tests.conftest.TinyNet", "init_args": {"num_classes": 5, "width": 5}},
            "path": "runs/mutual/a/student.pt",
            "part": None,
        },
    }


MISTAKES = {
    "unknown teacher": (
        ("teacher: teacher", "teacher: teecher"),
        ["chains/chain.yaml: links.assistant.teacher: there is no link 'teecher'; did you mean 'teacher'?"]),
    "teacher that stands below": (
        ("teacher: teacher", "teacher: student"),
        ["links.assistant.teacher: 'student' is not trained yet; a link learns from one that stands above it"]),
    "its own teacher": (("teacher: teacher", "teacher: assistant"), ["'assistant' is not trained yet"]),
    "teacher of no kind": (("teacher: teacher", "teacher: 3"), ["must be an earlier link, a network or null, got 3"]),
    "missing config": (
        ("configs: [plain.yaml]", "configs: [plane.yaml]"),
        ["links.teacher.configs: there is no file 'plane.yaml' in", "/chains"]),
    "no config": (("configs: [plain.yaml]", "configs: []"), ["configs must be a list of at least one config file"]),
    "unknown key": (("run_dir:", "rundir:"), ["chain.yaml: unknown key 'rundir'; did you mean 'run_dir'?"]),
    "unknown key of a link": (
        ("overrides:", "override:"), ["links.teacher: unknown key 'override'; did you mean 'overrides'?"]),
    "overrides of another form": (
        ("{model.student.width: 16, trainer.max_epochs: 1}", "[--model.student.width=16]"),
        ["links.teacher.overrides must map options to values"]),
    "what the chain sets": (
        ("model.student.width: 12", "model.teacher.width: 12"), ["the chain itself sets model.teacher.width"]),
    "name that is no folder": (("  teacher:\n", "  a/b:\n"), ["letters, digits, _ and -, got 'a/b'"]),
    "no links": (("links:", "links: {}\nx:"), ["unknown key 'x'"]),
    "link without settings": (
        ("  student:\n", "  student: 3\n  other:\n"), ["links.student: must have the keys configs, overrides, teacher"]),
    "links as a list": ((CHAIN, "links: [a, b]"), ["links must map the name of each link", "['a', 'b']"]),
    "folder that is none": (("runs/chain", "[runs]"), ["run_dir must be a folder, got ['runs']"]),
    "no YAML": (("links:", "links: ["), ["chain.yaml: is not YAML"]),
    "misspelled key of a config": (
        ("model.student.width: 12", "model.student.widht: 12"),
        ["link 'assistant': unknown key 'widht' of tests.conftest.TinyNet", "'width'"]),
    "network that does not exist": (
        ("teacher: teacher", "teacher: kdlit.models.resnet21"), ["link 'assistant': ", "resnet21", "'resnet20'"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_message_before_anything_runs(project, kdlit_cli, mistake):
    change, expected = MISTAKES[mistake]
    assert change[0] in CHAIN
    (project / "chains" / "chain.yaml").write_text(CHAIN.replace(*change, 1))
    before = contents(project)
    out = kdlit_cli("chain", "--config", "chains/chain.yaml")
    assert out.startswith("kdlit: error: ")
    assert out.endswith("exit 2")
    assert len(out.splitlines()) == 2, out
    for part in expected:
        assert part in out, out
    assert {path: seen for path, seen in contents(project).items() if "__pycache__" not in path.parts} == before


def test_a_missing_chain_file_is_named(project, kdlit_cli):
    out = kdlit_cli("chain", "--config=no.yaml")
    assert out == "kdlit: error: no.yaml: cannot be read: No such file or directory\nexit 2"
    assert "required: --config" in kdlit_cli("chain")


def test_help_shows_a_chain_file_without_loading_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kdlit", "chain", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "teacher: assistant" in done.stdout
    assert " torch" not in done.stderr


def test_the_quickstart_chain_resolves(monkeypatch):
    monkeypatch.chdir(ROOT)
    links = read_chain(Path("configs/quickstart/chain.yaml"))
    for link in links:
        link.resolve()
    assert [link.name for link in links] == ["assistant", "student"]
    teachers = [link.config["model"]["init_args"]["teacher"] for link in links]
    assert teachers[0]["class_path"] == "kdlit.models.digit_pairs_teacher"
    assert teachers[1]["init_args"]["model"]["init_args"]["depth"] == 14
    assert yaml.safe_load(yaml.safe_dump(links[1].config)) == links[1].config
