"""Many students on one teacher: each is what it is alone."""

from __future__ import annotations

import copy
import re

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from kdlit.losses import (
    CRDLoss,
    CrossEntropyLoss,
    DistillationLoss,
    DKDLoss,
    FitNetLoss,
    KDLoss,
    MLKDTwoViewLoss,
    SimKDLoss,
    WeightedLoss,
)
from kdlit.models import FeatureLayers
from kdlit.modules import ClassificationDistillation, ManyStudents
from kdlit.modules.streams import RandomStream
from tests.conftest import TinyData, TinyNet


class Dropped(TinyNet):
    """Draws, and so does its input noise, from three generators."""

    feature_layers = FeatureLayers(maps=("act",), pool="fc.input", classifier="fc")

    def __init__(self, num_classes=5, width=8):
        super().__init__(num_classes, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, image):
        if self.training:
            image = image * float(1 + 0.1 * np.random.rand())
        return self.fc(self.drop(self.act(self.bn(self.stem(image)))).mean((2, 3)))


class Mapped(TinyNet):
    """Says where its map is."""

    feature_layers = FeatureLayers(maps=("act",), pool="fc.input", classifier="fc")


def rough_teacher(width=16):
    """A teacher whose batch norm does something."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = Mapped(width=width)
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) - (0.5 if value.ndim > 1 else 0.0))
    return network


def steps(optimizer):
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], 0.5)


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)


def adam(params):
    return torch.optim.Adam(params, lr=0.01)


KINDS = {
    "kd": (0, Mapped, 8, {"ce": CrossEntropyLoss, "kd": lambda: WeightedLoss(KDLoss(), 1.0, 3)}, {"lr_scheduler": steps}),
    "adam": (
        3, Dropped, 8, {"ce": CrossEntropyLoss, "dkd": DKDLoss}, {"optimizer": adam, "lr_scheduler": plateau}),
    "crd": (1, Dropped, 12, {"ce": CrossEntropyLoss, "crd": lambda: CRDLoss(negatives=8)}, {}),
    "two_views": (2, Dropped, 8, {"ce": CrossEntropyLoss, "mlkd": MLKDTwoViewLoss}, {}),
    "simkd": (4, Mapped, 6, {"simkd": SimKDLoss}, {}),
    "alone": (5, Dropped, 6, {"ce": CrossEntropyLoss}, {"teacher": None}),
}  # fmt: skip


def build(kind, **changes):
    seed, network, width, losses, options = KINDS[kind]
    L.seed_everything(seed, verbose=False)
    settings = {"teacher": rough_teacher(), "input_size": (3, 8, 8)} | options | changes
    return ClassificationDistillation(network(width=width), {key: make() for key, make in losses.items()}, **settings)


def group(*kinds, **changes):
    return ManyStudents({kind: build(kind, **changes) for kind in kinds}, {kind: KINDS[kind][0] for kind in kinds})


def figures_of(fit, name=""):
    prefix = f"{name}/" if name else ""
    return {
        key.removeprefix(prefix): float(value) for key, value in fit.callback_metrics.items() if key.startswith(prefix)
    }


def assert_equal(module, other):
    ours, theirs = module.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def assert_each_is_what_it_is_alone(trainer, kinds, **settings):
    many, fit = group(*kinds), trainer(max_epochs=3, **settings)
    L.seed_everything(0, verbose=False)
    fit.fit(many, TinyData(strong_view=True))
    for kind in kinds:
        single, alone = build(kind), trainer(max_epochs=3, **settings)
        L.seed_everything(KINDS[kind][0], verbose=False)
        alone.fit(single, TinyData(strong_view=True, seed=0))
        assert_equal(many.students[kind], single)
        assert figures_of(fit, kind) == figures_of(alone)
        assert alone.global_step == fit.global_step
    return many, fit


def test_every_kind_of_student_is_bit_for_bit_what_it_is_alone(trainer):
    _, fit = assert_each_is_what_it_is_alone(trainer, KINDS)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in fit.optimizers[0].optimizers.values()]
    assert rates[0] == [0.05 * 0.25]
    assert rates[1][0] < 0.01, "the plateau is seen in the student's own figures"
    assert rates[2] == [0.05]


def test_gradients_are_clipped_by_the_norm_of_each_student_and_accumulate(trainer):
    assert_each_is_what_it_is_alone(trainer, ("kd", "adam"), gradient_clip_val=0.05, accumulate_grad_batches=3)


def test_under_16_mixed_each_student_has_a_scale_of_its_own(trainer):
    class Precision(MixedPrecision):
        def __init__(self):
            super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3))

    fits = []

    def with_precision(**settings):
        fits.append(trainer(plugins=[Precision()], gradient_clip_val=0.1, **settings))
        return fits[-1]

    many, fit = assert_each_is_what_it_is_alone(with_precision, ("kd", "alone"))
    scales = {name: scaler.get_scale() for name, scaler in many.scalers.of.items()}
    assert scales == {
        "kd": fits[1].precision_plugin.scaler.get_scale(),
        "alone": fits[2].precision_plugin.scaler.get_scale(),
    }
    assert set(fit.precision_plugin.state_dict()) == {"kd", "alone"}


class Counted(Mapped):
    """Counts the batches that it and its copies see; a single picture is a dry run."""

    seen: list[int] = []

    def forward(self, image):
        if len(image) > 1:
            self.seen.append(len(image))
            assert not torch.is_grad_enabled()
            assert not self.training
        return super().forward(image)


def test_the_teacher_runs_once_a_batch_with_the_layers_of_all(trainer):
    taught = {kind: build(kind, teacher=Counted(width=16)) for kind in ("kd", "crd", "simkd", "two_views")}
    for module in taught.values():
        module.teacher.load_state_dict(rough_teacher().state_dict())
    many = ManyStudents({**taught, "alone": build("alone")})
    assert many._frozen_teacher.frozen.layers == {"act", "fc.input"}
    assert len({id(student.teacher) for student in taught.values()}) == 1
    Counted.seen.clear()
    trainer(max_epochs=2, num_sanity_val_steps=0).fit(many, TinyData(strong_view=True))
    assert Counted.seen == [*[16] * 8, 32] * 2, "twice a training batch, as one student needs the strong view"


@pytest.mark.parametrize("save_at", [4, 6])
def test_a_group_resumes_bit_for_bit_also_in_the_middle_of_an_epoch(trainer, tmp_path, save_at):
    from tests.conftest import Diary

    kinds, path = ("kd", "two_views", "alone"), str(tmp_path / "middle.ckpt")
    whole = group(*kinds)
    straight = trainer(max_epochs=3, callbacks=[Diary(save_at, path)])
    straight.fit(whole, TinyData(strong_view=True, seed=3))
    resumed = group(*kinds)
    L.seed_everything(99, verbose=False)
    fit = trainer(max_epochs=3)
    fit.fit(resumed, TinyData(strong_view=True, seed=3), ckpt_path=path)
    assert figures_of(fit) == figures_of(straight)
    for kind in kinds:
        assert_equal(resumed.students[kind], whole.students[kind])
    saved = torch.load(path, weights_only=True)
    assert not [key for student in saved["students"].values() for key in student["state_dict"] if "teacher" in key]


class Spoiled(DistillationLoss):
    """Is not a number in every step."""

    def forward(self, student, teacher, batch):
        return student.logits.sum() * float("nan")


def test_a_loss_that_is_not_finite_and_a_student_that_diverges_harm_no_other(trainer):
    spoiled = build("adam")
    spoiled.losses["bad"] = WeightedLoss(Spoiled())
    wild = build("kd", optimizer=lambda params: torch.optim.SGD(params, lr=1e30))
    many = ManyStudents(
        {"spoiled": spoiled, "kd": build("kd"), "wild": wild}, {"spoiled": 0, "kd": KINDS["kd"][0], "wild": 0}
    )
    fit = trainer(max_epochs=2, gradient_clip_val=1.0)
    with pytest.warns(UserWarning, match="student wild: .* must be finite.*; the others go on without it"):
        fit.fit(many, TinyData(seed=0))
    assert set(many.dropped) == {"spoiled", "wild"}
    single, alone = build("kd"), trainer(max_epochs=2, gradient_clip_val=1.0)
    L.seed_everything(KINDS["kd"][0], verbose=False)
    alone.fit(single, TinyData(seed=0))
    assert_equal(many.students["kd"], single)
    assert figures_of(fit, "kd") == figures_of(alone)


def test_a_student_that_writes_into_its_pictures_is_refused(trainer):
    class Greedy(TinyNet):
        def forward(self, image):
            return super().forward(image.mul_(0.5))

    module = ClassificationDistillation(Greedy(), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))
    with pytest.raises(ValueError, match="student greedy writes into its pictures"):
        trainer(num_sanity_val_steps=0).fit(ManyStudents({"greedy": module, "kd": build("kd")}), TinyData())


def test_errors_of_a_student_have_its_name(trainer):
    many = group("kd", "two_views")
    with pytest.raises(ValueError, match="^student two_views: a loss needs a second view"):
        trainer(num_sanity_val_steps=0).fit(many, TinyData())
    six = ClassificationDistillation(TinyNet(6), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))
    with pytest.raises(ValueError, match="^student six: the data has 5 classes"):
        trainer().fit(ManyStudents({"six": six}), TinyData())


def other_teacher():
    network = rough_teacher()
    network.fc.weight.data[0, 0] += 1e-6
    return network


def of_six():
    return ClassificationDistillation(TinyNet(6), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))


class ByHand(ClassificationDistillation):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False


class OwnStep(ClassificationDistillation):
    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)


def of_class(module_class):
    return module_class(TinyNet(), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))


REFUSED = {
    "none": (lambda: {}, "students must hold at least one module"),
    "name": (lambda: {"a b": build("kd")}, "letters, digits, _ and -, got 'a b'"),
    "not a module": (lambda: {"a": TinyNet()}, "student a must be a DistillationModule, got TinyNet"),
    "classes": (lambda: {"a": build("kd"), "b": of_six()}, "student a gives 5 logits and student b 6"),
    "weights of the teacher": (
        lambda: {"a": build("kd"), "b": build("kd", teacher=other_teacher())}, "a and b differ in their weights, such as fc.weight"),
    "layers of the teacher": (
        lambda: {"a": build("kd"), "b": build("kd", teacher=rough_teacher(12))}, "a and b differ in their layers"),
    "performance": (
        lambda: {"a": build("kd"), "b": build("kd", performance="plain")}, "differ in performance.channels_last, True and False"),
    "input": (lambda: {"a": build("kd"), "b": build("kd", teacher_input_size=(3, 8, 8))}, "differ in their input"),
    "by hand": (lambda: {"a": of_class(ByHand)}, "student a optimises by hand"),
    "own step": (lambda: {"a": of_class(OwnStep)}, "student a has its own optimizer_step"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSED)
def test_students_that_cannot_be_together_are_refused(mistake):
    students, message = REFUSED[mistake]
    with pytest.raises(ValueError, match=re.escape(message)):
        ManyStudents(students())


def test_students_must_not_share_weights_and_seeds_must_be_theirs():
    module = build("kd")
    with pytest.raises(ValueError, match="students a and b share parameters"):
        ManyStudents({"a": module, "b": module})
    with pytest.raises(ValueError, match="seeds names c, but the students are a"):
        ManyStudents({"a": module}, {"c": 1})


def test_a_checkpoint_of_other_students_is_refused(trainer, tmp_path):
    fit = trainer()
    fit.fit(group("kd"), TinyData())
    fit.save_checkpoint(tmp_path / "kd.ckpt")
    with pytest.raises(ValueError, match="the checkpoint is of the students kd, but these are adam"):
        trainer(max_epochs=2).fit(group("adam"), TinyData(), ckpt_path=tmp_path / "kd.ckpt")


def test_streams_neither_disturb_nor_are_disturbed():
    L.seed_everything(5, verbose=False)
    expected = torch.rand(3), np.random.randn(3), [__import__("random").random() for _ in range(2)]
    stream = RandomStream(5)
    L.seed_everything(8, verbose=False)
    untouched = copy.deepcopy(torch.get_rng_state())
    for part in range(3):
        with stream.flowing(torch.device("cpu")):
            if part == 0:
                assert torch.equal(torch.rand(3), expected[0])
            elif part == 1:
                assert np.array_equal(np.random.randn(3), expected[1])
            else:
                assert [__import__("random").random() for _ in range(2)] == expected[2]
        torch.rand(1)
        np.random.rand()
    again = RandomStream(1)
    again.load_state_dict(stream.state_dict())
    with stream.flowing(torch.device("cpu")):
        ahead = torch.rand(2), np.random.randn()
    with again.flowing(torch.device("cpu")):
        assert torch.equal(torch.rand(2), ahead[0])
        assert np.random.randn() == ahead[1]
    assert not torch.equal(untouched, torch.get_rng_state())


def test_the_union_of_layers_does_not_reach_a_student_that_asked_for_less():
    many = ManyStudents({"kd": build("kd"), "fit": build("kd")})
    assert many._frozen_teacher.frozen.layers == frozenset()
    feature = ClassificationDistillation(
        Mapped(), {"fitnet": FitNetLoss("act", "act")}, rough_teacher(), input_size=(3, 8, 8)
    )
    many = ManyStudents({"kd": build("kd"), "fitnet": feature}).train()
    said = many.training_step({"image": torch.rand(4, 3, 8, 8), "target": torch.arange(4)}, 0)["students"]
    assert said["kd"]["teacher"].features == {}
    assert list(said["fitnet"]["teacher"].features) == ["act"]
    assert torch.equal(said["kd"]["teacher"].logits, said["fitnet"]["teacher"].logits)


def test_students_are_told_of_batches_only_if_they_listen(trainer, monkeypatch):
    class Listener(ClassificationDistillation):
        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            heard.append((float(torch.rand(())), batch_idx))

    heard, turns = [], []
    students = {
        name: kind(TinyNet(), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))
        for name, kind in (("deaf", ClassificationDistillation), ("listener", Listener))
    }
    group = ManyStudents(students, seeds={"deaf": 1, "listener": 2})
    turn = ManyStudents.turn
    monkeypatch.setattr(ManyStudents, "turn", lambda self, name: turns.append(name) or turn(self, name))
    monkeypatch.setattr(
        ManyStudents,
        "training_step",
        lambda self, batch, batch_idx: turns.append("step") or next(self.parameters()).sum(),
    )
    trainer(limit_val_batches=0).fit(group, TinyData(val_size=0, batch_size=32))
    assert [batch_idx for _, batch_idx in heard] == [0, 1, 2]
    before_steps = [turns[place - 1] for place, what in enumerate(turns) if what == "step"]
    assert before_steps == ["listener"] * 3, "taking turns costs time"
