r"""Transformed teacher matching, plain and weighted: Zheng and Yang, ICLR 2024, equations 2, 9 and 22.

The student, at temperature 1, follows the teacher's distribution raised to the power :math:`\gamma = 1/T`. Neither form
carries a factor :math:`T^2`; the paper's :math:`\beta` is the weight of the term. The authors' code raises
probabilities to the power, which loses those that underflow; here :math:`p^\gamma / \sum p^\gamma =
\mathrm{softmax}(\gamma v)` (equation 9) and powers are taken of log-probabilities, which is the same function without
that loss.
"""

from __future__ import annotations

from torch import Tensor

from kdlit.losses.base import DistillationLoss
from kdlit.losses.functional import batch_mean, check_logits, check_positive, full_precision, kl_divergence
from kdlit.types import Batch, ModelOutput


@full_precision
def ttm_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, gamma: float, sample_weight: Tensor | None = None
) -> Tensor:
    r"""Divergence of the student from the power-transformed teacher (equation 2 without its label term).

    .. math:: L = \frac{1}{B} \sum_b KL\big(\mathrm{softmax}(\gamma v_b) \,\|\, \mathrm{softmax}(z_b)\big)

    Args:
        student_logits: :math:`z`, shape ``(B, C)``; the only logits that receive a gradient.
        teacher_logits: :math:`v`, shape ``(B, C)``.
        gamma: exponent of the power transform, > 0; the inverse of a temperature.
        sample_weight: factor of each sample's term, >= 0, shape ``(B,)``; None for 1.

    Returns:
        Scalar, at least 0; 0 where the student gives the transformed distribution, and so where both networks agree if
        ``gamma`` is 1.

    Raises:
        ValueError: If the shapes differ, a logit is not finite or ``gamma`` is not positive.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 9.0]]).log()
        >>> ttm_loss(student, teacher, gamma=0.5)  # 1/4 log(1/2) + 3/4 log(3/2)
        tensor(0.1308)
    """
    check_logits(student_logits, teacher_logits)
    check_positive("gamma", gamma)
    return batch_mean(_divergence(student_logits, teacher_logits.detach(), gamma), sample_weight=sample_weight)


@full_precision
def wttm_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, gamma: float, sample_weight: Tensor | None = None
) -> Tensor:
    r"""TTM with more weight on samples of which the teacher is less sure (equation 22 without its label term).

    .. math::

        L = \frac{1}{B} \sum_b U_\gamma(v_b) \, KL\big(\mathrm{softmax}(\gamma v_b) \,\|\,
        \mathrm{softmax}(z_b)\big)

    with :func:`power_sum` :math:`U_\gamma`.

    Args:
        student_logits: :math:`z`, shape ``(B, C)``; the only logits that receive a gradient.
        teacher_logits: :math:`v`, shape ``(B, C)``.
        gamma: exponent of the power transform, > 0, and below 1 for the weights to mean what they should.
        sample_weight: further factor of each sample's term, >= 0, shape ``(B,)``; None for 1.

    Returns:
        Scalar, at least 0; 0 under the conditions of :func:`ttm_loss`.

    Raises:
        ValueError: If the shapes differ, a logit is not finite or ``gamma`` is not positive.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 9.0]]).log()
        >>> wttm_loss(student, teacher, gamma=0.5)  # that of ttm_loss times (1 + 3) / sqrt(10)
        tensor(0.1655)
    """
    check_logits(student_logits, teacher_logits)
    check_positive("gamma", gamma)
    teacher_logits = teacher_logits.detach()
    divergence = _divergence(student_logits, teacher_logits, gamma)
    return batch_mean(power_sum(teacher_logits, gamma=gamma) * divergence, sample_weight=sample_weight)


@full_precision
def power_sum(logits: Tensor, *, gamma: float) -> Tensor:
    r"""Smoothness of each sample's prediction, :math:`U_\gamma(p) = \sum_i p_i^\gamma` with :math:`p` the softmax.

    Args:
        logits: shape ``(B, C)``.
        gamma: exponent, > 0.

    Returns:
        Shape ``(B,)``; for ``gamma`` in (0, 1) from 1 (one-hot) to :math:`C^{1 - \gamma}` (uniform).

    Raises:
        ValueError: If the logits are not of shape ``(B, C)`` or not finite, or ``gamma`` is not positive.
    """
    check_logits(logits)
    check_positive("gamma", gamma)
    return (gamma * logits.log_softmax(dim=-1)).logsumexp(dim=-1).exp()


def _divergence(student_logits: Tensor, teacher_logits: Tensor, gamma: float) -> Tensor:
    return kl_divergence((gamma * teacher_logits).log_softmax(dim=-1), student_logits.log_softmax(dim=-1))


class TTMLoss(DistillationLoss):
    """Transformed teacher matching (Zheng and Yang 2024): see :func:`ttm_loss`.

    Args:
        gamma: exponent of the power transform, > 0; the paper tunes it for each pair of networks, 0.1 to 0.4.

    Raises:
        ValueError: If ``gamma`` is not positive.
    """

    reads_sample_weight = True

    def __init__(self, gamma: float = 0.1) -> None:
        super().__init__()
        self.gamma = check_positive("gamma", gamma)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        return ttm_loss(student.logits, teacher.logits, gamma=self.gamma, sample_weight=batch.get("sample_weight"))


class WTTMLoss(DistillationLoss):
    """Weighted transformed teacher matching (Zheng and Yang 2024): see :func:`wttm_loss`.

    Args:
        gamma: exponent of the power transform, > 0; the paper tunes it for each pair of networks, 0.1 to 0.4 on
            CIFAR-100, 0.7 and 0.8 on ImageNet.

    Raises:
        ValueError: If ``gamma`` is not positive.
    """

    reads_sample_weight = True

    def __init__(self, gamma: float = 0.1) -> None:
        super().__init__()
        self.gamma = check_positive("gamma", gamma)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        return wttm_loss(student.logits, teacher.logits, gamma=self.gamma, sample_weight=batch.get("sample_weight"))
