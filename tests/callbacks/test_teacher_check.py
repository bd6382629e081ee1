"""Is the teacher as good as its record says?"""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kdlit.callbacks import StudentExport, TeacherCheck
from kdlit.data.inputs import NetworkInput
from kdlit.fingerprint import of_network
from kdlit.losses import CrossEntropyLoss, KDLoss
from kdlit.models import from_checkpoint
from kdlit.modules import ClassificationDistillation, ManyStudents
from kdlit.modules.performance import Performance
from tests.conftest import TinyData, TinyNet


class ByBrightness(TinyNet):
    """Knows the classes of TinyData, but for the share that a shift of the brightness costs it."""

    def __init__(self, shift=0.0):
        super().__init__(width=16)
        self.register_buffer("passes", torch.zeros(()))
        self.shift = shift

    def forward(self, image):
        self.passes += 1
        torch.rand(3)  # a careless teacher draws, too
        level = (image.mean((1, 2, 3)) * 0.25 + 0.5) * 255 - 20
        centre = 45 * torch.arange(5, device=image.device)
        return -(level[:, None] + self.shift - centre).abs() / 45 + 0 * super().forward(image)


class Black(torch.nn.Module):
    """Leaves nothing of a picture."""

    def forward(self, image):
        return torch.zeros_like(image)


def module(teacher, **kwargs):
    losses = {"ce": CrossEntropyLoss(), "kd": KDLoss()}
    return ClassificationDistillation(TinyNet(), losses, teacher=teacher, input_size=(3, 8, 8), **kwargs)


def fit(trainer, check, teacher, data=None, pl_module=None, **settings):
    fitted = trainer(callbacks=[check] if check else [], **settings)
    distiller = pl_module or module(teacher)
    L.seed_everything(5, verbose=False)
    fitted.fit(distiller, data or TinyData())
    return fitted, distiller


def test_a_good_teacher_is_measured_in_silence(trainer, capsys):
    teacher, check = ByBrightness(), TeacherCheck(recorded=0.99)
    fit(trainer, check, teacher)
    assert (check.top1, check.pictures_seen, check.part, check.recorded) == (1.0, 32, "val", 0.99)
    assert "THE TEACHER" not in capsys.readouterr().err
    assert len(check.weights) == 64


def test_a_teacher_below_its_record_is_said_loudly(trainer, capsys):
    check = TeacherCheck(recorded=0.98)
    fit(trainer, check, ByBrightness(shift=45.0))
    said = capsys.readouterr().err
    assert check.top1 == pytest.approx(0.2, abs=0.05), "only one class is still the nearest"
    assert f"measured:  {100 * check.top1:.2f} % top-1 on 32 validation pictures" in said
    assert "THE TEACHER IS FAR WORSE THAN ITS RECORD" in said
    assert "recorded:  98.00 % in the config" in said
    assert all(cause in said for cause in ("mean and std", "BGR", "classes numbered", "another size"))
    check = TeacherCheck(recorded=float(check.top1) + 0.1)
    check.top1, check.pictures_seen, check.part = 0.2, 32, "val"
    assert "RECORD" not in check._warning(0.3, 5), "that may be chance with 32 pictures"
    check.pictures_seen = 20_000
    assert "RECORD" in check._warning(0.3, 5)


def test_a_teacher_at_chance_is_said_without_a_record(trainer, capsys):
    fit(trainer, TeacherCheck(), ByBrightness(shift=90.0))
    said = capsys.readouterr().err
    assert "THE TEACHER IS HARDLY BETTER THAN CHANCE" in said
    assert "chance:    20.00 %" in said
    check = TeacherCheck()
    check.pictures_seen, check.part = 1000, "val"
    for classes, top1, warns in (
        (2, 0.54, True),
        (2, 0.6, False),
        (100, 0.02, True),
        (100, 0.03, False),
        (1000, 1e-3, True),
    ):
        check.top1 = top1
        assert bool(check._warning(0.0, classes)) is warns, (classes, top1)


def figures(fitted, distiller):
    return {name: value.item() for name, value in fitted.callback_metrics.items()}, distiller.student.state_dict()


@pytest.mark.parametrize("val_size", [32, 0])
def test_the_run_is_the_same_bit_for_bit(trainer, val_size):
    kinds = {}
    for name, check in (("plain", None), ("checked", TeacherCheck())):
        torch.manual_seed(3)
        student, teacher = TinyNet(), ByBrightness()
        student.fc = torch.nn.Sequential(torch.nn.Dropout(0.5), student.fc)  # draws from the global generator
        distiller = ClassificationDistillation(student, {"kd": KDLoss()}, teacher=teacher, input_size=(3, 8, 8))
        before = of_network(teacher)
        data = TinyData(val_size=val_size)
        kinds[name] = figures(*fit(trainer, check, teacher, data, distiller, max_epochs=2))
        if check:
            assert check.weights == before
    assert kinds["plain"][0] == kinds["checked"][0]
    assert all(torch.equal(value, kinds["checked"][1][key]) for key, value in kinds["plain"][1].items())
    assert kinds["plain"][1].keys() == kinds["checked"][1].keys()


def test_the_teacher_is_left_as_it_was(trainer):
    class Stop(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            self.after = of_network(pl_module.teacher), torch.get_rng_state(), pl_module.teacher.training
            raise KeyboardInterrupt

    teacher, stop, state = ByBrightness(), Stop(), None
    fitted = trainer(callbacks=[TeacherCheck(), stop])
    distiller = module(teacher)
    before, state = of_network(teacher), torch.get_rng_state()
    with pytest.raises(SystemExit):
        fitted.fit(distiller, TinyData())
    assert stop.after[0] == before
    assert torch.equal(stop.after[1], state)
    assert not stop.after[2]


def test_where_nothing_is_held_out_training_pictures_are_taken_as_evaluation_sees_them(trainer, capsys):
    check, data = TeacherCheck(pictures=50, recorded=1.0), TinyData(val_size=0, label_noise=0.5)
    fit(trainer, check, ByBrightness(), data)
    assert (check.pictures_seen, check.part) == (50, "train")
    assert check.top1 == pytest.approx(0.5, abs=0.15), "half of the labels are wrong"
    assert "THE TEACHER" not in capsys.readouterr().err
    check = TeacherCheck()
    fit(trainer, check, ByBrightness(), TinyData(val_size=0, transforms=[Black()]))
    assert (check.top1, check.pictures_seen) == (1.0, 96), "augmented, all pictures would be black"


@pytest.mark.parametrize("performance", ["plain", "fast", Performance(compile=["teacher"])])
def test_it_takes_what_the_run_takes(trainer, performance):
    check = TeacherCheck()
    own = NetworkInput((0.5,) * 3, (0.25,) * 3, size=16)
    distiller = module(ByBrightness(), performance=performance, teacher_input_size=(3, 16, 16))

    class Stop(L.Callback):  # before anything is compiled
        def on_fit_start(self, trainer, pl_module):
            raise KeyboardInterrupt

    fitted = trainer(callbacks=[check, Stop()], precision="bf16-mixed" if performance == "fast" else "32-true")
    if isinstance(performance, Performance):
        distiller.teacher._compiled_call_impl = lambda *args: pytest.fail("compiled for other batches")
    with pytest.raises(SystemExit):
        fitted.fit(distiller, TinyData(teacher_input=own))
    assert check.top1 == pytest.approx(1.0, abs=0.05)


def test_many_students_have_one_teacher_and_no_teacher_is_nothing(trainer):
    check = TeacherCheck()
    teacher = ByBrightness()
    group = ManyStudents({name: module(teacher) for name in ("a", "b")})
    fit(trainer, check, None, pl_module=group)
    assert (check.top1, check.pictures_seen) == (1.0, 32)
    alone = ClassificationDistillation(TinyNet(), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))
    fit(trainer, check, None, pl_module=alone)
    assert (check.top1, check.pictures_seen, check.part, check.weights) == (None, 0, None, None)


class Own(L.LightningDataModule):
    """A user's data, from loaders that draw."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.target = torch.arange(60) % 5
        noise = torch.randint(0, 40, (60, 3, 8, 8), generator=generator)
        self.image = ((noise + 45 * self.target[:, None, None, None]) / 255 - 0.5) / 0.25

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.image, self.target), batch_size=20)


class WithVal(Own):
    def val_dataloader(self):
        return [DataLoader(TensorDataset(self.image, self.target), batch_size=25, shuffle=True)]


def test_other_data_modules_are_asked_for_their_validation_pictures(trainer):
    check = TeacherCheck(pictures=30)
    fit(trainer, check, ByBrightness(), WithVal())
    assert (check.top1, check.pictures_seen, check.part) == (1.0, 30, "val")
    fit(trainer, check, ByBrightness(), Own())
    assert (check.top1, check.pictures_seen, check.part) == (None, 0, None)
    assert check.weights


def test_it_measures_again_on_resume(trainer, tmp_path):
    fitted, _ = fit(trainer, None, ByBrightness())
    fitted.save_checkpoint(tmp_path / "one.ckpt")
    check = TeacherCheck()
    trainer(max_epochs=2, callbacks=[check]).fit(module(ByBrightness()), TinyData(), ckpt_path=tmp_path / "one.ckpt")
    assert check.top1 == 1.0


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({"best_acc": torch.tensor(79.42)}, 0.7942),
        ({"accuracy": 74.31, "epoch": 240}, 0.7431),
        ({"acc": 0.9525}, 0.9525),
        ({"metrics": {"val/top1": 0.8, "test/top1": 0.75}}, 0.75),
        ({"metrics": {"train/top1": 0.8}}, None),
        ({"best_acc": "high"}, None),
        ({"best_acc": 0.0}, None),
        ({}, None),
    ],
)
def test_checkpoints_say_how_good_their_network_is(tmp_path, beside, expected):
    torch.save({"model": TinyNet().state_dict(), **beside}, tmp_path / "net.pth")
    assert from_checkpoint(TinyNet(), str(tmp_path / "net.pth")).recorded_top1 == pytest.approx(expected)


def test_the_record_of_a_run_of_kdlit_is_known_to_the_next(trainer, tmp_path, capsys):
    distiller = ClassificationDistillation(TinyNet(), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))
    fitted = trainer(max_epochs=25, callbacks=[StudentExport(str(tmp_path / "student.pt"))], check_val_every_n_epoch=25)
    fitted.fit(distiller, TinyData())
    reached = float(fitted.callback_metrics["val/top1"])
    assert reached > 0.6
    check = TeacherCheck()
    fit(trainer, check, from_checkpoint(TinyNet(), str(tmp_path / "student.pt")))
    assert (check.recorded, check.top1) == (pytest.approx(reached), pytest.approx(reached))
    assert "THE TEACHER" not in capsys.readouterr().err
    reversed_classes = from_checkpoint(TinyNet(), str(tmp_path / "student.pt"))
    reversed_classes.fc.weight.data = reversed_classes.fc.weight.data.roll(1, 0)
    reversed_classes.fc.bias.data = reversed_classes.fc.bias.data.roll(1, 0)
    fit(trainer, check, reversed_classes)
    assert "in its checkpoint" in capsys.readouterr().err


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="pictures must be >= 1, got 0"):
        TeacherCheck(pictures=0)
    with pytest.raises(ValueError, match=r"recorded must be a fraction of 1, in \(0, 1\], got 79.42"):
        TeacherCheck(recorded=79.42)


class OtherTask(ClassificationDistillation):
    def training_step(self, batch, batch_idx):
        return self.student(batch[0]).square().mean()

    def on_train_batch_end(self, *args):
        pass


@pytest.mark.parametrize("target", [torch.zeros(8, 5), torch.zeros(8)], ids=["multi-hot", "numbers"])
def test_where_there_are_no_classes_nothing_is_asked(trainer, target, capsys):
    check, data = TeacherCheck(), DataLoader(TensorDataset(torch.zeros(8, 3, 8, 8), target), batch_size=4)
    net = OtherTask(TinyNet(), {"kd": KDLoss()}, ByBrightness(), input_size=(3, 8, 8))
    trainer(callbacks=[check], limit_val_batches=0).fit(net, data, data)
    assert (check.top1, check.part) == (None, None)
    assert "THE TEACHER" not in capsys.readouterr().err
