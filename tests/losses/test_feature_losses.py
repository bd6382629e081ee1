"""What all methods that compare pairs of features have in common: golden vectors, edges, layers and a training step."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from kdlit import models
from kdlit.losses import CrossEntropyLoss, FeatureLoss, WeightedLoss
from kdlit.losses.at import ATLoss, at_loss
from kdlit.losses.cc import CCLoss
from kdlit.losses.fitnet import FitNetLoss
from kdlit.losses.nst import NSTLoss, nst_loss
from kdlit.losses.pkt import PKTLoss, pkt_loss
from kdlit.losses.rkd import RKDLoss, rkd_loss
from kdlit.losses.sp import SPLoss, sp_loss
from kdlit.losses.vid import VIDLoss
from kdlit.modules import ClassificationDistillation
from tests.conftest import TinyData, TinyNet
from tests.losses.feature_cases import Golden, apply, set_up
from tests.losses.test_golden import assert_agrees

METHODS: dict[str, tuple[type[FeatureLoss], tuple[str, ...]]] = {
    "fitnet": (FitNetLoss, ("use_relu",)),
    "at": (ATLoss, ("p",)),
    "nst": (NSTLoss, ()),
    "sp": (SPLoss, ()),
    "pkt": (PKTLoss, ("eps",)),
    "rkd": (RKDLoss, ("distance_weight", "angle_weight", "squared", "eps")),
    "cc": (CCLoss, ("feat_dim",)),
    "vid": (VIDLoss, ("eps", "init_pred_var")),
}
KINDS = [pytest.param(kind, id=name) for name, (kind, _) in METHODS.items()]
OF_MAPS = [pytest.param(METHODS[name][0], id=name) for name in ("fitnet", "at", "nst", "vid")]
WITH_HEADS = ("fitnet", "cc", "vid")
FUNCTIONS = {
    "at": at_loss,
    "nst": nst_loss,
    "sp": sp_loss,
    "pkt": pkt_loss,
    "rkd": lambda s, t: rkd_loss(s, t, distance_weight=25.0, angle_weight=50.0),
}
CASES = [(name, number) for name in METHODS for number in range(3)]


def golden(method: str, number: int, dtype: torch.dtype = torch.float64) -> Golden:
    return Golden(method, number, *METHODS[method], dtype=dtype)


def maps(batch: int = 4, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Two pairs: the student's map the larger, then the smaller; both shrunk or doubled by FitNet's connectors."""
    student = [torch.randn(batch, 6, 8, 8), torch.randn(batch, 7, 2, 2)]
    teacher = [torch.randn(batch, 5, 4, 4), torch.randn(batch, 9, 4, 4)]
    return [one.to(dtype).requires_grad_() for one in student], [one.to(dtype) for one in teacher]


@pytest.mark.parametrize(("method", "number"), CASES)
def test_golden_value_and_gradients(method: str, number: int) -> None:
    run = golden(method, number)
    value = run.value()
    for name in ("loss", "loss_repdistiller"):
        if name in run.case.arrays:
            assert_agrees(value.detach(), run.case[name], run.case.rtol, f"{method} case {number}, {name}")
    value.backward()
    gradients = run.gradients()
    assert set(gradients) == set(run.case.differentiated)
    for name, gradient in gradients.items():
        assert_agrees(gradient, run.case[f"grad_{name}"], run.case.rtol_grad, f"{method} case {number}, grad_{name}")


@pytest.mark.parametrize(("method", "number"), CASES)
def test_golden_in_float32(method: str, number: int) -> None:
    run = golden(method, number, torch.float32)
    value = run.value()
    value.backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.detach(), run.case["loss"].float(), rtol=1e-4, atol=1e-6)
    assert all(gradient.isfinite().all() for gradient in run.gradients().values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-4, 1e4])
def test_finite_at_the_edges(kind: type[FeatureLoss], scale: float) -> None:
    """Also where a sample, a channel or a whole batch of features is zero, or all samples are the same."""
    student, teacher = maps()
    student = [scale * one.detach().relu() for one in student]
    student[0][:, 1], student[0][0] = 0, 0
    same = [one[1:2].expand_as(one).contiguous() for one in student]
    loss = set_up(kind, student, teacher)
    for features in (student, same):
        features = [one.requires_grad_() for one in features]
        for of_teacher in (teacher, [1e4 * one for one in teacher], [0 * one for one in teacher]):
            value = apply(loss, features, of_teacher)
            gradients = torch.autograd.grad(value, features)
            assert value.isfinite()
            assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_autocast(kind: type[FeatureLoss]) -> None:
    student, teacher = maps(dtype=torch.bfloat16)
    loss = set_up(kind, student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = apply(loss, student, teacher)
    assert value.dtype == torch.float32
    expected = apply(loss, [one.float() for one in student], [one.float() for one in teacher])
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    value.backward()
    assert all(one.grad.dtype == torch.bfloat16 and one.grad.isfinite().all() for one in student)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_to_the_teacher_and_several_pairs_add_up(kind: type[FeatureLoss]) -> None:
    student, teacher = maps(dtype=torch.float64)
    teacher = [one.requires_grad_() for one in teacher]
    loss = set_up(kind, student, teacher).double()
    value = apply(loss, student, teacher)
    value.backward()
    assert all(one.grad is not None for one in student)
    assert all(one.grad is None for one in teacher)
    parts = []
    for index in range(2):
        single = set_up(kind, student[index : index + 1], teacher[index : index + 1]).double()
        state = {name.replace(f"heads.{index}", "heads.0"): entry for name, entry in loss.state_dict().items()}
        single.load_state_dict({name: entry for name, entry in state.items() if name.startswith("heads.0")})
        parts.append(apply(single, student[index : index + 1], teacher[index : index + 1]))
    torch.testing.assert_close(sum(parts), value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.id != "cc"])
def test_the_order_of_the_batch_does_not_matter(kind: type[FeatureLoss]) -> None:
    student, teacher = maps(6, dtype=torch.float64)
    loss = set_up(kind, student, teacher).double()
    order = torch.randperm(6)
    value = apply(loss, [one[order] for one in student], [one[order] for one in teacher])
    torch.testing.assert_close(value, apply(loss, student, teacher))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: type[FeatureLoss]) -> None:
    student = [torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)]
    teacher = [torch.randn(3, 3, 2, 2, dtype=torch.float64)]
    loss = set_up(kind, student, teacher).double()
    assert torch.autograd.gradcheck(lambda *features: apply(loss, features, teacher), student)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_zero_for_equal_and_for_scaled_features(name: str) -> None:
    (feature, *_), _ = maps(dtype=torch.float64)
    value = FUNCTIONS[name](feature, feature.detach())
    torch.testing.assert_close(value.detach(), torch.tensor(0.0, dtype=torch.float64), rtol=0, atol=1e-14)
    value.backward()
    assert feature.grad.abs().max() < 1e-9  # of PKT the constant leaves some
    scaled = FUNCTIONS[name](7 * feature.detach(), feature.detach())
    torch.testing.assert_close(scaled, torch.tensor(0.0, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["sp", "pkt", "rkd"])
def test_relations_do_not_see_a_rotation(name: str) -> None:
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    expected = FUNCTIONS[name](student, teacher)
    torch.testing.assert_close(FUNCTIONS[name](student @ turn, teacher), expected)
    torch.testing.assert_close(FUNCTIONS[name](student, 3 * teacher @ turn), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(FUNCTIONS[name](student[:, :, None, None], teacher), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_lists_and_tensors(name: str) -> None:
    student, teacher = maps()
    value = FUNCTIONS[name](student, teacher)
    parts = [FUNCTIONS[name](*pair) for pair in zip(student, teacher, strict=True)]
    torch.testing.assert_close(sum(parts), value)
    with pytest.raises(ValueError, match="must be as many, at least one; got 2 and 1"):
        FUNCTIONS[name](student, teacher[:1])
    with pytest.raises(ValueError, match=r"one batch size above 0, got shapes \(4, 6, 8, 8\) and \(3, 5, 4, 4\)"):
        FUNCTIONS[name](student[0], teacher[0][:3])


@pytest.mark.parametrize("name", ["at", "nst"])
def test_functions_of_maps_name_other_shapes(name: str) -> None:
    with pytest.raises(ValueError, match=r"maps of shape \(B, C, H, W\), got shapes \(2, 3\) and \(2, 4, 5, 5\)"):
        FUNCTIONS[name](torch.randn(2, 3), torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize("name", ["at", "nst", "sp", "pkt"])
def test_a_batch_of_one(name: str) -> None:
    student, teacher = maps(1)
    value = FUNCTIONS[name](student, teacher)
    value.backward()
    assert value.isfinite()
    assert all(one.grad.isfinite().all() for one in student)


@pytest.mark.parametrize("name", ["rkd", "cc"])
def test_a_batch_of_one_that_cannot_be_compared_is_named(name: str) -> None:
    student, teacher = maps(1)
    with pytest.raises(ValueError, match="needs at least 2.* got a batch of 1"):
        apply(set_up(METHODS[name][0], student, teacher), student, teacher)


DEFAULTS: dict[str, Any] = {
    "fitnet": lambda layers: layers.maps[2:3],
    **dict.fromkeys(("at", "nst", "vid"), lambda layers: layers.maps[1:]),
    "sp": lambda layers: layers.maps[-1:],
    **dict.fromkeys(("pkt", "rkd", "cc"), lambda layers: (layers.pool,)),
}


@functools.cache
def networks(student: Any, teacher: Any) -> tuple[nn.Module, nn.Module]:
    return student(num_classes=5), teacher(num_classes=5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "builders",
    [
        (models.resnet8, models.vgg8),
        (models.wrn_16_1, torchvision.models.resnet18),
        (torchvision.models.resnet18, models.mobilenetv2),
    ],
)
def test_default_layers(method: str, builders: Any) -> None:
    student, teacher = networks(*builders)
    expected = [DEFAULTS[method](models.feature_layers(one)) for one in (student, teacher)]
    count = min(map(len, expected))
    loss = METHODS[method][0]()
    module = ClassificationDistillation(student, {"feat": loss}, teacher)
    assert [loss.student_layers, loss.teacher_layers] == [tuple(one[:count]) for one in expected]
    batch = {"image": torch.randn(2, 3, 32, 32), "target": torch.tensor([0, 4])}
    value = loss(module.run_student(batch), module.run_teacher(batch), batch)
    value.backward()
    assert value.isfinite()


class OwnNet(nn.Module):
    """A network that names no layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU())
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image)).mean((2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_ones_own_network(kind: type[FeatureLoss]) -> None:
    student, teacher, example = OwnNet(4), OwnNet(6), torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match=f"{kind.__name__} needs student_layers: OwnNet does not say .* body, head"):
        kind().setup(student, teacher, example)
    loss = kind(["body.1", "body.3"], ["body.1", "body.3"])
    loss.setup(student, teacher, example)
    first = {name: tuple(entry.shape) for name, entry in loss.state_dict().items()}
    loss.setup(student, teacher, example)  # in another module: anew, not in addition
    assert first == {name: tuple(entry.shape) for name, entry in loss.state_dict().items()}
    with pytest.raises(ValueError, match="must be as many, got body.1, body.3 and body.1"):
        kind(["body.1", "body.3"], "body.1")


@pytest.mark.parametrize("kind", OF_MAPS)
def test_a_layer_that_gives_no_map_is_named(kind: type[FeatureLoss]) -> None:
    student, teacher = TinyNet(), TinyNet()
    with pytest.raises(ValueError, match=r"teacher_layers: 'fc' must give a map .*, but gives \(1, 5\)"):
        kind("act", "fc").setup(student, teacher, torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("method", METHODS)
def test_training_step(method: str, trainer: Any, tmp_path: Any) -> None:
    layer = {"student_layers": "act", "teacher_layers": "act"}
    losses = {"ce": CrossEntropyLoss(), "feat": WeightedLoss(METHODS[method][0](**layer), weight=2.0)}
    module = ClassificationDistillation(TinyNet(), losses, TinyNet(width=6), input_size=(3, 8, 8))
    loss = module.losses["feat"].loss
    before = {name: value.clone() for name, value in loss.named_parameters()}
    teacher = copy.deepcopy(module.teacher.state_dict())
    fit = trainer(max_steps=2)
    fit.fit(module, TinyData())
    assert bool(before) == (method in WITH_HEADS)
    optimised = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    for name, value in loss.named_parameters():
        assert not torch.equal(value, before[name]), name
        assert id(value) in optimised
    assert all(torch.equal(value, teacher[name]) for name, value in module.teacher.state_dict().items())

    fit.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {f"losses.feat.loss.{name}" for name in loss.state_dict()} <= set(saved)
    assert set(module.student.state_dict()) == set(TinyNet().state_dict())

    twin = copy.deepcopy(loss)
    fresh = METHODS[method][0](**layer)
    fresh.setup(module.student, module.teacher, torch.zeros(1, 3, 8, 8))
    fresh.load_state_dict(loss.state_dict())
    batch = {"image": torch.randn(4, 3, 8, 8), "target": torch.arange(4)}
    outputs = module.run_student(batch), module.run_teacher(batch), batch
    for other in (twin, fresh):
        torch.testing.assert_close(other(*outputs), loss(*outputs), rtol=0, atol=0)
