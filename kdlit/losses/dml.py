r"""Deep mutual learning: Zhang et al., CVPR 2018, the loss of one student with respect to one peer.

The authors' code puts 1e-8 inside the logarithm in two places, which caps the loss and is kept as the default;
``eps=0`` is the divergence of the paper. With several peers the code adds such terms, the paper averages them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdlit.losses.base import DistillationLoss
from kdlit.losses.functional import batch_mean, check_logits, check_not_negative, full_precision, kl_divergence
from kdlit.types import Batch, ModelOutput


@full_precision
def dml_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, eps: float = 1e-8, sample_weight: Tensor | None = None
) -> Tensor:
    r"""Divergence of the student from its peer, at temperature 1.

    .. math:: L = \frac{1}{B} \sum_b \sum_i q_i \log\Big(\frac{q_i}{p_i + \epsilon} + \epsilon\Big)

    with :math:`p, q` the probabilities of student and peer.

    Args:
        student_logits: shape ``(B, C)``; the only logits that receive a gradient.
        teacher_logits: the peer's, shape ``(B, C)``.
        eps: :math:`\epsilon \geq 0`; 0 for the Kullback-Leibler divergence.
        sample_weight: factor of each sample's term, >= 0, shape ``(B,)``; None for 1.

    Returns:
        Scalar; at least 0 and 0 where both networks agree, but for terms of the order of ``eps`` times the classes.

    Raises:
        ValueError: If the shapes differ, a logit is not finite or ``eps`` is negative.

    Example:
        >>> import torch
        >>> student, peer = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]]).log()
        >>> dml_loss(student, peer)  # 1/4 log(1/2) + 3/4 log(3/2)
        tensor(0.1308)
    """
    check_logits(student_logits, teacher_logits)
    check_not_negative("eps", eps)
    log_p, log_q = student_logits.log_softmax(dim=-1), teacher_logits.detach().log_softmax(dim=-1)
    if not eps:
        return batch_mean(kl_divergence(log_q, log_p), sample_weight=sample_weight)
    q = log_q.exp()
    return batch_mean((q * torch.log(q / (log_p.exp() + eps) + eps)).sum(dim=-1), sample_weight=sample_weight)


class DMLLoss(DistillationLoss):
    """Deep mutual learning with the teacher as the one peer (Zhang et al. 2018): see :func:`dml_loss`.

    Args:
        eps: constant inside the logarithm, >= 0; 0 for the Kullback-Leibler divergence.

    Raises:
        ValueError: If ``eps`` is negative.
    """

    reads_sample_weight = True

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = check_not_negative("eps", eps)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        return dml_loss(student.logits, teacher.logits, eps=self.eps, sample_weight=batch.get("sample_weight"))
