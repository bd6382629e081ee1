r"""Curriculum temperature: Li et al., AAAI 2023, Curriculum Temperature for Knowledge Distillation.

The temperature is learned against the student: its gradient is reversed, and the strength of the reversal grows along a
cosine, so that the loss becomes harder over the first epochs. Either one temperature for all samples
(:class:`GlobalTemperature`) or one a sample, predicted from both networks' outputs (:class:`InstanceTemperature`). Both
are wrappers: the method inside must have an attribute ``temperature`` that its forward reads.

The authors' code is followed: the reversal's sign is in its coefficient, the first epoch already has one step of the
cosine behind it, and the learned scalar starts at 1, so the temperature at :math:`1 + 20 \sigma(1) = 15.6`. The paper,
which was not at hand, is said to write a positive coefficient and a layer that reverses. The network that predicts
temperatures a sample is not in the public code: the one here is of our making. For the loss printed with it, see
:func:`instance_temperature_kd_loss`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdlit.losses.base import DistillationLoss, LossWrapper
from kdlit.losses.functional import batch_mean, check_logits, check_not_negative, check_positive, full_precision
from kdlit.models.features import dry_run
from kdlit.types import Batch, ModelOutput


def reversal_coefficient(epoch: float, *, decay_max: float, decay_min: float, decay_loops: int) -> float:
    r"""Factor of the temperature's gradient in one epoch.

    .. math:: c(e) = c_{min} + \frac{c_{max} - c_{min}}{2} \Big(1 + \cos\frac{\pi m}{n}\Big), \quad
              m = \min(\max(e, 0), n)

    Args:
        epoch: :math:`e`, counted from 1.
        decay_max: :math:`c_{max}`, the factor before the first epoch.
        decay_min: :math:`c_{min}`, the factor from epoch :math:`n` on; negative to reverse the gradient.
        decay_loops: :math:`n > 0`, over how many epochs the factor falls.

    Raises:
        ValueError: If ``decay_loops`` is not positive.

    Example:
        >>> reversal_coefficient(10, decay_max=0.0, decay_min=-1.0, decay_loops=10)
        -1.0
    """
    check_positive("decay_loops", decay_loops)
    elapsed = min(max(epoch, 0), decay_loops)
    return decay_min + (decay_max - decay_min) / 2 * (1 + math.cos(math.pi * elapsed / decay_loops))


@full_precision
def instance_temperature_kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Tensor, teacher_eps: float = 1e-7
) -> Tensor:
    r"""KD at one temperature a sample, with the constant that the authors add to the teacher's probabilities.

    .. math:: L = \frac{1}{B} \sum_b t_b^2 \sum_i q_i (\log q_i - \log p_i), \quad
              q = \mathrm{softmax}(v_b / t_b) + \epsilon

    ``q`` is not normalised again. With ``teacher_eps=0`` this is :func:`~kdlit.losses.kd_loss`, which is what
    :class:`InstanceTemperature` around a :class:`~kdlit.losses.KDLoss` computes.

    Args:
        student_logits: shape ``(B, C)``; receives a gradient.
        teacher_logits: :math:`v`, shape ``(B, C)``.
        temperature: :math:`t > 0`, shape ``(B, 1)``; receives a gradient.
        teacher_eps: :math:`\epsilon \geq 0`.

    Raises:
        ValueError: If the shapes differ, a logit is not finite or ``teacher_eps`` is negative.
    """
    check_logits(student_logits, teacher_logits)
    check_not_negative("teacher_eps", teacher_eps)
    log_p = (student_logits / temperature).log_softmax(dim=-1)
    log_q = (teacher_logits.detach() / temperature).log_softmax(dim=-1)
    if teacher_eps:
        log_q = torch.logaddexp(log_q, log_q.new_tensor(math.log(teacher_eps)))
    return batch_mean((log_q.exp() * (log_q - log_p)).sum(dim=-1), temperature=temperature)


class LearnableTemperature(LossWrapper):
    r"""What the two forms share: the range of the temperature, the reversal of its gradient and the curriculum.

    The temperature is :math:`t_{start} + t_{end} \sigma(g)`, so between ``t_start`` and ``t_start + t_end``.

    Args:
        loss: a loss with a temperature, or wrappers around one; its own temperature is not used.
        t_start: lowest temperature, > 0.
        t_end: width of the range, > 0; the name is the authors'.
        decay_max: factor of the temperature's gradient before the first epoch.
        decay_min: factor of the temperature's gradient from epoch ``decay_loops`` on; negative to reverse it.
        decay_loops: over how many epochs the factor falls, > 0.

    Raises:
        ValueError: If the loss has no temperature, or a number is out of its range.
    """

    def __init__(
        self,
        loss: DistillationLoss,
        t_start: float = 1.0,
        t_end: float = 20.0,
        decay_max: float = 0.0,
        decay_min: float = -1.0,
        decay_loops: int = 10,
    ) -> None:
        super().__init__(loss)
        if not hasattr(self.innermost, "temperature"):
            raise ValueError(f"loss must have a temperature, got {type(self.innermost).__name__}, which has none")
        self.t_start = check_positive("t_start", t_start)
        self.t_end = check_positive("t_end", t_end)
        self.decay_max = decay_max
        self.decay_min = decay_min
        self.decay_loops = decay_loops
        self.coefficient = self._coefficient(epoch=0)

    def _coefficient(self, epoch: int) -> float:
        return reversal_coefficient(
            epoch + 1, decay_max=self.decay_max, decay_min=self.decay_min, decay_loops=self.decay_loops
        )

    @abstractmethod
    def score(self, student: ModelOutput, teacher: ModelOutput) -> Tensor:
        """What the sigmoid turns into temperatures: shape ``(1,)``, or ``(B, 1)`` for one a sample."""
        raise NotImplementedError

    def current_temperature(self, student: ModelOutput, teacher: ModelOutput) -> Tensor:
        """Temperature for one batch, shape ``(1,)`` or ``(B, 1)``; its gradient to what is learned is reversed."""
        score = self.score(student, teacher)
        reversed_score = score.detach() + self.coefficient * (score - score.detach())
        return self.t_start + self.t_end * reversed_score.sigmoid()

    def on_train_epoch_start(self, epoch: int, max_epochs: int) -> None:
        """Move the curriculum on, then the wrapped loss."""
        self.coefficient = self._coefficient(epoch)
        super().on_train_epoch_start(epoch, max_epochs)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the wrapped loss at the learned temperature."""
        with _temperature(self.innermost, self.current_temperature(student, teacher)):
            return super().forward(student, teacher, batch)


@contextmanager
def _temperature(loss: Any, temperature: Tensor) -> Iterator[None]:
    """Let a loss have another temperature for as long as the context lasts."""
    own = loss.temperature
    loss.temperature = temperature
    try:
        yield
    finally:
        loss.temperature = own


class GlobalTemperature(LearnableTemperature):
    """One learnable temperature for all samples (Li et al. 2023).

    Args:
        loss: a loss with a temperature, or wrappers around one; its own temperature is not used.
        **kwargs: of :class:`LearnableTemperature`: the range of the temperature and the curriculum.

    Raises:
        ValueError: If the loss has no temperature, or a number is out of its range.
    """

    def __init__(self, loss: DistillationLoss, **kwargs: Any) -> None:
        super().__init__(loss, **kwargs)
        self.global_score = nn.Parameter(torch.ones(1))

    def score(self, student: ModelOutput, teacher: ModelOutput) -> Tensor:
        """The learned scalar, shape ``(1,)``."""
        return self.global_score


class InstanceTemperature(LearnableTemperature):
    """A temperature for each sample, from both networks' probabilities (Li et al. 2023).

    Two linear layers with a ReLU between them, built by :meth:`setup`. They read values only: no gradient reaches the
    student through them.

    Args:
        loss: a loss with a temperature, or wrappers around one; its own temperature is not used.
        hidden: width of the hidden layer, > 0.
        **kwargs: of :class:`LearnableTemperature`: the range of the temperature and the curriculum.

    Raises:
        ValueError: If the loss has no temperature, or a number is out of its range.
    """

    def __init__(self, loss: DistillationLoss, hidden: int = 128, **kwargs: Any) -> None:
        super().__init__(loss, **kwargs)
        self.hidden = check_positive("hidden", hidden)
        self.predictor = nn.Sequential()

    def setup(self, student: nn.Module, teacher: nn.Module | None, *examples: Tensor) -> None:  # type: ignore[override]
        """Build the layers for the number of classes that the student has."""
        super().setup(student, teacher, *examples)
        logits = dry_run(student, examples[0])
        if not isinstance(logits, Tensor):
            raise ValueError(f"student must give logits, got {type(logits).__name__}")
        self.predictor = nn.Sequential(
            nn.Linear(2 * logits.shape[1], self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1)
        )

    def score(self, student: ModelOutput, teacher: ModelOutput) -> Tensor:
        """A prediction for each sample, shape ``(B, 1)``."""
        if not len(self.predictor):
            raise RuntimeError("setup must be called before the first batch: it builds the layers of the temperature")
        outputs = torch.cat([student.logits.softmax(dim=-1), teacher.logits.softmax(dim=-1)], dim=-1)
        score: Tensor = self.predictor(outputs.detach())
        return score
