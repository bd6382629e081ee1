"""What is taken out of a run: the student alone, and predictions."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import nn

from kdlit.callbacks.throughput import without_times
from kdlit.files import write_whole
from kdlit.modules import DistillationModule, ManyStudents, MutualLearning
from kdlit.modules.many_students import own_values


class StudentExport(L.Callback):
    """Writes the student of the last epoch as a small file of its own when training ends.

    The file is a dictionary of plain tensors and numbers: ``model`` (the student's state_dict), ``num_classes``,
    ``num_parameters``, ``epoch``, ``metrics`` (the last value of everything logged but times) and, of a network that
    has one, ``note`` (how to build it). It needs neither kdlit nor the teacher:
    ``net.load_state_dict(torch.load("student.pt")["model"])``. Of students that taught each other, the first is written
    to ``student.pt`` and any other to ``student_NAME.pt``; of many that one teacher taught, each to a folder of its
    name beside it.

    Args:
        path: file to write.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file, on the first process alone."""
        if not trainer.is_global_zero:
            return
        figures = {name: float(value) for name, value in without_times(trainer.callback_metrics).items()}
        if isinstance(pl_module, ManyStudents):
            for name in pl_module.going:
                own = own_values(figures, name)
                self._write(self.path.parent / name / self.path.name, trainer, pl_module.students[name], own)
        elif isinstance(pl_module, DistillationModule):
            self._write(self.path, trainer, pl_module, figures)

    def _write(self, file: Path, trainer: L.Trainer, module: DistillationModule, figures: dict[str, float]) -> None:
        peers = module.peers if isinstance(module, MutualLearning) else nn.ModuleDict()
        networks = {file.with_stem(f"{file.stem}_{name}"): peer for name, peer in peers.items()}
        for path, network in (networks | {file: module.student}).items():
            content = {
                "model": {name: value.detach().cpu().clone() for name, value in network.state_dict().items()},
                "num_classes": module.num_classes,
                "num_parameters": sum(parameter.numel() for parameter in network.parameters()),
                "epoch": trainer.current_epoch,
                "metrics": figures,
            }
            if isinstance(note := getattr(network, "note", None), str):
                content["note"] = note
            write_whole(path, functools.partial(torch.save, content))


class PredictionTable(BasePredictionWriter):
    """Writes what ``kdlit predict`` found as a table: one row a picture, in the order of the data.

    Columns: ``index``, ``label`` and ``class`` (predicted), ``confidence``, and ``target`` if the pictures have labels.
    Of several students, each has its table in a folder of its name.

    Args:
        path: CSV file to write.
    """

    def __init__(self, path: str) -> None:
        super().__init__(write_interval="epoch")
        self.path = Path(path)

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write the table; with several processes each writes its own, the number of the process in its name."""
        if not isinstance(pl_module, ManyStudents):
            self._write(self.path, trainer, predictions, batch_indices)
            return
        for name in pl_module.names:
            own = [batch["students"][name] for batch in predictions]
            self._write(self.path.parent / name / self.path.name, trainer, own, batch_indices)

    def _write(self, path: Path, trainer: L.Trainer, predictions: Sequence[Any], batch_indices: Sequence[Any]) -> None:
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        text = io.StringIO(newline="")
        table = csv.writer(text)
        has_target = bool(predictions) and "target" in predictions[0]
        table.writerow(["index", "label", "class", "confidence", *(["target"] if has_target else [])])
        indices = (
            [index for batch in predictions for index in batch["index"].tolist()]
            if predictions and "index" in predictions[0]
            else [index for batch in batch_indices[0] for index in batch]
        )
        columns = ["label", "confidence", *(["target"] if has_target else [])]
        rows = (row for batch in predictions for row in zip(*(batch[key].tolist() for key in columns), strict=True))
        for index, (label, confidence, *target) in zip(indices, rows, strict=True):
            table.writerow([index, label, names[label] if names else "", f"{confidence:.6f}", *target])
        path = path if trainer.world_size == 1 else path.with_suffix(f".{trainer.global_rank}.csv")
        write_whole(path, lambda file: file.write(text.getvalue().encode()))
        print(f"{len(indices)} predictions: {path}")
