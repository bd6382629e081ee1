r"""Entropy-based adaptive weights: Su et al. 2023, EA-KD: Entropy-based Adaptive Knowledge Distillation.

Samples of which the teacher is unsure count more, and among those the ones of which the student is unsure too. The
wrapper writes the weights into ``batch["sample_weight"]``, where every loss that is a mean over samples reads them; of
MLKD, CRLD and the like, they weigh the divergences. The weights are constants: no gradient flows through them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdlit.losses.base import DistillationLoss, SampleWeighting
from kdlit.losses.functional import check_logits, check_positive, full_precision
from kdlit.losses.renyi import renyi_entropy
from kdlit.types import Batch, ModelOutput


@full_precision
@torch.no_grad()
def entropy_weight(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    r"""Weight of each sample.

    .. math:: w_b = \frac{1}{2} H\big(\mathrm{softmax}(v_b / T)\big)
              \Big(1 + \frac{H(\mathrm{softmax}(z_b / T))}{\log C}\Big)

    Args:
        student_logits: :math:`z`, shape ``(B, C)``.
        teacher_logits: :math:`v`, shape ``(B, C)``.
        temperature: softens both distributions, > 0.

    Returns:
        From 0 to log C, shape ``(B,)``, without a graph.

    Raises:
        ValueError: If the shapes differ, a logit is not finite or the temperature is not positive.

    Example:
        >>> import torch
        >>> entropy_weight(torch.zeros(1, 2), torch.zeros(1, 2), temperature=3.0)  # log 2
        tensor([0.6931])
    """
    check_logits(student_logits, teacher_logits)
    check_positive("temperature", temperature)
    student = renyi_entropy(student_logits / temperature, order=1)
    teacher = renyi_entropy(teacher_logits / temperature, order=1)
    return 0.5 * teacher * (1 + student / math.log(student_logits.shape[1]))


class EntropyWeighting(SampleWeighting):
    """Weighs each sample of the wrapped loss by :func:`entropy_weight` (Su et al. 2023).

    Weights that the batch already has are multiplied by these.

    Args:
        loss: a loss that reads sample weights, or wrappers around one.
        entropy_temperature: softens both distributions before their entropy is taken, > 0.

    Raises:
        ValueError: If the loss does not read sample weights or the temperature is not positive.
    """

    def __init__(self, loss: DistillationLoss, entropy_temperature: float = 3.0) -> None:
        super().__init__(loss)
        self.entropy_temperature = check_positive("entropy_temperature", entropy_temperature)

    def weigh(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return :func:`entropy_weight` of the batch."""
        return entropy_weight(student.logits, teacher.logits, temperature=self.entropy_temperature)
