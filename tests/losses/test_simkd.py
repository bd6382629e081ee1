"""SimKD: the student with its teacher's classifier, from the loss to the exported file."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kdlit import models
from kdlit.callbacks import StudentExport
from kdlit.losses import CrossEntropyLoss, FeatureLoss, KDLoss, LogitStandardization, WeightedLoss
from kdlit.losses.simkd import SimKDLoss
from kdlit.models import FeatureLayers, feature_layers, from_checkpoint
from kdlit.models.simkd import SimKDStudent
from kdlit.modules import ClassificationDistillation, MutualLearning
from kdlit.types import ModelOutput
from tests.conftest import TinyData
from tests.losses.heads import Own, check_gradients, close, in_float32, load_head
from tests.losses.test_golden import load


class Given(nn.Module):
    """Its pictures are its maps."""

    feature_layers = FeatureLayers(maps=("map",), pool="fc.input", classifier="fc")

    def __init__(self, channels, classes):
        super().__init__()
        self.map = nn.Identity()
        self.fc = nn.Linear(channels, classes)

    def forward(self, image):
        return self.fc(self.map(image).mean((2, 3)))


class Mapped(Own):
    """The same as a user's network, but it says where to look; its last map is made after a ReLU."""

    feature_layers = FeatureLayers(maps=("first", "last"), pool="head.input", classifier="head")

    def __init__(self, width=6, num_classes=5):
        super().__init__(width, num_classes)
        self.last = nn.ReLU(inplace=True)

    def forward(self, image):
        return self.head(self.last(self.second(self.first(image))).mean((2, 3)))


def golden(number, dtype):
    case = load("simkd", number)
    if dtype == torch.float32:
        in_float32(case)
    student, teacher = case["student_feat_0"], case["teacher_feat_0"]
    classes, width = case["teacher_fc_weight"].shape
    given = Given(width, classes).to(dtype)
    given.fc.load_state_dict({"weight": case["teacher_fc_weight"], "bias": case["teacher_fc_bias"]})
    loss = SimKDLoss(factor=case.factor)
    examples = student[:1].detach(), teacher[:1].detach()
    joint = loss.extend_student(Given(student.shape[1], classes).to(dtype), given, *examples)
    loss.setup(joint, given, *examples)
    load_head(joint.projector, case)
    return case, loss, joint.to(dtype).train(), student, teacher


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("number", range(3))
def test_golden_values_logits_and_gradients(number, dtype):
    case, loss, joint, student, teacher = golden(number, dtype)
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    caught = []
    joint.projector.register_forward_hook(lambda module, args, output: caught.append(output))
    close(joint(student), case["logits"], rtol)
    close(caught[0], case["student_feat_proj_0"], rtol)
    value = loss(ModelOutput(student, {"projector": caught[0]}), ModelOutput(teacher, {"map": teacher}), {})
    close(value, case["loss"], rtol)
    value.backward()
    check_gradients(joint.projector, case, rtol)


def module(student=None, teacher=None, losses=None, **options):
    torch.manual_seed(0)
    student, teacher = student or Mapped(), teacher or Mapped(width=8)
    return ClassificationDistillation(
        student, losses or {"simkd": SimKDLoss(**options)}, teacher=teacher, input_size=(3, 8, 8)
    )


def batch_of(size=4):
    return {"image": torch.rand(size, 3, 8, 8), "target": torch.arange(size) % 5}


def test_a_perfect_projection_gives_the_teachers_logits_and_no_loss():
    distiller = module()
    distiller.eval()
    batch = batch_of()
    teacher = distiller.run_teacher(batch)
    feature = teacher.features["last"]
    loss = distiller.losses["simkd"].loss
    assert loss.compare([feature], [feature]) == 0
    assert loss.compare([feature + 2], [feature]).item() == pytest.approx(4.0, rel=1e-5)
    assert torch.equal(distiller.student.classifier(feature.mean((2, 3))), teacher.logits)
    huge = loss.compare([1e4 * torch.ones_like(feature)], [-1e4 * torch.ones_like(feature)])
    assert huge.isfinite()


def test_it_trains_alone_measures_and_exports_the_joint_network(trainer, tmp_path):
    distiller = module(factor=4)
    teacher = copy.deepcopy(distiller.teacher)
    before = copy.deepcopy(distiller.student.state_dict())
    fit = trainer(max_epochs=3, callbacks=[StudentExport(str(tmp_path / "student.pt"))])
    fit.fit(distiller, TinyData())
    metrics = dict(fit.callback_metrics)
    assert set(metrics) >= {"val/top1", "val/cross_entropy", "val/agreement", "train/loss/simkd"}
    student = distiller.student
    unchanged = {name for name, value in student.state_dict().items() if torch.equal(before[name], value)}
    assert unchanged == {"body.head.weight", "body.head.bias", "classifier.weight", "classifier.bias"}
    assert torch.equal(student.classifier.weight, teacher.head.weight)
    held = {id(p) for group in distiller.configure_optimizers().param_groups for p in group["params"]}
    frozen = {*student.body.head.parameters(), *student.classifier.parameters()}
    assert held == {id(parameter) for parameter in student.parameters()} - {id(p) for p in frozen}

    tested = fit.test(distiller, TinyData(), verbose=False)[0]["test/top1"]
    # Without the teacher:
    alone = from_checkpoint(SimKDStudent(Mapped(), 16, 5, factor=4, input_size=(3, 8, 8)), str(tmp_path / "student.pt"))
    assert alone.note == student.note
    assert alone.note.startswith("kdlit.models.SimKDStudent(body, teacher_channels=16, num_classes=5, factor=4")
    image = batch_of()["image"]
    assert torch.equal(alone.eval()(image), student.eval()(image))
    plain = ClassificationDistillation(alone, {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))
    assert trainer().test(plain, TinyData(), verbose=False)[0]["test/top1"] == tested
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again = module(factor=4, teacher=teacher)
    trainer(max_epochs=4).fit(again, TinyData(), ckpt_path=tmp_path / "last.ckpt")
    assert isinstance(again.student, SimKDStudent)
    assert not [n for n in torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"] if "teacher." in n]


def test_the_error_falls(trainer):
    distiller = module(teacher=Mapped(width=8))
    fit = trainer(max_epochs=1)
    fit.fit(distiller, TinyData())
    first = fit.callback_metrics["train/loss/simkd"]
    fit = trainer(max_epochs=10)
    fit.fit(distiller, TinyData())
    assert fit.callback_metrics["train/loss/simkd"] < 0.5 * first


def test_ddp_reduces_all_that_it_is_given(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        student = models.shufflenetv2(num_classes=5)  # has a convolution after its last published map
        teacher = models.resnet8(num_classes=5)
        loss = SimKDLoss()
        joint = loss.extend_student(student, teacher, torch.zeros(1, 3, 32, 32))
        assert not any(parameter.requires_grad for parameter in student.linear.parameters())
        wrapped = DistributedDataParallel(joint)
        for _ in range(2):  # the second pass fails if a parameter got no gradient in the first
            wrapped(torch.rand(2, 3, 32, 32)).sum().backward()
        assert all(p.grad is not None for p in joint.parameters() if p.requires_grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("student", "teacher", "layer", "teacher_layer", "size"),
    [
        ("resnet8", "wrn_16_2", "layer3", "pool.input", 32),
        ("wrn_16_1", "resnet8x4", "block3", "pool.input", 32),
        ("mobilenetv2", "torchvision", "blocks.6", "layer4", 64),
        ("torchvision", "mobilenetv2_tinyimagenet", "layer4", "pool.input", 64),  # a convolution classifies
        ("vgg8", "shufflenetv2", "relu4", "pool.input", 32),
    ],
)
def test_default_layers(student, teacher, layer, teacher_layer, size):
    student, teacher = (
        torchvision.models.resnet18(num_classes=5) if name == "torchvision" else getattr(models, name)(num_classes=5)
        for name in (student, teacher)
    )
    loss = SimKDLoss()
    distiller = ClassificationDistillation(student, {"s": loss}, teacher, input_size=(3, size, size))
    assert distiller.student.layer == layer
    assert loss.student_layers == ("projector",)
    assert loss.teacher_layers == (teacher_layer,)
    batch = {"image": torch.rand(2, 3, size, size)}
    distiller.eval()
    value = loss(distiller.run_student(batch), distiller.run_teacher(batch), batch)
    assert value.isfinite()
    layers, inner = feature_layers(distiller.student), feature_layers(student)
    assert layers.maps == tuple(f"body.{path}" for path in inner.maps)
    assert layers.norms == tuple(f"body.{path}" for path in inner.norms)
    assert (layers.pool, layers.classifier, layers.pooled_map) == ("classifier.input", "classifier", "projector")


def test_a_larger_map_is_averaged_and_pictures_of_other_sizes_pass():
    body, teacher = models.vgg8(5), models.resnet8x4(5)
    joint = SimKDStudent.from_teacher(body, teacher, torch.zeros(1, 3, 32, 32), layer="relu1")
    assert joint.max_size == (8, 8)
    assert "max_size=[8, 8]" in joint.note
    alone = SimKDStudent(models.vgg8(5), 256, 5, layer="relu1", max_size=[8, 8])
    alone.load_state_dict(joint.state_dict())
    assert alone.note == joint.note
    small = SimKDStudent(models.vgg8(5), 256, 5, layer="relu1", max_size=[8, 8], input_size=(3, 8, 8))
    assert small.max_size == (8, 8)  # whatever its map at the size of the dry run
    image = torch.rand(2, 3, 32, 32)
    assert torch.equal(alone.eval()(image), joint.eval()(image))
    assert joint(torch.rand(2, 3, 48, 48)).shape == (2, 5)
    copied = copy.deepcopy(joint)
    with torch.no_grad():
        copied.projector.conv0.weight.zero_()
    assert not torch.equal(copied(image), joint(image))


def test_a_map_that_the_next_layer_overwrites():
    body = Mapped()
    joint = SimKDStudent(body, 8, 5, layer="second.1", input_size=(3, 8, 8)).eval()
    image = batch_of()["image"]
    with torch.inference_mode():
        expected = joint.classifier(joint.projector(body.second(body.first(image))).mean((2, 3)))
        assert torch.equal(joint(image), expected)


def test_explicit_layers_of_a_users_network():
    distiller = module(Own(), Mapped(width=7), student_layers="second")
    assert distiller.student.layer == "second"
    assert distiller.student.projector.conv0.in_channels == 12


class Maps(FeatureLoss):
    """A loss on maps beside SimKD."""

    def default_layers(self, layers):
        return layers.maps[1:]

    def compare(self, student, teacher):
        return sum(a.mean() - b.mean() for a, b in zip(student, teacher, strict=True)).square()


def test_other_losses_find_the_body_and_read_the_joint_logits():
    losses = {"ce": CrossEntropyLoss(), "kd": KDLoss(), "maps": Maps(), "named": Maps(["body.first"], ["first"])}
    distiller = module(losses={**losses, "simkd": SimKDLoss()})
    assert losses["maps"].student_layers == ("body.last",)
    batch = batch_of()
    student, teacher = distiller.run_student(batch), distiller.run_teacher(batch)
    for term in distiller.losses.values():
        assert term(student, teacher, batch).isfinite()
    assert torch.equal(student.logits, distiller.student.classifier(student.features["projector"].mean((2, 3))))


def test_wrappers_change_nothing_but_the_factor():
    batch = batch_of()
    values = []
    for wrap in (lambda loss: loss, LogitStandardization, lambda loss: WeightedLoss(LogitStandardization(loss), 0.5)):
        distiller = module(losses={"s": wrap(SimKDLoss())})
        assert isinstance(distiller.student, SimKDStudent)
        values.append(distiller.losses["s"](distiller.run_student(batch), distiller.run_teacher(batch), batch))
    assert torch.equal(values[0], values[1])
    assert torch.equal(0.5 * values[0], values[2])


def test_gradients_reach_the_student_alone():
    distiller = module()
    batch = batch_of()
    student, teacher = distiller.run_student(batch), distiller.run_teacher(batch)
    feature = teacher.features["last"].requires_grad_()
    distiller.losses["simkd"](student, teacher, batch).backward()
    assert feature.grad is None
    without = {name for name, parameter in distiller.student.named_parameters() if parameter.grad is None}
    assert without == {"body.head.weight", "body.head.bias", "classifier.weight", "classifier.bias"}


class Hidden(Mapped):
    """A teacher whose logits are not its last layer's."""

    def forward(self, image):
        return super().forward(image).tanh() * 3


def test_errors():
    with pytest.raises(
        ValueError, match=r"logits are its last layer \('head'\) on the mean of a map, but those of Hidden"
    ):
        module(teacher=Hidden())
    with pytest.raises(ValueError, match="those of Mapped are not so with 'first'"):
        module(teacher_layers="first")
    with pytest.raises(ValueError, match="teacher_layers must be named: Own does not say which map"):
        module(teacher=Own())
    with pytest.raises(ValueError, match="SimKDLoss needs student_layers: Own does not say"):
        module(student=Own())
    with pytest.raises(ValueError, match=r"layer 'head' must give maps \(B, C, H, W\), but gives \(1, 5\)"):
        module(student_layers="head")
    with pytest.raises(ValueError, match=r"layer 'head' of the teacher must give maps .* but gives \(1, 5\)"):
        module(teacher_layers="head")
    with pytest.raises(ValueError, match="has no layer 'lost'; close names: last"):
        module(student_layers="lost")
    with pytest.raises(ValueError, match="but it is one already; give its body as the student, and this loss once"):
        module(losses={"a": SimKDLoss(), "b": SimKDLoss()})
    with pytest.raises(ValueError, match="got Mapped; a module that does not call it, as MutualLearning, cannot use"):
        MutualLearning([Mapped(), Mapped()], {"ce": CrossEntropyLoss(), "s": SimKDLoss()}, input_size=(3, 8, 8))
    with pytest.raises(ValueError, match="student_layers must be one layer for SimKDLoss, got first, second"):
        SimKDLoss(student_layers=["first", "second"])
    with pytest.raises(ValueError, match="factor must be an integer >= 1, got 0"):
        SimKDLoss(factor=0)
    with pytest.raises(ValueError, match="factor must be at most 16, the teacher's channels, got 32"):
        module(factor=32)
    with pytest.raises(ValueError, match="layer must be named: Own does not say which layer gives its last map"):
        SimKDStudent(Own(), 8, 5)
