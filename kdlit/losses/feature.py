"""What losses on layers share: finding the layers, their shapes, and pairs of features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kdlit.losses.base import DistillationLoss
from kdlit.models.features import feature_shapes
from kdlit.models.layers import FeatureLayers, feature_layers
from kdlit.types import Batch, ModelOutput

Shape = tuple[int, ...]
Features = Tensor | Sequence[Tensor]


class FeatureLoss(DistillationLoss):
    """Base of losses that compare layers of the student with layers of the teacher.

    A subclass says by :meth:`default_layers` where its method looks, makes connectors in :meth:`build` if it has any,
    and implements :meth:`compare`, or :meth:`forward` if it needs more than features.

    Args:
        student_layers: dotted paths of student layers, from shallow to deep, or one path; ``PATH.input`` stands for
            what a layer is given. None: where the method looks in a network that says so, as those of kdlit, of
            torchvision's ResNets and of timm's vision transformers do.
        teacher_layers: likewise of the teacher, as many; they are compared in pairs.

    Raises:
        ValueError: If there are not as many layers of one as of the other, or, at :meth:`setup`, if a network does not
            say where to look.
    """

    def __init__(
        self,
        student_layers: Sequence[str] | str | None = None,
        teacher_layers: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__()
        self._given = [
            (layers,) if isinstance(layers, str) else None if layers is None else tuple(layers)
            for layers in (student_layers, teacher_layers)
        ]
        student, teacher = self._given
        for role, layers in (("student", student), ("teacher", teacher)):
            if layers is not None and not layers:
                raise ValueError(f"{role}_layers must name at least one layer, or be left out for the default")
        if student is not None and teacher is not None and len(student) != len(teacher):
            raise ValueError(
                f"student_layers and teacher_layers must be as many, got {', '.join(student)} and {', '.join(teacher)}"
            )

    @abstractmethod
    def default_layers(self, layers: FeatureLayers) -> Sequence[str]:
        """Choose from what a network says about itself; the same for student and teacher."""

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> None:
        """Make connectors for features of these shapes, batch dimension included, pair by pair."""

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the scalar loss of pairs of features; the teacher's have no graph."""
        raise NotImplementedError

    def setup(
        self, student: nn.Module, teacher: nn.Module | None, example: Tensor, teacher_example: Tensor | None = None
    ) -> None:
        """Settle the layers and build the connectors."""
        if teacher is None:
            raise ValueError(f"{type(self).__name__} needs a teacher, but there is none")
        networks = (
            ("student", student, example),
            ("teacher", teacher, example if teacher_example is None else teacher_example),
        )
        found = [
            self._defaults(role, model, picture) if given is None else given
            for (role, model, picture), given in zip(networks, self._given, strict=True)
        ]
        found = self.align(found)
        self.student_layers, self.teacher_layers = found
        shapes = []
        for (role, model, picture), layers in zip(networks, found, strict=True):
            try:
                of_path = feature_shapes(model, layers, picture)
            except (ValueError, RuntimeError, TypeError) as error:
                raise ValueError(f"{type(self).__name__}, {role}_layers: {error}") from error
            shapes.append([of_path[path] for path in layers])
        self.build(*shapes)

    def align(self, found: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Make as many layers of both networks: of defaults as many as both have, from shallow to deep.

        Raises:
            ValueError: If layers that were named do not pair up.
        """
        count = min(map(len, found))
        if self._given == [None, None]:
            return [layers[:count] for layers in found]
        return self._in_pairs(found)

    def _in_pairs(self, found: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        if len(found[0]) != len(found[1]):
            raise ValueError(
                f"{type(self).__name__}: student_layers {', '.join(found[0])} and teacher_layers {', '.join(found[1])} "
                "must be as many; name both"
            )
        return found

    def _defaults(self, role: str, model: nn.Module, example: Tensor) -> tuple[str, ...]:
        layers = tuple(path for path in self.default_layers(feature_layers(model, example)) if path)
        if not layers:
            children = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"{type(self).__name__} needs {role}_layers: {type(model).__name__} does not say where this method is "
                f"to look; name layers of it, such as {children}"
            )
        return layers

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Compare the features of one batch."""
        return self.compare(
            [student.features[path] for path in self.student_layers],
            [teacher.features[path].detach() for path in self.teacher_layers],
        )


def in_pairs(student_feat: Features, teacher_feat: Features) -> list[tuple[Tensor, Tensor]]:
    """Pair up features given as one tensor each or as lists; the teacher's lose their graph.

    Raises:
        ValueError: If there are not as many of one as of the other, none, or the batches differ in size.
    """
    students = [student_feat] if isinstance(student_feat, Tensor) else list(student_feat)
    teachers = [teacher_feat] if isinstance(teacher_feat, Tensor) else list(teacher_feat)
    if not students or len(students) != len(teachers):
        raise ValueError(
            f"student_feat and teacher_feat must be as many, at least one; got {len(students)} and {len(teachers)}"
        )
    for student, teacher in zip(students, teachers, strict=True):
        if len(student) != len(teacher) or not len(student):
            raise ValueError(
                f"student_feat and teacher_feat must have one batch size above 0, got shapes {tuple(student.shape)} "
                f"and {tuple(teacher.shape)}"
            )
    return [(student, teacher.detach()) for student, teacher in zip(students, teachers, strict=True)]


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Bring two maps, ``(B, C, H, W)``, to the smaller height and the smaller width of both by average pooling."""
    size = (min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1]))
    student, teacher = (
        one if one.shape[-2:] == size else F.adaptive_avg_pool2d(one, size) for one in (student, teacher)
    )
    return student, teacher


def check_maps(student: Tensor, teacher: Tensor) -> None:
    """Raise ValueError unless both features are maps."""
    if student.ndim != 4 or teacher.ndim != 4:
        raise ValueError(
            f"student_feat and teacher_feat must be maps of shape (B, C, H, W), got shapes {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )


def check_layers_give_maps(loss: FeatureLoss, student: Sequence[Shape], teacher: Sequence[Shape]) -> None:
    """Raise ValueError, naming the layer, unless all features of a loss are maps."""
    for role, paths, shapes in (("student", loss.student_layers, student), ("teacher", loss.teacher_layers, teacher)):
        for path, shape in zip(paths, shapes, strict=True):
            if len(shape) != 4:
                raise ValueError(f"{role}_layers: {path!r} must give a map of shape (B, C, H, W), but gives {shape}")
