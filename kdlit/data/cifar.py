"""CIFAR-10 and CIFAR-100, or any pictures in their file layout."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torchvision

from kdlit.data.base import Pictures
from kdlit.data.download import Archive, PublishedDataModule

_SIZE = 3 * 32 * 32


def _files(published: Any) -> dict[str, str]:
    return dict([*published.train_list, *published.test_list]) | {published.meta["filename"]: published.meta["md5"]}


class _CIFAR(PublishedDataModule):
    """What both share; ``published`` is torchvision's class, which knows address, files, sums and keys."""

    published: ClassVar[Any]
    labels_key: ClassVar[str]

    def load(self) -> dict[str, Pictures]:
        """Read all files.

        Raises:
            FileNotFoundError: If one is missing.
            ValueError: If one cannot be read, is not the published one (with ``verify``) or lacks what it should hold.
        """
        self.check_folder()
        contents = {name: self._unpickle(name) for name in self.files}
        meta = self.published.meta
        names = self._entry(contents[meta["filename"]], meta["key"], meta["filename"])
        if not isinstance(names, (list, tuple)) or not names:
            path = (self.folder / meta["filename"]).absolute()
            raise ValueError(f"{meta['key']} in {path} must be a list of class names, got {names!r}")
        self.class_names = list(names)
        lists = {"train": self.published.train_list, "test": self.published.test_list}
        return {split: self._join(contents, [name for name, _ in files]) for split, files in lists.items()}

    def _join(self, contents: dict[str, dict[str, Any]], names: Sequence[str]) -> Pictures:
        parts = [self._pictures_of(contents[name], name) for name in names]
        return Pictures(torch.cat([part.image for part in parts]), torch.cat([part.target for part in parts]))

    def _unpickle(self, name: str) -> dict[str, Any]:
        raw, path, title = self.read(name), (self.folder / name).absolute(), self.archive.title
        try:
            content = _PlainUnpickler(io.BytesIO(raw), encoding="latin1").load()
        except Exception as error:  # a damaged pickle can raise almost anything
            raise ValueError(
                f"{path} ({len(raw)} bytes) is not a whole {title} file: {error}; fetch or write it again"
            ) from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, not the dictionary of {title}")
        return content

    def _entry(self, content: dict[str, Any], key: str, name: str) -> Any:
        if key not in content:
            raise ValueError(f"{(self.folder / name).absolute()} has no {key!r}, only {', '.join(map(repr, content))}")
        return content[key]

    def _pictures_of(self, content: dict[str, Any], name: str) -> Pictures:
        data, labels = self._entry(content, "data", name), self._entry(content, self.labels_key, name)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (_SIZE,):
            got = f"{data.dtype} of shape {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
            raise ValueError(
                f"data in {(self.folder / name).absolute()} must be uint8 of shape (N, {_SIZE}), got {got}"
            )
        return self.pictures_of(name, data.reshape(-1, 3, 32, 32), labels)


class CIFAR10(_CIFAR):
    """CIFAR-10 from its published files, or your own 32x32 pictures in the same layout.

    Reads ``<root>/cifar-10-batches-py/{data_batch_1,...,data_batch_5,test_batch,batches.meta}``. The classes and their
    names come from ``batches.meta``.

    Args:
        root: folder that holds ``cifar-10-batches-py``; relative to the working directory.
        download: fetch and unpack the published archive if the folder is not there.
        verify: compare the files with the md5 sums of the published ones; false for your own pictures in this layout.
        mean: mean of each channel, for pictures scaled to 0..1; by default the usual values.
        std: standard deviation of each channel, likewise.
        **kwargs: of :class:`~kdlit.data.PictureDataModule`: splits, augmentation and batches.

    Raises:
        FileNotFoundError: If a file is missing and ``download`` is false.
    """

    published = torchvision.datasets.CIFAR10
    archive = Archive("CIFAR-10", published.url, published.tgz_md5, published.base_folder, "170 MB")
    files = _files(published)
    labels_key = "labels"

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        verify: bool = True,
        mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
        std: Sequence[float] = (0.2470, 0.2435, 0.2616),
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, download=download, verify=verify, mean=mean, std=std, **kwargs)


class CIFAR100(_CIFAR):
    """CIFAR-100 from its published files, or your own 32x32 pictures in the same layout.

    Reads ``<root>/cifar-100-python/{train,test,meta}``. The classes and their names come from ``meta``.

    Args:
        root: folder that holds ``cifar-100-python``; relative to the working directory.
        download: fetch and unpack the published archive if the folder is not there.
        verify: compare the files with the md5 sums of the published ones; false for your own pictures in this layout.
        mean: mean of each channel, for pictures scaled to 0..1; by default what published teachers were trained with.
        std: standard deviation of each channel, likewise.
        **kwargs: of :class:`~kdlit.data.PictureDataModule`: splits, augmentation and batches.

    Raises:
        FileNotFoundError: If a file is missing and ``download`` is false.
    """

    published = torchvision.datasets.CIFAR100
    archive = Archive("CIFAR-100", published.url, published.tgz_md5, published.base_folder, "169 MB")
    files = _files(published)
    labels_key = "fine_labels"

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        verify: bool = True,
        mean: Sequence[float] = (0.5071, 0.4867, 0.4408),
        std: Sequence[float] = (0.2675, 0.2565, 0.2761),
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, download=download, verify=verify, mean=mean, std=std, **kwargs)


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
