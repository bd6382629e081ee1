"""What student and teacher say about the same pictures, sample by sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WATCHED_TEMPERATURE = 4.0  # of the teacher in kl_softened: that of the figures of Zheng and Yang 2024


def student_figures(student_logits: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
    """How the student does by itself.

    Args:
        student_logits: shape ``(B, C)``.
        target: labels, int64, shape ``(B,)``.

    Returns:
        By name, each of shape ``(B,)``: ``entropy`` of the student's probabilities, in nats (Zheng and Yang 2024,
        figure 1); ``logit_mean`` and ``logit_std`` over the classes (the latter with 1/C; Sun et al. 2024, figure 5);
        and with labels ``top1`` and ``top5``, of as many classes as there are where these are fewer.
    """
    logits = student_logits.float()
    figures = {"entropy": entropy(logits.log_softmax(dim=-1)), **_moments(logits)}
    if target is not None:
        figures |= {"top1": is_right(logits, target), "top5": is_right(logits, target, k=5)}
    return figures


def teacher_figures(student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
    """How the student stands to its teacher.

    Args:
        student_logits: shape ``(B, C)``.
        teacher_logits: shape ``(B, C)``.
        target: labels, int64, shape ``(B,)``.

    Returns:
        By name, each of shape ``(B,)``:

        - ``agreement``, whether both name the same class; ``agreement5``, whether the teacher's class is among the
          student's five;
        - ``kl``, the divergence KL(teacher || student); ``kl_softened``, likewise with the teacher at temperature 4 and
          the student at 1 (Zheng and Yang 2024, figure 2); both in nats;
        - ``teacher_entropy``, ``teacher_logit_mean``, ``teacher_logit_std``, as those of the student;
        - with labels ``teacher_top1``, ``teacher_top5`` and ``teacher_wrong``, and for what the student does where the
          teacher is wrong ``teacher_wrong_student_right``, ``teacher_wrong_student_same`` (it repeats the mistake) and
          ``teacher_wrong_student_other``, which add up to ``teacher_wrong``.
    """
    student, teacher = student_logits.float(), teacher_logits.float()
    log_q, log_p = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
    said, learned = teacher.argmax(dim=-1), student.argmax(dim=-1)
    agreement = said == learned
    figures = {
        "agreement": agreement,
        "agreement5": is_right(student, said, k=5),
        "kl": divergence(log_p, log_q),
        "kl_softened": divergence((teacher / WATCHED_TEMPERATURE).log_softmax(dim=-1), log_q),
        "teacher_entropy": entropy(log_p),
        **{f"teacher_{name}": value for name, value in _moments(teacher).items()},
    }
    if target is not None:
        wrong = said != target
        right = learned == target
        figures |= {
            "teacher_top1": ~wrong,
            "teacher_top5": is_right(teacher, target, k=5),
            "teacher_wrong": wrong,
            "teacher_wrong_student_right": wrong & right,
            "teacher_wrong_student_same": wrong & agreement,
            "teacher_wrong_student_other": wrong & ~right & ~agreement,
        }
    return figures


def is_right(logits: Tensor, target: Tensor, k: int = 1) -> Tensor:
    """Whether the label is among the ``k`` largest logits, for each sample: bool, shape ``(B,)``.

    Of equal logits the first come first. A NaN is never right for ``k`` > 1; for 1 it counts as the largest, as in
    ``argmax``, which names the class.

    Args:
        logits: shape ``(B, C)``.
        target: labels, shape ``(B,)``.
        k: how many; of fewer classes all count.
    """
    if k == 1:
        return logits.argmax(dim=-1) == target
    own = logits.gather(-1, place := target[:, None])  # counting those behind it is far cheaper than sorting
    comes_first = torch.arange(logits.shape[-1], device=logits.device) < place
    return torch.where(comes_first, logits < own, logits <= own).sum(dim=-1) > logits.shape[-1] - k


def entropy(log_p: Tensor) -> Tensor:
    """Shannon entropy in nats, between 0 and log C, shape ``(B,)``.

    Args:
        log_p: log-probabilities, shape ``(B, C)``.
    """
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(dim=-1)  # so that 0 log 0 is 0


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(p || q) in nats, >= 0, shape ``(B,)``.

    Args:
        log_p: log-probabilities, shape ``(B, C)``.
        log_q: likewise.
    """
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(dim=-1)


class CalibrationError:
    """Expected calibration error over many batches: the gap between confidence and accuracy, mean over samples.

    Samples are sorted by confidence into bins of equal width (Guo et al. 2017, equation 3). Nothing waits for the
    device before the value is taken.

    Args:
        bins: how many.
    """

    def __init__(self, bins: int = 15) -> None:
        self.bins = bins
        self._sums: Tensor | None = None  # of accuracy minus confidence in each bin, and the number of samples

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            logits: shape ``(B, C)``.
            target: labels, int64, shape ``(B,)``.
        """
        confidence, said = logits.float().softmax(dim=-1).max(dim=-1)
        place = (confidence * self.bins).long().clamp(0, self.bins - 1)
        sums = confidence.new_zeros(self.bins + 1).index_add_(0, place, (said == target).float() - confidence)
        sums[-1] = len(target)
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self, over_processes: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Return the error, a scalar from 0 to 1, and start anew; None if nothing was counted.

        Args:
            over_processes: gives the sum of a tensor over all processes.
        """
        if self._sums is None:
            return None
        sums, self._sums = over_processes(self._sums), None
        return sums[:-1].abs().sum() / sums[-1]


def _moments(logits: Tensor) -> dict[str, Tensor]:
    mean = logits.mean(dim=-1, keepdim=True)
    std = (logits - mean).square().mean(dim=-1).sqrt()  # a third of the time of std_mean on a CPU
    return {"logit_mean": mean.squeeze(-1), "logit_std": std}
