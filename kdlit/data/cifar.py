"""CIFAR-100, or any pictures in its file layout."""

from __future__ import annotations

import hashlib
import io
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from kdlit.data.base import PictureDataModule, Pictures

_FOLDER = "cifar-100-python"
_MD5 = dict([*torchvision.datasets.CIFAR100.train_list, *torchvision.datasets.CIFAR100.test_list]) | {
    "meta": torchvision.datasets.CIFAR100.meta["md5"]
}
_SIZE = 3 * 32 * 32


class CIFAR100(PictureDataModule):
    """CIFAR-100 from its published files, or your own 32x32 pictures in the same layout.

    Reads ``<root>/cifar-100-python/{train,test,meta}``. The classes and their names come from ``meta``.

    Args:
        root: folder that holds ``cifar-100-python``; relative to the working directory.
        download: fetch and unpack the published archive if the files are not there.
        verify: compare the files with the md5 sums of the published ones; false for your own pictures in this layout.
        mean: mean of each channel, for pictures scaled to 0..1; by default what published teachers were trained with.
        std: standard deviation of each channel, likewise.
        **kwargs: of :class:`~kdlit.data.PictureDataModule`: splits, augmentation and batches.

    Raises:
        FileNotFoundError: If a file is missing and ``download`` is false.
    """

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        verify: bool = True,
        mean: Sequence[float] = (0.5071, 0.4867, 0.4408),
        std: Sequence[float] = (0.2675, 0.2565, 0.2761),
        **kwargs: Any,
    ) -> None:
        super().__init__(mean=mean, std=std, **kwargs)
        self.root = root
        self.download = download
        self.verify = verify
        if not download:
            self._check_folder()

    @property
    def folder(self) -> Path:
        """Where the three files lie."""
        return Path(self.root).expanduser() / _FOLDER

    def _check_folder(self) -> None:
        try:
            missing = [name for name in _MD5 if not (self.folder / name).exists()]
        except OSError as error:
            raise ValueError(f"cannot read {self.folder.absolute()}: {error.strerror}; check its permissions") from None
        if missing:
            raise FileNotFoundError(
                f"no {', '.join(missing)} in {self.folder.absolute()}; set --data.root to the folder that holds "
                f"{_FOLDER}, or --data.download=true to fetch CIFAR-100 (169 MB)"
            )

    def prepare_data(self) -> None:
        """Fetch the published files if asked to; they get their final name only when whole and verified."""
        if not self.download or all((self.folder / name).exists() for name in _MD5):
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder.parent, prefix=".cifar-100-") as scratch:
            torchvision.datasets.CIFAR100(scratch, download=True)
            (Path(scratch) / _FOLDER).rename(self.folder)

    def load(self) -> dict[str, Pictures]:
        """Read the three files.

        Raises:
            FileNotFoundError: If one is missing.
            ValueError: If one cannot be read, is not the published one (with ``verify``) or lacks what it should hold.
        """
        self._check_folder()
        contents = {name: self._read(self.folder / name) for name in _MD5}
        self.class_names = list(self._entry(contents["meta"], "fine_label_names", "meta"))
        return {name: self._pictures_of(contents[name], name) for name in ("train", "test")}

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read {path.absolute()}: {error.strerror}; check its permissions") from None
        if self.verify and hashlib.md5(raw, usedforsecurity=False).hexdigest() != _MD5[path.name]:
            raise ValueError(
                f"{path.absolute()} ({len(raw)} bytes) is not the published CIFAR-100 file: its md5 differs. If it is "
                "damaged, remove it and set --data.download=true; for pictures of your own, set --data.verify=false"
            )
        try:
            content = _PlainUnpickler(io.BytesIO(raw), encoding="latin1").load()
        except Exception as error:  # a damaged pickle can raise almost anything
            raise ValueError(
                f"{path.absolute()} ({len(raw)} bytes) is not a whole CIFAR-100 file: {error}; fetch or write it again"
            ) from None
        if not isinstance(content, dict):
            raise ValueError(f"{path.absolute()} holds a {type(content).__name__}, not the dictionary of CIFAR-100")
        return content

    def _entry(self, content: dict[str, Any], key: str, name: str) -> Any:
        if key not in content:
            raise ValueError(f"{(self.folder / name).absolute()} has no {key!r}, only {', '.join(map(repr, content))}")
        return content[key]

    def _pictures_of(self, content: dict[str, Any], name: str) -> Pictures:
        data, labels = np.asarray(self._entry(content, "data", name)), self._entry(content, "fine_labels", name)
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _SIZE:
            raise ValueError(
                f"data in {(self.folder / name).absolute()} must be uint8 of shape (N, {_SIZE}), "
                f"got {data.dtype} of shape {data.shape}"
            )
        image = torch.from_numpy(np.ascontiguousarray(data)).view(-1, 3, 32, 32)
        return Pictures(image, torch.tensor(np.asarray(labels, dtype=np.int64)))


class _PlainUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists, text, numbers and numpy arrays, and refuses everything else a pickle could run."""

    _allowed = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "scalar"),
            ("numpy._core.numeric", "_frombuffer"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """Look up the few numpy names that arrays need; files from numpy 1 spell them ``numpy.core``."""
        module = module.replace("numpy.core.", "numpy._core.")
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it would run {module}.{name}, which no data file needs")
        if module.startswith("numpy._core.") and not hasattr(np, "_core"):
            module = module.replace("numpy._core.", "numpy.core.")
        return super().find_class(module, name)
