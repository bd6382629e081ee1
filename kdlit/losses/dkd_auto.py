r"""DKD whose weight of the non-target classes follows the teacher: Zhao et al., CVPR 2022, appendix A.3.

The authors find the best :math:`\beta` to grow with the gap between the teacher's logit of the label and its largest
other logit, averaged over the training set, and pick :math:`\beta` by hand for each teacher (table A.2). Here it is a
straight line in that gap, fitted to the table: :math:`\beta = 2 (gap - 4.75)`, within 2 of every entry. The authors
have no such rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdlit.losses.base import DistillationLoss
from kdlit.losses.dkd import dkd_loss
from kdlit.losses.functional import (
    check_logits,
    check_not_negative,
    check_positive,
    check_target,
    full_precision,
    target_mask,
)
from kdlit.losses.gathering import of_all_processes
from kdlit.types import Batch, ModelOutput


@full_precision
def logit_gap(logits: Tensor, target: Tensor) -> Tensor:
    r"""Gap of each sample between the label's logit and the largest other one, :math:`z_y - \max_{i \neq y} z_i`.

    Args:
        logits: shape ``(B, C)``.
        target: labels, integers of shape ``(B,)``.

    Returns:
        Shape ``(B,)``; negative where the prediction is wrong.

    Raises:
        ValueError: If shapes do not fit, a label is out of range or a logit is not finite.

    Example:
        >>> import torch
        >>> logit_gap(torch.tensor([[5.0, 1.0, 2.0]]), torch.tensor([0]))
        tensor([3.])
    """
    check_logits(logits)
    check_target(target, logits)
    others = logits.masked_fill(target_mask(target, logits), -torch.inf).amax(dim=-1)
    return logits.gather(1, target.long().unsqueeze(1)).squeeze(1) - others


class AutoBetaDKDLoss(DistillationLoss):
    r"""Decoupled distillation with :math:`\beta = \max(\beta_{min}, slope \cdot (gap - offset))`.

    The gap is that of the teacher, averaged over all batches since training began; in the first step, over that batch.
    It is saved with the checkpoint.

    Args:
        alpha: weight of the target-class part, >= 0.
        temperature: softens both distributions, > 0.
        slope: how much the weight of the non-target part grows with the gap, >= 0.
        offset: gap at which that weight would be 0.
        beta_min: lowest weight of the non-target part, >= 0.

    Raises:
        ValueError: If a weight or the slope is negative or the temperature is not positive.
    """

    gap: Tensor
    batches: Tensor
    reads_sample_weight = True
    across_batch = True

    def __init__(
        self,
        alpha: float = 1.0,
        temperature: float = 4.0,
        slope: float = 2.0,
        offset: float = 4.75,
        beta_min: float = 1.0,
    ) -> None:
        super().__init__()
        self.alpha = check_not_negative("alpha", alpha)
        self.temperature = check_positive("temperature", temperature)
        self.slope = check_not_negative("slope", slope)
        self.offset = offset
        self.beta_min = check_not_negative("beta_min", beta_min)
        self.register_buffer("gap", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def beta(self, gap: Tensor) -> Tensor:
        """Weight of the non-target part for a gap in logits."""
        return (self.slope * (gap - self.offset)).clamp(min=self.beta_min)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        gap = torch.where(self.batches > 0, self.gap, logit_gap(teacher.logits, batch["target"]).mean().detach())
        return dkd_loss(
            student.logits,
            teacher.logits,
            batch["target"],
            alpha=self.alpha,
            beta=self.beta(gap),
            temperature=self.temperature,
            sample_weight=batch.get("sample_weight"),
        )

    def on_train_batch_end(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> None:
        """Move the average of the gap on, with the samples of all processes."""
        self.batches += 1
        (gap,) = of_all_processes(logit_gap(teacher.logits, batch["target"]))
        self.gap += (gap.mean() - self.gap) / self.batches
