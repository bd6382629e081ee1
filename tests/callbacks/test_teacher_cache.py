"""Training with the teacher's logits from a file is training with the teacher."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import time
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from kdlit.callbacks import TeacherCache
from kdlit.data import ImageNet, NetworkInput, Pictures, TeacherConfidence, teacher_logits
from kdlit.data.teacher_logits import TeacherLogits
from kdlit.losses import ATLoss, CRLDLoss, CrossEntropyLoss, KDLoss, LogitStandardization, MLKDTwoViewLoss
from kdlit.modules import ClassificationDistillation, ManyStudents, MutualLearning
from tests.conftest import Diary, TinyData, TinyNet

BRIEFLY = {"max_steps": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(teacher_logits, "BLOCK", 16)


def distil(losses=None, teacher_width=16, performance="plain", **kwargs):
    torch.manual_seed(0)
    losses = losses or {"ce": CrossEntropyLoss(), "kd": KDLoss()}
    teacher = TinyNet(width=teacher_width).eval()
    teacher.fc.weight.data *= 20  # logits that differ, as those of a trained network do
    return ClassificationDistillation(
        TinyNet(), losses, teacher=teacher, input_size=(3, 8, 8), performance=performance, **kwargs
    )


class Losses(L.Callback):
    """Remembers objectives, students' pictures and how often the teacher ran."""

    def __init__(self, forget=False):
        self.losses, self.pictures, self.calls, self.forget = [], [], 0, forget

    def setup(self, trainer, pl_module, stage):
        self.hook = pl_module.teacher.register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.forget:  # the teacher runs on the same pictures
            batch.pop("teacher_logits")
            batch.pop("teacher_logits_strong", None)
        self.before = self.calls

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ran = self.calls - self.before
        self.losses.append(float(outputs["loss"]))
        self.pictures.append({name: value.clone() for name, value in batch.items() if name.startswith("image")})

    def teardown(self, trainer, pl_module, stage):
        self.hook.remove()


def fit(trainer, *callbacks, module=None, data=None, seed=0, epochs=2, forget=False, **kwargs):
    """What a run with some callbacks goes through."""
    module, watch = module or distil(), Losses(forget)
    torch.manual_seed(seed)
    kwargs = {"max_epochs": epochs, "limit_val_batches": 0, "num_sanity_val_steps": 0} | kwargs
    trainer(callbacks=[*callbacks, watch], **kwargs).fit(module, data or TinyData())
    return watch


def same(one, other, tolerance=1e-6):
    assert len(one.losses) == len(other.losses) > 0
    assert one.losses == pytest.approx(other.losses, rel=tolerance, abs=tolerance)


def same_pictures(one, other):
    for ours, theirs in zip(one.pictures, other.pictures, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# Same losses


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_epochs_are_those_of_a_run_without_a_cache(trainer, tmp_path, workers):
    live = fit(trainer)
    filling = fit(trainer, TeacherCache(tmp_path / "c", 2, "float32"), data=TinyData(num_workers=workers))
    reading = fit(trainer, TeacherCache(tmp_path / "c", 2, "float32"), data=TinyData(num_workers=workers))
    for cached in (filling, reading):
        same(cached, live)
        same_pictures(cached, live)
        assert cached.ran == 0
    assert live.ran == 1


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3)])
def test_views_come_again_and_again_whatever_the_seed_of_the_run(trainer, tmp_path, dtype, tolerance):
    """Against the teacher itself, on the batches that are replayed."""
    path = tmp_path / "c"
    first = fit(trainer, TeacherCache(path, 2, dtype), epochs=5, seed=3)
    cached = fit(trainer, TeacherCache(path, 2, dtype), epochs=5, seed=1)
    live = fit(trainer, TeacherCache(path, 2, dtype), epochs=5, seed=1, forget=True)
    same_pictures(cached, live)
    same(cached, live, tolerance)
    assert (cached.ran, live.ran) == (0, 1)

    def seen(run, epoch):
        return {
            picture.numpy().tobytes() for batch in run.pictures[4 * epoch : 4 * epoch + 4] for picture in batch["image"]
        }

    assert seen(cached, 0) == seen(cached, 2) == seen(cached, 4) == seen(first, 0)
    assert seen(cached, 1) == seen(cached, 3) == seen(first, 3)
    assert len(seen(cached, 0) & seen(cached, 1)) < 40
    assert not torch.equal(cached.pictures[0]["image"], cached.pictures[8]["image"])  # another order


def test_pictures_as_they_are(trainer, tmp_path):
    """Equal to the teacher itself where nothing is augmented; otherwise the student sees what it always sees."""

    def plain():
        return TinyPlain()

    live = fit(trainer, data=plain())
    same(fit(trainer, TeacherCache(tmp_path / "c", 0, "float32"), data=plain()), live)
    augmented = fit(trainer, TeacherCache(tmp_path / "c", 0, "float32"))  # the same cache: augmentation plays no part
    same_pictures(augmented, fit(trainer))
    assert augmented.ran == 0


class TinyPlain(TinyData):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.padding, self.flip = 0, False


@pytest.mark.parametrize("loss", [CRLDLoss, lambda: LogitStandardization(MLKDTwoViewLoss())], ids=["crld", "mlkd"])
def test_methods_with_two_views(trainer, tmp_path, loss):
    def run(*callbacks):
        module = distil({"ce": CrossEntropyLoss(), "two": loss()})
        return fit(trainer, *callbacks, module=module, data=TinyData(strong_view=True), epochs=1)

    live = run()
    for cached in (run(TeacherCache(tmp_path / "c", 1, "float32")), run(TeacherCache(tmp_path / "c", 1, "float32"))):
        same(cached, live)
        same_pictures(cached, live)
        assert cached.ran == 0


def test_a_teacher_with_an_input_of_its_own(trainer, tmp_path):
    def run(*callbacks):
        data = TinyData(teacher_input=NetworkInput((0.4,) * 3, (0.2,) * 3, size=12))
        return fit(trainer, *callbacks, module=distil(teacher_input_size=(3, 12, 12)), data=data)

    live = run()
    same(run(TeacherCache(tmp_path / "c", 2, "float32")), live)
    same(run(TeacherCache(tmp_path / "c", 2, "float32")), live)


def test_the_largest_logits_are_for_temperature_1(trainer, tmp_path, recwarn):
    def run(temperature, *callbacks):
        return fit(trainer, *callbacks, module=distil({"kd": KDLoss(temperature=temperature)}))

    same(run(1.0, TeacherCache(tmp_path / "c", 2, "float32", top_k=4)), run(1.0), 1e-4)
    assert not [warning for warning in recwarn if "temperature" in str(warning.message)]
    with pytest.warns(UserWarning, match=r"right for temperature 1, but losses.kd \(KDLoss\) has temperature 4.0"):
        run(4.0, TeacherCache(tmp_path / "c", 2, "float32", top_k=4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_reads_what_it_and_worker_processes_fill(trainer, tmp_path):
    gpu = {"accelerator": "gpu", "devices": 1}
    live = fit(trainer, **gpu)
    fit(trainer, TeacherCache(tmp_path / "workers", 2, "float32"), data=TinyData(num_workers=1))
    for name in ("workers", "c", "c"):
        cached = fit(trainer, TeacherCache(tmp_path / name, 2, "float32"), **gpu)
        same(cached, live, 1e-2)  # the live teacher's convolutions round to 10 bits there
        same_pictures(cached, live)
        assert cached.ran == 0


@pytest.mark.filterwarnings("ignore:skipped", "ignore:.*could not be decoded")
def test_photographs_and_one_that_is_broken(trainer, tmp_path):
    for part, count in (("train", 12), ("val", 3)):
        for number in range(count):
            folder = tmp_path / "photos" / part / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "photos" / "train" / "a" / "4.png").write_bytes(b"no picture")

    def run(*callbacks, workers=0):
        data = ImageNet(str(tmp_path / "photos"), 8, 10, batch_size=4, num_workers=workers, broken="skip")
        torch.manual_seed(0)
        module = ClassificationDistillation(TinyNet(2), {"kd": KDLoss()}, teacher=TinyNet(2), input_size=(3, 8, 8))
        return fit(trainer, *callbacks, module=module, data=data)

    live = run()
    for workers in (0, 2):
        same(run(TeacherCache(tmp_path / "c", 2, "float32"), workers=workers), live)
    os.utime(tmp_path / "photos" / "train" / "b" / "5.png", ns=(1, 1))
    with pytest.raises(ValueError, match=r"data: fingerprint \w{12} in the cache, \w{12} now"):
        run(TeacherCache(tmp_path / "c", 2, "float32"))


def test_many_students_share_a_cache(trainer, tmp_path):
    def run(*callbacks):
        module = ManyStudents({"a": distil(), "b": distil({"kd": KDLoss()})}, seeds={"a": 0, "b": 1})
        torch.manual_seed(0)
        fitted = trainer(callbacks=list(callbacks), max_epochs=2)
        fitted.fit(module, TinyData())
        return [float(fitted.callback_metrics[f"{name}/train/loss"]) for name in "ab"]

    live = run()
    assert run(TeacherCache(tmp_path / "c", 2, "float32")) == pytest.approx(live, rel=1e-6)
    module = ManyStudents({"a": distil(), "b": distil({"at": feature_loss()})})
    fitted = trainer(callbacks=[TeacherCache(tmp_path / "c", 2, "float32")])
    with pytest.raises(ValueError, match=r"losses.at \(ATLoss\) reads the teacher's features"):
        fitted.fit(module, TinyData())


# When it is used


def test_a_resumed_run_goes_on_in_the_middle_of_an_epoch(trainer, tmp_path):
    def run(diary, ckpt_path=None, epochs=3):
        torch.manual_seed(5)
        cache = TeacherCache(tmp_path / "c", 2)
        trainer(callbacks=[cache, diary], max_epochs=epochs).fit(distil(), TinyData(), ckpt_path=ckpt_path)
        return diary.batches

    whole = run(Diary(save_at=10, path=tmp_path / "mid.ckpt"))
    assert run(Diary(), ckpt_path=tmp_path / "mid.ckpt") == whole[10:]


def test_the_data_is_left_as_it_was(trainer, tmp_path):
    data, module = TinyData(), distil()
    fit(trainer, TeacherCache(tmp_path / "c", 2), data=data, module=module)
    assert data.datasets["train"].teacher_logits is None
    again = fit(trainer, data=data, seed=4)
    assert again.ran == 1
    same_pictures(again, fit(trainer, seed=4))

    class Stop(L.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fit(trainer, TeacherCache(tmp_path / "c", 2), Stop(), data=data)
    assert data.datasets["train"].teacher_logits is None


def test_other_commands_and_part_of_an_epoch_work(trainer, tmp_path):
    cache = TeacherCache(tmp_path / "c", 2)
    module, data = distil(), TinyData()
    fitted = trainer(callbacks=[cache], max_epochs=2, limit_train_batches=2)
    for command in (fitted.validate, fitted.test, fitted.predict):
        command(module, data)
    assert not (tmp_path / "c").exists()
    fitted.fit(module, data)
    fitted.validate(module, data)
    assert TeacherLogits(tmp_path / "c").complete
    assert "val/teacher_top1" in fitted.callback_metrics


def test_a_trial_run_fills_nothing(trainer, tmp_path):
    watch = fit(trainer, TeacherCache(tmp_path / "c", 2), fast_dev_run=2)
    assert watch.ran == 1
    assert not (tmp_path / "c").exists()
    fit(trainer, TeacherCache(tmp_path / "c", 2))
    assert fit(trainer, TeacherCache(tmp_path / "c", 2), fast_dev_run=2).ran == 0


def test_what_was_done_is_said_in_a_line(trainer, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        for _ in range(2):
            fit(trainer, TeacherCache(tmp_path / "c", 3))
    lines = [record.getMessage() for record in caplog.records if "teacher cache" in record.getMessage()]
    assert lines[0] == f"teacher cache {tmp_path / 'c'}: asking the teacher about 192 views"
    assert lines[1].startswith(f"teacher cache {tmp_path / 'c'}: 3 views of each of 64 pictures, 0.0 MB, filled at ")
    assert lines[2].endswith("0.0 MB, read, as it was there")


def test_filling_draws_no_random_numbers(trainer, tmp_path):
    states = []

    class Look(L.Callback):
        def on_train_start(self, *_):
            states.append((torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()))

    for _ in range(2):
        L.seed_everything(0, verbose=False)
        fit(trainer, TeacherCache(tmp_path / "c", 2), Look(), data=TinyData(strong_view=True))
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1:] == states[1][1:]


def test_the_logits_are_those_of_float32_whatever_the_precision(trainer, tmp_path):
    for name, kwargs in (("a", {}), ("b", {"precision": "bf16-true"}), ("c", {"precision": "bf16-mixed"})):
        fit(trainer, TeacherCache(tmp_path / name, 2), epochs=1, **kwargs, **BRIEFLY)
    fit(trainer, TeacherCache(tmp_path / "d", 2), module=distil(performance="fast"), epochs=1, **BRIEFLY)
    assert len({(tmp_path / name / "logits.bin").read_bytes() for name in "abcd"}) == 1


def test_the_command_line(kdlit_cli, tmp_path):
    configs = Path(__file__).parents[2] / "configs"
    arguments = (
        "fit", "--config", configs / "quickstart.yaml", "--config", configs / "teacher_cache.yaml",
        "--trainer.max_epochs=1", "--data.val_size=100", "--data.test_size=100",
    )  # fmt: skip
    first, second = (kdlit_cli(*arguments, f"--run_dir=runs/{name}") for name in "ab")
    assert "error" not in first + second
    assert TeacherLogits(tmp_path / "cache" / "teacher").complete
    other = kdlit_cli(*arguments, "--run_dir=runs/c", "--data.padding=2")
    assert "cache/teacher is stale: transform: padding" in other


# What is refused


class Hidden(nn.Module):
    """A transform that shows nothing of itself."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def __repr__(self):
        return "Hidden()"

    def forward(self, image):
        return (image.int() + self.step + torch.randint(0, 20, ())).clamp(0, 255).to(torch.uint8)


class Other(TinyData):
    def _draw(self, size, seed):
        return super()._draw(size, seed + 10)


class Turned(TinyData):
    """The same pictures in another order."""

    def load(self):
        pictures = super().load()
        return {name: Pictures(one.image.flip(0), one.target.flip(0)) for name, one in pictures.items()}


class Doubled(TinyNet):
    """The same weights, but other logits."""

    __qualname__ = "TinyNet"

    def _get_name(self):
        return "TinyNet"

    def forward(self, image):
        return 2 * super().forward(image)


def another_teacher():
    module = distil()
    module.teacher.bn.running_mean += 0.1
    return module


def another_class():
    module = distil()
    module.teacher.__class__ = type("BigNet", (TinyNet,), {})
    return module


def hidden_teacher():
    module = distil()
    module.teacher.__class__ = Doubled
    return module


def other_eps():
    module = distil()
    module.teacher.bn.eps = 1e-4
    return module


def hidden(step=0):
    return TinyData(transforms=[Hidden(step)])


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"module": another_teacher}, r"stale: teacher: weights \w{12} in the cache, \w{12} now\. Delete .*c to"),
        ({}, {"module": another_class}, "stale: teacher: class 'TinyNet' in the cache, 'BigNet' now"),
        ({}, {"module": hidden_teacher}, "stale: teacher: the same weights give other logits"),
        ({}, {"module": other_eps}, r"stale: teacher: layers \w{12} in the cache, \w{12} now"),
        ({}, {"data": lambda: Other()}, r"stale: data: fingerprint \w{12} in the cache, \w{12} now\. Delete"),
        ({}, {"data": lambda: Turned()}, "stale: data: fingerprint"),
        ({}, {"data": lambda: TinyData(subset=0.5)}, "stale: data: pictures 64 in the cache, 32 now; data: fingerprint"),
        ({}, {"data": lambda: TinyData(val_size=16)}, "stale: data: pictures 64 in the cache, 80 now"),
        ({}, {"data": lambda: TinyData(split_seed=1)}, "stale: data: fingerprint"),
        ({}, {"data": lambda: TinyPlain()}, "stale: transform: padding 1 in the cache, 0 now; transform: flip True"),
        ({}, {"data": lambda: TinyData(auto_augment=True)}, "stale: transform: auto_augment 'None' in"),
        ({}, {"data": lambda: TinyData(strong_view=True)}, "stale: transform: strong_view False in the cache, True now"),
        ({}, {"data": lambda: TinyData(transforms=[v2.RandomHorizontalFlip(0.3)])}, r"stale: transform: transforms .*p=0\.3"),
        ({}, {"data": lambda: TinyData(teacher_input=NetworkInput((0.4,) * 3, (0.25,) * 3))}, "stale: transform: input mean"),
        ({"data": hidden}, {"data": lambda: hidden(1)}, "stale: transform: the same settings give other pictures"),
        ({}, {"cache": {"epochs": 3}}, r"stale: epochs 2 in the cache, 3 now\. Delete"),
        ({}, {"cache": {"epochs": 0}}, r"stale: epochs 2 in the cache, 0 now\. Delete"),
        ({}, {"cache": {"dtype": "float32"}}, "stale: format: dtype 'float16' in the cache, 'float32' now"),
        ({}, {"cache": {"top_k": 2}}, "stale: format: top_k None in the cache, 2 now"),
        ({}, {"module": another_teacher, "data": lambda: TinyPlain()}, "stale: teacher: weights .*; transform: padding"),
    ],
)  # fmt: skip
def test_a_stale_cache_is_refused_with_the_reason(trainer, tmp_path, before, after, message):
    def run(module=distil, data=TinyData, cache=None):
        fitted = trainer(callbacks=[TeacherCache(tmp_path / "c", **({"epochs": 2} | (cache or {})))], **BRIEFLY)
        torch.manual_seed(0)
        fitted.fit(module(), data())

    run(**before)
    kept = (tmp_path / "c" / "logits.bin").read_bytes()
    with pytest.raises(ValueError, match=message):
        run(**after)
    assert (tmp_path / "c" / "logits.bin").read_bytes() == kept


@pytest.mark.parametrize(
    "data",
    [{"label_noise": 0.3}, {"batch_size": 8}, {"eval_batch_size": 7}, {"num_workers": 1}],
    ids=lambda data: next(iter(data)),
)
def test_what_the_teacher_does_not_see_plays_no_part(trainer, tmp_path, data):
    fit(trainer, TeacherCache(tmp_path / "c", 1), epochs=1)
    assert fit(trainer, TeacherCache(tmp_path / "c", 1), data=TinyData(**data), epochs=1, seed=9).ran == 0


def test_a_subset_by_score_has_a_cache_of_its_own(trainer, tmp_path):
    def run(keep, *callbacks):
        data = TinyData(subset=0.5, subset_by=TeacherConfidence(distil().teacher, keep))
        return fit(trainer, *callbacks, data=data)

    live = run("most")
    for _ in range(2):
        same(run("most", TeacherCache(tmp_path / "c", 2, "float32")), live)
    with pytest.raises(ValueError, match="stale: data: fingerprint"):
        run("least", TeacherCache(tmp_path / "c", 2, "float32"))


def feature_loss():
    return ATLoss(student_layers=["stem"], teacher_layers=["stem"])


class Mixing(TinyData):
    def collate(self, batch):
        return batch


class MixingLater(TinyData):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


class Foreign(L.LightningDataModule):
    pass


class Random(nn.Module):
    def forward(self, image):
        return (image.int() + random.randint(0, 9)).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(
    ("module", "data", "cache", "message"),
    [
        (lambda: distil({"at": feature_loss()}), TinyData, {}, r"losses.at \(ATLoss\) reads the teacher's features stem; remove"),
        (lambda: ClassificationDistillation(TinyNet(), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8)), TinyData, {},
         "needs a module with a teacher, but ClassificationDistillation has none"),
        (lambda: MutualLearning([TinyNet(), TinyNet()], input_size=(3, 8, 8)), TinyData, {}, "but MutualLearning has none"),
        (distil, Foreign, {}, "but got Foreign; remove TeacherCache"),
        (distil, Mixing, {}, "collate of Mixing .*may change batches"),
        (distil, MixingLater, {}, "on_after_batch_transfer of MixingLater"),
        (lambda: distil({"m": MLKDTwoViewLoss()}), lambda: TinyData(strong_view=True), {"epochs": 0},
         r"losses.m \(MLKDTwoViewLoss\) needs logits of the strong view; .*got True and 0"),
        (lambda: distil({"m": MLKDTwoViewLoss()}), TinyData, {}, "set --data.strong_view=true"),
        (distil, lambda: TinyData(transforms=[Random()]), {}, "gives other pictures each time, so it cannot be replayed"),
        (distil, TinyData, {"top_k": 5}, "top_k must be below the number of classes, 5, got 5"),
        (lambda: distil(teacher_input_size=(3, 12, 12)), TinyData, {}, "the data gives no image_teacher"),
    ],
)  # fmt: skip
def test_what_cannot_be_cached_is_refused_at_the_start(trainer, tmp_path, module, data, cache, message):
    fitted = trainer(callbacks=[TeacherCache(tmp_path / "c", **({"epochs": 1} | cache))], **BRIEFLY)
    with pytest.raises(ValueError, match=message):
        fitted.fit(module(), data())
    assert not (tmp_path / "c").exists()
    assert fitted.global_step == 0


def test_loaders_alone_and_a_teacher_in_half_precision_are_refused(trainer, tmp_path):
    data = TinyData()
    data.setup("fit")
    with pytest.raises(ValueError, match="but got loaders alone"):
        trainer(callbacks=[TeacherCache(tmp_path / "c")]).fit(distil(), data.train_dataloader())
    module = distil()
    module.teacher.bfloat16()
    with pytest.raises(ValueError, match="teacher.stem.weight is torch.bfloat16"):
        fit(trainer, TeacherCache(tmp_path / "c"), module=module)


def test_batches_from_elsewhere_are_refused(trainer, tmp_path):
    class Elsewhere(TinyData):
        def train_dataloader(self):
            return self.val_dataloader()

    with pytest.raises(ValueError, match="a training batch has no teacher_logits"):
        fit(trainer, TeacherCache(tmp_path / "c", 1), data=Elsewhere())


@pytest.mark.parametrize(
    ("bias", "dtype", "message"),
    [
        (torch.nan, "float32", "a logit of nan for training picture 0$"),
        (torch.inf, "float16", "a logit of inf for training picture 0$"),
        (7e4, "float16", "a logit of 69999.* for training picture 0, too large for float16; set dtype to float32"),
        (7e4, "float32", None),
    ],
)
def test_logits_that_cannot_be_stored(trainer, tmp_path, bias, dtype, message):
    module = distil()
    module.teacher.fc.bias.data[2] = bias
    cache = TeacherCache(tmp_path / "c", 1, dtype)
    if message is None:
        fit(trainer, cache, module=module, epochs=1)
        return
    with pytest.raises(ValueError, match=message):
        fit(trainer, cache, module=module)
    assert not TeacherLogits(tmp_path / "c").marks().any()


def test_damage_is_refused_at_the_start(trainer, tmp_path):
    fit(trainer, TeacherCache(tmp_path / "c", 1), epochs=1)
    file = tmp_path / "c" / "logits.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 64
    file.write_bytes(data)
    with pytest.raises(
        ValueError, match=f"{file} is damaged: block 0 does not have its checksum; delete {tmp_path}/c "
    ):
        fit(trainer, TeacherCache(tmp_path / "c", 1))
    os.truncate(file, 100)
    with pytest.raises(ValueError, match=f"{file} is damaged: it has 100 bytes, but must have 640"):
        fit(trainer, TeacherCache(tmp_path / "c", 1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="mine exists but is no teacher cache"):
        fit(trainer, TeacherCache(tmp_path / "mine", 1))


@pytest.mark.parametrize("odd", [{"epochs": -1}, {"dtype": "int8"}, {"top_k": 0}])
def test_values_out_of_range_are_refused_when_it_is_built(odd):
    with pytest.raises(ValueError, match=next(iter(odd))):
        TeacherCache("c", **odd)


# Crashes and company


def _fit_slowly(path, pause):
    module = distil()
    module.teacher.register_forward_hook(lambda *_: time.sleep(pause))
    torch.manual_seed(0)
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    cache = TeacherCache(path, epochs=3)
    L.Trainer(accelerator="cpu", max_steps=1, callbacks=[cache], enable_checkpointing=False, **silent).fit(
        module, TinyData()
    )


def start(path, pause):
    process = multiprocessing.get_context("fork").Process(target=_fit_slowly, args=(path, pause))
    process.start()
    return process


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def filled(path):
    return TeacherLogits(path).filled if path.exists() else 0


def test_a_killed_run_is_gone_on_with_and_two_may_fill_together(trainer, tmp_path):
    fit(trainer, TeacherCache(tmp_path / "whole", 3), epochs=1)
    both = [start(tmp_path / "c", 0.3) for _ in range(2)]
    wait_for(lambda: filled(tmp_path / "c") >= 48)
    for process in both:
        process.kill()
        process.join()
    assert 48 <= filled(tmp_path / "c") < 192
    both = [start(tmp_path / "c", 0.01) for _ in range(2)]
    for process in both:
        process.join()
        assert process.exitcode == 0
    for name in ("logits.bin", "blocks.bin"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "whole"]
