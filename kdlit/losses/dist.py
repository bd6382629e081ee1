r"""DIST: Huang et al., NeurIPS 2022, Knowledge Distillation from A Stronger Teacher.

Instead of equal probabilities, it asks for correlated ones: over the classes of each sample (inter) and over the
samples of each class (intra). The authors' code is followed: a factor :math:`T^2`, and 1e-8 added to the product of
norms under each correlation, which is part of the result for classes that are nearly absent from a batch.
"""

from __future__ import annotations

from torch import Tensor
from torch.linalg import vector_norm

from kdlit.losses.base import DistillationLoss
from kdlit.losses.functional import batch_mean, check_logits, check_not_negative, check_positive, full_precision
from kdlit.types import Batch, ModelOutput

EPS = 1e-8


@full_precision
def dist_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: float, gamma: float, temperature: float | Tensor
) -> Tensor:
    r"""One minus the correlations of the two networks' probabilities, over classes and over samples.

    .. math:: L = T^2 \Big[ \beta \Big(1 - \frac{1}{B} \sum_b \rho(P_{b}, Q_{b})\Big)
              + \gamma \Big(1 - \frac{1}{C} \sum_i \rho(P_{\cdot i}, Q_{\cdot i})\Big) \Big]

    with :math:`P, Q` the probabilities at :math:`T`, shape ``(B, C)``, and :math:`\rho` the Pearson correlation.

    Args:
        student_logits: shape ``(B, C)``; the only logits that receive a gradient.
        teacher_logits: shape ``(B, C)``.
        beta: weight of the correlation over classes, >= 0.
        gamma: weight of the correlation over samples, >= 0.
        temperature: :math:`T > 0`; a tensor of one element, or of shape ``(B, 1)``, receives a gradient.

    Returns:
        Scalar, at least 0 and at most :math:`2 T^2 (\beta + \gamma)`; near 0 where both networks give the same
        probabilities, were it not for the constant under the correlations and for rows or columns without spread, which
        count as uncorrelated.

    Raises:
        ValueError: If the shapes differ, a logit is not finite, a weight is negative or the temperature is not
            positive.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> dist_loss(student, teacher, beta=1.0, gamma=0.0, temperature=1.0)  # opposed: 1 - (-1)
        tensor(2.)
    """
    check_logits(student_logits, teacher_logits)
    check_not_negative("beta", beta)
    check_not_negative("gamma", gamma)
    check_positive("temperature", temperature)
    p = (student_logits / temperature).softmax(dim=-1)
    q = (teacher_logits.detach() / temperature).softmax(dim=-1)
    inter = batch_mean(1 - _correlation(p, q, dim=1), temperature=temperature)
    intra: Tensor = (temperature**2 * (1 - _correlation(p, q, dim=0))).mean()
    return beta * inter + gamma * intra


def _correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Pearson correlations along a dimension."""
    a, b = a - a.mean(dim=dim, keepdim=True), b - b.mean(dim=dim, keepdim=True)
    correlation: Tensor = (a * b).sum(dim=dim) / (vector_norm(a, dim=dim) * vector_norm(b, dim=dim) + EPS)
    return correlation


class DISTLoss(DistillationLoss):
    """Correlated instead of equal probabilities (Huang et al. 2022): see :func:`dist_loss`.

    Args:
        beta: weight of the correlation over classes, >= 0; 2 on CIFAR-100, 1 on ImageNet.
        gamma: weight of the correlation over samples, >= 0; 2 on CIFAR-100, 1 on ImageNet.
        temperature: softens both distributions, > 0; 4 on CIFAR-100, 1 on ImageNet.

    Raises:
        ValueError: If a weight is negative or the temperature is not positive.
    """

    across_batch = True

    def __init__(self, beta: float = 2.0, gamma: float = 2.0, temperature: float = 4.0) -> None:
        super().__init__()
        self.beta = check_not_negative("beta", beta)
        self.gamma = check_not_negative("gamma", gamma)
        self.temperature = check_positive("temperature", temperature)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        return dist_loss(student.logits, teacher.logits, beta=self.beta, gamma=self.gamma, temperature=self.temperature)
