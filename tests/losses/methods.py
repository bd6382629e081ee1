"""Every logit method as a function of four tensors, so that one test can run them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdlit import losses

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """One method at one setting and the laws that it obeys.

    Attributes:
        loss: of student logits, teacher logits and target; methods with two views see each view twice.
        zero_at_equality: whether the loss is 0 where both networks give the same logits and the teacher is right.
        shift_invariant: whether a constant added to one network's logits changes nothing.
        not_negative: whether the loss is never below 0, rounding apart.
    """

    loss: Loss
    zero_at_equality: bool = True
    shift_invariant: bool = True
    not_negative: bool = True


def distance(classes: int, like: Tensor) -> Tensor:
    """Every class equally far from every other."""
    return 0.5 * (1 - torch.eye(classes, dtype=like.dtype))


def _lskd(loss: Loss) -> Loss:
    return lambda s, t, y: loss(losses.standardize_logits(s), losses.standardize_logits(t), y)


def _wkd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return losses.wkd_loss(
        s,
        t,
        y,
        distance=distance(s.shape[-1], s),
        alpha=1.0,
        beta=2.0,
        temperature=2.0,
        regularization=0.5,
        iterations=60,
    )


METHODS: dict[str, Method] = {
    "kd": Method(lambda s, t, y: losses.kd_loss(s, t, temperature=4.0)),
    "dkd": Method(lambda s, t, y: losses.dkd_loss(s, t, y, alpha=1.0, beta=8.0, temperature=4.0)),
    "tckd": Method(lambda s, t, y: losses.dkd_loss(s, t, y, alpha=1.0, beta=0.0, temperature=4.0)),
    "nckd": Method(lambda s, t, y: losses.dkd_loss(s, t, y, alpha=0.0, beta=1.0, temperature=1.0)),
    "nkd": Method(lambda s, t, y: losses.nkd_loss(s, t, y, gamma=1.5, temperature=2.0), zero_at_equality=False),
    "ttm": Method(lambda s, t, y: losses.ttm_loss(s, t, gamma=0.3), zero_at_equality=False),
    "ttm_1": Method(lambda s, t, y: losses.ttm_loss(s, t, gamma=1.0)),
    "wttm": Method(lambda s, t, y: losses.wttm_loss(s, t, gamma=0.1), zero_at_equality=False),
    "wttm_1": Method(lambda s, t, y: losses.wttm_loss(s, t, gamma=1.0)),
    "mlkd": Method(lambda s, t, y: losses.mlkd_loss(s, t, temperatures=(2.0, 4.0))),
    "mlkd_single_view": Method(lambda s, t, y: losses.mlkd_single_view_loss(s, t, temperature=4.0)),
    "mlkd_two_view": Method(lambda s, t, y: losses.mlkd_two_view_loss(s, t, s, t, temperature=4.0)),
    "mlkd_standardized": Method(
        lambda s, t, y: losses.mlkd_two_view_loss(s, t, s, t, temperature=2.0, standardize=True)
    ),
    "rld": Method(lambda s, t, y: losses.rld_loss(s, t, y, alpha=1.0, beta=8.0, temperature=4.0)),
    "rld_g": Method(lambda s, t, y: losses.rld_loss(s, t, y, alpha=1.0, beta=8.0, temperature=1.0, mask="g")),
    "dist": Method(lambda s, t, y: losses.dist_loss(s, t, beta=2.0, gamma=2.0, temperature=4.0), False),
    "la": Method(lambda s, t, y: losses.la_loss(s, t, y, temperature=4.0)),
    "rc": Method(
        lambda s, t, y: losses.rc_loss(s, t, y, temperature=4.0, kd_weight=1.0, rc_weight=0.1),
        zero_at_equality=False,
        shift_invariant=False,
    ),
    "lr": Method(lambda s, t, y: losses.lr_loss(s, t, y, lambda1=4.0, lambda2=1.0, eta=0.8), shift_invariant=False),
    "dml": Method(lambda s, t, y: losses.dml_loss(s, t), zero_at_equality=False, not_negative=False),
    "dml_exact": Method(lambda s, t, y: losses.dml_loss(s, t, eps=0.0)),
    "crld": Method(
        lambda s, t, y: losses.crld_loss(s, t, s, t, temperature=2.0, weak_threshold=0.1, strong_threshold=0.3)
    ),
    "wkd": Method(_wkd, zero_at_equality=False),
    "lskd_kd": Method(_lskd(lambda s, t, y: losses.kd_loss(s, t, temperature=2.0))),
    "lskd_dkd": Method(_lskd(lambda s, t, y: losses.dkd_loss(s, t, y, alpha=1.0, beta=8.0, temperature=2.0))),
    "lskd_rld": Method(_lskd(lambda s, t, y: losses.rld_loss(s, t, y, alpha=1.0, beta=8.0, temperature=2.0))),
    "renyi": Method(lambda s, t, y: losses.renyi_entropy_loss(s, order=0.25), zero_at_equality=False),
    "cross_entropy": Method(
        lambda s, t, y: losses.cross_entropy_loss(s, y, label_smoothing=0.1), zero_at_equality=False
    ),
    "teacher_right_ce": Method(
        lambda s, t, y: losses.teacher_right_cross_entropy_loss(s, t, y), zero_at_equality=False
    ),
}
