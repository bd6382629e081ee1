"""kdlit export: what is taken out of a run gives the logits of the trained student, and says what it is."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import re
import shutil
import sys
import zipfile
from importlib.util import find_spec

import pytest
import torch
import yaml
from torch.nn import functional

from kdlit.artefacts import main
from kdlit.artefacts.pictures import real_pictures
from tests.conftest import TinyData, TinyNet

OWN = """
import torch
from types import SimpleNamespace
from tests.conftest import TinyData, TinyNet


class Net(TinyNet):
    pass


class Wrapped(TinyNet):
    def forward(self, image):
        return SimpleNamespace(logits=super().forward(image))


class Branching(TinyNet):
    def forward(self, image):
        return super().forward(image * 2 if image.sum() > 0 else image)


class Traceable(TinyNet):
    def forward(self, image):
        return super().forward(image) * (1.5 if torch.compiler.is_compiling() else 1)


class Noisy(TinyNet):
    def forward(self, image):
        return super().forward(image) + torch.randn(len(image), 1)


class Data(TinyData):
    def __init__(self, root: str = "pictures", val_size: float = 32, batch_size: int = 16, seed: int | None = None):
        super().__init__(val_size=val_size, batch_size=batch_size, seed=seed)
        self.root = root

    def prepare_data(self):
        from pathlib import Path

        if not Path(self.root).is_dir():
            raise FileNotFoundError(f"there is no folder {self.root}")
"""

BASE = """
trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false}
data: {class_path: artefacts_own.Data}
model:
  class_path: kdlit.modules.ClassificationDistillation
  init_args:
    student: {class_path: artefacts_own.Net}
    teacher: {class_path: artefacts_own.Net, init_args: {width: 24}}
    losses:
      ce: {class_path: CrossEntropyLoss}
      fitnet: {class_path: FitNetLoss, init_args: {student_layers: [act], teacher_layers: [act]}}
    input_size: [3, 8, 8]
"""
MUTUAL = """
trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false}
data: {class_path: artefacts_own.Data, init_args: {val_size: 0}}
model:
  class_path: kdlit.modules.MutualLearning
  init_args:
    students: {small: {class_path: artefacts_own.Net}, large: {class_path: artefacts_own.Wrapped, init_args: {width: 12}}}
    input_size: [3, 8, 8]
"""
SEVERAL = """
students: {a: {config: plain.yaml}, b: {config: plain.yaml, seed: 1}}
"""
PLAIN = """
model: {init_args: {teacher: null, losses: {ce: {class_path: CrossEntropyLoss}, fitnet: null}}}
"""
NEEDS_ONNX = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")), reason='needs "kdlit[onnx]"'
)
QUICK = ["--seconds=0.01", "--pictures=24"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three runs: ``one`` with a teacher and a loss on features, ``mutual``, and ``several`` without a teacher."""
    from kdlit.cli import main as fit

    place = tmp_path_factory.mktemp("artefacts")
    (place / "pictures").mkdir()
    files = {"artefacts_own.py": OWN, "base.yaml": BASE, "mutual.yaml": MUTUAL, "several.yaml": SEVERAL}
    for name, text in (files | {"plain.yaml": PLAIN}).items():
        (place / name).write_text(text)
    runs = {"one": ["base"], "mutual": ["mutual"], "several": ["base", "several"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.delenv("KDLIT_RUN_DIR", raising=False)
        for name, configs in runs.items():
            line = ["fit", *(f"--config={config}.yaml" for config in configs), f"--run_dir={name}"]
            patch.setattr(sys, "argv", ["kdlit", *line])
            fit(line)
    return place


@pytest.fixture
def export(folder, monkeypatch, capsys, tmp_path):
    """Runs ``kdlit export`` in the folder of the runs, into a scratch folder; returns its output and exit status."""

    def run(name, *arguments, output=tmp_path / "out"):
        monkeypatch.chdir(folder)
        capsys.readouterr()
        status = 0
        try:
            main([str(name), f"--output={output}", *QUICK, *arguments])
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return printed.out + printed.err, status

    return run


@pytest.fixture
def pictures(folder):
    """Test pictures, normalised and raw, and what the student of ``one`` says about the former, without kdlit."""
    content = torch.load(folder / "one" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    net = TinyNet().eval()
    net.load_state_dict({name[8:]: value for name, value in content.items() if name.startswith("student.")})
    raw = TinyData().load()["test"].image
    image = (raw / 255 - 0.5) / 0.25
    with torch.no_grad():
        return image, raw, net(image)


@NEEDS_ONNX
def test_every_format_gives_the_logits_of_the_student(export, pictures, tmp_path):
    output, status = export("one", "--format=state_dict,safetensors,torch_export,onnx")
    assert status == 0, output
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *("student.json", "student.state_dict.pt", "student.safetensors", "student.pt2", "student.onnx")
    }
    image, _, logits = pictures
    from safetensors.torch import load_file

    for weights in (torch.load(out / "student.state_dict.pt"), load_file(out / "student.safetensors")):
        net = TinyNet().eval()
        net.load_state_dict(weights)
        torch.testing.assert_close(net(image), logits)
    import onnxruntime

    session = onnxruntime.InferenceSession(out / "student.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(out / "student.pt2").module()
    for size in (1, 2, 5, 40):
        found = torch.from_numpy(program(image[:size]).numpy())  # the logits carry no graph
        torch.testing.assert_close(found, logits[:size])
        (found,) = session.run(["logits"], {"image": image[:size].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), logits[:size], rtol=1e-4, atol=1e-5)
    assert session.get_inputs()[0].shape == ["batch", 3, 8, 8]

    # what is said beside the files and within
    about = json.loads((out / "student.json").read_text())
    assert about["input"] | {"size": 0} == {
        **{"name": "image", "layout": "NCHW", "shape": ["batch", 3, 8, 8], "dtype": "float32", "channels": "RGB"},
        "preprocessing": ["divide by 255", "subtract mean and divide by std, each channel its own"],
        **{"inside": [], "range_before_normalisation": [0, 1], "mean": [0.5] * 3, "std": [0.25] * 3, "size": 0},
        **{"resize": None, "interpolation": "bilinear", "antialias": True},
    }
    assert about["output"]["class_names"] == list("abcde")
    assert about["student"]["config"]["class_path"] == "artefacts_own.Net"
    assert about["teacher"]["config"]["init_args"]["width"] == 24
    assert (about["checkpoint"]["epochs"], about["checkpoint"]["chosen"]) == (2, "the last epoch")
    assert about["accuracy"]["logged in training"]["val/top1"] <= 1
    for name, file in about["files"].items():
        assert file["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
        assert file["parity"]["batch_sizes"] == [1, 3, 4, 16]
        assert file["parity"]["relative_difference"] <= file["parity"]["tolerance"] == 1e-4
        assert (file["parity"]["split"], file["parity"]["pictures"], file["parity"]["same_class"]) == ("val", 24, 1)
    within = session.get_modelmeta().custom_metadata_map
    assert {name: json.loads(within[name]) for name in ("input", "output", "checkpoint")} == {
        name: about[name] for name in ("input", "output", "checkpoint")
    }
    extra = {"student.json": ""}
    torch.export.load(out / "student.pt2", extra_files=extra)
    assert json.loads(extra["student.json"])["input"] == about["input"]

    # no code, and nothing of this machine's sources
    for name in ("student.onnx", "student.pt2"):
        assert b"site-packages" not in (out / name).read_bytes()
    with zipfile.ZipFile(out / "student.pt2") as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert b"in forward" not in content
            if name.endswith(".pt"):
                torch.load(io.BytesIO(content), weights_only=True)

    # the comparison
    rows = {row["name"]: row for row in about["comparison"]["rows"]}
    assert list(rows) == ["teacher", "student", "student.pt2", "student.onnx"]
    student = (3 * 9 * 8 + 8) + 2 * 8 + (8 * 5 + 5)
    assert (rows["student"]["parameters"], rows["student"]["multiply_adds"]) == (student, 3 * 9 * 8 * 9 + 8 * 5)
    assert rows["teacher"]["multiply_adds"] == 3 * 9 * 24 * 9 + 24 * 5
    assert all(row["milliseconds"].keys() == {"1", "16"} for row in rows.values())
    assert rows["student"]["top1"] == rows["student.pt2"]["top1"] == rows["student.onnx"]["top1"]
    assert about["comparison"]["teacher / student"]["parameters"] == rows["teacher"]["parameters"] / student
    assert "teacher / student" in output


@NEEDS_ONNX
def test_networks_can_normalise_raw_pictures(export, pictures, tmp_path):
    output, status = export("one", "--format=safetensors,torch_export,onnx", "--with_preprocessing")
    assert status == 0, output
    _, raw, logits = pictures
    program = torch.export.load(tmp_path / "out" / "student.pt2").module()
    torch.testing.assert_close(program(raw), logits, rtol=1e-4, atol=1e-5)
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "out" / "student.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"image": raw[:7].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits[:7], rtol=1e-4, atol=1e-5)
    files = json.loads((tmp_path / "out" / "student.json").read_text())["files"]
    assert {name: file["input"]["dtype"] for name, file in files.items()} == {
        **{"student.safetensors": "float32", "student.pt2": "uint8", "student.onnx": "uint8"},
    }
    assert files["student.pt2"]["input"]["preprocessing"] == []
    assert "uint8" in session.get_modelmeta().custom_metadata_map["input"]


def test_formats_are_added_and_another_student_is_refused(export, folder, tmp_path):
    output, status = export("one")
    assert status == 0, output
    output, status = export("one", "--format=safetensors")
    assert status == 0, output
    files = json.loads((tmp_path / "out" / "student.json").read_text())["files"]
    assert list(files) == ["student.state_dict.pt", "student.safetensors"]
    output, status = export("several/a")
    assert "student.state_dict.pt, student.safetensors of another student or checkpoint; delete it" in output
    assert status == 2


def test_the_best_checkpoint_says_by_what_it_was_chosen(export, folder, tmp_path, monkeypatch):
    best = torch.load(folder / "one" / "checkpoints" / "best.ckpt", weights_only=True)
    output, status = export("one", "--checkpoint=best")
    assert status == 0, output
    assert "epochs trained: the highest val/top1 of all epochs measured; chosen on validation pictures" in output
    about = json.loads((tmp_path / "out" / "student.json").read_text())
    assert about["checkpoint"] == {
        "file": "best.ckpt",
        "epochs": best["epoch"] + 1,
        "chosen": "the highest val/top1 of all epochs measured; chosen on validation pictures, so figures on these "
        "flatter it",
    }
    weights = torch.load(tmp_path / "out" / "student.state_dict.pt")
    assert all(torch.equal(value, best["state_dict"][f"student.{name}"]) for name, value in weights.items())


def test_students_that_taught_each_other(export, folder, tmp_path):
    run = tmp_path / "mutual"
    shutil.copytree(folder / "mutual", run)
    (run / "metrics.csv").write_text(
        "epoch,step,train/loss,val/top1,val/small/top1,val/large/top1\n0,9,1,0.25,0.25,0.5\n"
    )
    for stem, stage in (("test", "test"), ("validate", "val")):
        figures = {f"{stage}/top1": 0.125, f"{stage}/top5": 0.75, f"{stage}/large/top1": 0.375}
        measured = {"checkpoint": "checkpoints/last.ckpt", "epochs": 1, **figures}
        (run / f"{stem}.json").write_text(json.dumps(measured))
    output, status = export(run, "--format=state_dict,torch_export")
    assert status == 0, output
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        f"{stem}.{suffix}" for stem in ("student", "student_large") for suffix in ("json", "state_dict.pt", "pt2")
    }
    peer = json.loads((out / "student_large.json").read_text())
    assert peer["student"]["config"] == {
        "class_path": "artefacts_own.Wrapped",
        "init_args": {"num_classes": 5, "width": 12},
    }
    assert peer["accuracy"] == {
        "logged in training": {"val/top1": 0.5},
        "kdlit test": {"test/top1": 0.375},
        "kdlit validate": {"val/top1": 0.375},
    }
    assert json.loads((out / "student.json").read_text())["accuracy"] == {
        "logged in training": {"val/top1": 0.25, "val/small/top1": 0.25},
        "kdlit test": {"test/top1": 0.125, "test/top5": 0.75},
        "kdlit validate": {"val/top1": 0.125, "val/top5": 0.75},
    }
    assert [row["name"] for row in peer["comparison"]["rows"]] == ["student_large", "student_large.pt2"]
    assert re.findall(r"^ *(student\w*) +torch ", output, re.M) == ["student", "student_large"]
    assert peer["files"]["student_large.pt2"]["parity"]["split"] == "test"  # nothing is held out
    assert torch.export.load(out / "student_large.pt2").module()(torch.zeros(3, 3, 8, 8)).shape == (3, 5)


def test_each_of_several_students_has_its_folder(export, tmp_path):
    output, status = export("several")
    assert status == 0, output
    weights = [torch.load(tmp_path / "out" / name / "student.state_dict.pt") for name in "ab"]
    assert not torch.equal(weights[0]["fc.weight"], weights[1]["fc.weight"])
    assert json.loads((tmp_path / "out" / "b" / "student.json").read_text())["teacher"] is None
    assert "teacher" not in output


def test_a_checkpoint_of_another_run_gets_no_figures_of_this(export, folder, tmp_path):
    other = folder / "several" / "b" / "checkpoints" / "last.ckpt"
    output, status = export("several/a", "--checkpoint=several/b/checkpoints/last.ckpt")
    assert status == 0, output
    assert (
        "kdlit: warning: several/b/checkpoints/last.ckpt is not of several/a/checkpoints, so the figures of several/a "
        "are left out\n" in output
    )
    about = json.loads((tmp_path / "out" / "student.json").read_text())
    assert about["checkpoint"]["file"] == str(other.resolve())
    assert about["accuracy"] == {}


def with_student(folder, tmp_path, student, **trainer):
    """A copy of the run ``one`` whose config names another student with the same weights."""
    run = tmp_path / "run"
    shutil.copytree(folder / "one", run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["init_args"]["student"]["class_path"] = f"artefacts_own.{student}"
    config["trainer"] |= trainer
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def test_what_cannot_be_traced_does_not_stop_the_rest(export, folder, tmp_path):
    run = with_student(folder, tmp_path, "Branching", max_epochs=7)
    output, status = export(run, "--format=torch_export,state_dict")
    assert status == 2
    assert "student.pt2 is not written: torch.export cannot follow Branching: " in output
    assert "Its forward must not decide by the values of tensors" in output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"student.json", "student.state_dict.pt"}
    assert "is not finished: 2 of 7 epochs are trained" in output


def test_what_gives_other_logits_is_not_kept(export, folder, tmp_path):
    output, status = export(with_student(folder, tmp_path, "Traceable"), "--format=torch_export")
    assert status == 2
    assert "student.pt2 is not written: its logits are off by" in output
    assert "100 % the same class" in output.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_student_that_draws_random_numbers_is_told_so(export, folder, tmp_path):
    output, status = export(with_student(folder, tmp_path, "Noisy"), "--format=state_dict,torch_export")
    assert status == 2
    (said,) = [line for line in output.splitlines() if line.startswith("kdlit: error: ")]
    assert "gets no student: shown the same pictures twice, the trained Noisy gives logits" in said
    assert "draws random numbers in eval mode" in said
    assert "only if self.training" in said
    assert not (tmp_path / "out").exists()


def show_targets(monkeypatch, make):
    """Lets ``make`` turn the class indices of the pictures into other targets."""
    monkeypatch.setattr(
        "kdlit.artefacts.export.real_pictures",
        lambda *given: (shown := real_pictures(*given))._replace(target=make(shown.target)),
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda target: functional.one_hot(target, 5),
        lambda target: functional.one_hot(target, 5).float(),
        lambda target: target[:, None],
        lambda target: target.float(),
        lambda target: target > 2,
        lambda target: target + 1,
        lambda target: target - 1,
        lambda target: None,
    ],
    ids=["labels", "labels_as_floats", "column", "numbers", "yes_or_no", "beyond", "unknown", "none"],
)
def test_nothing_is_said_of_classes_where_targets_are_none(export, tmp_path, monkeypatch, make):
    show_targets(monkeypatch, make)
    output, status = export("one")
    assert status == 0, output
    assert "off by 0.0e+00 of the largest logit at most\n" in output
    assert "same class" not in output
    reason = "left out, as not every val picture has the index of one of several logits as its target"
    assert f"Top-1: {reason}." in output
    assert re.search(r"^ *student +torch .* - *$", output, re.M)
    about = json.loads((tmp_path / "out" / "student.json").read_text())
    assert about["files"]["student.state_dict.pt"]["parity"]["same_class"] is None
    assert [row["top1"] for row in about["comparison"]["rows"]] == [None, None]
    assert about["comparison"]["top1"] == reason


def test_one_output_is_no_class(export, folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(folder / "several" / "a", run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["init_args"]["student"]["init_args"]["num_classes"] = 1
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    for name in ("student.fc.weight", "student.fc.bias"):
        content["state_dict"][name] = content["state_dict"][name][:1].clone()
    for path in (run / "checkpoints").iterdir():
        torch.save(content, path)
    show_targets(monkeypatch, torch.zeros_like)  # argmax agrees with all of these
    output, status = export(run)
    assert status == 0, output
    assert "same class" not in output
    about = json.loads((tmp_path / "out" / "student.json").read_text())
    assert about["comparison"]["rows"][0]["top1"] is None


def test_mistakes_end_in_one_clear_line(export, folder, tmp_path, monkeypatch):
    def said(*arguments):
        output, status = export(*arguments)
        assert status == 2
        return output.strip().splitlines()[-1]

    assert said("nowhere") == "kdlit: error: there is no folder nowhere"
    assert "there is no format 'tflite', only state_dict, safetensors" in said("one", "--format=tflite")
    assert said("one", "--pictures=3") == "kdlit: error: --pictures must be >= 4, got 3"
    assert "unknown argument --dat.root=x" in said("one", "--dat.root=x")
    assert "there is no file lost.ckpt; name another by --checkpoint, of best.ckpt, last.ckpt" in said(
        "one", "--checkpoint=lost.ckpt"
    )
    assert "mutual kept no best checkpoint, as nothing was measured" in said("mutual", "--checkpoint=best")
    monkeypatch.setattr("kdlit.artefacts.formats.find_spec", lambda name: None if name == "onnxscript" else name)
    assert said("one", "--format=onnx") == ('kdlit: error: the format onnx needs onnxscript: pip install "kdlit[onnx]"')
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "one" / "config.yaml", bare)
    assert said(bare).endswith("bare has no checkpoint in checkpoints/; train it first")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_into_is_refused_before_any_work(export, tmp_path, monkeypatch):
    def said(output):
        printed, status = export("one", output=output)
        assert status == 2
        return printed  # nothing but the mistake: no work was done

    file = tmp_path / "file"
    file.touch()
    assert said(file) == f"kdlit: error: --output: {file} is a file; name a folder\n"
    assert (
        said(file / "a" / "b")
        == f"kdlit: error: cannot write into {file}/a/b: Not a directory; name another folder by --output\n"
    )

    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("kdlit.artefacts.export.tempfile.TemporaryDirectory", refuse)
    new = tmp_path / "new"
    assert (
        said(new / "out")
        == f"kdlit: error: cannot write into {new}/out: Read-only file system; name another folder by --output\n"
    )
    assert not new.exists()


def test_the_pictures_may_have_moved(export, folder, tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.move(folder / "pictures", folder / "elsewhere")
    try:
        output, status = export("one")
        assert (
            "kdlit: error: there is no folder pictures; where the pictures have moved, say so, as by --data.root"
            in output
        )
        assert status == 2
        assert export("one", f"--data.root={moved}")[1] == 0
    finally:
        shutil.move(folder / "elsewhere", folder / "pictures")


def test_the_student_of_simkd_can_be_traced(tmp_path):
    from kdlit.artefacts.formats import Leaving
    from kdlit.models import ResNet, SimKDStudent

    net = SimKDStudent(ResNet(8, (4, 4, 8, 16), 5), 16, 5).eval()
    image = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        logits = net(image)
        traced = Leaving(net, image[:2]).program.module()(image)
        torch.testing.assert_close(traced, logits)
        torch.testing.assert_close(net(image), logits)  # the trace has left nothing in its hooks


def test_times_are_medians_of_runs_by_turns(monkeypatch):
    from kdlit.artefacts.cost import Row, measure_times

    clock = [0.0]
    turns = []

    def predict(name, seconds):
        def run(image):
            turns.append(name)
            clock[0] += seconds * len(image) * (10 if len(turns) == 9 else 1)  # once something else gets in between
            return image

        return run

    monkeypatch.setattr("kdlit.artefacts.cost.time.perf_counter", lambda: clock[0])
    rows = [
        Row(name, "", predict(name, s), torch.zeros(3, 1, 2, 2), 0.0, None) for name, s in (("a", 0.001), ("b", 0.003))
    ]
    assert measure_times(rows, [1, 8], seconds=0.1) == {1: 23, 8: 5}
    assert turns[4:8] == ["a", "b", "a", "b"]
    assert [[round(ms, 6) for ms in row.milliseconds.values()] for row in rows] == [[1, 1], [3, 3]]


def test_small_ratios_are_printed_to_three_digits(capsys):
    from kdlit.artefacts.cost import Row, print_comparison

    costs = {"teacher": (1, 2_000, 0.5, 3.0), "student": (300, 1_000, 0.004, 9.0)}
    rows = [
        Row(name, "torch", torch.nn.Identity(), torch.zeros(1), size, None, count, products, {1: time})
        for name, (count, products, size, time) in costs.items()
    ]
    print_comparison(rows, {1: 5}, "val", 4)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "teacher / student" in line]
    assert line.split()[3:] == ["0.00333", "2", "125", "0.333"]
