"""Distillation of image classifiers."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from kdlit.losses.functional import check_target, widened
from kdlit.modules.base import DistillationModule, as_batch
from kdlit.types import Batch, ModelOutput


class ClassificationDistillation(DistillationModule):
    """Distils an image classifier, and says how good student and teacher are and how often they agree.

    Logged, all as fractions of 1 but the losses: ``train/top1``; for ``val`` and ``test``, over the whole split,
    ``cross_entropy``, ``top1``, ``top5`` and, with a teacher, ``teacher_top1`` and ``agreement`` (share of
    pictures for which both networks name the same class). With fewer than five classes ``top5`` counts them all.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metrics = nn.ModuleDict({"train_top1": self._accuracy()})
        for stage in ("val", "test"):
            self.metrics[f"{stage}_top1"] = self._accuracy()
            self.metrics[f"{stage}_top5"] = self._accuracy(top_k=min(5, self.num_classes))
            if self.teacher is not None:
                self.metrics[f"{stage}_teacher_top1"] = self._accuracy()
                self.metrics[f"{stage}_agreement"] = self._accuracy()

    def _accuracy(self, top_k: int = 1) -> MulticlassAccuracy:
        return MulticlassAccuracy(self.num_classes, top_k=top_k, average="micro", validate_args=False)

    def _measure(self, stage: str, name: str, logits: Tensor, target: Tensor) -> None:
        metric = cast("MulticlassAccuracy", self.metrics[f"{stage}_{name}"])
        metric.update(logits, target)
        self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, prog_bar=name == "top1")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the student's hits on the training pictures, after the losses had their turn."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if "target" in outputs["batch"]:
            self._measure("train", "top1", outputs["student"].logits, outputs["batch"]["target"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure student and teacher on validation pictures."""
        self._evaluate("val", as_batch(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure student and teacher on test pictures."""
        self._evaluate("test", as_batch(batch))

    def _evaluate(self, stage: str, batch: Batch) -> None:
        if "target" not in batch:
            raise ValueError(f"to measure accuracy a batch must have target, but it has only {', '.join(batch)}")
        self._check_image(batch["image"])
        student = ModelOutput(widened(self(batch["image"])))
        check_target(batch["target"], student.logits)
        target = batch["target"].long()
        loss = F.cross_entropy(student.logits, target)
        self.log(f"{stage}/cross_entropy", loss, on_epoch=True, sync_dist=True, batch_size=len(target))
        self._measure(stage, "top1", student.logits, target)
        self._measure(stage, "top5", student.logits, target)
        if self.teacher is not None:
            teacher = self.run_teacher(batch)
            self._measure(stage, "teacher_top1", teacher.logits, target)
            self._measure(stage, "agreement", student.logits, teacher.logits.argmax(dim=-1))

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
