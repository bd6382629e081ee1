"""What the losses on the last layers of a network have in common: layers, mistakes, a training step, copies."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

from kdlit import models
from kdlit.losses import CrossEntropyLoss
from kdlit.losses.catkd import CATKDLoss
from kdlit.losses.crd import CRDLoss
from kdlit.losses.itrd import ITRDLoss
from kdlit.losses.last_layer import unit
from kdlit.losses.srrl import SRRLLoss
from kdlit.modules import ClassificationDistillation
from kdlit.types import ModelOutput
from tests.conftest import TinyData
from tests.losses.heads import Own

MAKE = {
    "crd": lambda *layers, **kw: CRDLoss(*layers, feat_dim=4, negatives=6, **kw),
    "itrd": ITRDLoss,
    "srrl": SRRLLoss,
    "catkd": CATKDLoss,
}
MAPS = ("srrl", "catkd")
METHODS = pytest.mark.parametrize("method", MAKE)
OF_MAPS = pytest.mark.parametrize("method", MAPS)


def example(size: int = 8) -> torch.Tensor:
    return torch.zeros(1, 3, size, size)


def layers_of(method: str) -> dict[str, str]:
    layer = "second" if method in MAPS else "head.input"
    return {"student_layers": layer, "teacher_layers": layer}


def distil(method: str, **kwargs: object) -> ClassificationDistillation:
    loss = MAKE[method](**layers_of(method))
    return ClassificationDistillation(
        Own(4), {"ce": CrossEntropyLoss(), method: loss}, Own(6), input_size=(3, 8, 8), **kwargs
    )


@METHODS
def test_default_layers(method: str) -> None:
    """The pooled feature, or the map that is averaged to it, with the classifier that takes it."""
    pairs = [
        (models.resnet8(10), models.wrn_16_1(10), "pool", "pool"),
        (torchvision.models.resnet18(num_classes=10), models.mobilenetv2(num_classes=10), "layer4", "pool"),
    ]
    for student, teacher, student_layer, teacher_layer in pairs:
        loss = MAKE[method]()
        loss.setup(student, teacher, example(32))
        found = (loss.student_layers[0], loss.teacher_layers[0])
        if method in MAPS:
            pooled = tuple(f"{layer}.input" if layer == "pool" else layer for layer in (student_layer, teacher_layer))
        else:
            pooled = tuple("fc.input" if layer == "layer4" else layer for layer in (student_layer, teacher_layer))
        assert found == pooled


@METHODS
def test_a_training_step(method: str, trainer) -> None:
    module = distil(method)
    before = {name: value.clone() for name, value in module.named_parameters()}
    fitting = trainer(limit_train_batches=2)
    fitting.fit(module, TinyData())
    heads = [name for name in before if name.startswith(f"losses.{method}")]
    optimized = {id(p) for group in fitting.optimizers[0].param_groups for p in group["params"]}
    assert bool(heads) == (method != "catkd")
    for name, value in module.named_parameters():
        assert torch.equal(value, before[name]) == name.startswith("teacher."), name
        assert (id(value) in optimized) != name.startswith("teacher."), name
    own = module.losses.state_dict()
    assert {f"losses.{name}" for name in own} >= set(heads)
    assert not any("classifier" in name or "_of_teacher" in name for name in own)
    assert set(module.student.state_dict()) == set(Own(4).state_dict())
    assert 0 < fitting.callback_metrics[f"train/loss/{method}"].item() < 1e4
    fitting.validate(module, TinyData(), verbose=False)
    copied = copy.deepcopy(module)
    batch = {"image": torch.rand(4, 3, 8, 8), "target": torch.arange(4), "index": torch.arange(4)}
    outputs = module.eval().run_student(batch), module.run_teacher(batch)
    torch.manual_seed(0)
    value = module.losses[method](*outputs, batch)
    torch.manual_seed(0)
    copied.eval()
    with torch.no_grad():  # a classifier that stands in for the copied one would show
        module.student.head.weight.add_(1)
        module.teacher.head.weight.add_(1)
    assert torch.equal(copied.losses[method](*outputs, batch), value)


@METHODS
def test_state_dict_round_trip(method: str) -> None:
    module, other = distil(method), distil(method)
    for one in (module, other):
        one.losses[method].on_fit_start(torch.arange(12) % 3)
    with torch.no_grad():
        for value in module.losses[method].parameters():
            value.normal_()
    other.losses[method].load_state_dict(module.losses[method].state_dict())
    for name, value in module.losses[method].state_dict().items():
        assert (
            torch.equal(
                other.losses[method].state_dict()[name],
                value,
            )
            or value.isnan().all()
        )


@METHODS
def test_it_compiles_and_forward_changes_no_state(method: str) -> None:
    module = distil(method)
    loss = module.losses[method].loss
    loss.on_fit_start(torch.arange(12) % 3)
    loss.eval()
    batch = {"image": torch.rand(4, 3, 8, 8), "index": torch.arange(4)}
    student, teacher = module.run_student(batch), module.run_teacher(batch)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    torch.manual_seed(0)
    expected = loss(student, teacher, batch)
    torch.manual_seed(0)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(student, teacher, batch), expected)
    for name, value in loss.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


@METHODS
def test_mistakes_with_layers(method: str) -> None:
    right, wrong = ("second", "head.input") if method in MAPS else ("head.input", "second")
    with pytest.raises(ValueError, match=rf"but student layer '{wrong}' gives \(1, .*set student_layers"):
        MAKE[method](wrong, right).setup(Own(), Own(), example())
    with pytest.raises(ValueError, match="looks at one layer, but student_layers names first, second"):
        MAKE[method](["first", "second"], ["first", "second"]).setup(Own(), Own(), example())
    with pytest.raises(ValueError, match="must be as many"):
        MAKE[method](["first", "second"], right)
    with pytest.raises(ValueError, match="needs a teacher, but there is none"):
        MAKE[method](right, right).setup(Own(), None, example())
    silent = nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten())
    with pytest.raises(ValueError, match="needs student_layers: Sequential does not say where"):
        MAKE[method]().setup(silent, Own(), example())


@OF_MAPS
def test_mistakes_with_classifiers(method: str) -> None:
    with pytest.raises(
        ValueError, match="the teacher's classifier 'head' takes 12 channels, but layer 'first' gives 6"
    ):
        MAKE[method]("second", "first").setup(Own(), Own(), example())
    with pytest.raises(ValueError, match=r"as teacher_classifier, but 'first.2' is ReLU"):
        MAKE[method]("second", "second", teacher_classifier="first.2").setup(Own(), Own(), example())
    with pytest.raises(ValueError, match="has no layer 'haed'; close names: head"):
        MAKE[method]("second", "second", teacher_classifier="haed").setup(Own(), Own(), example())
    silent = nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten())
    with pytest.raises(ValueError, match="needs teacher_classifier: in Sequential no linear layer gives the logits"):
        MAKE[method]("second", "0").setup(Own(), silent, example())


@OF_MAPS
def test_a_convolution_may_be_the_classifier(method: str) -> None:
    teacher, student = models.mobilenetv2_tinyimagenet(num_classes=5), Own()
    loss = MAKE[method](student_layers="second")
    loss.setup(student, teacher, example(32))
    output = teacher.eval()(torch.rand(2, 3, 32, 32))
    value = loss(
        ModelOutput(output, {"second": torch.rand(2, 12, 8, 8)}),
        ModelOutput(output, {"pool.input": torch.rand(2, 1280, 5, 5)}),
        {},
    )
    assert value.isfinite()


@OF_MAPS
def test_classifiers_follow_and_are_shared(method: str) -> None:
    """They are no part of the loss, and what happens to the network happens to them."""
    student, teacher = Own(4), Own(6)
    loss = MAKE[method]("second", "second")
    loss.setup(student, teacher, example())
    assert not any("head" in name or "classifier" in name for name in dict(loss.named_modules()))
    feats = torch.rand(3, 8, 2, 2, dtype=torch.float64), torch.rand(3, 12, 2, 2, dtype=torch.float64)
    logits = torch.randn(3, 5, dtype=torch.float64)
    for module in (student, teacher, loss):
        module.double()
    value = loss(ModelOutput(logits, {"second": feats[0]}), ModelOutput(logits, {"second": feats[1]}), {})
    assert value.dtype == torch.float64
    value.backward()
    assert teacher.head.weight.grad is None
    assert (student.head.weight.grad is not None) == (method == "catkd")
    for network in (student, teacher):  # as with --trainer.precision=bf16-true, where features arrive in float32
        network.bfloat16()
    half = loss.float()(
        ModelOutput(logits.float(), {"second": feats[0].float()}),
        ModelOutput(logits.float(), {"second": feats[1].float()}),
        {},
    )
    torch.testing.assert_close(half, value.float(), rtol=5e-2, atol=1e-3)


def test_unit_vectors() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-30, 0.0]], requires_grad=True)
    unit(x)[:, 0].sum().backward()
    torch.testing.assert_close(unit(x), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(x.grad, torch.tensor([[0.128, -0.096], [0.0, 0.0], [0.0, 0.0]]))
