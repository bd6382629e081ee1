"""LightningModules: the base that distils, and one subclass for each task."""

from kdlit.modules.base import DistillationModule
from kdlit.modules.classification import ClassificationDistillation
from kdlit.modules.linear_probe import LinearProbe
from kdlit.modules.many_students import ManyStudents
from kdlit.modules.mutual import MutualLearning

__all__ = ["ClassificationDistillation", "DistillationModule", "LinearProbe", "ManyStudents", "MutualLearning"]
