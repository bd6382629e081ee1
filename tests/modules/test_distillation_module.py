"""Objective, delegation to the losses, and what is refused at construction."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kdlit.losses import CrossEntropyLoss, DistillationLoss, DKDLoss, KDLoss, WeightedLoss, dkd_loss, kd_loss
from kdlit.modules import ClassificationDistillation, DistillationModule
from kdlit.modules.base import as_batch
from tests.conftest import TinyData, TinyNet


def distil(losses, student=None, teacher=None, **kwargs):
    return ClassificationDistillation(
        student or TinyNet(), losses, teacher=teacher or TinyNet(width=16), input_size=(3, 8, 8), **kwargs
    )


def test_objective_is_weight_times_warmup_times_loss(trainer):
    distiller = distil(
        {
            "ce": WeightedLoss(CrossEntropyLoss(), weight=0.5),
            "kd": WeightedLoss(KDLoss(2.0), weight=3.0),
            "dkd": WeightedLoss(DKDLoss(beta=2.0), weight=2.0, warmup_epochs=4),
        }
    )
    seen = []

    def spy(self, batch, batch_idx, step=ClassificationDistillation.training_step):
        student, teacher = copy.deepcopy(self.student), self.teacher
        z, v, y = student(batch["image"]), teacher(batch["image"]), batch["target"]
        warmup = min((self.current_epoch + 1) / 4, 1)
        expected = (
            0.5 * nn.functional.cross_entropy(z, y)
            + 3 * kd_loss(z, v, temperature=2.0)
            + 2 * warmup * dkd_loss(z, v, y, alpha=1.0, beta=2.0, temperature=4.0)
        )
        output = step(self, batch, batch_idx)
        seen.append((self.current_epoch, output["loss"].item(), expected.item()))
        return output

    distiller.training_step = spy.__get__(distiller)
    trainer(max_epochs=6).fit(distiller, TinyData(num_workers=0))
    assert [epoch for epoch, *_ in seen] == [e for e in range(6) for _ in range(4)]
    assert all(got == pytest.approx(expected, rel=1e-5) for _, got, expected in seen)


class Recorder(DistillationLoss):
    """Writes down every hook, trains a scale and fills a memory."""

    student_layers = ("stem", "bn")
    teacher_layers = ("stem",)

    def __init__(self):
        super().__init__()
        self.calls = []
        self.register_buffer("memory", torch.zeros(5))

    def setup(self, student, teacher, example):
        self.calls.append("setup")
        self.example_shape = tuple(example.shape)
        self.scale = nn.Parameter(torch.ones(1))
        self.connect = nn.Linear(8, 16)

    def on_train_epoch_start(self, epoch, max_epochs):
        self.calls.append(f"epoch {epoch} of {max_epochs}")

    def forward(self, student, teacher, batch):
        self.calls.append("forward")
        assert set(student.features) == {"stem", "bn"}
        assert set(teacher.features) == {"stem"}
        assert student.features["bn"].min() < 0, "the in-place ReLU after it must not reach the feature"
        pooled = self.connect(student.features["stem"].mean((2, 3)))
        return (self.scale * pooled - teacher.features["stem"].mean((2, 3))).square().mean()

    def on_train_batch_end(self, student, teacher, batch):
        self.calls.append("batch end")
        assert not student.logits.requires_grad
        assert not any(feature.requires_grad for feature in student.features.values())
        self.memory[batch["target"]] += 1


def test_hooks_come_in_order_and_extra_parameters_train(trainer):
    recorder = Recorder()
    distiller = distil({"rec": recorder})
    start = {name: value.clone() for name, value in recorder.named_parameters()}
    trainer(max_epochs=2).fit(distiller, TinyData(batch_size=32))
    epoch = ["forward", "batch end"] * 2
    assert recorder.calls == ["setup", "epoch 0 of 2", *epoch, "epoch 1 of 2", *epoch]
    assert recorder.example_shape == (1, 3, 8, 8)
    assert all(not torch.equal(start[name], value) for name, value in recorder.named_parameters())
    assert recorder.memory.sum() > 0


def test_loss_parameters_and_buffers_resume_from_the_checkpoint(trainer, tmp_path):
    recorder = Recorder()
    fitted = trainer()
    fitted.fit(distil({"rec": recorder}), TinyData())
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    again = Recorder()
    resumed = distil({"rec": again})
    stopped = trainer(max_epochs=1)  # the checkpoint has one epoch behind it: nothing more is trained
    stopped.fit(resumed, TinyData(), ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(again.memory, recorder.memory)
    assert torch.equal(again.scale, recorder.scale)
    assert torch.equal(again.connect.weight, recorder.connect.weight)


def test_one_forward_of_each_network_a_step(trainer):
    distiller = distil({"a": KDLoss(), "b": KDLoss(2.0), "c": DKDLoss(), "ce": CrossEntropyLoss()})
    counts = {"student": 0, "teacher": 0}
    for role in counts:
        getattr(distiller, role).register_forward_hook(lambda *_, role=role: counts.__setitem__(role, counts[role] + 1))
    trainer().fit(distiller, TinyData(val_size=0, batch_size=32))
    assert counts == {"student": 3, "teacher": 3}


def test_without_a_teacher_it_trains_plainly(trainer):
    distiller = ClassificationDistillation(TinyNet(), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))
    fitted = trainer(max_epochs=40)
    fitted.fit(distiller, TinyData())
    assert fitted.callback_metrics["val/top1"] > 0.9
    assert "val/teacher_top1" not in fitted.callback_metrics


def test_bare_losses_count_once_and_null_removes_a_term():
    distiller = distil({"kd": KDLoss(), "ce": None})
    assert list(distiller.losses) == ["kd"]
    assert distiller.losses["kd"].factor == 1.0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_losses_get_full_precision_whatever_the_run_has(trainer, precision):
    class Spy(DistillationLoss):
        student_layers = ("stem",)

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, student, teacher, batch):
            self.dtypes = {student.logits.dtype, teacher.logits.dtype, student.features["stem"].dtype, self.scale.dtype}
            self.product = (student.logits @ teacher.logits.T).dtype
            return self.scale * student.logits.square().mean()

    spy = Spy()
    trainer(precision=precision).fit(distil({"spy": spy}), TinyData())
    expected = torch.float64 if precision == "64-true" else torch.float32
    assert spy.product == expected
    assert spy.dtypes == {expected}


def test_scheduler_and_optimizer_come_from_the_arguments(trainer):
    distiller = distil(
        {"kd": KDLoss()},
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
    )
    fitted = trainer(max_epochs=3)
    fitted.fit(distiller, TinyData())
    optimizer = fitted.optimizers[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.5**3)


class WithLogits(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = TinyNet()

    def forward(self, image):
        return type("Output", (), {"logits": self.net(image)})()


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = TinyNet()

    def forward(self, image):
        return self.net(image), image


class Maps(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 5, 3)


def test_a_network_may_return_an_object_with_logits(trainer):
    fitted = trainer()
    fitted.fit(distil({"kd": KDLoss()}, teacher=WithLogits(), student=WithLogits()), TinyData())
    assert fitted.callback_metrics["train/loss"] >= 0


class NeedsLayer(DistillationLoss):
    student_layers = ("stemm",)

    def forward(self, student, teacher, batch):
        return student.logits.sum()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: distil({"kd": KDLoss()}, teacher=TinyNet(num_classes=7)), "student gives 5 logits and the teacher 7"),
        (lambda: distil({}), "at least one loss"),
        (lambda: distil({"ce": None}), "at least one loss"),
        (lambda: distil({"a.b": KDLoss()}), "without dots, got 'a.b'"),
        (lambda: distil({"kd": NeedsLayer()}), "no layer 'stemm'; close names: stem"),
        (lambda: KDLoss(temperature=0.0), "temperature must be > 0, got 0.0"),
        (lambda: KDLoss(temperature=float("nan")), "temperature must be > 0, got nan"),
        (lambda: DKDLoss(beta=-1.0), "beta must be >= 0, got -1.0"),
        (lambda: WeightedLoss(KDLoss(), weight=-0.5), "weight must be >= 0, got -0.5"),
        (lambda: WeightedLoss(KDLoss(), warmup_epochs=1.5), "warmup_epochs must be a whole number, got 1.5"),
        (lambda: CrossEntropyLoss(label_smoothing=1.5), r"label_smoothing must lie in \[0, 1\], got 1.5"),
        (
            lambda: ClassificationDistillation(TinyNet(), {"kd": KDLoss()}, input_size=(3, 8, 8)),
            r"losses.kd \(KDLoss\) needs a teacher",
        ),
        (
            lambda: ClassificationDistillation(TinyNet(), {"ce": CrossEntropyLoss()}, input_size=(1, 8, 8)),
            r"the student \(TinyNet\) cannot take pictures of input_size \(1, 8, 8\)",
        ),
        (lambda: distil({"kd": KDLoss()}, student=Maps()), "must give logits of shape"),
    ],
)
def test_mistakes_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_network_that_returns_a_tuple_is_refused_with_advice():
    with pytest.raises(TypeError, match="the teacher must return logits .* returned tuple; wrap it"):
        distil({"kd": KDLoss()}, teacher=Pair())


def test_student_and_teacher_must_not_share_weights():
    net = TinyNet()
    with pytest.raises(ValueError, match="share parameters"):
        distil({"kd": KDLoss()}, student=net, teacher=net)


def test_a_frozen_student_is_refused():
    frozen = TinyNet().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        distil({"kd": KDLoss()}, student=frozen).configure_optimizers()


def test_data_with_other_classes_is_refused_before_the_first_step(trainer):
    distiller = ClassificationDistillation(TinyNet(num_classes=6), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))
    with pytest.raises(ValueError, match="the data has 5 classes, but the student gives 6 logits"):
        trainer().fit(distiller, TinyData())


def test_construction_leaves_batch_norm_and_random_state_alone():
    student, teacher = TinyNet(), TinyNet()
    before, state = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    distil({"rec": WeightedLoss(KDLoss())}, student=student, teacher=teacher)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert student.training


def test_batches_may_be_tuples_or_dictionaries():
    image, target, index = torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.arange(2)
    assert as_batch((image, target)) == {"image": image, "target": target}
    assert as_batch([image, target, index])["index"] is index
    assert as_batch({"image": image})["image"] is image
    with pytest.raises(TypeError, match=r"got \['picture'\]"):
        as_batch({"picture": image})
    assert as_batch(image)["image"] is image
    assert as_batch((image,))["image"] is image
    with pytest.raises(TypeError, match="got int"):
        as_batch(3)


class Regression(DistillationModule):
    """A task of a user's own: only its evaluation steps are new."""

    def validation_step(self, batch, batch_idx):
        batch = as_batch(batch)
        self.log("val/error", (self(batch["image"]) - batch["target"][:, None]).abs().mean())


def test_a_new_task_is_one_subclass(trainer):
    class SquaredGap(DistillationLoss):
        def forward(self, student, teacher, batch):
            return (student.logits - teacher.logits).square().mean()

    task = Regression(TinyNet(), {"gap": SquaredGap()}, teacher=TinyNet(width=16), input_size=(3, 8, 8))
    fitted = trainer()
    fitted.fit(task, TinyData())
    assert "val/error" in fitted.callback_metrics


def test_reported_accuracies_are_those_of_the_networks(trainer):
    distiller = distil({"kd": KDLoss()})
    data = TinyData()
    fitted = trainer()
    metrics = fitted.test(distiller, data, verbose=False)[0]
    distiller.eval()
    images, targets = data.views.evaluation(data._pictures["test"].image)["image"], data._pictures["test"].target
    with torch.no_grad():
        student, teacher = distiller.student(images), distiller.teacher(images)
    assert metrics["test/top1"] == pytest.approx((student.argmax(1) == targets).float().mean().item())
    assert metrics["test/teacher_top1"] == pytest.approx((teacher.argmax(1) == targets).float().mean().item())
    assert metrics["test/agreement"] == pytest.approx((student.argmax(1) == teacher.argmax(1)).float().mean().item())
    assert metrics["test/cross_entropy"] == pytest.approx(
        nn.functional.cross_entropy(student, targets).item(), rel=1e-5
    )
    assert metrics["test/top5"] == 1.0


def test_predictions_are_probabilities_and_classes(trainer):
    distiller = distil({"kd": KDLoss()})
    prediction = trainer().predict(distiller, TinyData())[0]
    logits = prediction["logits"]
    assert torch.equal(prediction["label"], logits.argmax(1))
    assert torch.allclose(prediction["confidence"], logits.softmax(1).max(1).values)
    assert prediction["target"].shape == (40,)


def test_losses_of_two_views_get_the_strong_one(trainer):
    from kdlit.losses import MLKDTwoViewLoss, mlkd_two_view_loss

    distiller = distil(
        {
            "ce": WeightedLoss(CrossEntropyLoss(), 0.1),
            "ce_strong": WeightedLoss(CrossEntropyLoss(strong_view=True), 0.1),
            "mlkd": WeightedLoss(MLKDTwoViewLoss(), 0.9),
        }
    )
    seen = []
    passes = []
    distiller.student.register_forward_hook(lambda *_: passes.append(distiller.student.training))

    def spy(self, batch, batch_idx, step=ClassificationDistillation.training_step):
        student, teacher = copy.deepcopy(self.student), self.teacher
        student._forward_hooks.clear()
        z, z_strong = student(batch["image"]), student(batch["image_strong"])
        v, v_strong = teacher(batch["image"]), teacher(batch["image_strong"])
        cross_entropy = nn.functional.cross_entropy
        expected = 0.1 * (cross_entropy(z, batch["target"]) + cross_entropy(z_strong, batch["target"]))
        expected = expected + 0.9 * mlkd_two_view_loss(z, v, z_strong, v_strong, temperature=4.0)
        output = step(self, batch, batch_idx)
        seen.append((output["loss"].item(), expected.item()))
        return output

    distiller.training_step = spy.__get__(distiller)
    trainer(max_epochs=1).fit(distiller, TinyData(strong_view=True))
    assert len(seen) == 4
    assert all(got == pytest.approx(expected, rel=1e-4) for got, expected in seen)
    assert passes.count(True) == 8


def test_a_missing_second_view_is_named_with_the_cure(trainer):
    from kdlit.losses import MLKDTwoViewLoss

    with pytest.raises(ValueError, match=r"needs a second view, image_strong, but .* --data.strong_view=true"):
        trainer().fit(distil({"mlkd": MLKDTwoViewLoss()}), TinyData())
