"""What two or more methods share: argument checks, full precision, divergences and the mean over the batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlit.types import ModelOutput

P = ParamSpec("P")
T = TypeVar("T")


def full_precision(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorate a loss so that it computes in float32, or in float64 if that is what it gets, under any precision.

    Half-precision tensors are widened, and autocast is off inside: on a CPU it would leave ``log_softmax`` in bfloat16.
    """

    @functools.wraps(loss)
    def computed(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        device = tensors[0].device.type if tensors else "cpu"
        with torch.autocast(device, enabled=False):
            kwargs = {name: widened(value) for name, value in kwargs.items()}  # type: ignore[assignment]
            return loss(*map(widened, args), **kwargs)  # type: ignore[arg-type]

    return computed


def widened(value: T) -> T:
    """Return a half-precision tensor as float32 and anything else as it is."""
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()  # type: ignore[return-value]
    return value


def check_positive(name: str, value: T) -> T:
    """Return ``value``, or raise ValueError unless it is a finite number above 0; tensors pass unchecked."""
    if not isinstance(value, Tensor) and not (_is_number(value) and value > 0):  # type: ignore[operator]
        raise ValueError(f"{name} must be > 0, got {value!r}")
    return value


def check_not_negative(name: str, value: T) -> T:
    """Return ``value``, or raise ValueError unless it is a finite number of at least 0; tensors pass unchecked."""
    if not isinstance(value, Tensor) and not (_is_number(value) and value >= 0):  # type: ignore[operator]
        raise ValueError(f"{name} must be >= 0, got {value!r}")
    return value


def check_one_of(name: str, value: object, known: Collection[object]) -> None:
    """Raise ValueError unless ``value`` is one of those known."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_logits(student_logits: Tensor, teacher_logits: Tensor | None = None) -> None:
    """Raise ValueError unless the logits are finite, of shape ``(B, C)`` with ``B >= 1, C >= 2``, and of one shape.

    Whether values are finite is looked at on the CPU only: on an accelerator the look would stall every step.
    """
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if logits is None:
            continue
        shape = tuple(logits.shape)
        if logits.ndim != 2 or shape[0] < 1 or shape[1] < 2:
            raise ValueError(f"{name} must have shape (batch >= 1, classes >= 2), got {shape}")
        if not logits.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {logits.dtype}")
        if _values_are_cheap(logits) and not logits.isfinite().all():
            row, column = (~logits.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{name} must be finite, got {logits[row, column].item()} at sample {row}, class {column}")
    if teacher_logits is not None and student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have one shape, got {tuple(student_logits.shape)} "
            f"and {tuple(teacher_logits.shape)}"
        )


def check_target(target: Tensor, logits: Tensor) -> None:
    """Raise ValueError unless ``target`` holds one class index of ``logits`` a sample; the range on the CPU only."""
    if target.shape != logits.shape[:1] or target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(
            f"target must hold one integer class index for each of the {logits.shape[0]} samples, "
            f"got shape {tuple(target.shape)} of {target.dtype}"
        )
    if _values_are_cheap(target) and not ((target >= 0) & (target < logits.shape[1])).all():
        raise ValueError(
            f"target must lie in 0..{logits.shape[1] - 1} (the logits have {logits.shape[1]} classes), "
            f"got {target.min().item()}..{target.max().item()}"
        )


def check_strong_logits(student: ModelOutput, teacher: ModelOutput) -> tuple[Tensor, Tensor]:
    """Return both networks' logits of the strong view, or raise ValueError if the module gave none."""
    if student.logits_strong is None or teacher.logits_strong is None:
        raise ValueError(
            f"logits_strong must be given by student and teacher, got {_kind(student.logits_strong)} "
            f"and {_kind(teacher.logits_strong)}: the batch needs a second view, image_strong"
        )
    return student.logits_strong, teacher.logits_strong


def _kind(value: object) -> str:
    return type(value).__name__


def _values_are_cheap(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    r""":math:`KL(p \| q) = \sum_i p_i (\log p_i - \log q_i)` over the last dimension, from log-probabilities."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def target_mask(target: Tensor, logits: Tensor) -> Tensor:
    """Boolean mask of the shape of ``logits``, true at each sample's label."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, target.long().unsqueeze(1), True)


def masked_log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """``log_softmax`` over the classes where ``mask`` is false; 0 where it is true, also in a row that is all true."""
    kept = logits.masked_fill(mask & ~mask.all(dim=-1, keepdim=True), -torch.inf)
    return kept.log_softmax(dim=-1).masked_fill(mask, 0.0)


def target_gap(logits: Tensor, is_target: Tensor) -> Tensor:
    """Logit of the target against the log-sum-exp of all other classes: shape ``(B,)``."""
    others = logits.masked_fill(is_target, -torch.inf).logsumexp(dim=-1)
    return logits.masked_fill(~is_target, 0.0).sum(dim=-1) - others


def binary_kl_divergence(gap_p: Tensor, gap_q: Tensor) -> Tensor:
    r""":math:`KL\big((p, 1-p) \| (q, 1-q)\big)` for :math:`p = \sigma(gap_p), q = \sigma(gap_q)`, elementwise."""
    return gap_p.sigmoid() * (F.logsigmoid(gap_p) - F.logsigmoid(gap_q)) + (-gap_p).sigmoid() * (
        F.logsigmoid(-gap_p) - F.logsigmoid(-gap_q)
    )


def batch_mean(values: Tensor, *, temperature: float | Tensor = 1.0, sample_weight: Tensor | None = None) -> Tensor:
    r"""Return :math:`\frac{1}{B} \sum_b w_b T^2 x_b`; the weights are not normalised.

    Args:
        values: :math:`x`, one a sample, shape ``(B,)``.
        temperature: :math:`T`, a number or a tensor of one element or of shape ``(B, 1)``.
        sample_weight: :math:`w \geq 0`, shape ``(B,)``; None for 1 everywhere.

    Raises:
        ValueError: If the weights do not have the shape of the values, or one is negative or not finite.
    """
    if sample_weight is not None:
        values = check_sample_weight(sample_weight, values) * values
    return (temperature**2 * values.unsqueeze(1)).mean()


def check_sample_weight(sample_weight: Tensor, values: Tensor) -> Tensor:
    """Return the weights without their graph, or raise ValueError unless they hold one number >= 0 a sample."""
    if sample_weight.shape != values.shape:
        raise ValueError(
            f"sample_weight must hold one number for each of the {len(values)} samples, "
            f"got shape {tuple(sample_weight.shape)}"
        )
    if _values_are_cheap(sample_weight) and not ((sample_weight >= 0) & sample_weight.isfinite()).all():
        raise ValueError(f"sample_weight must be finite and >= 0, got {sample_weight.tolist()}")
    return sample_weight.detach()


def target_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, is_target: Tensor) -> Tensor:
    r"""Cross-entropy with the teacher's probability of the label, :math:`-p^t_y \log p^s_y`: shape ``(B,)``."""
    p = teacher_logits.softmax(dim=-1)
    log_q = student_logits.log_softmax(dim=-1)
    return -(p * log_q).masked_fill(~is_target, 0.0).sum(dim=-1)
