"""SimKD: Chen et al., CVPR 2022, Knowledge Distillation with the Reused Teacher Classifier, equation 3.

The student classifies with its teacher's own last layer; all it learns is to give that layer the teacher's map, by the
mean squared error alone. So the network that is trained, measured, saved and exported is a larger one than the student
of the config: :class:`~kdlit.models.SimKDStudent`, with a projector and a frozen copy of that layer. Published without
cross-entropy and without any other term, with factors 2, 4 and 8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kdlit.losses.feature import FeatureLoss, same_size
from kdlit.models.layers import FeatureLayers
from kdlit.models.simkd import SimKDStudent, pooled_map


class SimKDLoss(FeatureLoss):
    """Mean squared error between the student's projected last map and the teacher's (Chen et al. 2022).

    The larger of both maps is averaged to the size of the smaller. The student becomes the ``body`` of a
    :class:`~kdlit.models.SimKDStudent`: paths that other losses of the same run name explicitly start with ``body.``;
    their defaults need no change. Other losses see the logits of the teacher's classifier.

    Args:
        student_layers: dotted path of the layer of the student, as it is without this loss, that gives its last map;
            None: the last map of a network that names it.
        teacher_layers: dotted path of the map that the teacher averages for its classifier; None: that of a network
            that names it.
        factor: how many times narrower than the teacher's map the inner maps of the projector are, 1 or more.

    Raises:
        ValueError: If there is more than one layer of a network or, when the module is built, if a network does not say
            where to look, the teacher's logits are not a linear layer on the mean of that map, the student is extended
            already, or the module does not extend its students (mutual learning).
    """

    def __init__(
        self,
        student_layers: Sequence[str] | str | None = None,
        teacher_layers: Sequence[str] | str | None = None,
        factor: int = 2,
        teacher_classifier: str | None = None,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        for role, layers in zip(("student", "teacher"), self._given, strict=True):
            if layers is not None and len(layers) != 1:
                raise ValueError(f"{role}_layers must be one layer for SimKDLoss, got {', '.join(layers)}")
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"factor must be an integer >= 1, got {factor!r}")
        self.factor = factor
        self.teacher_classifier = teacher_classifier

    def default_layers(self, layers: FeatureLayers) -> Sequence[str]:
        """The last map."""
        return layers.maps[-1:]

    def extend_student(
        self, student: nn.Module, teacher: nn.Module | None, example: Tensor, teacher_example: Tensor | None = None
    ) -> nn.Module:
        """Put the projector and the teacher's classifier behind the student."""
        if teacher is None:
            raise ValueError("SimKDLoss needs a teacher, but there is none")
        if isinstance(student, SimKDStudent):
            raise ValueError(
                "SimKDLoss makes a SimKDStudent of the student, but it is one already; give its body as the student, "
                "and this loss once"
            )
        (layer,) = self._given[0] or self._defaults("student", student, example)
        (teacher_layer,) = self._given[1] or (pooled_map(teacher),)
        return SimKDStudent.from_teacher(
            student,
            teacher,
            example,
            teacher_example,
            factor=self.factor,
            layer=layer,
            teacher_layer=teacher_layer,
            teacher_classifier=self.teacher_classifier,
        )

    def setup(
        self, student: nn.Module, teacher: nn.Module | None, example: Tensor, teacher_example: Tensor | None = None
    ) -> None:
        """Settle the layers."""
        if teacher is None or not isinstance(student, SimKDStudent):
            raise ValueError(
                "SimKDLoss trains the SimKDStudent that its extend_student makes from student and teacher, got "
                f"{type(student).__name__}; a module that does not call it, as MutualLearning, cannot use this loss"
            )
        self.student_layers = ("projector",)
        self.teacher_layers = self._given[1] or (pooled_map(teacher),)

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Mean squared error of the one pair of maps."""
        return F.mse_loss(*same_size(student[0], teacher[0]))
