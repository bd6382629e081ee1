r"""Rényi entropy: the regulariser inside TTM (Zheng and Yang, ICLR 2024, eq. 4 and 16) and on its own (appendix A.6).

Equation 15 of that paper, with :math:`T = 1/\gamma` and :math:`p_T, q_T` the softened teacher and student:

.. math:: KL(p_T \| q) = T \, KL(p_T \| q_T) - (T - 1) H_{1/T}(q) + (T - 1) H(p_T)

so that TTM is KD that also asks for a student of high Rényi entropy, of order :math:`1/T` and with weight :math:`T -
1`. Appendix A.6 proposes to choose order and weight freely: put :class:`RenyiEntropyLoss` beside a
:class:`~kdlit.losses.KDLoss`. The authors have no code for it.
"""

from __future__ import annotations

import math

from torch import Tensor

from kdlit.losses.base import DistillationLoss
from kdlit.losses.functional import batch_mean, check_logits, check_positive, full_precision
from kdlit.types import Batch, ModelOutput


@full_precision
def renyi_entropy(logits: Tensor, *, order: float) -> Tensor:
    r"""Rényi entropy of each sample's prediction (equation 4), the Shannon entropy at order 1.

    .. math:: H_a(p) = \frac{1}{1 - a} \log \sum_i p_i^a, \quad p = \mathrm{softmax}(z)

    Args:
        logits: :math:`z`, shape ``(B, C)``.
        order: :math:`a > 0`.

    Returns:
        Entropies in nats, from 0 to log C, shape ``(B,)``.

    Raises:
        ValueError: If the logits are not of shape ``(B, C)`` or not finite, or the order is not positive.

    Example:
        >>> import torch
        >>> renyi_entropy(torch.zeros(1, 4), order=0.5)  # log 4
        tensor([1.3863])
    """
    check_logits(logits)
    check_positive("order", order)
    log_p = logits.log_softmax(dim=-1)
    if order == 1:
        return -(log_p.exp() * log_p).sum(dim=-1)
    return (order * log_p).logsumexp(dim=-1) / (1 - order)


@full_precision
def renyi_entropy_loss(student_logits: Tensor, *, order: float, sample_weight: Tensor | None = None) -> Tensor:
    r"""How far the student's Rényi entropy is below that of the uniform distribution, averaged over the batch.

    .. math:: L = \log C - \frac{1}{B} \sum_b H_a(p_b)

    Args:
        student_logits: shape ``(B, C)``.
        order: :math:`a > 0`; :math:`1/T` in TTM.
        sample_weight: factor of each sample's term, >= 0, shape ``(B,)``; None for 1.

    Returns:
        Scalar, at least 0; 0 where every prediction is uniform.

    Raises:
        ValueError: If the logits are not of shape ``(B, C)`` or not finite, or the order is not positive.
    """
    entropy = renyi_entropy(student_logits, order=order)
    return batch_mean(math.log(student_logits.shape[1]) - entropy, sample_weight=sample_weight)


class RenyiEntropyLoss(DistillationLoss):
    """Regulariser against confident students (Zheng and Yang 2024, appendix A.6): see :func:`renyi_entropy_loss`.

    Args:
        order: order of the entropy, > 0.

    Raises:
        ValueError: If the order is not positive.
    """

    needs_teacher = False
    reads_sample_weight = True

    def __init__(self, order: float = 0.25) -> None:
        super().__init__()
        self.order = check_positive("order", order)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        return renyi_entropy_loss(student.logits, order=self.order, sample_weight=batch.get("sample_weight"))
