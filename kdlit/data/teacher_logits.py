"""The teacher's logits of all training pictures, in a file that is mapped into memory.

A folder holds ``teacher_cache.json`` (what the logits are of, and their format), ``logits.bin`` (a row for each
picture of each view), ``blocks.bin`` (for each block of rows whether it is filled, and its checksum) and ``locks``
(empty). A block is marked once its rows are on disk. Whoever fills a block holds a lock on it, which the system takes
back from a process that dies: so any number of processes may fill a cache together, and what one leaves undone another
does.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

BLOCK = 4096  # rows
ABOUT, LOGITS, BLOCKS, LOCKS = "teacher_cache.json", "logits.bin", "blocks.bin", "locks"
KIND = "kdlit teacher cache 1"
_MARK = 1 << 32  # above a checksum of 32 bits: the block is filled


@dataclass(frozen=True)
class LogitFormat:
    r"""What a row of the file holds.

    With ``top_k`` that is the k largest logits, their classes and :math:`\log \sum \exp z` over all others, on which
    it is spread evenly when read. So at temperature 1 the probabilities of the k classes and of all others together are
    as they were. At another temperature :math:`\tau` the odds of the others against the k come out too high (for
    :math:`\tau > 1`; too low below 1) by a factor of at most :math:`(C - k)^{|1 - 1 / \tau|}`, reached if one class
    has all that mass, and 1 if they share it evenly.

    Args:
        pictures: number of training pictures.
        classes: number of logits.
        epochs: number of augmented views of each picture; 0 for the picture itself, not augmented.
        strong: whether there are logits of the strong views, too.
        dtype: type of the stored logits: ``float16`` is off by at most 0.05 % of each, ``float32`` exact.
        top_k: how many logits are kept of each picture; None for all.

    Raises:
        ValueError: If a value is out of range.
    """

    pictures: int
    classes: int
    epochs: int = 0
    strong: bool = False
    dtype: Literal["float16", "float32"] = "float16"
    top_k: int | None = None

    def __post_init__(self) -> None:
        least = {"pictures": 1, "classes": 1, "epochs": 0} | ({} if self.top_k is None else {"top_k": 1})
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} must be a whole number >= {low}, got {value!r}")
        if not isinstance(self.strong, bool):
            raise ValueError(f"strong must be true or false, got {self.strong!r}")
        if self.dtype not in ("float16", "float32"):
            raise ValueError(f"dtype must be 'float16' or 'float32', got {self.dtype!r}")
        if self.top_k is not None and self.top_k >= self.classes:
            raise ValueError(f"top_k must be below the number of classes, {self.classes}, got {self.top_k}; omit it")

    @property
    def views(self) -> int:
        """How many rows a picture has."""
        return max(1, self.epochs)

    @property
    def row(self) -> np.dtype[Any]:
        """Type of a row; its fields have shape ``(V, C)``, ``(V, k)`` or ``(V,)``, V being 2 with strong views."""
        both = 1 + self.strong
        if self.top_k is None:
            return np.dtype([("logits", self.dtype, (both, self.classes))])
        label = "int16" if self.classes <= 2**15 else "int32"
        shape = (both, self.top_k)
        return np.dtype([("value", self.dtype, shape), ("label", label, shape), ("rest", "float32", (both,))])

    @property
    def blocks_a_view(self) -> int:
        """How many blocks the rows of one view make."""
        return -(-self.pictures // BLOCK)

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return self.views * self.pictures * self.row.itemsize

    def encode(self, logits: Tensor) -> np.ndarray[Any, Any]:
        """Rows of some pictures.

        Args:
            logits: float32, shape ``(B, V, C)``.
        """
        rows = np.zeros(len(logits), self.row)
        if self.top_k is None:
            rows["logits"] = logits.numpy()
            return rows
        value, label = logits.topk(self.top_k)
        rows["value"], rows["label"] = value.numpy(), label.numpy()
        rows["rest"] = logits.double().scatter(-1, label, -torch.inf).logsumexp(-1).numpy()
        return rows

    def decode(self, fields: Mapping[str, Tensor]) -> Tensor:
        """Logits in float32, shape ``(B, V, C)``, of the fields of some rows, on their device."""
        if self.top_k is None:
            return fields["logits"].float()
        other = fields["rest"] - math.log(self.classes - self.top_k)
        return other[..., None].repeat(1, 1, self.classes).scatter(-1, fields["label"].long(), fields["value"].float())


class TeacherLogits:
    """Logits in a folder made by :func:`create`; nothing in it is trusted.

    Args:
        path: the folder.

    Attributes:
        about: what was given to :func:`create`.
        format: what a row holds.
        seed: draws the augmented views.

    Raises:
        FileNotFoundError: If there is no such folder, or it is empty.
        ValueError: If it is something else or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            content = json.loads((self.path / ABOUT).read_bytes())
            if content["kind"] != KIND:
                raise ValueError(f"it is of kind {content['kind']!r}, not {KIND!r}")
            self.about: dict[str, Any] = content["about"]
            self.format = LogitFormat(**content["format"])
            self.seed: int = content["seed"]
            parts = [self.about, *self.about.values()]
            if not isinstance(self.seed, int) or not all(isinstance(part, dict) for part in parts):
                raise ValueError("seed or about has another type")
            sizes = {LOGITS: self.format.size, BLOCKS: 8 * self.format.views * self.format.blocks_a_view}
        except (NotADirectoryError, FileNotFoundError):
            if _is_free(self.path):
                raise FileNotFoundError(f"there is no teacher cache {self.path}") from None
            raise ValueError(
                f"{self.path} exists but is no teacher cache: it has no {ABOUT}; name another path, or delete it"
            ) from None
        except OSError as error:
            raise self.damaged(ABOUT, str(error.strerror)) from None
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise self.damaged(ABOUT, f"{type(error).__name__} {error}") from None
        for name, size in sizes.items():
            file = self.path / name
            if not file.is_file():
                raise self.damaged(name, "there is no such file")
            if file.stat().st_size != size:
                raise self.damaged(name, f"it has {file.stat().st_size:,} bytes, but must have {size:,}")
        self._rows: np.memmap[Any, Any] | None = None
        self._on_device: tuple[int, dict[str, Tensor]] | None = None
        self._locks: IO[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes, each of which maps the file itself."""
        return self.__dict__ | {"_rows": None, "_on_device": None, "_locks": None}

    def damaged(self, name: str, reason: str) -> ValueError:
        """What to say about a file that cannot be used."""
        return ValueError(f"{self.path / name} is damaged: {reason}; delete {self.path} to have it made anew")

    # Reading

    @property
    def rows(self) -> np.memmap[Any, Any]:
        """All rows, shape ``(views, pictures)``."""
        if self._rows is None:
            shape = (self.format.views, self.format.pictures)
            self._rows = np.memmap(self.path / LOGITS, self.format.row, "r", shape=shape)
        return self._rows

    def drawn_from(self, seed: int, epoch: int) -> tuple[int, int]:
        """Which seed and epoch to draw the augmentation of an epoch from: again those of the view the teacher saw."""
        return (self.seed, epoch % self.format.epochs) if self.format.epochs else (seed, epoch)

    def read(self, epoch: int, index: Tensor) -> dict[str, Tensor]:
        """The teacher's logits of some pictures as they are seen in an epoch.

        On the CPU these come from the mapped file, on another device from the whole view, which is copied there when
        first asked for: it is of the size of the pictures themselves, which lie there too.

        Args:
            epoch: number of the epoch, from 0.
            index: positions of the pictures, int64, shape ``(B,)``.

        Returns:
            ``teacher_logits`` and, if there are strong views, ``teacher_logits_strong``: float32, shape ``(B, C)``, on
            the device of ``index``.
        """
        view = epoch % self.format.views
        if index.device.type == "cpu":
            fields = _columns(self.rows[view][index.numpy()])
        else:
            if self._on_device is None or self._on_device[0] != view:
                self._on_device = None  # before the next is made: room for one is enough
                columns = _columns(self.rows[view])
                self._on_device = view, {name: column.to(index.device) for name, column in columns.items()}
            fields = {name: column[index] for name, column in self._on_device[1].items()}
        both = self.format.decode(fields).unbind(1)
        return dict(zip(("teacher_logits", "teacher_logits_strong"), both, strict=False))

    # Filling

    def marks(self) -> np.ndarray[Any, Any]:
        """For each block 0, or its checksum with a mark that it is filled; int64."""
        marks = np.fromfile(self.path / BLOCKS, "<i8")
        if ((marks != 0) & (marks >> 32 != 1)).any():
            raise self.damaged(BLOCKS, "it holds values that are no marks")
        return marks

    @property
    def complete(self) -> bool:
        """Whether all blocks are filled."""
        return bool(self.marks().all())

    @property
    def filled(self) -> int:
        """How many rows are filled."""
        return sum(len(self.keys(int(block))) for block in self.marks().nonzero()[0])

    def check(self) -> None:
        """Read all that is filled and compare it with the checksums.

        Raises:
            ValueError: If it differs.
        """
        for block, mark in enumerate(self.marks()):
            view, first, last = self._span(block)
            if mark and zlib.crc32(self.rows[view, first:last].data) != mark - _MARK:
                raise self.damaged(LOGITS, f"block {block} does not have its checksum")

    def _span(self, block: int) -> tuple[int, int, int]:
        view, number = divmod(block, self.format.blocks_a_view)
        return view, number * BLOCK, min((number + 1) * BLOCK, self.format.pictures)

    def block_of(self, key: int) -> int:
        """The block that a row lies in."""
        view, index = divmod(key, self.format.pictures)
        return view * self.format.blocks_a_view + index // BLOCK

    def keys(self, block: int) -> range:
        """The rows of a block, counted through all views: ``view * pictures + index``."""
        view, first, last = self._span(block)
        return range(view * self.format.pictures + first, view * self.format.pictures + last)

    def claims(self) -> Iterator[int]:
        """Blocks that are neither filled nor being filled by another process, each locked until :meth:`write`.

        Raises:
            OSError: If the file system knows no locks, or the folder must not be written to.
        """
        import fcntl  # not on every system, and only needed here

        if self._locks is None:  # never opened twice: closing any of a process's files gives up all its locks
            self._locks = (self.path / LOCKS).open("a+b")
        for block in np.flatnonzero(self.marks() == 0).tolist():
            try:
                fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, block)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    continue
                raise OSError(
                    f"cannot lock {self.path / LOCKS} ({error.strerror}); name a path on another disk"
                ) from error
            if self.marks()[block]:
                fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, block)
            else:
                yield block

    def write(self, block: int, logits: Tensor) -> None:
        """Fill a claimed block and give it free.

        Args:
            block: number of the block.
            logits: float32, shape ``(rows, V, C)``, on the CPU; nan for pictures that are never read.

        Raises:
            OSError: If the disk is full.
        """
        import fcntl

        rows = self.format.encode(logits)
        try:
            _write_at(self.path / LOGITS, self.keys(block)[0] * rows.itemsize, rows.tobytes())
            mark = np.array(_MARK | zlib.crc32(rows.data), "<i8")
            _write_at(self.path / BLOCKS, 8 * block, mark.tobytes())
        except OSError as error:
            raise OSError(
                f"cannot write {self.path / LOGITS} ({error.strerror}), which takes {self.format.size / 1e9:.2f} GB; "
                "make room, and the same command goes on from here",
            ) from error
        if self._locks is not None:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, block)

    def close(self) -> None:
        """Give up all claims and let the file go."""
        if self._locks is not None:
            self._locks.close()
        self._rows = self._on_device = self._locks = None


def create(path: str | Path, about: Mapping[str, Any], row_format: LogitFormat, seed: int) -> TeacherLogits:
    """Make a folder without logits; of two processes that do so at once, both get the folder of the first.

    Args:
        path: the folder, which must not exist or be empty.
        about: what the logits are of: plain values, for JSON.
        row_format: what a row holds.
        seed: draws the augmented views.

    Raises:
        ValueError: If there is something else.
        OSError: If it cannot be written, or the disk has too little room.
    """
    path = Path(path).resolve()
    if not _is_free(path):
        return TeacherLogits(path)
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file, so that {path} cannot be made; name another path")
    if row_format.size > (free := shutil.disk_usage(existing).free):
        raise OSError(
            f"the teacher cache {path} takes {row_format.size / 1e6:,.1f} MB, but {existing} has room for "
            f"{free / 1e6:,.1f}; make room, name a path on another disk, or store less: float16, top_k, fewer epochs",
        )
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        scratch.mkdir(parents=True)
        for name, size in ((LOGITS, row_format.size), (BLOCKS, 8 * row_format.views * row_format.blocks_a_view)):
            with (scratch / name).open("wb") as file:
                file.truncate(size)
        (scratch / LOCKS).touch()
        content = {"kind": KIND, "about": about, "format": asdict(row_format), "seed": seed}
        _write_at(scratch / ABOUT, 0, json.dumps(content).encode(), "wb")
        with contextlib.suppress(OSError):  # another process was first
            scratch.rename(path)
    except OSError as error:
        raise OSError(f"cannot make the teacher cache {path}: {error.strerror}; name another path") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return TeacherLogits(path)


def _is_free(path: Path) -> bool:
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _columns(rows: np.ndarray[Any, Any]) -> dict[str, Tensor]:
    """The fields of some rows, copied."""
    return {name: torch.from_numpy(rows[name].copy()) for name in rows.dtype.names or ()}


def _write_at(path: Path, position: int, data: bytes, mode: str = "r+b") -> None:
    """Write into a file; return once that is on disk."""
    with path.open(mode) as file:
        file.seek(position)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
