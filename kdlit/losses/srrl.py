r"""SRRL: Yang, Martinez, Bulat and Tzimiropoulos, ICLR 2021.

Knowledge distillation via softmax regression representation learning.

A connector brings the student's last map to the teacher's width. Its spatial mean is to equal the teacher's (feature
matching), and the teacher's own classifier is to give the teacher's logits for it (softmax regression).

The authors' code is followed: both terms are means over elements, where the paper writes squared norms. Its weight
stands before both terms, here before the second; both are the same at the published 1, and
:class:`~kdlit.losses.WeightedLoss` gives the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kdlit.losses.feature import FeatureLoss, Shape
from kdlit.losses.functional import check_not_negative, full_precision, widened
from kdlit.losses.last_layer import class_weight, linear_classifier, single_layer
from kdlit.models.layers import FeatureLayers
from kdlit.types import Batch, ModelOutput


@full_precision
def srrl_loss(
    connected_feat: Tensor, teacher_feat: Tensor, cross_logits: Tensor, teacher_logits: Tensor, *, weight: float
) -> Tensor:
    r"""Squared gap of the spatial means and of the logits.

    .. math:: L = \frac{1}{BD} \|\bar f^s - \bar f^t\|^2 + \frac{w}{BC} \|z^{st} - z^t\|^2

    Args:
        connected_feat: student maps after the connector, shape ``(B, D, h, w)``; receives a gradient.
        teacher_feat: shape ``(B, D, H, W)``.
        cross_logits: :math:`z^{st}`, what the teacher's classifier gives for the mean of ``connected_feat``, shape
            ``(B, C)``; receives a gradient.
        teacher_logits: shape ``(B, C)``.
        weight: factor of the second term, >= 0; 0 leaves feature matching alone.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: If the channels, the classes or the batch sizes differ, or the weight is negative.

    Example:
        >>> import torch
        >>> student, teacher = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 1, 1)
        >>> srrl_loss(student, teacher, torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]), weight=0.5)  # 1 + 4/4
        tensor(2.)
    """
    check_not_negative("weight", weight)
    for name, one, other in (
        ("the channels of connected_feat and teacher_feat", connected_feat, teacher_feat),
        ("the classes of cross_logits and teacher_logits", cross_logits, teacher_logits),
    ):
        if one.shape[:2] != other.shape[:2]:
            raise ValueError(f"batch and {name} must agree, got shapes {tuple(one.shape)} and {tuple(other.shape)}")
    matching = F.mse_loss(connected_feat.flatten(2).mean(2), teacher_feat.detach().flatten(2).mean(2))
    return matching + weight * F.mse_loss(cross_logits, teacher_logits.detach())


class SRRLLoss(FeatureLoss):
    """The teacher's classifier on the student's features (Yang et al. 2021): see :func:`srrl_loss`.

    The connector, a 1x1 convolution (``conv``), a batch norm (``bn``) and a ReLU, is trained with the student.

    Args:
        student_layers: one layer with a map; None: the map whose mean the student classifies.
        teacher_layers: one layer, the map whose mean the teacher classifies; None: where the teacher says.
        weight: factor of the softmax regression, >= 0; feature matching has 1.
        teacher_classifier: dotted path of the teacher's last layer; None: where the teacher says, else the linear
            layer that gives its logits.

    Raises:
        ValueError: If the weight is negative, or, at :meth:`setup`, if a layer gives no map or the teacher's classifier
            does not fit its layer.
    """

    across_batch = True

    def __init__(
        self,
        student_layers: Sequence[str] | str | None = None,
        teacher_layers: Sequence[str] | str | None = None,
        weight: float = 1.0,
        teacher_classifier: str | None = None,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.weight = check_not_negative("weight", weight)
        self.teacher_classifier = teacher_classifier

    def default_layers(self, layers: FeatureLayers) -> Sequence[str]:
        """The map that is averaged for the classifier."""
        return (layers.pooled_map,)

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> None:
        """Make the connector, initialised as in the authors' code."""
        (_, student_width, *_), (_, teacher_width, *_) = single_layer(self, student, teacher, "(B, C, H, W)")
        self.conv = nn.Conv2d(student_width, teacher_width, 1, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.bn = nn.BatchNorm2d(teacher_width)
        self._teacher_width = teacher_width

    def setup(
        self, student: nn.Module, teacher: nn.Module | None, example: Tensor, teacher_example: Tensor | None = None
    ) -> None:
        """Build the connector and find the teacher's classifier."""
        super().setup(student, teacher, example, teacher_example)
        assert teacher is not None  # or the line before has raised
        picture = example if teacher_example is None else teacher_example
        # In a tuple, so that it is no part of this loss.
        self._of_teacher = (
            linear_classifier(self, "teacher", teacher, self.teacher_classifier, self._teacher_width, picture),
        )

    def connect(self, student_feat: Tensor) -> Tensor:
        """Bring student maps to the teacher's width."""
        return F.relu(self.bn(self.conv(student_feat)))

    def cross_logits(self, connected_feat: Tensor) -> Tensor:
        """What the frozen classifier of the teacher gives for the means of connected maps: shape ``(B, C)``."""
        (classifier,) = self._of_teacher
        bias: Tensor | None = classifier.bias  # type: ignore[assignment]
        weight = class_weight(classifier).detach()
        return F.linear(connected_feat.flatten(2).mean(2), weight, None if bias is None else widened(bias.detach()))

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        connected = self.connect(student.features[self.student_layers[0]])
        teacher_feat = teacher.features[self.teacher_layers[0]]
        # Not teacher.logits, which a wrapper such as LogitStandardization changes, though these are the same.
        teacher_logits = self.cross_logits(teacher_feat)
        return srrl_loss(connected, teacher_feat, self.cross_logits(connected), teacher_logits, weight=self.weight)
