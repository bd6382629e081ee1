"""Cross-entropy with labels, smoothed or not."""

from __future__ import annotations

import pytest
import torch

from kdlit.losses import CrossEntropyLoss, cross_entropy_loss
from kdlit.types import ModelOutput


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_it_is_the_divergence_from_the_smoothed_labels(smoothing):
    logits = torch.randn(5, 7, dtype=torch.float64)
    target = torch.tensor([0, 6, 3, 3, 1])
    wanted = torch.full((5, 7), smoothing / 7, dtype=torch.float64)
    wanted[torch.arange(5), target] += 1 - smoothing
    expected = -(wanted * logits.log_softmax(1)).sum(1).mean()
    assert cross_entropy_loss(logits, target, label_smoothing=smoothing) == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [2, 1000])
def test_it_is_finite_at_extreme_logits(dtype, smoothing, classes):
    logits = torch.zeros(1, classes, dtype=dtype)
    logits[0, 0], logits[0, -1] = 1e4, -1e4
    logits.requires_grad_()
    loss = cross_entropy_loss(logits, torch.tensor([classes - 1]), label_smoothing=smoothing)
    loss.backward()
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    assert logits.grad.isfinite().all()


def test_class_and_function_agree_on_either_view():
    weak, strong = torch.randn(2, 4, 6)
    target = torch.tensor([1, 2, 3, 4])
    student = ModelOutput(weak, {}, strong)
    assert CrossEntropyLoss()(student, None, {"target": target}) == cross_entropy_loss(weak, target)
    assert CrossEntropyLoss(strong_view=True)(student, None, {"target": target}) == cross_entropy_loss(strong, target)
    with pytest.raises(ValueError, match="strong_view needs logits_strong"):
        CrossEntropyLoss(strong_view=True)(ModelOutput(weak), None, {"target": target})
