"""Laws that theory gives for the losses, on random logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdlit import losses
from kdlit.losses.functional import binary_kl_divergence, target_gap, target_mask
from tests.losses.methods import METHODS, Loss

settings.register_profile("losses", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("losses")


@dataclass
class Sample:
    """Logits of both networks and labels, in float64."""

    student: Tensor
    teacher: Tensor
    target: Tensor


@st.composite
def samples(draw: st.DrawFn, right: bool = False, batch: int | None = None) -> Sample:
    """Random logits; with ``right`` the teacher predicts every label."""
    rows = batch or draw(st.integers(1, 5))
    classes = draw(st.integers(2, 7))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0, 20.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    student, teacher = scale * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=generator)
    return Sample(student, teacher, teacher.argmax(dim=-1) if right else target)


def close(a: Tensor, b: Tensor, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def named(**wanted: bool) -> pytest.MarkDecorator:
    """Every method with the given laws, by name."""
    chosen = {n: m for n, m in METHODS.items() if all(getattr(m, law) == value for law, value in wanted.items())}
    return pytest.mark.parametrize("loss", [pytest.param(m.loss, id=n) for n, m in chosen.items()])


@named(zero_at_equality=True)
@given(sample=samples(right=True))
def test_zero_where_both_agree_and_are_right(loss: Loss, sample: Sample) -> None:
    close(loss(sample.teacher, sample.teacher, sample.target), torch.tensor(0.0, dtype=torch.float64))


@named(not_negative=True)
@given(sample=samples())
def test_not_negative(loss: Loss, sample: Sample) -> None:
    assert loss(sample.student, sample.teacher, sample.target) >= -1e-12


@given(sample=samples())
def test_the_constants_of_dml_shift_it_by_next_to_nothing(sample: Sample) -> None:
    exact = losses.dml_loss(sample.student, sample.teacher, eps=0.0)
    assert losses.dml_loss(sample.student, sample.teacher) <= exact + 1e-7
    assert losses.dml_loss(sample.student, sample.teacher) >= -1e-6


@named(shift_invariant=True)
@given(sample=samples(), shift=st.floats(-50, 50))
def test_constant_added_to_the_logits(loss: Loss, sample: Sample, shift: float) -> None:
    expected = loss(sample.student, sample.teacher, sample.target)
    close(loss(sample.student + shift, sample.teacher, sample.target), expected, rtol=1e-7)
    close(loss(sample.student, sample.teacher - shift, sample.target), expected, rtol=1e-7)


@named()
@given(sample=samples(), seed=st.integers(0, 1000))
def test_permutations_of_batch_and_classes(loss: Loss, sample: Sample, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(sample.student), generator=generator)
    classes = torch.randperm(sample.student.shape[1], generator=generator)
    expected = loss(sample.student, sample.teacher, sample.target)
    close(loss(sample.student[rows], sample.teacher[rows], sample.target[rows]), expected)
    target = classes.argsort()[sample.target]
    close(loss(sample.student[:, classes], sample.teacher[:, classes], target), expected)


@named()
@given(sample=samples())
def test_no_gradient_to_the_teacher(loss: Loss, sample: Sample) -> None:
    student, teacher = sample.student.requires_grad_(), sample.teacher.requires_grad_()
    loss(student, teacher, sample.target).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("loss", [pytest.param(m.loss, id=n) for n, m in METHODS.items() if n != "rc"])
def test_gradcheck(loss: Loss) -> None:
    """Not of RC, whose corrected prediction is a constant for the gradient but not for finite differences."""
    student = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    teacher, target = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 5, 2, 2])
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, target), student)


@pytest.mark.parametrize("shape", [(1,), (4, 1)])
@pytest.mark.parametrize("name", ["kd", "dkd", "nkd", "rld", "la", "dist", "mlkd", "wkd_target", "crld"])
def test_gradcheck_of_the_temperature(name: str, shape: tuple[int, ...]) -> None:
    s, t = torch.randn(2, 4, 6, dtype=torch.float64)
    y = torch.tensor([0, 5, 2, 2])
    computed = {
        "kd": lambda temperature: losses.kd_loss(s, t, temperature=temperature),
        "dkd": lambda temperature: losses.dkd_loss(s, t, y, alpha=1.0, beta=2.0, temperature=temperature),
        "nkd": lambda temperature: losses.nkd_loss(s, t, y, gamma=1.0, temperature=temperature),
        "rld": lambda temperature: losses.rld_loss(s, t, y, alpha=1.0, beta=2.0, temperature=temperature),
        "la": lambda temperature: losses.la_loss(s, t, y, temperature=temperature),
        "dist": lambda temperature: losses.dist_loss(s, t, beta=1.0, gamma=2.0, temperature=temperature),
        "mlkd": lambda temperature: losses.mlkd_two_view_loss(s, t, t, s, temperature=temperature),
        "crld": lambda temperature: losses.crld_loss(
            s, t, t, s, temperature=temperature, weak_threshold=0.3, strong_threshold=0.0
        ),
        "wkd_target": lambda temperature: losses.wkd_loss(
            s,
            t,
            y,
            distance=0.5 * (1 - torch.eye(6, dtype=torch.float64)),
            alpha=1.0,
            beta=1.0,
            temperature=temperature,
            regularization=0.5,
            iterations=200,
        ),
    }
    temperature = (1 + torch.rand(shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(computed[name], temperature)


@given(sample=samples(), scale=st.floats(0.2, 20), shift=st.floats(-20, 20))
def test_standardised_logits_forget_scale_and_offset(sample: Sample, scale: float, shift: float) -> None:
    for unbiased, eps in ((True, 1e-7), (False, 0.0)):
        expected = losses.standardize_logits(sample.student, unbiased=unbiased, eps=eps)
        moved = losses.standardize_logits(scale * sample.student + shift, unbiased=unbiased, eps=eps)
        close(moved, expected, rtol=1e-4 if eps else 1e-9, atol=1e-9)


@given(sample=samples())
def test_standardised_logits_have_mean_0_and_deviation_1(sample: Sample) -> None:
    scores = losses.standardize_logits(sample.student, unbiased=False, eps=0.0)
    close(scores.mean(dim=-1), torch.zeros(len(scores), dtype=torch.float64))
    close(scores.std(dim=-1, unbiased=False), torch.ones(len(scores), dtype=torch.float64))


@given(sample=samples())
def test_the_two_deviations_differ_by_a_base_temperature(sample: Sample) -> None:
    classes = sample.student.shape[1]
    ratio = math.sqrt(classes / (classes - 1))
    paper = losses.standardize_logits(sample.student, unbiased=False, eps=0.0)
    close(losses.standardize_logits(sample.student, unbiased=True, eps=0.0) * ratio, paper)


@given(sample=samples(right=True), temperature=st.floats(0.5, 8))
def test_rld_is_dkd_where_the_teacher_is_right(sample: Sample, temperature: float) -> None:
    options = {"alpha": 1.0, "beta": 4.0, "temperature": temperature}
    logits = (sample.student, sample.teacher, sample.target)
    close(losses.rld_loss(*logits, **options), losses.dkd_loss(*logits, **options))


@given(sample=samples(batch=1), temperature=st.floats(0.5, 8))
def test_dkd_with_beta_one_minus_the_teachers_confidence_is_kd(sample: Sample, temperature: float) -> None:
    is_target = target_mask(sample.target, sample.teacher)
    beta = target_gap(sample.teacher / temperature, is_target).neg().sigmoid().item()
    dkd = losses.dkd_loss(sample.student, sample.teacher, sample.target, alpha=1.0, beta=beta, temperature=temperature)
    close(dkd, losses.kd_loss(sample.student, sample.teacher, temperature=temperature))


@given(sample=samples(), temperature=st.floats(1.1, 10))
def test_ttm_is_kd_less_a_renyi_entropy(sample: Sample, temperature: float) -> None:
    """Equation 15, in the mean over the batch, and 16 without its constant."""
    ttm = losses.ttm_loss(sample.student, sample.teacher, gamma=1 / temperature)
    kd = losses.kd_loss(sample.student, sample.teacher, temperature=temperature) / temperature**2
    of_student = losses.renyi_entropy(sample.student, order=1 / temperature).mean()
    of_teacher = losses.renyi_entropy(sample.teacher / temperature, order=1).mean()
    close(ttm, temperature * kd - (temperature - 1) * of_student + (temperature - 1) * of_teacher, rtol=1e-8)


@given(sample=samples(), gamma=st.floats(0.05, 0.95))
def test_power_sum_from_one_hot_to_uniform(sample: Sample, gamma: float) -> None:
    weight = losses.power_sum(sample.teacher, gamma=gamma)
    classes = sample.teacher.shape[1]
    assert (weight >= 1 - 1e-12).all()
    assert (weight <= classes ** (1 - gamma) + 1e-9).all()
    one_hot = losses.power_sum(torch.tensor([[1e4, 0.0, 0.0]]), gamma=gamma)
    uniform = losses.power_sum(torch.zeros(1, 3), gamma=gamma)
    close(one_hot, torch.ones(1))
    close(uniform, torch.tensor([3.0 ** (1 - gamma)]), rtol=1e-5)


@given(sample=samples())
def test_wttm_at_gamma_1_is_ttm_is_kd(sample: Sample) -> None:
    kd = losses.kd_loss(sample.student, sample.teacher, temperature=1.0)
    close(losses.ttm_loss(sample.student, sample.teacher, gamma=1.0), kd)
    close(losses.wttm_loss(sample.student, sample.teacher, gamma=1.0), kd)


@given(sample=samples(), temperature=st.floats(0.5, 8))
def test_mlkd_at_the_instance_level_is_kd_without_the_square(sample: Sample, temperature: float) -> None:
    instance = losses.mlkd_loss(sample.student, sample.teacher, temperatures=[temperature], levels=["instance"])
    close(instance * temperature**2, losses.kd_loss(sample.student, sample.teacher, temperature=temperature))


@given(sample=samples(right=True))
def test_la_is_kd_where_the_teacher_is_right(sample: Sample) -> None:
    la = losses.la_loss(sample.student, sample.teacher, sample.target, temperature=4.0)
    close(la, losses.kd_loss(sample.student, sample.teacher, temperature=4.0))


@given(sample=samples())
def test_corrected_teachers_prefer_the_label(sample: Sample) -> None:
    swapped = losses.swap_label_logit(sample.teacher, sample.target)
    revised = losses.revised_labels(sample.teacher, sample.target, eta=0.8)
    for corrected in (swapped, revised):
        assert (corrected.argmax(dim=-1) == sample.target).all()
    close(revised.sum(dim=-1), torch.ones(len(revised), dtype=torch.float64))


@given(sample=samples())
def test_binary_divergence_is_that_of_the_probabilities(sample: Sample) -> None:
    gap_p, gap_q = sample.teacher[:, 0].clamp(-8, 8), sample.student[:, 0].clamp(-8, 8)
    p, q = gap_p.sigmoid(), gap_q.sigmoid()
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    close(binary_kl_divergence(gap_p, gap_q), expected, rtol=1e-6)


@given(sample=samples())
def test_entropy_weights(sample: Sample) -> None:
    weight = losses.entropy_weight(sample.student, sample.teacher, temperature=3.0)
    p, q = (sample.student / 3).softmax(dim=-1), (sample.teacher / 3).softmax(dim=-1)
    of_student, of_teacher = -(p * p.log()).sum(dim=-1), -(q * q.log()).sum(dim=-1)
    close(weight, 0.5 * of_teacher * (1 + of_student / math.log(p.shape[1])))


@given(sample=samples(), order=st.sampled_from([0.1, 0.5, 1.0, 2.0, 5.0]))
def test_renyi_entropy_falls_with_its_order(sample: Sample, order: float) -> None:
    entropy = losses.renyi_entropy(sample.student, order=order)
    assert (entropy >= -1e-12).all()
    assert (entropy <= math.log(sample.student.shape[1]) + 1e-12).all()
    assert (losses.renyi_entropy(sample.student, order=1.5 * order) <= entropy + 1e-9).all()
    near = losses.renyi_entropy(sample.student, order=order + 1e-7)
    close(near, entropy, rtol=1e-4, atol=1e-5)


def test_transport_between_point_masses_costs_their_distance() -> None:
    student = torch.tensor([[0.0, 0.0, 60.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 60.0, 0.0, 0.0]], dtype=torch.float64)
    distance = torch.rand(4, 4, dtype=torch.float64)
    distance = (distance + distance.T) * (1 - torch.eye(4, dtype=torch.float64))
    cost = losses.wkd_loss(
        student,
        teacher,
        torch.tensor([0]),
        distance=distance,
        alpha=0.0,
        beta=1.0,
        temperature=1.0,
        regularization=0.05,
        iterations=50,
    )
    close(cost, distance[1, 2], rtol=1e-6)


def test_transport_agrees_with_a_plain_solver() -> None:
    """Marginals, objective and optimality of the plan that the potentials describe."""
    student, teacher = torch.randn(2, 1, 5, dtype=torch.float64)
    distance = losses.class_distance(torch.randn(5, 3, dtype=torch.float64))
    epsilon = 0.2
    a, c = teacher[0, 1:].softmax(dim=0), student[0, 1:].softmax(dim=0)
    inner = distance[1:, 1:]
    plan = (-inner / epsilon).exp() * a[:, None] * c
    for _ in range(3000):
        plan = plan * (a / plan.sum(dim=1))[:, None]
        plan = plan * (c / plan.sum(dim=0))
    expected = (plan * inner).sum() + epsilon * (plan * (plan / (a[:, None] * c)).log()).sum()
    cost = losses.wkd_loss(
        student,
        teacher,
        torch.tensor([0]),
        distance=distance,
        alpha=0.0,
        beta=1.0,
        temperature=1.0,
        regularization=epsilon,
        iterations=1000,
    )
    close(cost, expected, rtol=1e-8)


@pytest.mark.parametrize("name", ["kd", "dkd", "nkd", "ttm", "wttm", "rld", "la", "rc", "dml", "mlkd", "crld"])
def test_sample_weights_are_means_of_single_samples(name: str) -> None:
    s, t = torch.randn(2, 3, 5, dtype=torch.float64)
    y, w = torch.tensor([0, 1, 4]), torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64)
    computed = {
        "kd": lambda i, w: losses.kd_loss(s[i], t[i], temperature=2.0, sample_weight=w),
        "dkd": lambda i, w: losses.dkd_loss(s[i], t[i], y[i], alpha=1.0, beta=2.0, temperature=2.0, sample_weight=w),
        "nkd": lambda i, w: losses.nkd_loss(s[i], t[i], y[i], gamma=1.0, temperature=2.0, sample_weight=w),
        "ttm": lambda i, w: losses.ttm_loss(s[i], t[i], gamma=0.3, sample_weight=w),
        "wttm": lambda i, w: losses.wttm_loss(s[i], t[i], gamma=0.3, sample_weight=w),
        "rld": lambda i, w: losses.rld_loss(s[i], t[i], y[i], alpha=1.0, beta=2.0, temperature=2.0, sample_weight=w),
        "la": lambda i, w: losses.la_loss(s[i], t[i], y[i], temperature=2.0, sample_weight=w),
        "rc": lambda i, w: losses.rc_loss(
            s[i], t[i], y[i], temperature=2.0, kd_weight=1.0, rc_weight=0.5, sample_weight=w
        ),
        "dml": lambda i, w: losses.dml_loss(s[i], t[i], sample_weight=w),
        "mlkd": lambda i, w: losses.mlkd_loss(s[i], t[i], temperatures=[2.0], levels=["instance"], sample_weight=w),
        "crld": lambda i, w: losses.crld_loss(
            s[i], t[i], t[i], s[i], temperature=2.0, weak_threshold=0.4, strong_threshold=0.0, sample_weight=w
        ),
    }[name]
    singles = torch.stack([w[i] * computed(slice(i, i + 1), None) for i in range(3)])
    close(computed(slice(None), w), singles.mean())
