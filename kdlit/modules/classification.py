"""Distillation of image classifiers."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from kdlit.losses.functional import check_target, widened
from kdlit.modules.base import DistillationModule, as_batch
from kdlit.modules.networks import check_image
from kdlit.types import Batch, ModelOutput


class ClassificationDistillation(DistillationModule):
    """Distils an image classifier, and says how good student and teacher are and how often they agree.

    Logged, all as fractions of 1 but the losses: ``train/top1``; for ``val`` and ``test``, over the whole split,
    ``cross_entropy``, ``top1``, ``top5`` and, with a teacher, ``teacher_top1`` and ``agreement`` (share of
    pictures for which both networks name the same class). With fewer than five classes ``top5`` counts them all.
    """

    def watch(self, student: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """Where the student is right about the training pictures, if they have labels."""
        return {"train/top1": is_right(student.logits, batch["target"])} if "target" in batch else {}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure student and teacher on validation pictures."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure student and teacher on test pictures."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Any) -> None:
        batch = as_batch(batch)
        if "target" not in batch:
            raise ValueError(f"to measure accuracy a batch must have target, but it has only {', '.join(batch)}")
        self.means[stage].add(self.measure(stage, batch, self.run_teacher(batch)), len(batch["image"]))

    def measure(self, stage: str, batch: Batch, teacher: ModelOutput) -> dict[str, Tensor]:
        """Say how good the networks are on one batch, by name: means over it, scalars, or values of each sample.

        Args:
            stage: ``val`` or ``test``, for the names.
            batch: the pictures and their labels.
            teacher: what :meth:`run_teacher` gave for them.
        """
        check_image(batch["image"], self._channels, self.dtype)
        logits = widened(self(batch["image"]))
        check_target(batch["target"], logits)
        target = batch["target"].long()
        figures = {
            "cross_entropy": F.cross_entropy(logits, target),
            "top1": is_right(logits, target),
            "top5": is_right(logits, target, k=min(5, self.num_classes)),
        }
        if cast("ModelOutput | None", teacher) is not None:
            figures["teacher_top1"] = is_right(teacher.logits, target)
            figures["agreement"] = is_right(logits, teacher.logits.argmax(dim=-1))
        return {f"{stage}/{name}": value for name, value in figures.items()}

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Name the classes of pictures.

        Returns:
            ``label`` (most probable class, int64) and ``confidence`` (its probability), both of shape ``(B,)``, and
            ``logits`` of shape ``(B, C)``; also ``target`` and ``index``, shape ``(B,)``, if the batch has them.
        """
        batch = as_batch(batch)
        logits = widened(self(batch["image"]))
        confidence, label = logits.softmax(dim=-1).max(dim=-1)
        prediction = {"label": label, "confidence": confidence, "logits": logits}
        return prediction | {name: batch[name] for name in ("target", "index") if name in batch}


def is_right(logits: Tensor, target: Tensor, k: int = 1) -> Tensor:
    """Whether the label is among the ``k`` largest logits, for each sample: bool, shape ``(B,)``.

    Args:
        logits: shape ``(B, C)``.
        target: labels, shape ``(B,)``.
        k: how many.
    """
    if k == 1:
        return logits.argmax(dim=-1) == target
    return (logits.topk(k, dim=-1).indices == target[:, None]).any(dim=-1)
