"""The numbers behind the figures, against values worked out by hand and facts of the papers."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch

from kdlit import figures
from kdlit.losses import power_sum, standardize_logits
from kdlit.losses.functional import kl_divergence
from kdlit.losses.mlkd import batch_relation_loss, class_relation_loss


def test_class_mean_logit_difference_by_hand():
    student = torch.tensor([[1.0, 0.0, 4.0], [3.0, 2.0, 0.0], [0.0, 5.0, 1.0]])
    teacher = torch.tensor([[0.0, 0.0, 0.0], [2.0, 4.0, 1.0], [1.0, 9.0, 3.0]])
    target = torch.tensor([0, 0, 1])
    assert figures.class_mean_logits(student, target)[:2].tolist() == [[2, 1, 2], [0, 5, 1]]
    found = figures.class_mean_logit_difference(student, teacher, target)
    # rows of means: student (2, 1, 2), (0, 5, 1); teacher (1, 2, 0.5), (1, 9, 3); class 2 has no picture
    assert found[:2].tolist() == [[0, 1, 1.5], [1, 0, 2]]
    assert found[2].isnan().all()
    assert figures.mean_logit_difference(student, teacher).tolist() == pytest.approx([1, 2, 7 / 3])


def test_the_difference_of_a_network_to_itself_and_to_a_shifted_copy():
    logits, target = torch.randn(50, 7), torch.arange(50) % 7
    assert not figures.class_mean_logit_difference(logits, logits, target).any()
    shifted = figures.class_mean_logit_difference(2 * logits + 5, logits, target)
    assert shifted.diagonal().tolist() == [0] * 7
    assert shifted.max() > 1
    # standardised, an affine image of the teacher's logits is the teacher's logits
    same = figures.class_mean_logit_difference(standardize_logits(2 * logits + 5), standardize_logits(logits), target)
    assert same.max() < 1e-5


def test_mean_counts_the_zero_diagonal_and_scale_divides(outputs):
    import matplotlib.image

    plain = figures.class_mean_logit_difference(outputs.students["KD"].logits, outputs.teacher.logits, outputs.target)
    assert f"KD {plain.mean():.3g}" in figures.draw_class_difference_map(outputs).caption
    scaled = figures.draw_class_difference_map(outputs, scale=3.0)
    assert f"KD {plain.mean() / 3:.3g}" in scaled.caption
    (drawn,) = [one for one in scaled.axes[0].get_children() if isinstance(one, matplotlib.image.AxesImage)]
    np.testing.assert_allclose(drawn.get_array(), plain.numpy() / 3)


def test_published_numbers_agree_with_the_scale_of_the_notebook(shared):
    with (shared / "reference" / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == "repo:notebook Fig.4"]
    by_method = {(row["method"], row["metric"]): float(row["value"]) for row in rows}
    # divided by 3 there; DKD differs less than KD
    assert 3 * by_method["kd", "logit_diff_max"] == pytest.approx(2.70, abs=0.005)
    assert by_method["dkd", "logit_diff_mean"] < by_method["kd", "logit_diff_mean"]


def test_standardised_logits_have_the_deviation_of_lskd():
    mean, deviation = figures.logit_moments(standardize_logits(torch.randn(20, 100) * 3 + 1))
    assert mean.abs().max() < 1e-6
    np.testing.assert_allclose(deviation, math.sqrt(99 / 100), rtol=1e-5)  # 0.995, printed as 0.99 in the legend


def test_logit_moments_and_ranges_by_hand():
    logits = torch.tensor([[1.0, 3.0], [0.0, 8.0]])
    mean, deviation = figures.logit_moments(logits)
    assert mean.tolist() == [2, 4]
    assert deviation.tolist() == [1, 4]
    found = figures.logit_ranges(logits, torch.tensor([0, 1]))
    assert found == {"lowest": 0, "low": 0.5, "target": 4.5, "high": 5.5, "highest": 8, "deviation": 2.5}


def test_correlation_differences_by_hand_and_against_the_losses():
    student = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    teacher = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()
    samples, classes = figures.correlation_differences(student, teacher)
    # off the diagonal P P^T: 0.5 against 0.26; P^T P: 0.4375 against 0.25
    np.testing.assert_allclose(samples, [[0, 0.24], [0.24, 0]], atol=1e-7)
    np.testing.assert_allclose(classes, [[0, 0.1875], [0.1875, 0]], atol=1e-7)
    student, teacher = torch.randn(2, 6, 4, dtype=torch.float64)
    p, q = (student / 4).softmax(1), (teacher / 4).softmax(1)
    samples, classes = figures.correlation_differences(student, teacher, temperature=4)
    diagonals = ((p @ p.T - q @ q.T).diagonal() ** 2).sum(), ((p.T @ p - q.T @ q).diagonal() ** 2).sum()
    assert samples.square().sum() + diagonals[0] == pytest.approx(
        6 * batch_relation_loss(student, teacher, temperature=4)
    )
    assert classes.square().sum() + diagonals[1] == pytest.approx(
        4 * class_relation_loss(student, teacher, temperature=4)
    )
    assert not any(one.any() for one in figures.correlation_differences(teacher, teacher))


def test_entropy_by_hand_and_in_the_identity_of_ttm():
    assert figures.entropy(torch.zeros(1, 100)).item() == pytest.approx(math.log(100))
    assert figures.entropy(torch.tensor([[0.25, 0.75]]).log()).item() == pytest.approx(0.5623351446)
    assert figures.entropy(torch.tensor([[1e4, -1e4]])).item() == 0
    # equation 15: D(p_T || q) = T D(p_T || q_T) - (T - 1) H_{1/T}(q) + (T - 1) H(p_T)
    z, v, t = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64), 4.0
    p_t, q, q_t = (v / t).log_softmax(1), z.log_softmax(1), (z / t).log_softmax(1)
    renyi = power_sum(z, gamma=1 / t).log() / (1 - 1 / t)
    right = t * kl_divergence(p_t, q_t) - (t - 1) * renyi + (t - 1) * figures.entropy(v, t)
    np.testing.assert_allclose(kl_divergence(p_t, q), right)


def test_scatter_ratio_and_silhouette_by_hand():
    features, target = torch.tensor([[0.0], [2.0], [10.0], [12.0]]), torch.tensor([3, 3, 8, 8])
    assert figures.scatter_ratio(features, target) == pytest.approx(100 / 4)  # 4 * 5^2 over 4 * 1^2
    # from its own class 2 away, from the other 11 and 9 in the mean
    assert figures.silhouette(features, target) == pytest.approx((9 / 11 + 7 / 9) / 2)
    assert math.isnan(figures.silhouette(features, torch.zeros(4, dtype=torch.int64)))
    assert math.isnan(figures.scatter_ratio(torch.ones(3, 2), torch.tensor([0, 0, 1])))


def test_tsne_keeps_clusters_apart_and_is_the_same_every_time():
    features = torch.randn(30, 5) + 50 * (torch.arange(30) % 2).unsqueeze(1)
    place = figures.tsne_positions(features)
    assert place.shape == (30, 2)
    assert figures.silhouette(torch.from_numpy(place), torch.arange(30) % 2) > 0.5
    np.testing.assert_array_equal(place, figures.tsne_positions(features))


def test_the_telling_mistake_has_two_wrong_classes_on_top():
    logits = torch.tensor([[9.0, 1.0, 0.0], [5.0, 4.0, 1.0], [0.0, 6.0, 5.0]])
    assert figures.telling_mistake(logits, torch.tensor([0, 2, 1])) == 1
    assert figures.telling_mistake(logits, torch.tensor([0, 2, 0])) == 2  # by 5, the other by 3
    assert figures.telling_mistake(logits[:, :2], torch.tensor([0, 1, 0])) == 2


def test_the_logit_gap_of_the_teacher_gives_the_papers_beta(outputs):
    others = outputs.teacher.logits.clone()
    others[torch.arange(40), outputs.target] = -torch.inf
    gap = (outputs.teacher.logits[torch.arange(40), outputs.target] - others.amax(1)).mean().item()
    assert figures.mean_logit_gap(outputs) == pytest.approx(gap)
    caption = figures.beta_of_gaps({"wrn-40-2": 7.24, "resnet32x4": 8.40}).caption
    assert "wrn-40-2 gap 7.24, beta 4.98" in caption  # 2 (gap - 4.75); best of the paper's grid: 6
    assert "resnet32x4 gap 8.4, beta 7.3" in caption  # 8


def test_mappings_have_the_properties_that_the_paper_asks_for():
    for name, mapping in figures.transforms.MAPPINGS.items():
        figures.check_point_wise(name, mapping)
    with pytest.raises(ValueError, match=r"must keep 0; 'constant' does not"):
        figures.check_point_wise("constant", np.ones_like)
    with pytest.raises(ValueError, match="must lie nowhere below the identity; 'square'"):
        figures.check_point_wise("square", np.square)
    with pytest.raises(ValueError, match="must not decrease"):
        figures.check_point_wise("wave", lambda t: t + np.sin(np.pi * t) * 1.5)
    with pytest.raises(ValueError, match=r"exponents must lie in \(0, 1\], got 2"):
        figures.point_wise_transforms(exponents=(2,))


def test_a_power_transform_is_a_temperature():
    logits = torch.randn(3, 6, dtype=torch.float64)
    power = logits.softmax(1) ** 0.25
    np.testing.assert_allclose(power / power.sum(1, keepdim=True), (logits / 4).softmax(1))
