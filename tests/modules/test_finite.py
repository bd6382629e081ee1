"""NaN and infinities: said clearly, or skipped; and teachers that say the same of everything."""

from __future__ import annotations

import copy
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from kdlit import config_errors
from kdlit.losses import CrossEntropyLoss, DistillationLoss, FitNetLoss, KDLoss, functional
from kdlit.modules import ClassificationDistillation, ManyStudents, MutualLearning, finite
from kdlit.modules.finite import NonFiniteError, TeacherDoubt
from tests.conftest import Diary, TinyData, TinyNet


def module(student=None, teacher=None, extra=None, **kwargs):
    losses = {"ce": CrossEntropyLoss(), "kd": KDLoss(), **(extra or {})}
    teacher = teacher or TinyNet(width=16)
    return ClassificationDistillation(student or TinyNet(), losses, teacher=teacher, input_size=(3, 8, 8), **kwargs)


class At(L.Callback):
    """Does something before one training batch."""

    def __init__(self, epoch, batch, act):
        self.place, self.act = (epoch, batch), act

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.place:
            self.index = batch["index"].tolist()
            with torch.no_grad():
                self.act(pl_module)


def poison_student(module):
    module.student.fc.bias[1] = torch.nan


def poison_teacher(module):
    module.teacher.fc.bias[2] = torch.inf


class Memory(DistillationLoss):
    """Is the mean of the logits, NaN from one of its calls on; counts the batches that it remembers."""

    def __init__(self, nan_from=10**6, nan_to=10**6):
        super().__init__()
        self.calls, self.nan = 0, range(nan_from, nan_to)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, student, teacher, batch):
        self.calls += 1
        return student.logits.mean() * (torch.nan if self.calls in self.nan else 1.0)

    def on_train_batch_end(self, student, teacher, batch):
        self.seen += 1


# Stop


def test_logits_that_are_not_finite_stop_the_run_with_all_that_is_known(trainer):
    act = At(1, 2, poison_student)
    with pytest.raises(NonFiniteError) as caught:
        trainer(max_epochs=2, callbacks=[act]).fit(module(), TinyData())
    message = str(caught.value)
    assert message.startswith(
        "the student's logits must be finite, but 16 of 80 are not, the first nan at sample 0 "
        f"(picture {act.index[0]} of the data), class 1 in epoch 1, batch 2, step 6; "
    )
    assert re.search(r"the teacher's logits: min -?[\d.]+, max -?[\d.]+, mean .* std .* of 80 finite ones", message)
    assert re.search(r"the student's logits: min .* of 64 finite ones, 16 not finite; lower the learning rate", message)
    assert "--model.non_finite=skip" in message
    assert "pictures are not" not in message
    assert config_errors.users_mistake(caught.value) == message


def test_the_teacher_is_blamed_for_its_own(trainer):
    with pytest.raises(
        NonFiniteError, match="^the teacher's logits must be finite.* first inf at .* float32"
    ) as caught:
        trainer(callbacks=[At(0, 1, poison_teacher)]).fit(module(), TinyData())
    assert caught.value.shared


def test_a_loss_is_named_with_the_logits_it_came_from(trainer):
    match = r"^losses.bad must be finite, got nan in epoch 0, batch 2, step 2; the teacher's logits: min"
    with pytest.raises(NonFiniteError, match=match):
        trainer().fit(module(extra={"bad": Memory(3, 99)}), TinyData())


class Spoiled(TinyData):
    """One picture is no number."""

    @staticmethod
    def collate(batch):
        batch["image"][batch["index"] == 7] = torch.nan
        return batch


def test_pictures_that_are_not_finite_are_told(trainer):
    plain = module(performance="plain")
    with pytest.raises(
        NonFiniteError,
        match=r"pictures are not finite themselves, but 192 of 3072 .*picture 7 of.*; look at that picture",
    ):
        trainer().fit(plain, Spoiled())


def test_students_that_teach_each_other_are_all_watched(trainer):
    mutual = MutualLearning({"a": TinyNet(), "b": TinyNet(width=12)}, input_size=(3, 8, 8))
    act = At(0, 1, lambda module: module.peers["b"].fc.bias.fill_(torch.nan))
    with pytest.raises(NonFiniteError, match=r"^student b's logits must be finite.*; student a's logits: min"):
        trainer(callbacks=[act]).fit(mutual, TinyData())


def test_a_checkpoint_is_never_replaced_by_one_with_weights_that_are_not_finite(trainer, tmp_path):
    class LastGradient(L.Callback):  # the last step of the second epoch spoils what no step looks at any more
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 7:
                pl_module.student.stem.weight.grad[0] = torch.inf

    keep = ModelCheckpoint(tmp_path, filename="kept", save_on_train_epoch_end=True, every_n_epochs=1)
    fitted = trainer(max_epochs=3, enable_checkpointing=True, callbacks=[LastGradient(), keep])
    with pytest.raises(
        NonFiniteError, match=r"weights must be finite, but student.stem.weight.* are not.* no checkpoint"
    ):
        fitted.fit(module(), TinyData())
    kept = torch.load(tmp_path / "kept.ckpt", weights_only=True)
    assert kept["global_step"] == 4
    with pytest.raises(NonFiniteError, match="no checkpoint is written"):
        fitted.save_checkpoint(tmp_path / "other.ckpt")
    assert not (tmp_path / "other.ckpt").exists()


# Late, as on an accelerator


@pytest.fixture
def late(monkeypatch):
    """Nothing may look at values on the way."""
    monkeypatch.setattr(functional, "_values_are_cheap", lambda tensor: False)


def test_what_no_step_waits_for_is_told_at_the_end_of_the_epoch(trainer, late):
    match = (
        r"^losses.bad must be finite, got nan in epoch 0, batch 1, step 1, noticed in epoch 0, batch 3, step 3, as no"
    )
    with pytest.raises(NonFiniteError, match=match):
        trainer(log_every_n_steps=50).fit(module(extra={"bad": Memory(2, 3)}), TinyData())


def test_before_a_checkpoint_and_where_the_bar_waits_it_is_told_too(trainer, tmp_path, late):
    path = tmp_path / "mid.ckpt"
    with pytest.raises(NonFiniteError, match=r"losses.bad .* batch 1, step 1, noticed in epoch 0, batch 2"):
        trainer(callbacks=[Diary(3, path)]).fit(module(extra={"bad": Memory(2, 3)}), TinyData())
    assert not path.exists()
    with pytest.raises(NonFiniteError, match=r"losses.bad .* batch 1, step 1, noticed in epoch 0, batch 2"):
        trainer(log_every_n_steps=2).fit(module(extra={"bad": Memory(2, 3)}), TinyData())


class Event:
    """Is done when it is asked for the second time."""

    def __init__(self):
        self.asked = 0

    def query(self):
        self.asked += 1
        return self.asked > 1

    def synchronize(self):
        self.asked = 9


def test_numbers_are_read_once_they_have_arrived(trainer, monkeypatch, late):
    monkeypatch.setattr(finite, "_on_its_way", lambda numbers: (numbers.clone(), Event()))
    distiller = module(extra={"bad": Memory(2, 3)})
    with pytest.raises(NonFiniteError, match=r"got nan in epoch 0, batch 1, step 1, noticed in epoch 0, batch 2"):
        trainer().fit(distiller, TinyData())
    with pytest.raises(
        NonFiniteError, match=r"^the student's logits must be .*picture .* in epoch 0, batch 1, step 1, no"
    ):
        trainer(callbacks=[At(0, 1, poison_student)]).fit(module(), TinyData())
    fine = module()
    trainer(max_epochs=2).fit(fine, TinyData())
    assert not fine.finite._unread


# Skip


def cpu_half():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**4))


class Watcher(L.Callback):
    """Writes down what a step changed."""

    def __init__(self):
        self.changed = []

    @staticmethod
    def state(trainer, pl_module):
        moments = [one.get("momentum_buffer") for one in trainer.optimizers[0].state.values()]
        tensors = [*pl_module.student.state_dict().values(), *pl_module.losses.buffers(), *moments]
        return [one.clone() for one in tensors if one is not None]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = self.state(trainer, pl_module)
        self.bad = bool((batch["index"] == 7).any())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        after = self.state(trainer, pl_module)
        changed = len(after) != len(self.before) or any(map(lambda a, b: not torch.equal(a, b), after, self.before))
        self.changed.append((self.bad, changed, bool(outputs)))


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_clip_val": 0.5}, {"precision": "bf16-mixed"}, {"plugins": [cpu_half()]}],
    ids=["float32", "clipped", "bf16-mixed", "16-mixed"],
)
def test_a_skipped_batch_leaves_no_trace(trainer, settings):
    watcher, memory = Watcher(), Memory()
    fitted = trainer(max_epochs=2, callbacks=[watcher], **settings)
    with pytest.warns(
        UserWarning, match=r"skipped a batch, 1 in this run: the teacher's logits must be finite"
    ) as seen:
        fitted.fit(module(extra={"memory": memory}, non_finite="skip"), Spoiled())
    assert sorted(watcher.changed) == [(False, True, True)] * 6 + [(True, False, False)] * 2
    assert memory.seen == 6
    assert fitted.callback_metrics["train/skipped"] == 1, "of the last epoch"
    assert fitted.callback_metrics["train/loss"].isfinite()
    assert fitted.global_step == 8
    assert len([one for one in seen if "skip" in str(one.message)]) == 1


def test_only_what_was_skipped_is_missing(trainer):
    def fit(data, **kwargs):
        L.seed_everything(1, verbose=False)
        distiller, fitted = module(**kwargs), trainer(max_epochs=2, accumulate_grad_batches=2)
        fitted.fit(distiller, data)
        return fitted.callback_metrics, distiller.student.state_dict()

    (plain, weights), (same, others) = fit(TinyData()), fit(TinyData(), non_finite="skip")
    assert plain.keys() == same.keys()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    with pytest.warns(UserWarning, match="skipped a batch"):
        metrics, others = fit(Spoiled(), non_finite="skip")
    assert metrics.keys() - plain.keys() == {"train/skipped"}
    assert all(value.isfinite().all() for value in others.values())


def test_too_many_skipped_batches_end_the_run(trainer, monkeypatch):
    poisoned = At(1, 1, poison_student)
    monkeypatch.setattr(finite, "_IN_A_ROW", 3)
    with (
        pytest.warns(UserWarning, match="skipped a batch"),
        pytest.raises(
            NonFiniteError, match=r"^3 batches in a row were skipped, so the weights have probably diverged; "
        ),
    ):
        trainer(max_epochs=2, callbacks=[poisoned]).fit(module(non_finite="skip"), TinyData())
    monkeypatch.undo()
    with (
        pytest.warns(UserWarning, match="skipped a batch"),
        pytest.raises(NonFiniteError, match="^all batches of an epoch were skipped.* step 3"),
    ):
        trainer().fit(module(extra={"bad": Memory(1, 99)}, non_finite="skip"), TinyData())


def test_a_resumed_epoch_goes_on_counting_what_it_skips(trainer, tmp_path):
    def fit(path=None, save_at=None):
        fitted = trainer(callbacks=[Diary(save_at, tmp_path / "mid.ckpt")])
        fitted.fit(module(extra={"bad": Memory(1, 2)}, non_finite="skip"), TinyData(), ckpt_path=path)
        return fitted.callback_metrics["train/skipped"]

    with pytest.warns(UserWarning, match="skipped"):
        counts = [fit(save_at=2), fit(tmp_path / "mid.ckpt")]
    assert counts == [1, 2], "the resumed run meets another"


def test_several_processes_cannot_skip(trainer, monkeypatch):
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    with pytest.raises(ValueError, match="non_finite=skip works in one process, but this run has 2"):
        trainer().fit(module(non_finite="skip"), TinyData())
    with pytest.raises(ValueError, match="non_finite must be one of 'stop', 'skip', got 'ignore'"):
        module(non_finite="ignore")


def test_networks_with_buffers_that_are_replaced_are_put_back():
    class Counts(TinyNet):
        def __init__(self):
            super().__init__()
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, image):
            self.passes = self.passes + 1
            return super().forward(image)

    distiller = module(student=Counts(), non_finite="skip").train()
    before = distiller.student.passes.item()
    image = torch.full((4, 3, 8, 8), torch.nan)
    with pytest.warns(UserWarning, match="skipped a batch"):
        assert distiller.training_step({"image": image, "target": torch.arange(4)}, 0) is None
    assert distiller.student.passes == before


def test_connectors_of_losses_are_put_back_when_a_batch_is_skipped():
    fit = FitNetLoss(student_layers="act", teacher_layers="act")
    distiller = module(teacher=TinyNet(width=16), extra={"fit": fit, "bad": Memory(1, 99)}, non_finite="skip").train()
    before = {name: one.clone() for name, one in distiller.losses.named_buffers()}
    assert any(name.endswith("running_mean") for name in before)
    with pytest.warns(UserWarning, match="skipped a batch"):
        assert distiller.training_step({"image": torch.randn(4, 3, 8, 8), "target": torch.arange(4)}, 0) is None
    assert all(torch.equal(one, before[name]) for name, one in distiller.losses.named_buffers())


def test_statistics_that_are_not_finite_are_never_saved(trainer, tmp_path):
    def poison(pl_module):
        pl_module.student.bn.running_var[0] = torch.inf

    fitted = trainer(max_epochs=2, callbacks=[At(0, 1, poison)])
    with pytest.raises(NonFiniteError, match=r"student\.bn\.running_var are not"):
        fitted.fit(module(), TinyData())
    with pytest.raises(NonFiniteError, match="no checkpoint is written"):
        fitted.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()


def test_an_objective_that_does_not_reach_the_student_is_refused():
    class Detached(DistillationLoss):
        needs_teacher = False

        def forward(self, student, teacher, batch):
            return student.logits.detach().square().mean()

    distiller = ClassificationDistillation(TinyNet(), {"mine": Detached()}, input_size=(3, 8, 8)).train()
    with pytest.raises(ValueError, match="no loss depends on the student: mine came without a graph"):
        distiller.training_step({"image": torch.randn(4, 3, 8, 8), "target": torch.arange(4)}, 0)


# Many students


def many(**kinds):
    teacher = TinyNet(width=16)
    return ManyStudents(
        {name: module(teacher=copy.deepcopy(teacher), **kind) for name, kind in kinds.items()},
        dict.fromkeys(kinds, 0),
    )


def test_each_of_many_students_skips_by_itself(trainer):
    def fit(bad, **settings):
        torch.manual_seed(0)
        students = many(odd={"extra": {"bad": bad}, "non_finite": "skip"}, good={"student": TinyNet(width=6)})
        fitted = trainer(max_epochs=2, **settings)
        fitted.fit(students, TinyData(seed=0))
        return students, fitted.callback_metrics

    undisturbed, _ = fit(Memory())
    with pytest.warns(UserWarning, match=r"skipped a batch, 1 in this run: losses.bad"):
        students, metrics = fit(Memory(6, 8))
    assert metrics["odd/train/skipped"] == 2
    assert students.students["odd"].losses["bad"].loss.seen == 6
    assert not students.dropped
    expected = undisturbed.students["good"].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in students.students["good"].state_dict().items())
    with pytest.warns(UserWarning, match="skipped a batch"):
        students, metrics = fit(Memory(6, 8), plugins=[cpu_half()])
    assert metrics["odd/train/skipped"] == 2


@pytest.mark.parametrize("precision", [None, cpu_half()], ids=["float32", "16-mixed"])
def test_one_that_stops_is_dropped_with_the_reason(trainer, precision, tmp_path):
    students = many(odd={"extra": {"bad": Memory(3, 99)}}, good={})
    fitted = trainer(max_epochs=2, plugins=[precision] if precision else None)
    with pytest.warns(UserWarning, match="the others go on"):
        fitted.fit(students, TinyData())
    assert students.dropped["odd"].startswith("student odd: losses.bad must be finite, got nan in epoch 0, batch 2")
    fitted.save_checkpoint(tmp_path / "all.ckpt")


def test_one_that_is_found_late_is_dropped_too_but_a_teacher_stops_all(trainer, tmp_path, late):
    students = many(odd={"extra": {"bad": Memory(3, 99)}}, good={})
    fitted = trainer(max_epochs=2)
    with pytest.warns(UserWarning, match=r"losses.bad .* noticed .*the others go on"):
        fitted.fit(students, TinyData())
    assert set(students.dropped) == {"odd"}
    fitted.save_checkpoint(tmp_path / "all.ckpt")  # the dropped one's weights are no obstacle
    spoil = At(0, 1, lambda group: group.students["odd"].teacher.fc.bias.fill_(torch.nan))
    with pytest.raises(NonFiniteError, match="^student odd: the teacher's logits must be finite"):
        trainer(callbacks=[spoil]).fit(many(odd={}, good={}), TinyData())


# Teachers that say nothing


def zeroed(*layers):
    net = TinyNet(width=16)
    for layer in layers:
        for weight in getattr(net, layer).parameters():
            nn.init.zeros_(weight)
    return net


@pytest.mark.parametrize("performance", ["plain", "exact", "fast"])
def test_a_teacher_that_says_nothing_is_refused_in_the_first_step(trainer, performance):
    with pytest.raises(ValueError, match=r"the same logit for all classes and pictures \(from 0 to 0, 16 pictures"):
        trainer().fit(module(teacher=zeroed("fc"), performance=performance), TinyData())
    with pytest.raises(ValueError, match=r"teacher gives the same logits for all pictures .*Usual causes: its weights"):
        trainer().fit(module(teacher=zeroed("bn"), performance=performance), TinyData())


def test_the_same_pictures_may_get_the_same_answer():
    doubt, batch = TeacherDoubt(), {"image": torch.rand(1, 3, 8, 8).expand(4, 3, 8, 8)}
    doubt.arise()
    doubt.look(batch, torch.ones(4, 5))
    assert not doubt.settled
    pair = {"image": torch.rand(2, 3, 8, 8)}
    same = torch.arange(5.0).expand(2, 5)
    for _ in range(3):
        doubt.look(pair, same)
    with pytest.raises(ValueError, match="8 pictures that differ"):
        doubt.look(pair, same)
    doubt.arise()
    doubt.look(pair, same + torch.tensor([[0.0], [1e-4]]))
    assert doubt.settled
