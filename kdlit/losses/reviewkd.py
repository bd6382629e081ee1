r"""ReviewKD: Chen et al., CVPR 2021, Distilling Knowledge via Knowledge Review, equations 6 and 7.

Each map of the teacher is learned from the student's map of that stage and of all deeper ones: from the deepest on, a
map is fused with what came from below by attention (ABF), and the result is compared at several sizes (HCL). The last
map of both networks is the pooled feature, of 1x1 positions.

The code of mdistiller is followed: in particular the student's maps are those after the ReLU on CIFAR-100 and before it
on ImageNet, those of the teacher always before it; and the cap of the inner width is 512 whatever its configuration
says. Maps are paired from the deepest on, so a student with a stage less than the teacher lends its stem.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlit.losses.feature import Features, Shape, in_pairs
from kdlit.losses.functional import full_precision
from kdlit.losses.ofd import DeepestLayersLoss
from kdlit.models.layers import FeatureLayers, feature_layers

LEVELS = (4, 2, 1)


@full_precision
def _pair_loss(student: Tensor, teacher: Tensor) -> Tensor:
    loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for level in LEVELS:
        if level < student.shape[-2]:
            weight /= 2
            total += weight
            small, small_teacher = F.adaptive_avg_pool2d(student, level), F.adaptive_avg_pool2d(teacher, level)
            loss = loss + weight * F.mse_loss(small, small_teacher)
    return loss / total


def hierarchical_context_loss(student_feat: Features, teacher_feat: Features) -> Tensor:
    r"""Mean squared error of maps at full size and averaged to 4x4, 2x2 and 1x1, as far as that is smaller.

    The sizes of a pair of maps count 1, 1/2, 1/4, ... and are divided by their sum; pairs are added.

    Args:
        student_feat: shape ``(B, C, H, W)`` each, or one map.
        teacher_feat: as many, each of the same shape.

    Returns:
        Scalar, at least 0; 0 at equality.

    Raises:
        ValueError: If the numbers of maps or the shapes of a pair differ.

    Example:
        >>> import torch
        >>> student = torch.tensor([[1.0, -1.0], [1.0, 1.0]]).view(1, 1, 2, 2)
        >>> hierarchical_context_loss(student, torch.zeros(1, 1, 2, 2))  # (1 + 1/2 * 1/4) / (1 + 1/2)
        tensor(0.7500)
    """
    pairs = in_pairs(student_feat, teacher_feat)
    for student, teacher in pairs:
        if student.shape != teacher.shape:
            raise ValueError(
                f"student_feat and teacher_feat must have one shape, got {tuple(student.shape)} and "
                f"{tuple(teacher.shape)}"
            )
    return torch.stack([_pair_loss(student, teacher) for student, teacher in pairs]).sum()


class AttentionFusion(nn.Module):
    """Attention-based fusion of a map with what came from deeper ones (ABF).

    Args:
        in_channels: of the student's map.
        mid_channels: of what is passed on.
        out_channels: of the teacher's map.
        is_deepest: whether there is nothing to fuse with.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, is_deepest: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, mid_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid_channels)
        self.conv2 = nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.att = None if is_deepest else nn.Conv2d(2 * mid_channels, 2, 1)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, x: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fuse and bring to ``size``.

        Args:
            x: the student's map, shape ``(B, in_channels, H, W)``.
            deeper: what the next deeper fusion passed on, shape ``(B, mid_channels, h, w)``.
            size: height and width of the teacher's map.

        Returns:
            The map to compare, ``(B, out_channels, *size)``, and what is passed on, ``(B, mid_channels, *size)``.
        """
        x = self.bn1(self.conv1(x))
        if self.att is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[-2:], mode="nearest")
            own, other = self.att(torch.cat([x, deeper], dim=1)).sigmoid().split(1, dim=1)
            x = x * own + deeper * other
        if x.shape[-2:] != tuple(size):
            x = F.interpolate(x, tuple(size), mode="nearest")
        return self.bn2(self.conv2(x)), x


class ReviewKDLoss(DeepestLayersLoss):
    """Each stage of the teacher from all deeper stages of the student (Chen et al. 2021).

    The maps are compared by :func:`hierarchical_context_loss`. Published weights lie outside: 5 for ResNet-32x4 to
    ResNet-8x4, warmed up over 20 epochs; on ImageNet 1 (ResNets) and 8 (ResNet-50 to MobileNet), over one.

    The fusions ``abf0`` (of the deepest layer), ``abf1``, ... train with the student. By default the teacher's stages
    without the stem and the pooled feature, and as many of the student's from the deepest on, of which the stem is one
    if it has a stage less; a teacher's stages beyond that are left out. Every batch must hold at least two pictures.

    Args:
        student_layers: dotted paths of student layers, from shallow to deep, maps or pooled features; None: where a
            network says its maps and its pooled feature are.
        teacher_layers: likewise of the teacher, as many.
        student_preact: whether the student's maps are by default those before the ReLU, as published on ImageNet,
            instead of those after it, as on CIFAR-100.
        max_mid_channels: largest width inside the fusions, >= 1; otherwise that of the student's deepest layer.

    Raises:
        ValueError: If ``max_mid_channels`` is below 1, or, at :meth:`setup`, if a network does not say where to look or
            a layer gives neither a map nor a pooled feature; in training, if a batch holds one picture.
    """

    across_batch = True

    def __init__(
        self,
        student_layers: Sequence[str] | str | None = None,
        teacher_layers: Sequence[str] | str | None = None,
        student_preact: bool = False,
        max_mid_channels: int = 512,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        if max_mid_channels < 1:
            raise ValueError(f"max_mid_channels must be >= 1, got {max_mid_channels!r}")
        self.student_preact = student_preact
        self.max_mid_channels = max_mid_channels

    def default_layers(self, layers: FeatureLayers) -> Sequence[str]:
        """All maps and the pooled feature; of the teacher the stem is taken off."""
        maps = layers.preact if self.student_preact else layers.maps
        return (*maps, layers.pool) if maps else ()

    def _defaults(self, role: str, model: nn.Module, example: Tensor) -> tuple[str, ...]:
        found, layers = super()._defaults(role, model, example), feature_layers(model)
        return found if role == "student" else tuple(filter(None, (*layers.preact[1:], layers.pool)))

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> None:
        """Make a fusion for each pair of layers, from the deepest on."""
        for role, paths, shapes in (
            ("student", self.student_layers, student),
            ("teacher", self.teacher_layers, teacher),
        ):
            for path, shape in zip(paths, shapes, strict=True):
                if len(shape) not in (2, 4):
                    raise ValueError(f"{role}_layers: {path!r} must give (B, C, H, W) or (B, C), but gives {shape}")
        mid_channels = min(self.max_mid_channels, student[-1][1])
        for index, (ours, theirs) in enumerate(zip(reversed(student), reversed(teacher), strict=True)):
            self.add_module(f"abf{index}", AttentionFusion(ours[1], mid_channels, theirs[1], is_deepest=index == 0))

    def fuse(self, student: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """What is compared with the teacher's maps of these heights and widths, from shallow to deep."""
        fused: list[Tensor] = []
        deeper = None
        for index, (feature, size) in enumerate(zip(reversed(student), reversed(sizes), strict=True)):
            out, deeper = self.get_submodule(f"abf{index}")(_as_map(feature), deeper, size)
            fused.append(out)
        return fused[::-1]

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Fuse the student's maps and compare."""
        if self.training and len(student[0]) < 2:
            raise ValueError(
                f"ReviewKDLoss normalises pooled features over the batch, so it needs at least 2 pictures, got "
                f"{len(student[0])}; change data.batch_size"
            )
        maps = [_as_map(feature) for feature in teacher]
        return hierarchical_context_loss(self.fuse(student, [feature.shape[-2:] for feature in maps]), maps)


def _as_map(feature: Tensor) -> Tensor:
    """A pooled feature ``(B, C)`` as a map of one position; a map as it is."""
    return feature if feature.ndim == 4 else feature[:, :, None, None]
