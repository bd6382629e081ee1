"""Distillation methods: a pure function on tensors and a loss class for each."""

from kdlit.losses.base import DistillationLoss, WeightedLoss
from kdlit.losses.cross_entropy import CrossEntropyLoss, cross_entropy_loss
from kdlit.losses.dkd import DKDLoss, dkd_loss
from kdlit.losses.kd import KDLoss, kd_loss

__all__ = [
    "CrossEntropyLoss",
    "DKDLoss",
    "DistillationLoss",
    "KDLoss",
    "WeightedLoss",
    "cross_entropy_loss",
    "dkd_loss",
    "kd_loss",
]
