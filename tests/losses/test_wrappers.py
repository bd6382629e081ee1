"""Wrappers: every hook passed on, every declaration kept, and any nesting from constructor arguments alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdlit import losses
from kdlit.losses import (
    DistillationLoss,
    DKDLoss,
    EntropyWeighting,
    GlobalTemperature,
    InstanceTemperature,
    KDLoss,
    LogitStandardization,
    LossWrapper,
    MLKDLoss,
    MLKDTwoViewLoss,
    WeightedLoss,
)
from kdlit.types import Batch, ModelOutput

CLASSES = 5


class Recorder(DistillationLoss):
    """Notes what is called, in order, and declares something of everything."""

    student_layers = ("layer1",)
    teacher_layers = ("layer2", "layer3")
    needs_teacher = True
    needs_strong_view = True
    reads_sample_weight = True

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 4.0
        self.calls: list[tuple[Any, ...]] = []

    def setup(self, student: nn.Module, teacher: nn.Module | None, example: Tensor) -> None:
        self.calls.append(("setup", student, teacher, example))

    def on_train_epoch_start(self, epoch: int, max_epochs: int) -> None:
        self.calls.append(("epoch", epoch, max_epochs))

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        self.calls.append(("forward", student, teacher, batch))
        return student.logits.sum() * self.temperature

    def on_train_batch_end(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> None:
        self.calls.append(("end", student, teacher, batch))


WRAPPERS: list[Callable[[DistillationLoss], LossWrapper]] = [
    LossWrapper,
    WeightedLoss,
    LogitStandardization,
    GlobalTemperature,
    InstanceTemperature,
    EntropyWeighting,
]


def networks() -> tuple[nn.Module, nn.Module]:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)), nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))


def inputs() -> tuple[ModelOutput, ModelOutput, Batch]:
    student, strong = torch.randn(2, 4, CLASSES).requires_grad_().unbind()
    teacher, teacher_strong = torch.randn(2, 4, CLASSES)
    batch: Batch = {"image": torch.randn(4, 3, 2, 2), "target": torch.tensor([0, 1, 4, 4])}
    return ModelOutput(student, logits_strong=strong), ModelOutput(teacher, logits_strong=teacher_strong), batch


def prepared(loss: LossWrapper) -> LossWrapper:
    loss.setup(*networks(), torch.zeros(1, 3, 2, 2))
    return loss


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_declarations_are_kept(wrap: Callable[[DistillationLoss], LossWrapper]) -> None:
    inner = Recorder()
    wrapper = wrap(inner)
    assert wrapper.student_layers == inner.student_layers
    assert wrapper.teacher_layers == inner.teacher_layers
    assert wrapper.needs_teacher
    assert wrapper.needs_strong_view
    assert wrapper.reads_sample_weight
    assert wrapper.innermost is inner
    plain = LossWrapper(losses.CrossEntropyLoss())
    assert not any((plain.needs_teacher, plain.needs_strong_view, plain.reads_sample_weight))


@pytest.mark.parametrize("outer", WRAPPERS)
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_every_hook_reaches_the_innermost_loss_in_order(
    wrap: Callable[[DistillationLoss], LossWrapper], outer: Callable[[DistillationLoss], LossWrapper]
) -> None:
    inner = Recorder()
    wrapper = outer(wrap(inner))
    student, teacher = networks()
    example, outputs = torch.zeros(1, 3, 2, 2), inputs()
    wrapper.setup(student, teacher, example)
    wrapper.on_train_epoch_start(3, 10)
    wrapper(*outputs)
    wrapper.on_train_batch_end(*outputs)
    assert [call[0] for call in inner.calls] == ["setup", "epoch", "forward", "end"]
    assert inner.calls[0][1:] == (student, teacher, example)
    assert inner.calls[1][1:] == (3, 10)
    for seen, ended in zip(inner.calls[2][1:3], inner.calls[3][1:3], strict=True):
        torch.testing.assert_close(seen.logits, ended.logits)
        torch.testing.assert_close(seen.logits_strong, ended.logits_strong)
    assert inner.calls[2][3].keys() == inner.calls[3][3].keys()


def test_weight_and_warm_up() -> None:
    loss = WeightedLoss(KDLoss(), weight=3.0, warmup_epochs=4)
    outputs = inputs()
    raw = KDLoss()(*outputs)
    for epoch, share in ((0, 0.25), (2, 0.75), (3, 1.0), (9, 1.0)):
        loss.on_train_epoch_start(epoch, 240)
        torch.testing.assert_close(loss(*outputs), 3 * share * raw)


def test_standardization_acts_on_every_view_and_leaves_the_caller_alone() -> None:
    inner = Recorder()
    student, teacher, batch = inputs()
    before = student.logits.clone()
    LogitStandardization(inner, unbiased=False, eps=0.0)(student, teacher, batch)
    torch.testing.assert_close(student.logits, before)
    for output in inner.calls[0][1:3]:
        for logits in (output.logits, output.logits_strong):
            torch.testing.assert_close(logits.std(dim=-1, unbiased=False), torch.ones(4))


def test_standardization_needs_no_teacher_for_a_loss_without_one() -> None:
    student, _, batch = inputs()
    loss = LogitStandardization(losses.CrossEntropyLoss())
    expected = losses.cross_entropy_loss(losses.standardize_logits(student.logits), batch["target"])
    torch.testing.assert_close(loss(student, None, batch), expected)


@pytest.mark.parametrize("learnable", [GlobalTemperature, InstanceTemperature])
@pytest.mark.parametrize("method", [KDLoss, DKDLoss, losses.NKDLoss, losses.RLDLoss, losses.LALoss, losses.RCLoss])
def test_standardization_and_learned_temperature_nest_both_ways(learnable: Any, method: Any) -> None:
    outputs = inputs()
    torch.manual_seed(1)
    inside = prepared(LogitStandardization(learnable(method())))
    torch.manual_seed(1)
    outside = prepared(learnable(LogitStandardization(method())))
    for loss in (inside, outside):
        gradients = torch.autograd.grad(loss(*outputs), list(loss.parameters()))
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients)
    if learnable is GlobalTemperature:
        torch.testing.assert_close(inside(*outputs), outside(*outputs))
        at_start = method(temperature=1 + 20 * torch.sigmoid(torch.tensor(1.0)).item())
        torch.testing.assert_close(inside(*outputs), LogitStandardization(at_start)(*outputs))


def test_forward_leaves_the_temperature_as_it_was() -> None:
    loss = GlobalTemperature(KDLoss(temperature=3.0))
    loss(*inputs()).backward()
    assert loss.innermost.temperature == 3.0
    copy.deepcopy(loss)
    broken, batch = ModelOutput(torch.full((4, CLASSES), torch.nan)), inputs()[2]
    with pytest.raises(ValueError, match="student_logits must be finite"):
        loss(broken, inputs()[1], batch)
    assert loss.innermost.temperature == 3.0


def test_the_temperature_climbs_the_loss() -> None:
    """With the gradient reversed, a descent step on the temperature raises the loss."""
    student, teacher, batch = inputs()
    outputs = ModelOutput(3 * student.logits.double()), ModelOutput(3 * teacher.logits.double()), batch
    loss = GlobalTemperature(KDLoss()).double()
    loss.on_train_epoch_start(50, 240)
    before = loss(*outputs)
    before.backward()
    with torch.no_grad():
        loss.global_score -= 1e-3 * loss.global_score.grad.sign()
    assert loss(*outputs) > before


def test_the_student_gets_no_gradient_through_predicted_temperatures() -> None:
    loss = prepared(InstanceTemperature(KDLoss())).double()
    loss.on_train_epoch_start(50, 240)
    student, teacher, batch = inputs()
    student, teacher = ModelOutput(3 * student.logits.double()), ModelOutput(3 * teacher.logits.double())
    temperature = loss.current_temperature(student, teacher)
    assert temperature.shape == (4, 1)
    assert ((temperature > 1) & (temperature < 21)).all()
    expected = torch.autograd.grad(
        losses.kd_loss(student.logits, teacher.logits, temperature=temperature.detach()), student.logits
    )
    gradient = torch.autograd.grad(loss(student, teacher, batch), student.logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_predicted_temperatures_need_setup() -> None:
    with pytest.raises(RuntimeError, match="setup"):
        InstanceTemperature(KDLoss())(*inputs())


@pytest.mark.parametrize("inner", [KDLoss(), DKDLoss(), MLKDLoss(), MLKDTwoViewLoss(), losses.CRLDLoss()])
def test_entropy_weights_reach_the_method(inner: DistillationLoss) -> None:
    student, teacher, batch = inputs()
    weight = losses.entropy_weight(student.logits, teacher.logits, temperature=3.0)
    expected = inner(student, teacher, {**batch, "sample_weight": weight})
    for loss in (EntropyWeighting(inner), WeightedLoss(EntropyWeighting(LossWrapper(inner)))):
        torch.testing.assert_close(loss(student, teacher, batch), expected)
    assert "sample_weight" not in batch
    assert not torch.allclose(inner(student, teacher, batch), expected)


def test_entropy_weights_multiply_those_of_the_batch() -> None:
    student, teacher, batch = inputs()
    own = torch.tensor([0.0, 1.0, 2.0, 3.0])
    weight = losses.entropy_weight(student.logits, teacher.logits, temperature=3.0)
    expected = losses.kd_loss(student.logits, teacher.logits, temperature=4.0, sample_weight=own * weight)
    weighted: Batch = {**batch, "sample_weight": own}
    torch.testing.assert_close(EntropyWeighting(KDLoss())(student, teacher, weighted), expected)
    torch.testing.assert_close(weighted["sample_weight"], own)


def test_everything_at_once() -> None:
    loss = WeightedLoss(EntropyWeighting(LogitStandardization(GlobalTemperature(DKDLoss()))), weight=9.0)
    student, teacher, batch = inputs()
    value = loss(student, teacher, batch)
    expected = 9 * losses.dkd_loss(
        losses.standardize_logits(student.logits),
        losses.standardize_logits(teacher.logits),
        batch["target"],
        alpha=1.0,
        beta=8.0,
        temperature=1 + 20 * torch.sigmoid(torch.tensor(1.0)).item(),
        sample_weight=losses.entropy_weight(student.logits, teacher.logits, temperature=3.0),
    )
    torch.testing.assert_close(value, expected)


def test_learned_parameters_are_found_and_saved() -> None:
    loss = WeightedLoss(LogitStandardization(GlobalTemperature(DKDLoss())))
    assert [name for name, _ in loss.named_parameters()] == ["loss.loss.global_score"]
    assert list(loss.state_dict()) == ["loss.loss.global_score"]


def test_model_output_detaches_every_view() -> None:
    student = inputs()[0]
    student.features["layer"] = student.logits * 2
    detached = student.detach()
    assert not detached.logits.requires_grad
    assert detached.logits_strong is not None
    assert not detached.logits_strong.requires_grad
    assert not detached.features["layer"].requires_grad
    assert ModelOutput(torch.zeros(1, 2)).detach().logits_strong is None


def test_classes_call_their_functions() -> None:
    student, teacher, batch = inputs()
    s, t, y = student.logits, teacher.logits, batch["target"]
    views = (s, t, student.logits_strong, teacher.logits_strong)
    for loss, expected in (
        (losses.NKDLoss(), losses.nkd_loss(s, t, y, gamma=1.5, temperature=1.0)),
        (losses.TTMLoss(), losses.ttm_loss(s, t, gamma=0.1)),
        (losses.WTTMLoss(), losses.wttm_loss(s, t, gamma=0.1)),
        (losses.MLKDLoss(), losses.mlkd_loss(s, t, temperatures=(2, 3, 4, 5, 6))),
        (losses.MLKDSingleViewLoss(), losses.mlkd_single_view_loss(s, t, temperature=4.0)),
        (losses.MLKDTwoViewLoss(), losses.mlkd_two_view_loss(*views, temperature=4.0)),
        (losses.RLDLoss(), losses.rld_loss(s, t, y, alpha=1.0, beta=8.0, temperature=4.0)),
        (losses.DISTLoss(), losses.dist_loss(s, t, beta=2.0, gamma=2.0, temperature=4.0)),
        (losses.LALoss(), losses.la_loss(s, t, y, temperature=4.0)),
        (losses.RCLoss(), losses.rc_loss(s, t, y, temperature=4.0, kd_weight=1.0, rc_weight=0.1)),
        (losses.LRLoss(), losses.lr_loss(s, t, y, lambda1=4.0, lambda2=1.0, eta=0.8)),
        (losses.TeacherRightCrossEntropyLoss(), losses.teacher_right_cross_entropy_loss(s, t, y)),
        (losses.DMLLoss(), losses.dml_loss(s, t)),
        (losses.RenyiEntropyLoss(), losses.renyi_entropy_loss(s, order=0.25)),
        (
            losses.CRLDLoss(),
            losses.crld_loss(*views, temperature=4.0, weak_threshold=0.6, strong_threshold=0.6),
        ),
    ):
        torch.testing.assert_close(loss(student, teacher, batch), expected)


def test_automatic_beta_follows_the_teachers_gap() -> None:
    student, teacher, batch = inputs()
    loss = losses.AutoBetaDKDLoss(offset=-1.0, beta_min=0.5)
    gap = losses.logit_gap(teacher.logits, batch["target"]).mean()

    def expected(gap: Tensor) -> Tensor:
        beta = max(0.5, 2 * (gap.item() + 1))
        return losses.dkd_loss(student.logits, teacher.logits, batch["target"], alpha=1.0, beta=beta, temperature=4.0)

    torch.testing.assert_close(loss(student, teacher, batch), expected(gap))
    assert loss.batches == 0
    other = ModelOutput(torch.eye(CLASSES)[batch["target"]] * 4)
    loss.on_train_batch_end(student, other, batch)
    torch.testing.assert_close(loss.gap, torch.tensor(4.0))
    torch.testing.assert_close(loss(student, teacher, batch), expected(torch.tensor(4.0)))
    loss.on_train_batch_end(student, teacher, batch)
    torch.testing.assert_close(loss.gap, (4 + gap) / 2)
    resumed = losses.AutoBetaDKDLoss()
    resumed.load_state_dict(loss.state_dict())
    torch.testing.assert_close(resumed.gap, loss.gap)


@pytest.mark.parametrize(("gap", "beta"), [(5.36, 2), (6.73, 2), (7.24, 6), (8.25, 6), (8.53, 8), (8.40, 8)])
def test_automatic_beta_is_near_table_a2(gap: float, beta: float) -> None:
    assert abs(losses.AutoBetaDKDLoss().beta(torch.tensor(gap)).item() - beta) < 2


def test_transport_takes_its_distances_from_the_teacher() -> None:
    student, teacher = networks()
    loss = losses.WKDLoss(teacher_classifier="1")
    loss.setup(student, teacher, torch.zeros(1, 3, 2, 2))
    torch.testing.assert_close(loss.distance, losses.class_distance(teacher[1].weight))
    torch.testing.assert_close(loss.distance, loss.distance.T)
    torch.testing.assert_close(loss.distance.diagonal(), torch.zeros(CLASSES), atol=1e-6, rtol=0)
    assert "distance" in loss.state_dict()
    assert loss(*inputs()).isfinite()
