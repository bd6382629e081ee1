"""Tiny-ImageNet: 200 classes of ImageNet in pictures of 64x64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from kdlit.data.base import Pictures
from kdlit.data.download import Archive, PublishedDataModule
from kdlit.data.photographs import read_photograph

_SIDE = 64
_PUBLISHED = {"classes": 200, "train": 500, "val": 50}  # the latter two a class
_CHUNK = 250
_THREADS = 4  # hide the wait for a slow disk; from a fast one, one thread decodes as many


class TinyImageNet(PublishedDataModule):
    """Tiny-ImageNet from its published files, or your own 64x64 pictures in the same layout.

    Reads ``<root>/tiny-imagenet-200/``: ``wnids.txt`` (the classes), ``words.txt`` (their names, if it is there),
    ``train/<wnid>/images/*`` and ``val/images/*`` with ``val/val_annotations.txt``, or ``val`` sorted into class
    folders as ``train`` is. The labels of its test pictures are not public, so ``val`` is the test set, and validation
    pictures are held out of ``train``.

    Classes are numbered in the order of their sorted WordNet numbers, not in that of ``wnids.txt``: so are those of
    published networks, which were trained on class folders. All pictures are decoded into memory: 1.35 GB for 110,000
    of them in each process.

    Args:
        root: folder that holds ``tiny-imagenet-200``; relative to the working directory.
        download: fetch and unpack the published archive if the folder is not there.
        verify: insist on 200 classes with 500 training and 50 test pictures each, as published; false for your own.
        mean: mean of each channel, for pictures scaled to 0..1; by default what published networks were trained with.
        std: standard deviation of each channel, likewise.
        **kwargs: of :class:`~kdlit.data.PictureDataModule`: size, splits, augmentation and batches.

    Raises:
        FileNotFoundError: If a part is missing and ``download`` is false.
    """

    archive = Archive(
        "Tiny-ImageNet",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "90528d7ca1a48142e341f4ef8d21d0de",
        "tiny-imagenet-200",
        "248 MB",
    )
    files: ClassVar = {"wnids.txt": None, "train": None, "val": None}

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        verify: bool = True,
        mean: Sequence[float] = (0.4802, 0.4481, 0.3975),
        std: Sequence[float] = (0.2302, 0.2265, 0.2262),
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, download=download, verify=verify, mean=mean, std=std, **kwargs)

    def load(self) -> dict[str, Pictures]:
        """List all pictures, check that none is missing, and decode them.

        Raises:
            FileNotFoundError: If a folder or list is missing.
            ValueError: If folders and lists do not fit each other, or a picture cannot be decoded or is not 64x64.
        """
        self.check_folder()
        folder = self.folder.absolute()
        try:
            wnids = sorted(self._lines("wnids.txt"))
            if not wnids or len(set(wnids)) < len(wnids):
                raise ValueError(f"{folder / 'wnids.txt'} must name each class once; unpack it again")
            paths = {"train": _in_class_folders(folder / "train", wnids)}
            is_sorted = any((folder / "val" / wnid).is_dir() for wnid in wnids)
            paths["val"] = _in_class_folders(folder / "val", wnids) if is_sorted else self._annotated(wnids)
            words = dict(line.partition("\t")[::2] for line in self._lines("words.txt"))
        except (PermissionError, NotADirectoryError) as error:
            raise ValueError(f"cannot read {error.filename}: {error.strerror}; check type and permissions") from None
        if self.verify:
            self._check_numbers(paths, len(wnids))
        self.class_names = [words.get(wnid, wnid) for wnid in wnids]
        splits = {"train": paths["train"], "test": paths["val"]}
        return {
            split: Pictures(
                _decoded([path for of_class in listed for path in of_class], f"{self.archive.title} {split}"),
                torch.tensor([label for label, of_class in enumerate(listed) for _ in of_class]),
            )
            for split, listed in splits.items()
        }

    def _lines(self, name: str) -> list[str]:
        path = self.folder.absolute() / name
        if not path.is_file():
            return []
        return [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]

    def _annotated(self, wnids: Sequence[str]) -> list[list[Path]]:
        """The pictures of ``val/images`` by class, as its list says."""
        name = "val/val_annotations.txt"
        listing = self.folder.absolute() / name
        if not listing.is_file():
            raise FileNotFoundError(
                f"no {listing} and no class folders beside it: the classes of the pictures in val are not known; "
                f"unpack {self.archive.url} again"
            )
        pictures = {path.name: path for path in _pictures_in(listing.parent)}
        annotated = {line.split("\t")[0]: "".join(line.split("\t")[1:2]) for line in self._lines(name)}
        _check_fit(
            f"the pictures in {listing.parent / 'images'} do not fit {listing.name}",
            {
                "without a line": pictures.keys() - annotated.keys(),
                "without a picture": annotated.keys() - pictures.keys(),
            },
        )
        if odd := sorted(set(annotated.values()) - set(wnids)):
            raise ValueError(f"{listing} names classes that wnids.txt does not: {_some(odd)}; unpack both again")
        found: dict[str, list[Path]] = {wnid: [] for wnid in wnids}
        for picture in sorted(annotated):
            found[annotated[picture]].append(pictures[picture])
        if empty := [wnid for wnid in wnids if not found[wnid]]:
            raise ValueError(f"{listing} has no picture of {_some(empty)}; unpack it again")
        return list(found.values())

    def _check_numbers(self, paths: dict[str, list[list[Path]]], num_classes: int) -> None:
        cure = "unpack it again, or set --data.verify=false for pictures of your own"
        folder = self.folder.absolute()
        if num_classes != _PUBLISHED["classes"]:
            raise ValueError(f"{folder} has {num_classes} classes, not {_PUBLISHED['classes']} as published; {cure}")
        for part, listed in paths.items():
            for of_class in listed:
                if len(of_class) != _PUBLISHED[part]:
                    raise ValueError(
                        f"a class in {folder / part} has {len(of_class)} pictures, not {_PUBLISHED[part]} as "
                        f"published, the first of them {of_class[0]}; {cure}"
                    )


def _in_class_folders(folder: Path, wnids: Sequence[str]) -> list[list[Path]]:
    """The pictures of ``folder/<wnid>/images`` or ``folder/<wnid>``, by class."""
    there = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if loose := [path for path in folder.iterdir() if path.suffix.lower() in IMG_EXTENSIONS]:
        raise ValueError(f"pictures without a class lie directly in {folder}: {_some(loose)}; move or remove them")
    if (left_over := folder / "images").is_dir() and not _pictures_in(left_over):
        there.remove("images")  # where the pictures lay before they were sorted
    _check_fit(
        f"the class folders in {folder} do not fit wnids.txt",
        {"without a folder": set(wnids) - set(there), "not in wnids.txt": set(there) - set(wnids)},
    )
    found = [sorted(_pictures_in(folder / wnid)) for wnid in wnids]
    if empty := [wnid for wnid, pictures in zip(wnids, found, strict=True) if not pictures]:
        raise ValueError(f"no picture in {_some(folder / wnid for wnid in empty)}; unpack the archive again")
    return found


def _pictures_in(folder: Path) -> list[Path]:
    """Pictures in ``folder/images``, or in the folder itself where there is none such."""
    inner = folder / "images"
    paths = (inner if inner.is_dir() else folder).iterdir()
    return [path for path in paths if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")]


def _check_fit(complaint: str, odd: dict[str, set[str]]) -> None:
    if lists := [f"{what} {_some(sorted(names))}" for what, names in odd.items() if names]:
        raise ValueError(f"{complaint}: {'; '.join(lists)}. Unpack the archive again, or correct the list")


def _some(names: Iterable[object], limit: int = 5) -> str:
    texts = list(map(str, names))
    return ", ".join(texts[:limit]) + (f" and {len(texts) - limit} more" if len(texts) > limit else "")


def _decoded(paths: Sequence[Path], title: str) -> Tensor:
    """Pictures of many files, uint8 of shape ``(N, 3, 64, 64)``."""
    image = torch.empty((len(paths), 3, _SIDE, _SIDE), dtype=torch.uint8)

    def fill(start: int) -> None:
        for number, path in enumerate(paths[start : start + _CHUNK], start):
            image[number] = _decode(path)

    starts = range(0, len(paths), _CHUNK)
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in track(
            pool.map(fill, starts),
            title,
            total=len(starts),
            disable=getattr(rank_zero_only, "rank", 0) != 0,
            console=Console(stderr=True),
        ):
            pass
    return image


def _decode(path: Path) -> Tensor:
    picture = read_photograph(path)
    if picture.shape[1:] != (_SIDE, _SIDE):
        height, width = picture.shape[1:]
        raise ValueError(f"{path} has {width}x{height} pixels, but must have {_SIDE}x{_SIDE}; unpack the archive again")
    return picture
