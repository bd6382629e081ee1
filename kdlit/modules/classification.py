"""Distillation of image classifiers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from kdlit.losses.functional import check_target, widened
from kdlit.metrics import CalibrationError, is_right, student_figures, teacher_figures
from kdlit.modules.base import DistillationModule, as_batch
from kdlit.modules.networks import check_image
from kdlit.types import Batch, ModelOutput


class ClassificationDistillation(DistillationModule):
    """Distils an image classifier, and says how good student and teacher are and how they differ.

    Logged for ``val`` and ``test``, over the whole split: ``cross_entropy``, what
    :func:`~kdlit.metrics.student_figures` and, with a teacher, :func:`~kdlit.metrics.teacher_figures` give, and the
    expected calibration errors ``ece`` and ``teacher_ece``. For ``train``, as pictures are augmented and weights move:
    ``top1`` of all batches, and the other figures of one batch in ``log_every_n_steps`` of the trainer. Shares and
    accuracies are fractions of 1.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._calibration: dict[tuple[str, str], CalibrationError] = defaultdict(CalibrationError)

    def watch(self, student: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """Where the student is right about the training pictures, if they have labels."""
        return {"train/top1": is_right(student.logits, batch["target"])} if "target" in batch else {}

    def watch_closely(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """How the student stands to its teacher on the training pictures."""
        target = batch.get("target")
        figures = student_figures(student.logits, target)
        figures.pop("top1", None)  # it is known of all batches
        if cast("ModelOutput | None", teacher) is not None:
            figures |= teacher_figures(student.logits, teacher.logits, target)
        return {f"train/{name}": value for name, value in figures.items()}

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
        cross_entropy = F.cross_entropy(logits, target)
        figures = {"cross_entropy": cross_entropy} | student_figures(logits, target)
        self._calibration[stage, ""].add(logits, target)
        if cast("ModelOutput | None", teacher) is not None:
            figures |= teacher_figures(logits, teacher.logits, target)
            self._calibration[stage, "teacher_"].add(teacher.logits, target)
        return {f"{stage}/{name}": value for name, value in figures.items()}

    def figures(self, stage: str) -> dict[str, Tensor]:
        """Return the means of a part of the epoch that has ended, and the calibration errors."""
        figures = super().figures(stage)
        for (of, whose), error in self._calibration.items():
            if of == stage and (value := error.take(self._over_processes)) is not None:
                figures[f"{stage}/{whose}ece"] = value
        return figures

    def _start_anew(self, stage: str) -> None:
        super()._start_anew(stage)
        self._calibration.clear()

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
