r"""Logit standardisation: Sun et al., CVPR 2024, Logit Standardization in Knowledge Distillation, algorithms 1 and 2.

Every sample's logits are brought to mean 0 and standard deviation 1 before the loss, so that its temperature is a share
of the logits' own spread. The paper divides by the population deviation; the authors' code divides by the deviation
with ``C - 1`` in the denominator plus 1e-7, which amounts to a base temperature :math:`\sqrt{C / (C - 1)}` times as
high. The code is followed; ``unbiased=False, eps=0`` is the paper's form.

A row of equal logits has no spread: here it gives zeros, and no gradient. The paper leaves it undefined; the code gives
the same zeros with a gradient of the order of 1e7.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kdlit.losses.base import DistillationLoss, LossWrapper
from kdlit.losses.functional import check_logits, check_not_negative, full_precision
from kdlit.types import Batch, ModelOutput


@full_precision
def standardize_logits(logits: Tensor, *, unbiased: bool = True, eps: float = 1e-7) -> Tensor:
    r"""Z-score of each sample's logits over the classes (algorithm 1).

    .. math:: Z(z) = \frac{z - \bar z}{\sigma(z) + \epsilon}

    Args:
        logits: :math:`z`, shape ``(B, C)``; the gradient flows through mean and deviation too.
        unbiased: whether the variance has ``C - 1`` in the denominator, as in the authors' code, or ``C``, as in the
            paper.
        eps: what is added to the deviation, >= 0; 1e-7 in the authors' code, 0 in the paper.

    Returns:
        Shape ``(B, C)``; zeros where all logits of a sample are equal.

    Raises:
        ValueError: If the logits are not of shape ``(B, C)`` or not finite, or ``eps`` is negative.

    Example:
        >>> import torch
        >>> standardize_logits(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-1.0000,  0.0000,  1.0000]])
    """
    check_logits(logits)
    check_not_negative("eps", eps)
    # Taking off one of the logits first makes the centred values of equal logits exact zeros.
    shifted = logits - logits[:, :1].detach()
    centred = shifted - shifted.mean(dim=-1, keepdim=True)
    variance = centred.square().sum(dim=-1, keepdim=True) / (logits.shape[1] - unbiased)
    # Below this bound, far below the rounding of any logit, the gradient of the square root overflows.
    has_spread = variance > torch.finfo(logits.dtype).eps ** 4
    deviation = torch.where(has_spread, variance, 1.0).sqrt()
    return centred / torch.where(has_spread, deviation + eps, torch.inf)


class LogitStandardization(LossWrapper):
    """Standardises the logits of student and teacher, of every view, for the wrapped loss (Sun et al. 2024).

    The released recipe for MLKD standardises its divergences only: for that, use the option of
    :class:`~kdlit.losses.MLKDTwoViewLoss` instead of this wrapper.

    Args:
        loss: the loss that gets standardised logits; its temperature is the paper's base temperature.
        unbiased: whether the variance has ``C - 1`` in the denominator, as in the authors' code, or ``C``, as in the
            paper.
        eps: what is added to the deviation, >= 0; 1e-7 in the authors' code, 0 in the paper.

    Raises:
        ValueError: If ``eps`` is negative.
    """

    def __init__(self, loss: DistillationLoss, unbiased: bool = True, eps: float = 1e-7) -> None:
        super().__init__(loss)
        self.unbiased = unbiased
        self.eps = check_not_negative("eps", eps)

    def inputs(
        self, student: ModelOutput, teacher: ModelOutput, batch: Batch
    ) -> tuple[ModelOutput, ModelOutput, Batch]:
        """The outputs with standardised logits; the rest as it is."""
        return self._standardized(student), self._standardized(teacher) if self.needs_teacher else teacher, batch

    def _standardized(self, output: ModelOutput) -> ModelOutput:
        strong = output.logits_strong
        return dataclasses.replace(
            output, logits=self._z_score(output.logits), logits_strong=None if strong is None else self._z_score(strong)
        )

    def _z_score(self, logits: Tensor) -> Tensor:
        return standardize_logits(logits, unbiased=self.unbiased, eps=self.eps)
