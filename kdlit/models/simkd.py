"""The student of SimKD (Chen et al. 2022): a network that classifies with its teacher's last layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, linear, relu

from kdlit.models._common import check_count, conv1x1, conv3x3
from kdlit.models.features import FeatureTap, dry_run, eval_mode, find_layer
from kdlit.models.layers import FeatureLayers, feature_layers


class Projector(nn.Module):
    """A bottleneck of three convolutions that brings the student's map to the teacher's width.

    Args:
        in_channels: of the student's map.
        out_channels: of the teacher's map.
        factor: how many times narrower than the teacher's map the inner maps are.

    Raises:
        ValueError: If ``factor`` is not between 1 and ``out_channels``.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2) -> None:
        super().__init__()
        if check_count("factor", factor) > out_channels:
            raise ValueError(f"factor must be at most {out_channels}, the teacher's channels, got {factor}")
        width = out_channels // factor
        self.conv0, self.bn0 = conv1x1(in_channels, width), nn.BatchNorm2d(width)
        self.conv1, self.bn1 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv1x1(width, out_channels), nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``."""
        x = relu(self.bn0(self.conv0(x)))
        x = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(x)))


class SimKDStudent(nn.Module):
    """A network whose last map passes a projector and then the frozen last layer of a teacher.

    :class:`~kdlit.losses.SimKDLoss` makes it by :meth:`from_teacher`. To read ``student.pt`` without the teacher, make
    it here with the same numbers, which the file holds as ``note``, and load: its names are ``body.*`` (the network's
    own), ``projector.*`` (``conv0`` to ``conv2`` and ``bn0`` to ``bn2``) and ``classifier.weight`` and ``.bias``.

    What of the network comes after that map, its own classifier above all, still runs, but its logits are dropped; its
    parameters stay as they are (``requires_grad`` is False). The projected map is what layer ``projector`` gives.

    Args:
        body: the student proper.
        teacher_channels: width of the teacher's last map.
        num_classes: size of the teacher's classifier.
        factor: how many times narrower than the teacher's map the inner maps of the projector are; 2, 4 and 8 are
            published.
        layer: dotted path of the layer of ``body`` that gives the map; None: the last map of a network that names it.
        max_size: height and width of the teacher's map where that of ``body`` is larger; it is averaged to them.
        input_size: size of one picture, ``(C, H, W)``, for the dry run that finds the width of the map.

    Raises:
        ValueError: If a number is below 1, ``factor`` above ``teacher_channels``, or the layer does not exist or gives
            no map.
    """

    def __init__(
        self,
        body: nn.Module,
        teacher_channels: int,
        num_classes: int,
        factor: int = 2,
        layer: str | None = None,
        max_size: Sequence[int] | None = None,
        input_size: Sequence[int] = (3, 32, 32),
    ) -> None:
        super().__init__()
        layer = layer or next(iter(feature_layers(body).maps[::-1]), "")
        if not layer:
            raise ValueError(f"layer must be named: {type(body).__name__} does not say which layer gives its last map")
        self.body = body
        self.layer = layer
        self._tap = FeatureTap(body, [layer])
        shape, device, dtype = self._freeze_after_map(torch.zeros(1, *input_size))
        self.factor = factor
        self.max_size = None if max_size is None else (max_size[0], max_size[1])
        self._height = shape[2]
        self.projector = Projector(shape[1], check_count("teacher_channels", teacher_channels), factor)
        self.classifier = nn.Linear(teacher_channels, check_count("num_classes", num_classes)).requires_grad_(False)
        self.projector.to(device, dtype)
        self.classifier.to(device, dtype)

    def _freeze_after_map(self, example: Tensor) -> tuple[torch.Size, torch.device, torch.dtype]:
        """Take requires_grad from the parameters that the map does not depend on; return what the map is like."""
        parameters = list(self.body.parameters())
        if parameters:
            example = example.to(parameters[0])
        with torch.enable_grad(), torch.random.fork_rng(), eval_mode(self.body):
            self.body(example)
            feature = self._tap.take()[self.layer]
            trainable = [parameter for parameter in parameters if parameter.requires_grad]
            used = (
                torch.autograd.grad(feature.sum(), trainable, allow_unused=True)
                if feature.requires_grad
                else [None] * len(trainable)
            )
        if feature.ndim != 4:
            raise ValueError(f"layer {self.layer!r} must give maps (B, C, H, W), but gives {tuple(feature.shape)}")
        for parameter, gradient in zip(trainable, used, strict=True):
            parameter.requires_grad_(gradient is not None)
        return feature.shape, feature.device, feature.dtype

    @classmethod
    def from_teacher(
        cls,
        body: nn.Module,
        teacher: nn.Module,
        example: Tensor,
        teacher_example: Tensor | None = None,
        *,
        factor: int = 2,
        layer: str | None = None,
        teacher_layer: str | None = None,
        teacher_classifier: str | None = None,
    ) -> SimKDStudent:
        """Make the student of a teacher, with a copy of its classifier.

        Args:
            body: the student proper.
            teacher: network whose logits are a linear layer on the spatial mean of a map.
            example: a batch of one picture for the student, shape ``(1, C, H, W)``.
            teacher_example: likewise for the teacher, where it has an input of its own.
            factor: of the projector.
            layer: dotted path of the student's map; None: its last one.
            teacher_layer: dotted path of the teacher's map; None: see :func:`pooled_map`.
            teacher_classifier: dotted path of its last layer; None: where it says, else the linear layer that gives its
                logits.

        Raises:
            ValueError: If a layer is not known or gives no map, or the teacher's logits are not made in this way.
        """
        teacher_layer = teacher_layer or pooled_map(teacher)
        picture = example if teacher_example is None else teacher_example
        path = teacher_classifier or feature_layers(teacher, picture).classifier
        last = find_layer(teacher, path) if path else None
        if not isinstance(last, (nn.Linear, nn.Conv2d)):
            raise ValueError(f"SimKD reuses a linear classifier, but of {type(teacher).__name__} none is known")
        picture = torch.linspace(-1, 1, picture.numel()).view_as(picture)  # a black one could hide a difference
        tap = FeatureTap(teacher, [teacher_layer])
        try:
            output = dry_run(teacher, picture)
            feature = tap.take()[teacher_layer]
        finally:
            tap.remove()
        if feature.ndim != 4:
            raise ValueError(
                f"layer {teacher_layer!r} of the teacher must give maps (B, C, H, W), but gives {tuple(feature.shape)}"
            )
        weight, bias = last.weight.detach().flatten(1), None if last.bias is None else last.bias.detach()
        logits = cast("Tensor", getattr(output, "logits", output))
        fits = weight.shape == (logits.shape[1], feature.shape[1])
        if not fits or not torch.allclose(
            linear(feature.mean((2, 3)), weight, bias), logits, rtol=1e-2, atol=1e-2 * float(logits.abs().max())
        ):
            raise ValueError(
                f"SimKD needs a teacher whose logits are its last layer ({path!r}) on the mean of a map, but those of "
                f"{type(teacher).__name__} are not so with {teacher_layer!r}; set teacher_layers or take another one"
            )
        student = cls(body, weight.shape[1], len(weight), factor, layer, feature.shape[2:], tuple(example.shape[1:]))
        if student._height <= feature.shape[2]:
            student.max_size = None
        with torch.no_grad():
            student.classifier.weight.copy_(weight)
            student.classifier.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
        return student

    @property
    def note(self) -> str:
        """How to make it again; the exported file holds it."""
        size = f", max_size={list(self.max_size)}" if self.max_size else ""
        classes, channels = self.classifier.weight.shape
        return (
            f"kdlit.models.SimKDStudent(body, teacher_channels={channels}, num_classes={classes}, "
            f"factor={self.factor}, layer={self.layer!r}{size}) with body a {type(self.body).__name__}"
        )

    @property
    def feature_layers(self) -> FeatureLayers:
        """Where to look inside: the maps of the body; of the projector what is pooled for the teacher's classifier."""
        body = feature_layers(self.body)
        maps, preact, norms = (
            tuple(f"body.{path}" for path in paths) for paths in (body.maps, body.preact, body.norms)
        )
        return FeatureLayers(
            maps, preact, norms, pool="classifier.input", classifier="classifier", averaged="projector"
        )

    def forward(self, image: Tensor) -> Tensor:
        """Classify pictures.

        Args:
            image: Shape ``(B, C, H, W)``.

        Returns:
            Logits, shape ``(B, num_classes)``.
        """
        self.body(image)
        x = self._tap.take()[self.layer]
        if self.max_size is not None and x.shape[-2] > self.max_size[0]:
            x = adaptive_avg_pool2d(x, self.max_size)
        logits: Tensor = self.classifier(self.projector(x).mean((2, 3)))
        return logits


def pooled_map(model: nn.Module) -> str:
    """Dotted path of the map that a network averages for its classifier.

    Raises:
        ValueError: If the network does not say so.
    """
    if path := feature_layers(model).pooled_map:
        return path
    raise ValueError(f"teacher_layers must be named: {type(model).__name__} does not say which map it averages")
