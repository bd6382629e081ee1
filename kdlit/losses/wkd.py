r"""WKD-L: Lv, Yang and Li, NeurIPS 2024, Wasserstein Distance Rivals Kullback-Leibler Divergence for KD, logit form.

Probability that the student puts on a wrong class costs the less, the closer that class is to the ones the teacher
names. The label is kept apart, as in NKD: its probability has a cross-entropy of its own, and probability is moved
among the other classes. The paper takes the similarity of classes from the features of their training pictures (CKA);
here it is the cosine of the rows of the teacher's classifier, which needs no pass over the data.

The transport is regularised by entropy relative to the product of its marginals and solved by Sinkhorn iterations on
logarithms. Since all samples share one matrix of distances, a log-sum-exp over it is one matrix product. The gradient
is that of the dual objective with the potentials held fixed, exact at convergence: no graph of the iterations is kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlit.losses.base import DistillationLoss
from kdlit.losses.functional import (
    batch_mean,
    check_logits,
    check_not_negative,
    check_positive,
    check_target,
    full_precision,
    target_cross_entropy,
    target_mask,
)
from kdlit.models.features import find_layer
from kdlit.types import Batch, ModelOutput

# exp(-80) is still a normal number in float32: no entry of the kernel may vanish.
LARGEST_EXPONENT = 80.0


@full_precision
def wkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    distance: Tensor,
    alpha: float,
    beta: float,
    temperature: float | Tensor,
    regularization: float,
    iterations: int,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Soft label of the target and transport cost between the distributions over the other classes.

    .. math:: L = \frac{1}{B} \sum_b - \alpha p^t_y \log p^s_y + \beta W_\epsilon(\hat p^t, \hat p^s), \quad
              W_\epsilon(a, c) = \min_{\pi \in \Pi(a, c)} \langle \pi, D \rangle + \epsilon KL(\pi \| a \otimes c)

    with :math:`p` the softmax at temperature 1 and :math:`\hat p` the softmax at :math:`T` over the classes other than
    the label.

    Args:
        student_logits: shape ``(B, C)``; the only logits that receive a gradient.
        teacher_logits: shape ``(B, C)``.
        target: labels, integers of shape ``(B,)``.
        distance: :math:`D \geq 0`, cost of moving probability between two classes, symmetric, shape ``(C, C)``; see
            :func:`class_distance`.
        alpha: weight of the target's term, >= 0.
        beta: weight of the transport cost, >= 0.
        temperature: :math:`T > 0`; a tensor of one element, or of shape ``(B, 1)``, receives a gradient.
        regularization: :math:`\epsilon > 0`, in units of ``distance``; at least 1/80 of its largest entry.
        iterations: number of Sinkhorn iterations, > 0.
        sample_weight: factor of each sample's term, >= 0, shape ``(B,)``; None for 1.

    Returns:
        Scalar, at least 0; not 0 where both networks agree, because of the soft label and of the regularisation.

    Raises:
        ValueError: If shapes do not fit, a label is out of range, a logit is not finite, a distance or weight is
            negative, or temperature, regularisation or iterations are not positive or too small.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 9.0, 0.0]]), torch.tensor([[0.0, 0.0, 9.0]])
        >>> distance = 0.5 * (1 - torch.eye(3))  # all but everything moves by 0.5
        >>> wkd_loss(
        ...     student, teacher, torch.tensor([0]), distance=distance, alpha=0.0, beta=1.0, temperature=1.0,
        ...     regularization=0.05, iterations=20,
        ... )
        tensor(0.4999)
    """
    check_logits(student_logits, teacher_logits)
    check_target(target, student_logits)
    check_not_negative("alpha", alpha)
    check_not_negative("beta", beta)
    check_positive("temperature", temperature)
    check_positive("regularization", regularization)
    check_positive("iterations", iterations)
    _check_distance(distance, student_logits.shape[1], regularization)
    teacher_logits, is_target = teacher_logits.detach(), target_mask(target, student_logits)
    soft_label = target_cross_entropy(student_logits, teacher_logits, is_target)

    teacher = (teacher_logits / temperature).masked_fill(is_target, -torch.inf).log_softmax(dim=-1)
    student = (student_logits / temperature).masked_fill(is_target, -torch.inf).log_softmax(dim=-1)
    kernel = (-distance.to(student) / regularization).exp()
    f, g = _sinkhorn_potentials(teacher.detach(), student.detach(), kernel, iterations)
    cost = regularization * ((teacher.exp() * f).sum(dim=-1) + (student.exp() * g).sum(dim=-1))
    return batch_mean(alpha * soft_label + beta * cost, sample_weight=sample_weight)


@torch.no_grad()
def _sinkhorn_potentials(log_a: Tensor, log_c: Tensor, kernel: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Dual potentials of both marginals in units of the regularisation, relative to their product."""
    g = torch.zeros_like(log_c)
    for _ in range(iterations):
        f = -_log_matmul(log_c + g, kernel.T)
        g = -_log_matmul(log_a + f, kernel)
    return f, g


def _log_matmul(log_rows: Tensor, matrix: Tensor) -> Tensor:
    """``log(exp(log_rows) @ matrix)``, safe for rows of any size as the matrix has no entry near 0."""
    largest = log_rows.amax(dim=-1, keepdim=True)
    return largest + ((log_rows - largest).exp() @ matrix).log()


def _check_distance(distance: Tensor, classes: int, regularization: float) -> None:
    if distance.shape != (classes, classes):
        raise ValueError(f"distance must have shape {(classes, classes)}, got {tuple(distance.shape)}")
    if torch.compiler.is_compiling() or distance.device.type != "cpu":
        return
    lowest, largest = distance.min().item(), distance.max().item()
    if not (lowest >= 0 and largest < float("inf")):
        raise ValueError(f"distance must be finite and >= 0, got values from {lowest} to {largest}")
    if largest > LARGEST_EXPONENT * regularization:
        raise ValueError(
            f"regularization must be at least 1/{LARGEST_EXPONENT:.0f} of the largest distance, {largest}, "
            f"got {regularization!r}"
        )


def class_distance(weight: Tensor, *, sharpness: float = 1.0) -> Tensor:
    r"""Distance between classes from the rows of a classifier.

    .. math:: D_{ij} = 1 - \exp\big(-\kappa (1 - \cos(w_i, w_j))\big)

    Args:
        weight: :math:`w`, one row a class, shape ``(C, d)``.
        sharpness: :math:`\kappa > 0`; the higher, the sooner two classes are as far apart as any.

    Returns:
        Symmetric, from 0 to below 1, shape ``(C, C)``, without a graph.

    Raises:
        ValueError: If the weight is not a matrix or the sharpness is not positive.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (classes, width), got {tuple(weight.shape)}")
    check_positive("sharpness", sharpness)
    rows = F.normalize(weight.detach(), dim=1)
    return 1 - (-sharpness * (1 - (rows @ rows.T).clamp(max=1))).exp()


class WKDLoss(DistillationLoss):
    """Wasserstein distance over related classes (Lv et al. 2024, WKD-L): see :func:`wkd_loss`.

    Args:
        teacher_classifier: dotted path of the teacher's last linear layer, whose rows say how close classes are.
        alpha: weight of the target's term, >= 0.
        beta: weight of the transport cost, >= 0.
        temperature: softens the distributions over the classes other than the label, > 0.
        regularization: weight of the entropy of the transport, > 0, in units of a distance that is below 1.
        iterations: number of Sinkhorn iterations, > 0.
        sharpness: of :func:`class_distance`, > 0.

    Raises:
        ValueError: If a number is out of its range; in :meth:`setup`, if the layer does not exist or has no matrix.
    """

    distance: Tensor
    reads_sample_weight = True

    def __init__(
        self,
        teacher_classifier: str = "fc",
        alpha: float = 1.0,
        beta: float = 30.0,
        temperature: float = 2.0,
        regularization: float = 0.05,
        iterations: int = 10,
        sharpness: float = 1.0,
    ) -> None:
        super().__init__()
        self.teacher_classifier = teacher_classifier
        self.alpha = check_not_negative("alpha", alpha)
        self.beta = check_not_negative("beta", beta)
        self.temperature = check_positive("temperature", temperature)
        self.regularization = check_positive("regularization", regularization)
        self.iterations = check_positive("iterations", iterations)
        self.sharpness = check_positive("sharpness", sharpness)

    def setup(
        self, student: nn.Module, teacher: nn.Module | None, example: Tensor, teacher_example: Tensor | None = None
    ) -> None:
        """Take the distances from the teacher's classifier."""
        weight = getattr(find_layer(teacher, self.teacher_classifier), "weight", None) if teacher else None
        if not isinstance(weight, Tensor):
            raise ValueError(f"teacher_classifier must name a layer with a weight, got {self.teacher_classifier!r}")
        self.register_buffer("distance", class_distance(weight, sharpness=self.sharpness))

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        return wkd_loss(
            student.logits,
            teacher.logits,
            batch["target"],
            distance=self.distance,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            regularization=self.regularization,
            iterations=self.iterations,
            sample_weight=batch.get("sample_weight"),
        )
