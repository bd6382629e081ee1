"""A loss on one of several classifiers of the student, such as the two of a DeiT with distillation token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kdlit.losses.base import DistillationLoss, LossWrapper
from kdlit.types import Batch, ModelOutput


class OnHead(LossWrapper):
    """Gives the wrapped loss what one layer of the student gave, in place of the student's logits.

    DeiT (Touvron et al. 2021) puts cross-entropy on ``head`` and the teacher's loss on ``head_dist``; its own logits
    are the mean of both.

    Args:
        loss: the wrapped loss; it must not read the strong view.
        layer: dotted path of a layer whose output are logits, shape ``(B, C)``.

    Raises:
        ValueError: If the wrapped loss reads the strong view, or the layer gives something else.
    """

    def __init__(self, loss: DistillationLoss, layer: str = "head") -> None:
        super().__init__(loss)
        if loss.needs_strong_view:
            raise ValueError(f"OnHead takes one view, but {type(self.innermost).__name__} needs a second")
        self.layer = layer

    @property
    def student_layers(self) -> Sequence[str]:  # type: ignore[override]
        """Those of the wrapped loss and the head."""
        return (*self.loss.student_layers, self.layer)

    def inputs(
        self, student: ModelOutput, teacher: ModelOutput, batch: Batch
    ) -> tuple[ModelOutput, ModelOutput, Batch]:
        """The outputs with the layer's as the student's logits."""
        logits = student.features[self.layer]
        if logits.shape != student.logits.shape:
            raise ValueError(
                f"layer {self.layer!r} must give logits of shape {tuple(student.logits.shape)}, but gives "
                f"{tuple(logits.shape)}"
            )
        return dataclasses.replace(student, logits=logits), teacher, batch
