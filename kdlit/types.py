"""The nouns that data, losses and modules share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from torch import Tensor
from typing_extensions import NotRequired


class Batch(TypedDict):
    """One batch of pictures with their labels.

    Keys:
        image: pictures as the networks take them, float, shape ``(B, C, H, W)``.
        target: labels, int64, shape ``(B,)``; absent when predicting on unlabelled pictures.
        index: positions of the samples in the data set, int64, shape ``(B,)``; only for losses with a memory.
        image_strong: a second, strongly augmented view of ``image``; only for methods with two views.
        image_teacher: the same pictures as ``image`` in the teacher's size and statistics, where these are its own.
        image_teacher_strong: likewise of ``image_strong``.
        teacher_logits: what the teacher gives for its form of ``image``, shape ``(B, C)``, known beforehand; it is then
            not run.
        teacher_logits_strong: likewise for that of ``image_strong``.
        sample_weight: how much each sample counts in losses that are a mean over samples, float >= 0, shape ``(B,)``.
    """

    image: Tensor
    target: NotRequired[Tensor]
    index: NotRequired[Tensor]
    image_strong: NotRequired[Tensor]
    image_teacher: NotRequired[Tensor]
    image_teacher_strong: NotRequired[Tensor]
    teacher_logits: NotRequired[Tensor]
    teacher_logits_strong: NotRequired[Tensor]
    sample_weight: NotRequired[Tensor]


@dataclass
class ModelOutput:
    """What one forward pass of a network gave.

    Attributes:
        logits: class scores before softmax, float, shape ``(B, K)``.
        features: the outputs of the layers that the losses asked for, by dotted path.
        logits_strong: class scores of the strongly augmented view, shape ``(B, K)``; None unless a loss needs that
            view.
    """

    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    logits_strong: Tensor | None = None

    def detach(self) -> ModelOutput:
        """The same values without their graph."""
        return ModelOutput(
            self.logits.detach(),
            {path: value.detach() for path, value in self.features.items()},
            None if self.logits_strong is None else self.logits_strong.detach(),
        )
