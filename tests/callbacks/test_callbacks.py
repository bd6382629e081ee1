"""What a run leaves behind and says about itself."""

from __future__ import annotations

import copy
import csv

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from kdlit.callbacks import PlainBaseline, PredictionTable, StudentExport
from kdlit.files import WholeCheckpointIO, write_whole
from kdlit.loggers import RunLogger
from kdlit.losses import CrossEntropyLoss, KDLoss
from kdlit.models import from_checkpoint
from kdlit.modules import ClassificationDistillation
from tests.conftest import TinyData, TinyNet


def distil(**kwargs):
    torch.manual_seed(0)
    losses = {"ce": CrossEntropyLoss(), "kd": KDLoss()}
    return ClassificationDistillation(TinyNet(), losses, teacher=TinyNet(width=16), input_size=(3, 8, 8), **kwargs)


def steps(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def test_student_export_loads_without_kdlit_and_without_the_teacher(trainer, tmp_path):
    distiller = distil()
    trainer(callbacks=[StudentExport(str(tmp_path / "student.pt"))], max_epochs=2).fit(distiller, TinyData())
    content = torch.load(tmp_path / "student.pt", weights_only=True)
    net = TinyNet()
    net.load_state_dict(content["model"])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), distiller.student.parameters(), strict=True))
    assert content["num_classes"] == 5
    assert content["epoch"] == 2
    assert 0 <= content["metrics"]["val/top1"] <= 1
    assert isinstance(from_checkpoint(TinyNet(), str(tmp_path / "student.pt")), TinyNet)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["student.pt"]


def test_the_baseline_does_not_touch_the_distilled_student(trainer):
    results = []
    for callbacks in ([], [PlainBaseline()]):
        distiller = distil(lr_scheduler=steps)
        torch.manual_seed(1)
        trainer(callbacks=callbacks, max_epochs=3).fit(distiller, TinyData())
        results.append(distiller.student.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_baseline_is_what_training_without_a_teacher_gives(trainer):
    baseline, distiller = PlainBaseline(), distil(lr_scheduler=steps)
    student = copy.deepcopy(distiller.student)
    torch.manual_seed(1)
    fitted = trainer(callbacks=[baseline], max_epochs=3)
    fitted.fit(distiller, TinyData())

    plain = ClassificationDistillation(student, {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8), lr_scheduler=steps)
    torch.manual_seed(1)
    alone = trainer(max_epochs=3)
    alone.fit(plain, TinyData())
    for name, value in plain.student.state_dict().items():
        assert torch.equal(value, baseline.twin.state_dict()[name]), name
    assert fitted.callback_metrics["val/plain_top1"] == alone.callback_metrics["val/top1"]


def test_a_test_after_the_fit_measures_the_twin_that_was_trained(trainer):
    baseline, distiller, data = PlainBaseline(), distil(), TinyData()
    fitted = trainer(callbacks=[baseline], max_epochs=2)
    fitted.fit(distiller, data)
    trained = copy.deepcopy(baseline.twin).eval()
    figures = fitted.test(distiller, data, verbose=False)[0]
    pictures = data._pictures["test"]
    with torch.no_grad():
        hits = (
            (trained(data.views.evaluation(pictures.image)["image"]).argmax(1) == pictures.target).float().mean().item()
        )
    assert figures["test/plain_top1"] == pytest.approx(hits)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), baseline.twin.parameters(), strict=True))
    assert not torch.equal(trained.fc.weight, distiller.student.fc.weight)


def test_the_baseline_resumes_with_the_run(trainer, tmp_path):
    def run(epochs, ckpt_path=None):
        baseline, distiller = PlainBaseline(), distil(lr_scheduler=steps)
        keep = ModelCheckpoint(dirpath=str(tmp_path), filename="last", save_on_train_epoch_end=True)
        torch.manual_seed(epochs)
        fitted = trainer(callbacks=[baseline, keep], max_epochs=epochs, enable_checkpointing=True)
        fitted.fit(distiller, TinyData(), ckpt_path=ckpt_path)
        return baseline, fitted

    first, _ = run(2)
    resumed, fitted = run(2, ckpt_path=tmp_path / "last.ckpt")
    for name, value in first.twin.state_dict().items():
        assert torch.equal(value, resumed.twin.state_dict()[name])
    further, fitted = run(4, ckpt_path=tmp_path / "last.ckpt")
    assert further.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.5**4)
    assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.5**4)


def test_predictions_are_a_row_a_picture_in_order(trainer, tmp_path):
    distiller, data = distil(), TinyData(eval_batch_size=16)
    trainer(callbacks=[PredictionTable(str(tmp_path / "p.csv"))]).predict(distiller, data)
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    images = data.views.evaluation(data._pictures["test"].image)["image"]
    with torch.no_grad():
        expected = distiller.eval().student(images).argmax(1).tolist()
    assert [int(row["label"]) for row in rows] == expected
    assert [int(row["index"]) for row in rows] == list(range(40))
    assert [row["class"] for row in rows] == ["abcde"[label] for label in expected]
    assert [int(row["target"]) for row in rows] == data._pictures["test"].target.tolist()


def test_the_log_survives_a_resume_and_new_columns(tmp_path):
    first = RunLogger(str(tmp_path))
    first.log_metrics({"a": 1.0}, step=0)
    first.log_metrics({"b": 2.0}, step=1)
    first.log_metrics({"a": 9.0}, step=2)
    resumed = RunLogger(str(tmp_path))
    resumed.forget_from(2)
    resumed.log_metrics({"a": 3.0, "c": 4.0}, step=2)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert [row["a"] for row in rows] == ["1.0", "", "3.0"]
    assert [row["b"] for row in rows] == ["", "2.0", ""]
    assert rows[2]["c"] == "4.0"


def test_a_failed_write_leaves_the_file_before_it(tmp_path):
    path = tmp_path / "deep" / "file"
    write_whole(path, lambda file: file.write(b"good"))

    def fail(file):
        file.write(b"ba")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_bytes() == b"good"
    assert list(path.parent.iterdir()) == [path]


def test_checkpoints_are_written_whole(tmp_path):
    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("cannot be saved")

    WholeCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match="cannot be saved"):
        WholeCheckpointIO().save_checkpoint({"a": Unpicklable()}, tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_the_baseline_says_where_it_does_not_fit(trainer):
    import lightning as L

    with pytest.raises(ValueError, match="PlainBaseline needs a DistillationModule, got LightningModule"):
        PlainBaseline().setup(trainer(), L.LightningModule(), "fit")


class Answers(ClassificationDistillation):
    def predict_step(self, batch, batch_idx):
        return {
            "digits": torch.tensor([[True, False]] * len(batch["image"])),
            "age": torch.full((len(batch["image"]),), 1.5),
        }


class Numbers(ClassificationDistillation):
    def predict_step(self, batch, batch_idx):
        return torch.zeros(3)


def test_what_another_task_predicts_becomes_columns(trainer, tmp_path):
    net = Answers(TinyNet(), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))
    path = tmp_path / "predictions.csv"
    trainer(callbacks=[PredictionTable(str(path))]).predict(net, TinyData())
    lines = path.read_text().splitlines()
    assert lines[:2] == ["index,digits_0,digits_1,age", "0,True,False,1.500000"]
    assert len(lines) == 41
    path.unlink()
    net = Numbers(TinyNet(), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))
    with pytest.warns(UserWarning, match="predict_step gives no dictionary"):
        trainer(callbacks=[PredictionTable(str(path))]).predict(net, TinyData())
    assert not path.exists()


def test_streamed_pictures_are_numbered_as_they_come(trainer, tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from ((torch.zeros(3, 8, 8), 0) for _ in range(5))

    net = ClassificationDistillation(TinyNet(), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))
    path = tmp_path / "predictions.csv"
    loader = torch.utils.data.DataLoader(Stream(), batch_size=2)
    trainer(callbacks=[PredictionTable(str(path))]).predict(net, loader)
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["index", "0", "1", "2", "3", "4"]
