"""Knowledge distillation: Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network, section 2.

The divergence carries the factor :math:`T^2`, as in the paper and in all published code, so that its gradient keeps its
size when the temperature changes. It is averaged over the batch and summed over the classes.
"""

from __future__ import annotations

from torch import Tensor

from kdlit.losses.base import DistillationLoss
from kdlit.losses.functional import batch_mean, check_logits, check_positive, full_precision, kl_divergence
from kdlit.types import Batch, ModelOutput


@full_precision
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Divergence of the softened student from the softened teacher.

    .. math:: L = \frac{T^2}{B} \sum_b KL\big(\mathrm{softmax}(v_b / T) \,\|\, \mathrm{softmax}(z_b / T)\big)

    Args:
        student_logits: :math:`z`, shape ``(B, C)``; the only logits that receive a gradient.
        teacher_logits: :math:`v`, shape ``(B, C)``.
        temperature: :math:`T > 0`; a tensor of one element, or of shape ``(B, 1)``, receives a gradient.
        sample_weight: factor of each sample's term, >= 0, shape ``(B,)``; None for 1.

    Returns:
        Scalar, at least 0; 0 where both networks give the same probabilities.

    Raises:
        ValueError: If the shapes differ, a logit is not finite or the temperature is not positive.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]]).log()
        >>> kd_loss(student, teacher, temperature=1.0)  # 1/4 log(1/2) + 3/4 log(3/2)
        tensor(0.1308)
    """
    check_logits(student_logits, teacher_logits)
    check_positive("temperature", temperature)
    log_p = (teacher_logits.detach() / temperature).log_softmax(dim=-1)
    log_q = (student_logits / temperature).log_softmax(dim=-1)
    return batch_mean(kl_divergence(log_p, log_q), temperature=temperature, sample_weight=sample_weight)


class KDLoss(DistillationLoss):
    """Knowledge distillation (Hinton et al. 2015): see :func:`kd_loss`.

    Args:
        temperature: softens both distributions, > 0; 4 on CIFAR-100 and 1 on ImageNet are customary.

    Raises:
        ValueError: If the temperature is not positive.
    """

    reads_sample_weight = True

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        return kd_loss(
            student.logits,
            teacher.logits,
            temperature=self.temperature,
            sample_weight=batch.get("sample_weight"),
        )
