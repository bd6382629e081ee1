r"""CAT-KD: Guo, Yan, Li and Lin, CVPR 2023, Class Attention Transfer Based Knowledge Distillation.

The class map of a class is its row of the classifier, applied as a 1x1 convolution to the map whose spatial mean is
classified: where the network sees the class. The student is to have the teacher's class maps, brought to a small size.

The authors' code is followed: a mean over all elements, where the paper writes squared norms. Its networks were trained
with a bias-free convolution before the pooling in place of the classifier, so that the mean of a class map is the
logit. Here networks stay as they are and class maps leave the bias out: their mean is the logit less the bias. The
option to transfer some classes only is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kdlit.losses.feature import FeatureLoss, Shape
from kdlit.losses.functional import check_not_negative, full_precision
from kdlit.losses.last_layer import class_weight, linear_classifier, single_layer, unit
from kdlit.models.layers import FeatureLayers


@full_precision
def catkd_loss(
    student_maps: Tensor,
    teacher_maps: Tensor,
    *,
    cam_resolution: int,
    normalize: bool,
    binarize: bool,
    cat_weight: float,
) -> Tensor:
    r"""Mean squared gap between class maps.

    .. math:: L = \frac{w}{B C r^2} \sum_{b,c} \|n(\mathrm{pool}_r(A^s_{bc})) - n(\mathrm{pool}_r(A^t_{bc}))\|^2

    Args:
        student_maps: :math:`A^s`, shape ``(B, C, h, w)``; the only input that receives a gradient.
        teacher_maps: :math:`A^t`, shape ``(B, C, H, W)``.
        cam_resolution: :math:`r`, height and width that maps are averaged to, > 0.
        normalize: whether :math:`n` scales each class map to unit length; otherwise it does nothing.
        binarize: whether teacher maps are replaced by 1 where they exceed the mean of their absolute values, else 0.
        cat_weight: :math:`w`, >= 0.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: If batch or classes differ, the inputs are no maps, the size is no whole number > 0 or the weight is
            negative.

    Example:
        >>> import torch
        >>> student, teacher = torch.ones(1, 1, 2, 2), torch.full((1, 1, 4, 4), 3.0)
        >>> catkd_loss(student, teacher, cam_resolution=2, normalize=False, binarize=False, cat_weight=5.0)  # 5 * 2^2
        tensor(20.)
    """
    check_not_negative("cat_weight", cat_weight)
    _check_resolution(cam_resolution)
    if student_maps.ndim != 4 or teacher_maps.ndim != 4 or student_maps.shape[:2] != teacher_maps.shape[:2]:
        raise ValueError(
            "student_maps and teacher_maps must have shape (B, C, height, width) with the same B and C, got "
            f"{tuple(student_maps.shape)} and {tuple(teacher_maps.shape)}"
        )
    teacher_maps = teacher_maps.detach()
    if binarize:
        teacher_maps = (teacher_maps > teacher_maps.abs().mean(dim=(2, 3), keepdim=True)).to(student_maps.dtype)
    student, teacher = (F.adaptive_avg_pool2d(maps, cam_resolution).flatten(2) for maps in (student_maps, teacher_maps))
    if normalize:
        student, teacher = unit(student), unit(teacher)
    return cat_weight * F.mse_loss(student, teacher)


def _check_resolution(value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"cam_resolution must be a whole number > 0, got {value!r}")
    return value


class CATKDLoss(FeatureLoss):
    """The teacher's class maps for the student (Guo et al. 2023): see :func:`catkd_loss`.

    Args:
        student_layers: one layer, the map whose mean the student classifies; None: where the student says.
        teacher_layers: likewise of the teacher.
        cam_resolution: height and width that class maps are averaged to, > 0; 4 for ShuffleNets on CIFAR-100.
        normalize: whether each class map is scaled to unit length; not for pairs of one family, whose published weights
            are 0.7 to 15 on CIFAR-100.
        binarize: whether only the places above the mean absolute value of the teacher's class map are transferred.
        cat_weight: factor inside the loss, >= 0; 400 is the default of the authors' code, 15 to 600 are published with
            ``normalize``.
        student_classifier: dotted path of the student's last layer; None: where the student says, else the linear
            layer that gives its logits.
        teacher_classifier: likewise of the teacher.

    Raises:
        ValueError: If a number is out of its range, or, at :meth:`setup`, if a layer gives no map or a classifier does
            not fit its layer.
    """

    def __init__(
        self,
        student_layers: Sequence[str] | str | None = None,
        teacher_layers: Sequence[str] | str | None = None,
        cam_resolution: int = 2,
        normalize: bool = True,
        binarize: bool = False,
        cat_weight: float = 400.0,
        student_classifier: str | None = None,
        teacher_classifier: str | None = None,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.cam_resolution = _check_resolution(cam_resolution)
        self.normalize = normalize
        self.binarize = binarize
        self.cat_weight = check_not_negative("cat_weight", cat_weight)
        self.student_classifier = student_classifier
        self.teacher_classifier = teacher_classifier

    def default_layers(self, layers: FeatureLayers) -> Sequence[str]:
        """The map that is averaged for the classifier."""
        return (layers.pooled_map,)

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> None:
        """Remember the widths for the classifiers."""
        self._widths = [shape[1] for shape in single_layer(self, student, teacher, "(B, C, H, W)")]

    def setup(
        self, student: nn.Module, teacher: nn.Module | None, example: Tensor, teacher_example: Tensor | None = None
    ) -> None:
        """Find the layers and the classifiers."""
        super().setup(student, teacher, example, teacher_example)
        assert teacher is not None  # or the line before has raised
        picture = example if teacher_example is None else teacher_example
        # In a tuple, so that they are no part of this loss.
        self._classifiers = (
            linear_classifier(self, "student", student, self.student_classifier, self._widths[0], example),
            linear_classifier(self, "teacher", teacher, self.teacher_classifier, self._widths[1], picture),
        )

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Scalar loss of one batch; the student's classifier learns through it too."""
        of_student, of_teacher = self._classifiers
        return catkd_loss(
            _class_maps(student[0], class_weight(of_student)),
            _class_maps(teacher[0], class_weight(of_teacher).detach()),
            cam_resolution=self.cam_resolution,
            normalize=self.normalize,
            binarize=self.binarize,
            cat_weight=self.cat_weight,
        )


def _class_maps(feature: Tensor, weight: Tensor) -> Tensor:
    """Class maps, shape ``(B, C, H, W)``, of a map ``(B, D, H, W)`` and a classifier's weight ``(C, D)``."""
    return F.conv2d(feature, weight[:, :, None, None])
