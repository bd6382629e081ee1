"""What the teacher says about the training pictures, computed once and kept for all runs."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from kdlit.data import SplitDataModule
from kdlit.data.base import without_addresses
from kdlit.data.sampling import EpochDataset
from kdlit.data.teacher_logits import ABOUT, LogitFormat, TeacherLogits, create
from kdlit.fingerprint import of_network, of_text, sketch
from kdlit.modules import ManyStudents
from kdlit.modules.many_students import frozen_teacher_of
from kdlit.modules.networks import logits_of
from kdlit.modules.teacher import FrozenTeacher

_PROBES = 64  # pictures that are made again to see whether all is as it was
_SAME_PICTURE = 1e-3  # in a sketch: rounding stays below, one step of 1/255 in one pixel above
_SAME_LOGITS = {"float16": 2e-3, "float32": 1e-4}  # of the largest logit: above what rounding does


class TeacherCache(L.Callback):
    r"""Keeps the teacher's logits of the training pictures in files, so that later epochs and runs need not run it.

    The first fit fills the cache, every other one reads it. On validation and test pictures the teacher still runs.
    Kept are the logits that the teacher gives in float32, whatever the precision of the run. (One in ``bf16-true`` or
    ``16-true`` rounds them when it takes up a batch, as it does with pictures.)

    With ``epochs=0`` the teacher sees each picture once, not augmented, while the student sees it augmented anew in
    every epoch. With ``epochs=E`` it sees E augmented views of each, and in epoch :math:`e` the student is given view
    :math:`e \bmod E`, bit for bit the picture the teacher saw, strong view included. These views follow from the seed
    of the run that makes the cache, the order of the pictures from the run's own: runs with any seed share a cache.

    A cache is used only for the teacher, pictures, augmentation, epochs and format that it was made for, and refused
    with the reason otherwise. It names all of these; besides, 64 pictures and the logits of some are made again and
    compared. Labels, their noise, the batch size and how many processes there are play no part. Where augmentation
    computes with fractions, as rotations do, a GPU gives slightly other pictures than worker processes, which is
    refused, too.

    Several processes, of one run or of several, fill a cache together, each taking the next 4,096 pictures and waiting
    in no collective operation. What a killed one left undone another does. They must see the same disk.

    Args:
        path: folder of the cache, made if missing; relative to the working directory.
        epochs: number of augmented views of each picture, used in turn; 0 for the pictures as they are.
        dtype: ``float16`` rounds logits to 11 bits, which moves losses by at most 0.02 % (nine methods on digit pairs);
            ``float32`` keeps them as they are, and losses to 1e-6.
        top_k: how many of the largest logits to keep of each picture; the mass of all others is spread evenly over
            them. None keeps all. For losses at temperature 1: with 10 of 100 classes KD moves by 0.02 % there, but by
            60 % at temperature 4; :class:`~kdlit.data.teacher_logits.LogitFormat` has the bound.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        path: str,
        epochs: int = 0,
        dtype: Literal["float16", "float32"] = "float16",
        top_k: int | None = None,
    ) -> None:
        LogitFormat(1, 2**31, epochs, dtype=dtype, top_k=top_k)  # checks the values
        if not path:
            raise ValueError("path must name a folder, got ''")
        self.path = Path(path).expanduser()
        self.epochs = epochs
        self.dtype = dtype
        self.top_k = top_k
        self._dataset: EpochDataset | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before training, see that the cache is filled, and let the training batches hold what is in it.

        Raises:
            ValueError: If losses or data need more than logits of known pictures, or the cache is stale, damaged or
                something else.
            OSError: If it cannot be written.
        """
        if stage != "fit":
            return
        frozen, data = self._check(trainer, pl_module)
        seed, size = data._order_seed(), len(data.train_target)  # a subset by score is settled by asking
        strong = bool(self.epochs) and data.strong_view
        row_format = LogitFormat(size, data.num_classes, self.epochs, strong, self.dtype, self.top_k)
        device = trainer.strategy.root_device
        teacher = frozen.network.to(device)
        is_trial = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        problem: Exception | None = None
        with _aside(device):
            if trainer.is_global_zero:
                try:
                    self._open(teacher, device, data, row_format, seed, may_create=not is_trial)
                except Exception as error:  # told to the other processes, which would wait in vain
                    problem = error
            if (problem := trainer.strategy.broadcast(problem)) is not None:
                raise problem
            if is_trial and not self._is_complete():
                rank_zero_info(f"teacher cache {self.path}: fast_dev_run fills none, so the teacher itself runs")
                return
            logits = TeacherLogits(self.path)
            if left := row_format.views * size - logits.filled:
                rank_zero_info(f"teacher cache {self.path}: asking the teacher about {left:,} views")
            speed = _fill(logits, teacher, data, trainer)
        views = f"{self.epochs} views of each of {size:,} pictures" if self.epochs else f"{size:,} pictures as they are"
        done = f"filled at {speed:,.0f} views/s" if speed else "read, as it was there"
        rank_zero_info(f"teacher cache {self.path}: {views}, {row_format.size / 1e6:,.1f} MB, {done}")
        self._dataset = data.datasets["train"]
        self._dataset.teacher_logits = logits

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refuse batches from elsewhere.

        Raises:
            ValueError: If the batch has no logits.
        """
        if self._dataset is not None and not (isinstance(batch, Mapping) and "teacher_logits" in batch):
            raise ValueError(
                "TeacherCache: a training batch has no teacher_logits, so it is not from datasets['train'] of the data "
                "module, which the cache was made for; remove TeacherCache, or what replaces train_dataloader"
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the data as it was."""
        if self._dataset is not None and self._dataset.teacher_logits is not None:
            self._dataset.teacher_logits.close()
            self._dataset.teacher_logits = None
        self._dataset = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the data as it was."""
        self.teardown(trainer, pl_module, "fit")

    def _is_complete(self) -> bool:
        try:
            return TeacherLogits(self.path).complete
        except FileNotFoundError:
            return False

    def _check(self, trainer: L.Trainer, pl_module: Any) -> tuple[FrozenTeacher, SplitDataModule]:
        """Refuse what logits of known pictures are not enough for."""
        several = isinstance(pl_module, ManyStudents)
        students = pl_module.students.values() if several else [pl_module]
        frozen = frozen_teacher_of(pl_module)
        if frozen is None:
            raise ValueError(f"TeacherCache needs a module with a teacher, but {type(pl_module).__name__} has none")
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, SplitDataModule) or not isinstance(data.datasets.get("train"), EpochDataset):
            got = "loaders alone" if data is None else type(data).__name__
            raise ValueError(
                "TeacherCache needs data whose pictures can be found and augmented again, a SplitDataModule of "
                f"kdlit.data such as CIFAR100 or ImageNet, but got {got}; remove TeacherCache"
            )
        if data.num_classes != pl_module.num_classes:
            raise ValueError(
                f"the data has {data.num_classes} classes, but the networks give {pl_module.num_classes} logits; set "
                f"num_classes of student and teacher to {data.num_classes}"
            )
        changes = ["collate"] if data.mixes_batches else []
        hooks = ("on_before_batch_transfer", "on_after_batch_transfer")
        changes += [hook for hook in hooks if is_overridden(hook, data) or is_overridden(hook, pl_module)]
        if changes:
            raise ValueError(
                f"TeacherCache: {changes[0]} of {type(data).__name__} or {type(pl_module).__name__} may change "
                "batches, so that the teacher's logits would be of other pictures; remove it, or TeacherCache"
            )
        for name, term in (item for student in students for item in student._terms().items()):
            loss = f"losses.{name} ({type(term.innermost).__name__})"
            if term.teacher_layers:
                raise ValueError(
                    f"TeacherCache keeps logits alone, but {loss} reads the teacher's features "
                    f"{', '.join(term.teacher_layers)}; remove TeacherCache, or set that loss to null"
                )
            if term.needs_strong_view and not (self.epochs and data.strong_view):
                raise ValueError(
                    f"TeacherCache: {loss} needs logits of the strong view; set --data.strong_view=true and epochs of "
                    f"TeacherCache to 1 or more, got {data.strong_view} and {self.epochs} (a picture as it is has no "
                    "strong view)"
                )
            if self.top_k and (temperature := getattr(term.innermost, "temperature", 1)) != 1:
                rank_zero_warn(
                    f"TeacherCache keeps the {self.top_k} largest logits, which is right for temperature 1, but {loss} "
                    f"has temperature {temperature}: it will take all other classes for more likely than they are"
                )
        if frozen.has_own_input and data.views.teacher is None:
            raise ValueError("teacher_input_size is set, but the data gives no image_teacher; set --data.teacher_input")
        for name, weight in frozen.network.named_parameters():
            if weight.dtype != torch.float32:
                raise ValueError(
                    f"TeacherCache keeps what a teacher says in float32, but teacher.{name} is {weight.dtype}; build "
                    "the module anew, or call teacher.float()"
                )
        return frozen, data

    def _open(
        self,
        teacher: nn.Module,
        device: torch.device,
        data: SplitDataModule,
        row_format: LogitFormat,
        seed: int,
        may_create: bool,
    ) -> None:
        """Make the cache, or see that the one that is there may be used."""
        train = data.datasets["train"]
        try:
            fingerprint = train.fingerprint()
        except NotImplementedError as error:
            raise ValueError(f"TeacherCache: {error}, so that a stale cache would not be noticed; add one") from None
        about = {
            "teacher": {
                "class": type(teacher).__qualname__,
                "layers": of_text(without_addresses(teacher)),
                "weights": of_network(teacher),
            },
            "data": {"fingerprint": fingerprint},
            "transform": data.teacher_view(augmented=bool(self.epochs)),
        }
        try:
            logits = TeacherLogits(self.path)
        except FileNotFoundError:
            (pictures, place, _), (again, _, _) = (_probe(data, row_format, seed) for _ in range(2))
            if not torch.equal(pictures, again):
                raise ValueError(
                    "TeacherCache: the augmentation gives other pictures each time, so it cannot be replayed; let the "
                    "transforms draw from torch's generator, not from random or numpy, and remember nothing"
                ) from None
            if not may_create:
                return
            about["probes"] = {"device": place, "sketches": pictures.round(decimals=6).tolist()}
            logits = create(self.path, about, row_format, seed)
        self._compare(logits, json.loads(json.dumps(about)), row_format)
        logits.check()
        self._compare_probes(logits, teacher, device, data)

    def _compare(self, logits: TeacherLogits, about: dict[str, Any], row_format: LogitFormat) -> None:
        """Refuse a cache of another teacher, data, transform, epochs or format."""
        old, new = asdict(logits.format), asdict(row_format)
        parts = {"data": ["pictures"], "teacher": ["classes"], "epochs": ["epochs"], "format": ["dtype", "top_k"]}
        odd = [
            f"{part if part == name else f'{part}: {name}'} {old[name]!r} in the cache, {new[name]!r} now"
            for part, names in parts.items()
            for name in names
            if old[name] != new[name]
        ]
        for part in ("teacher", "data", "transform"):
            if part == "transform" and (old["epochs"] == 0) != (new["epochs"] == 0):
                continue  # they differ because the epochs do
            kept, wanted = logits.about.get(part, {}), about[part]
            odd += [
                f"{part}: {name} {_short(kept.get(name))} in the cache, {_short(wanted.get(name))} now"
                for name in {**kept, **wanted}
                if kept.get(name) != wanted.get(name)
            ]
        if odd:
            raise self._stale("; ".join(odd))

    def _compare_probes(
        self, logits: TeacherLogits, teacher: nn.Module, device: torch.device, data: SplitDataModule
    ) -> None:
        """Refuse a cache where the same settings give other pictures, or the same weights other logits."""
        now, place, (keys, batch) = _probe(data, logits.format, logits.seed)
        kept = logits.about.get("probes", {})
        try:
            then = torch.tensor(kept.get("sketches", []), dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise logits.damaged(ABOUT, f"sketches: {error}") from None
        if then.shape != now.shape or not (then - now).abs().max() <= _SAME_PICTURE:
            places = "" if kept.get("device") == place else f" (made on {kept.get('device')}, now on {place})"
            raise self._stale(
                f"transform: the same settings give other pictures than when it was made{places}, by something that "
                "they do not show"
            )
        filled = logits.marks() != 0
        rows = [row for row, key in enumerate(keys) if filled[logits.block_of(key)]]
        if not rows:
            return
        index = torch.tensor(keys)[rows] % logits.format.pictures
        stored = torch.stack(list(logits.read(keys[0] // logits.format.pictures, index).values()), 1)
        live = _logits(teacher, batch, logits.format.strong, device)[rows].cpu()
        value, label = stored.topk(self.top_k or stored.shape[-1])
        worst = (value - live.gather(-1, label)).abs().max()
        if not worst <= _SAME_LOGITS[logits.format.dtype] * live.abs().max():
            raise self._stale(
                f"teacher: the same weights give other logits than when it was made, by up to {float(worst):.3g}"
            )

    def _stale(self, reason: str) -> ValueError:
        return ValueError(
            f"the teacher cache {self.path} is stale: {reason}. Delete {self.path} to have it made anew, or name "
            "another path"
        )


def _fill(logits: TeacherLogits, teacher: nn.Module, data: SplitDataModule, trainer: L.Trainer) -> float:
    """Fill what is left to fill together with all others who do; return how many views a second this process did."""
    source, device = _source(data, logits.format, logits.seed), trainer.strategy.root_device
    done, started = 0, time.monotonic()
    bar = _progress(trainer)
    task = bar.add_task("Asking the teacher", total=logits.format.views * logits.format.pictures)
    try:
        with bar:
            while not logits.complete:
                blocks = logits.claims()
                if (first := next(blocks, None)) is None:  # others are at all that is left
                    time.sleep(0.2)
                    continue
                claimed: deque[tuple[int, bool]] = deque()
                seen: list[tuple[Tensor, Tensor]] = []
                for batch in data.in_order(
                    source, _batches(logits, chain([first], blocks), data.eval_batch_size, claimed)
                ):
                    block, is_last = claimed.popleft()
                    seen.append((batch["index"], _logits(teacher, batch, logits.format.strong, device)))
                    if is_last:
                        index, values = (torch.cat(column).cpu() for column in zip(*seen, strict=True))
                        seen.clear()
                        keys = logits.keys(block)
                        _check_logits(values, index, logits.format)
                        rows = torch.full((len(keys), *values.shape[1:]), torch.nan)
                        rows[index - keys[0] % logits.format.pictures] = values
                        logits.write(block, rows)
                        done += len(keys)
                        bar.update(task, completed=logits.filled)
    finally:
        logits.close()
    return done / (time.monotonic() - started)


def _batches(
    logits: TeacherLogits, blocks: Iterable[int], size: int, claimed: deque[tuple[int, bool]]
) -> Iterator[list[int]]:
    """Keys of the batches of some blocks; ``claimed`` gets the block of each and whether it is the last of it."""
    for block in blocks:
        keys = logits.keys(block)
        for start in range(0, len(keys), size):
            claimed.append((block, start + size >= len(keys)))
            yield list(keys[start : start + size])


def _source(data: SplitDataModule, row_format: LogitFormat, seed: int) -> EpochDataset:
    """The training pictures as the teacher sees them, view by view in place of epoch by epoch."""
    train = data.datasets["train"]
    data._place(train)
    source = copy.copy(train)
    source.seed, source.augmented, source.teacher_logits = seed, bool(row_format.epochs), None
    return source


def _probe(
    data: SplitDataModule, row_format: LogitFormat, seed: int
) -> tuple[Tensor, str, tuple[list[int], dict[str, Tensor]]]:
    """Sketches of some pictures, where they were made, and the first of them with their keys."""
    source = _source(data, row_format, seed)
    count, views = min(_PROBES, row_format.pictures), min(4, row_format.views)
    index = torch.arange(count) * row_format.pictures // count
    groups = []
    for group in range(min(views, count)):
        view = group * row_format.views // views
        keys = (view * row_format.pictures + index[group::views]).tolist()
        groups.append((keys, cast("dict[str, Tensor]", source.__getitems__(keys).batch)))
    pictures = [sketch(view) for _, batch in groups for view in _views(batch, row_format.strong)]
    keys, first = groups[0]
    start = keys[0] - int(index[0])
    found = first["index"].tolist()[:16]
    return (
        torch.cat(pictures),
        source.device.type,
        ([start + one for one in found], {name: value[:16] for name, value in first.items()}),
    )


def _views(batch: Mapping[str, Tensor], strong: bool) -> list[Tensor]:
    """The teacher's form of the pictures, and of their strong views if wanted."""
    name = "image_teacher" if "image_teacher" in batch else "image"
    return [batch[name], *([batch[f"{name}_strong"]] if strong else [])]


@torch.no_grad()
def _logits(teacher: nn.Module, batch: Mapping[str, Any], strong: bool, device: torch.device) -> Tensor:
    """Float32, shape ``(B, V, C)``, on the teacher's device."""
    views = [view.to(device, non_blocking=True) for view in _views(batch, strong)]
    with torch.autocast(device.type, enabled=False):
        return torch.stack([logits_of(teacher.eval()(view), "teacher").float() for view in views], 1)


def _check_logits(values: Tensor, index: Tensor, row_format: LogitFormat) -> None:
    """Refuse what cannot be stored, shape ``(B, V, C)``, of some pictures."""
    limit = torch.finfo(getattr(torch, row_format.dtype)).max
    odd = ~(values.abs() <= limit)
    if odd.any():
        row = int(odd.flatten(1).any(1).nonzero()[0])
        value = float(values[row][odd[row]][0])
        reason = "" if value != value or abs(value) == torch.inf else ", too large for float16; set dtype to float32"
        raise ValueError(f"the teacher gives a logit of {value} for training picture {int(index[row])}{reason}")


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Leave torch's generators as they were, and meanwhile let a GPU multiply in full float32."""
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else []):
        if not is_cuda:
            yield
            return
        kept = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = kept[0]
            torch.set_float32_matmul_precision(kept[1])


def _progress(trainer: L.Trainer) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not (trainer.is_global_zero and sys.stderr.isatty()),
    )


def _short(value: object) -> str:
    """Fingerprints by their first digits."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)
