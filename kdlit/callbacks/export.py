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
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

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

    Columns: ``index``, ``label`` and ``class`` (predicted), ``confidence``, and ``target`` if the pictures have labels;
    of other tasks ``index`` and whatever the predict step gives for each sample, shape ``(B,)``, or ``(B, n)`` with the
    columns ``NAME_0`` to ``NAME_(n-1)``. Logits are left out. Of several students, each has its table in a folder of
    its name.

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
        if predictions and not isinstance(predictions[0], dict):
            rank_zero_warn(f"{path} is not written: predict_step gives no dictionary of values by name")
            return
        columns: dict[str, list[Any]] = {"index": [index for batch in batch_indices[0] for index in batch]}
        first = (
            predictions[0] if predictions else {"label": torch.empty(0, dtype=torch.long), "confidence": torch.empty(0)}
        )
        for name, value in first.items():
            if isinstance(value, Tensor) and value.ndim in (1, 2) and name != "logits":
                every = torch.cat([batch[name] for batch in predictions]) if predictions else value
                parts = {name: every} if every.ndim == 1 else {f"{name}_{i}": one for i, one in enumerate(every.T)}
                columns |= {key: one.tolist() for key, one in parts.items()}
        size = max((len(values) for name, values in columns.items() if name != "index"), default=0)
        if len(columns["index"]) != size:
            columns["index"] = list(range(size))  # of streamed data Lightning does not tell
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        if "label" in columns and not torch.is_floating_point(first["label"]):
            columns["class"] = [names[label] if names else "" for label in columns["label"]]
        heads: list[str] = [name for name in ("index", "label", "class", "confidence") if name in columns]
        heads += [name for name in columns if name not in heads]
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerow(heads)
        for row in zip(*(columns[name] for name in heads), strict=True):
            table.writerow([f"{value:.6f}" if isinstance(value, float) else value for value in row])
        path = path if trainer.world_size == 1 else path.with_suffix(f".{trainer.global_rank}.csv")
        write_whole(path, lambda file: file.write(text.getvalue().encode()))
        print(f"{len(columns['index'])} predictions: {path}")
