"""What losses on the last layers of a network share: the classifier, vectors of unit length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from kdlit.losses.feature import FeatureLoss, Shape
from kdlit.losses.functional import widened
from kdlit.models.features import dry_run, find_layer
from kdlit.models.layers import feature_layers

EPS = 1e-12


def single_layer(
    loss: FeatureLoss, student: Sequence[Shape], teacher: Sequence[Shape], form: str
) -> tuple[Shape, Shape]:
    """Return the shapes of the one layer that a loss looks at in each network.

    Args:
        loss: the loss, whose layers are settled.
        student: shapes of the student's layers, batch dimension included.
        teacher: likewise of the teacher.
        form: the shape it takes, such as ``(B, D)``.

    Raises:
        ValueError: If there are several layers, or one gives another number of dimensions.
    """
    name, dims = type(loss).__name__, form.count(",") + 1
    for role, layers, shapes in (("student", loss.student_layers, student), ("teacher", loss.teacher_layers, teacher)):
        if len(shapes) != 1:
            raise ValueError(f"{name} looks at one layer, but {role}_layers names {', '.join(layers)}; name one")
        if len(shapes[0]) != dims:
            raise ValueError(
                f"{name} needs features of shape {form}, but {role} layer {layers[0]!r} gives {shapes[0]}; set "
                f"{role}_layers to another"
            )
    return student[0], teacher[0]


def linear_classifier(
    loss: FeatureLoss, role: str, model: nn.Module, path: str | None, width: int, example: Tensor
) -> nn.Module:
    """Find the classifier of a network: a linear layer or a 1x1 convolution.

    Args:
        loss: who asks, for the messages.
        role: ``student`` or ``teacher``; its path is the argument ``{role}_classifier`` of the loss.
        model: the network.
        path: dotted path of the classifier; None: where the network says, else the linear layer that gives its
            logits.
        width: channels of the feature that it must take.
        example: a batch of pictures for the network.

    Raises:
        ValueError: If there is none, it is another kind of layer, or it takes features of another width.
    """
    name, path = type(loss).__name__, path or feature_layers(model, example).classifier
    if not path:
        raise ValueError(f"{name} needs {role}_classifier: in {type(model).__name__} no linear layer gives the logits")
    layer = find_layer(model, path)
    if not isinstance(layer, nn.Linear) and not (isinstance(layer, nn.Conv2d) and layer.weight[0, 0].numel() == 1):
        raise ValueError(
            f"{name} needs a linear layer or a 1x1 convolution as {role}_classifier, but {path!r} is "
            f"{type(layer).__name__}"
        )
    classes, takes = class_weight(layer).shape
    logits = dry_run(model, example)
    if classes != (given := getattr(logits, "logits", logits).shape[1]):  # type: ignore[attr-defined]
        raise ValueError(
            f"{name}: {path!r} has {classes} classes, but the {role} gives {given}; set {role}_classifier to its last "
            "layer"
        )
    if takes != width:
        raise ValueError(
            f"{name}: the {role}'s classifier {path!r} takes {takes} channels, but layer {_layer(loss, role)!r} gives "
            f"{width}; set {role}_layers to the map that is averaged for it"
        )
    return layer


def _layer(loss: FeatureLoss, role: str) -> str:
    return (loss.student_layers if role == "student" else loss.teacher_layers)[0]


def class_weight(classifier: nn.Module) -> Tensor:
    """Weight of a classifier, one row a class: shape ``(C, D)``, in float32 if it is in half precision."""
    weight: Tensor = classifier.weight  # type: ignore[assignment]
    return widened(weight).flatten(1)


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """Scale vectors along a dimension to length 1; one that is shorter than 1e-12 gives zeros, and no gradient."""
    length = vector_norm(x, dim=dim, keepdim=True)
    return torch.where(length > EPS, x / length.clamp_min(EPS), 0.0)
