"""Photographs in a folder for each class: finding them, and decoding one."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

WORDNET = re.compile(r"n\d{8}")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
# SHA-256 of the thousand WordNet numbers, sorted, a line each
ILSVRC2012 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"


# What a picture file may hold, whatever its name; Pillow knows more, and starts Ghostscript for one of them.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "TIFF", "WEBP", "GIF")
_MOST_PIXELS = 2**27  # a small file can claim any number
_OF_ONE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP)


class BrokenPhotograph(ValueError):  # noqa: N818 - the name says what it is
    """A picture file that is no picture, or only part of one; the message names it."""


class LostPhotograph(ValueError):  # noqa: N818 - likewise
    """A picture file that has vanished, or must not be read, while those around it are there; the message names it."""


@dataclass
class Photographs:
    """Labelled picture files; a million of them take 50 MB, which worker processes share.

    Attributes:
        folder: what the names are relative to.
        names: relative paths one after the other, as the file system spells them, uint8.
        ends: where each path ends in ``names``, int64, shape ``(N,)``.
        target: labels, positions in ``class_names``, int64, shape ``(N,)``.
        class_names: names of the class folders.
    """

    folder: Path
    names: Tensor
    ends: Tensor
    target: Tensor
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.target)

    def name(self, index: int) -> str:
        """Path of a picture relative to ``folder``."""
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.names[start : int(self.ends[index])].numpy().tobytes())

    def path(self, index: int) -> Path:
        """Path of a picture."""
        return self.folder / self.name(index)


def list_photographs(folder: Path, classes: Sequence[str] | None = None) -> Photographs:
    """Find the pictures in ``<folder>/<class>/**``, in the order of torchvision's ``ImageFolder``.

    A terminal shows a progress bar.

    Args:
        folder: folder of class folders.
        classes: names of the class folders, in the order in which to number them; None for all, sorted by name.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it cannot be read, has no class folder, has pictures outside of them, class folders without a
            picture, or archives in place of class folders; if its folders are not those of ``classes``; if WordNet
            numbers are mixed with other names, or a thousand of them are not those of ILSVRC-2012.
    """
    folder = folder.expanduser().absolute()
    try:
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}; it must hold a folder of pictures for each class")
        class_names = _class_folders(folder)
        _check_classes(folder, class_names, classes)
        if classes is not None:
            class_names = list(classes)
        names, ends, counts = bytearray(), array("q"), []
        for class_name in _with_progress(class_names, folder):
            before = len(ends)
            for name in _pictures(folder, class_name):
                names += os.fsencode(name)
                ends.append(len(names))
            counts.append(len(ends) - before)
    except PermissionError as error:
        raise ValueError(
            f"cannot list the pictures in {folder}: this user may not read {error.filename}; change its permissions"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENAMETOOLONG):  # such as that there is no such folder
            raise
        raise ValueError(f"cannot list the pictures in {folder}: {error.strerror} at {error.filename}") from None
    if empty := [name for name, count in zip(class_names, counts, strict=True) if not count]:
        raise ValueError(
            f"class folders without a picture in {folder}: {_few(empty)}; fill or remove them (pictures are files in "
            f"{', '.join(IMG_EXTENSIONS)})"
        )
    target = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return Photographs(
        folder,
        torch.frombuffer(names, dtype=torch.uint8),
        torch.frombuffer(ends, dtype=torch.int64),
        target,
        class_names,
    )


def read_photograph(path: str | Path) -> Tensor:
    """Decode a picture file: :func:`decode_photograph` of its bytes.

    Raises:
        ValueError: If the file cannot be read: :class:`LostPhotograph` if its folder is there, and
            :class:`BrokenPhotograph` if it can be read, but not decoded whole.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise BrokenPhotograph(f"cannot decode {path}: not a regular file; replace or remove it")
        data = Path(path).read_bytes()
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}; the folder may have changed since it was listed"
        alone = error.errno in _OF_ONE_FILE and Path(path).parent.is_dir()  # else the disk may be gone
        raise (LostPhotograph if alone else ValueError)(message) from None
    return decode_photograph(data, path)


def decode_photograph(data: bytes, name: str | Path) -> Tensor:
    """Decode a picture to the very pixels of PIL's ``convert("RGB")``, faster where it is a JPEG.

    Rotation by EXIF is not applied, transparency is dropped.

    Args:
        data: content of the picture file.
        name: how to call the picture in errors.

    Returns:
        uint8, shape ``(3, H, W)``; the channels are last in memory, which makes scaling fast.

    Raises:
        BrokenPhotograph: If the data is no picture, only part of one, or one of more than 2^27 pixels.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        # it turns other colours into RGB in another way
        if colours in ("YCbCr", "Gray") and height * width <= _MOST_PIXELS:
            return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
    except ValueError:
        pass  # no JPEG or one that PIL may know, or will say more clearly what is wrong with
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            if picture.width * picture.height > _MOST_PIXELS:
                raise ValueError(f"it claims {picture.width}x{picture.height} pixels, more than {_MOST_PIXELS}")
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # PIL raises OSError, SyntaxError, struct.error and more for broken files
        reason = "it is empty" if not data else "not a picture" if isinstance(error, UnidentifiedImageError) else error
        raise BrokenPhotograph(f"cannot decode {name}: {reason}; replace the file or remove it") from None


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as scan:
        entries = sorted((entry.name, entry.is_dir()) for entry in scan)
    folders = [name for name, is_folder in entries if is_folder]
    files = [name for name, is_folder in entries if not is_folder]
    if pictures := [name for name in files if name.lower().endswith(IMG_EXTENSIONS)]:
        raise ValueError(
            f"pictures lie directly in {folder} and so have no label: {_few(pictures)}; move each into a folder of its "
            "class. The validation pictures of ILSVRC-2012 come like this: torchvision.datasets.ImageNet sorts them "
            "from the archives, and LOC_val_solution.csv names the class of each"
        )
    stems = {name.split(".")[0]: name for name in files if name.lower().endswith(ARCHIVES)}
    packed = [name for stem, name in stems.items() if stem not in folders and (WORDNET.fullmatch(stem) or not folders)]
    if packed:
        raise ValueError(
            f"archives that are not unpacked lie in {folder}: {_few(packed)}; unpack each into a folder of its name: "
            '`for f in *.tar; do mkdir "${f%.tar}" && tar -xf "$f" -C "${f%.tar}"; done`'
        )
    if not folders:
        raise ValueError(f"no class folder in {folder}; it must hold a folder of pictures for each class")
    return folders


def _check_classes(folder: Path, names: list[str], expected: Sequence[str] | None) -> None:
    other = [name for name in names if not WORDNET.fullmatch(name)]
    if 0 < len(other) < len(names):
        raise ValueError(
            f"class folders in {folder} are named by WordNet numbers (as n01440764), but these are not: {_few(other)}; "
            "remove or rename them"
        )
    if expected is not None:
        if twice := sorted(name for name, count in Counter(expected).items() if count > 1):
            raise ValueError(f"classes must name each class once, but names more than once: {_few(twice)}")
        missing, extra = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
        odd = [f"{what}: {_few(some)}" for what, some in (("missing", missing), ("unexpected", extra)) if some]
        if odd:
            raise ValueError(
                f"{folder} must have the {len(expected)} class folders of the training data or of a given list, but "
                f"{'; '.join(odd)}; add or remove them"
            )
    if len(names) != 1000:
        return
    if other and expected is None:
        rank_zero_warn(
            f"{folder} has 1000 classes under names other than WordNet numbers: labels follow the sorted names, but "
            "published ImageNet weights number the classes in the order of their WordNet numbers"
        )
    if not other and hashlib.sha256("\n".join(names).encode()).hexdigest() != ILSVRC2012:
        raise ValueError(
            f"the 1000 class folders in {folder} are not those of ILSVRC-2012, so that labels would not be those of "
            "published weights; replace the wrong ones, or give the folders other names if the choice is meant"
        )


def _pictures(folder: Path, class_name: str) -> Iterator[str]:
    """Paths of a class relative to ``folder``."""

    def fail(error: OSError) -> None:
        raise error

    top = os.path.join(folder, class_name)
    skip = len(top) - len(class_name)
    for place, _, files in sorted(_without_loops(os.walk(top, followlinks=True, onerror=fail))):
        for name in sorted(files):
            if name.lower().endswith(IMG_EXTENSIONS):
                yield os.path.join(place, name)[skip:]


def _without_loops(walk: Iterable[tuple[str, list[str], list[str]]]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Refuse a link to a folder that it lies in: two of them would be followed without end."""
    for place, folders, files in walk:
        for link in (path for path in (os.path.join(place, name) for name in folders) if os.path.islink(path)):
            if os.path.join(os.path.realpath(place), "").startswith(os.path.join(os.path.realpath(link), "")):
                raise ValueError(f"{link} is a link to a folder that it lies in; remove it")
        yield place, folders, files


def _with_progress(class_names: list[str], folder: Path) -> Iterable[str]:
    """Hand out the classes beside a progress bar; without a terminal one line, only if it takes long."""
    quiet = not sys.stderr.isatty() or getattr(rank_zero_only, "rank", 0) != 0
    start, told = time.monotonic(), False
    bar = track(class_names, f"listing {folder}", disable=quiet, transient=True, console=Console(stderr=True))
    for done, name in enumerate(bar):
        if quiet and not told and time.monotonic() - start > 10:
            rank_zero_info(f"listing the pictures in {folder}: {done} of {len(class_names)} classes in 10 s")
            told = True
        yield name


def _few(names: Sequence[str]) -> str:
    """The first names, and how many there are."""
    return ", ".join(names[:3]) + (f" ... ({len(names)} in all)" if len(names) > 3 else "")
