"""Fetching published archives, and the base of data modules whose pictures come in one."""

from __future__ import annotations

import errno
import gzip
import hashlib
import lzma
import shutil
import ssl
import stat
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, ClassVar
from urllib.error import HTTPError, URLError

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from kdlit.data.base import PictureDataModule, Pictures

_CHUNK = 2**20
_TIMEOUT = 60  # seconds without a byte
_NETWORK_ERRORS = (URLError, HTTPException, TimeoutError, ConnectionError, ssl.SSLError)
# What unpacking a damaged archive, or one of a kind that Python cannot read, raises.
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    UnicodeError,
)
_MAGIC = {b"\x1f\x8b\x08": "a gzip archive", b"PK\x03\x04": "a zip archive", b"BZh": "a bzip2 archive"}


def fetch(url: str, folder: str | Path, digest: str) -> None:
    """Download an archive and unpack the folder in it, all or nothing.

    All is done in a scratch folder beside ``folder``; only when the archive is whole, verified and unpacked does the
    folder in it get its name. Nothing that exists is changed: if ``folder`` is there already, nothing happens, and of
    several processes that fetch the same at once one gives the name and the others throw away what they fetched.

    Args:
        url: address of a tar archive, compressed or not, or of a zip archive: http, https or file.
        folder: where the pictures go; the archive must hold a folder of the same name.
        digest: sum of the archive in hexadecimal digits: md5 if 32, sha256 if 64.

    Raises:
        ValueError: If the sum is another one, the archive cannot be unpacked, holds no such folder or holds links or
            paths that lead out of it.
        OSError: If the archive cannot be reached or ``folder`` cannot be written.
    """
    if not hasattr(tarfile, "data_filter"):
        raise OSError("this Python cannot unpack archives safely; take 3.10.12, 3.11.4 or a later one")
    folder = Path(folder).absolute()
    try:
        if folder.exists():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            archive, unpacked = Path(scratch) / "archive", Path(scratch) / "unpacked"
            _download(url, archive, digest)
            _unpack(archive, unpacked, url)
            if not (unpacked / folder.name).is_dir():
                names = ", ".join(sorted(path.name for path in unpacked.iterdir())[:5])
                raise ValueError(f"the archive {url} holds no folder {folder.name}, only {names}")
            _give_name(unpacked / folder.name, folder)
    except _NETWORK_ERRORS as error:
        reason = error.reason if isinstance(error, URLError) and not isinstance(error, HTTPError) else error
        raise OSError(
            f"cannot fetch {url}: {reason}; try again, or fetch it elsewhere and unpack it in {folder.parent}"
        ) from None
    except OSError as error:
        cure = {
            errno.ENOSPC: "free some space or choose another place",
            errno.EDQUOT: "free some space or choose another place",
            errno.EACCES: "change its permissions or choose another place",
        }.get(error.errno or 0, "choose another place")
        raise OSError(
            f"cannot write what {url} holds into {folder.parent}: {error.strerror or error}; {cure}"
        ) from None


def _download(url: str, path: Path, digest: str) -> None:
    """Write what lies at ``url`` to ``path`` and verify it."""
    kind = {32: "md5", 64: "sha256"}.get(len(digest))
    if kind is None:
        raise ValueError(f"digest must be an md5 (32 digits) or sha256 (64 digits), got {digest!r}")
    checksum = hashlib.new(kind, usedforsecurity=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    request = urllib.request.Request(url, headers={"User-Agent": "kdlit"})
    with (
        urllib.request.urlopen(request, timeout=_TIMEOUT) as response,
        path.open("wb") as file,
        Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress,
    ):
        total = int(response.headers.get("Content-Length") or 0)
        if total > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, f"{total} bytes do not fit")
        task = progress.add_task(url.rsplit("/", 1)[-1], total=total or None)
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            checksum.update(chunk)
            progress.advance(task, len(chunk))
        size = file.tell()
    if size < total:
        raise ConnectionError(f"the connection ended after {size} of {total} bytes")
    if checksum.hexdigest() != digest.lower():
        raise ValueError(
            f"{url} ({size} bytes) is not the published archive: its {kind} is {checksum.hexdigest()}, not {digest}. "
            "Try again; if that does not help, the address now gives another file or something on the way replaces it"
        )


def _unpack(archive: Path, folder: Path, url: str) -> None:
    """Unpack a zip or tar archive that is not trusted: plain files and folders alone, and none outside ``folder``."""
    free, unpacked = shutil.disk_usage(archive.parent).free, 0

    def count(size: int) -> None:
        nonlocal unpacked
        unpacked += size
        if unpacked > free:
            raise OSError(errno.ENOSPC, f"it unpacks to more than the {free} bytes that are free")

    def checked(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        _refuse(member.name, not (member.isfile() or member.isdir()), url)
        count(member.size)
        return tarfile.data_filter(member, path)

    try:
        with archive.open("rb") as file:
            is_zip = file.read(2) == b"PK"  # zipfile looks at the end, where a tar archive may hold a zip
        if is_zip:
            with zipfile.ZipFile(archive) as zipped:
                for member in zipped.infolist():
                    _refuse(member.filename, stat.S_ISLNK(member.external_attr >> 16), url)
                    count(member.file_size)
                zipped.extractall(folder)
        else:
            with tarfile.open(archive) as tarred:
                tarred.extractall(folder, filter=checked)
    except _DAMAGED as error:
        raise ValueError(f"the archive {url} cannot be unpacked: {error}") from None


def _refuse(name: str, special: bool, url: str) -> None:
    windows = PureWindowsPath(name)  # splits at both kinds of slashes
    if (
        special
        or "\0" in name
        or windows.drive
        or windows.root
        or PurePosixPath(name).is_absolute()
        or ".." in windows.parts
    ):
        raise ValueError(f"the archive {url} is refused: {name!r} in it is a link or device or leads out of the folder")


def _give_name(unpacked: Path, folder: Path) -> None:
    try:
        unpacked.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another process was first
            raise


@dataclass(frozen=True)
class Archive:
    """Where a data set is published.

    Attributes:
        title: the data set's name.
        url: address of its archive.
        md5: sum of that archive.
        folder: the folder in it.
        size: of the archive, for people to read.
    """

    title: str
    url: str
    md5: str
    folder: str
    size: str


class PublishedDataModule(PictureDataModule):
    """Base of data modules that read the folder of a published archive: finds it, or fetches it.

    A subclass names the ``archive`` and what must lie in its folder, and implements ``load``, which first calls
    :meth:`check_folder`.

    Args:
        root: folder that holds the unpacked folder of the archive; relative to the working directory.
        download: fetch and unpack the published archive if the folder is not there.
        verify: whether to insist on the published files; false for your own pictures in this layout.
        **kwargs: of :class:`~kdlit.data.PictureDataModule`: normalisation, splits, augmentation and batches.

    Raises:
        FileNotFoundError: If a file is missing and ``download`` is false.
    """

    archive: ClassVar[Archive]
    files: ClassVar[Mapping[str, str | None]]  # what must be there, and its md5 where it is published

    def __init__(self, root: str = "data", download: bool = False, verify: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.download = download
        self.verify = verify
        if not download:
            self.check_folder()

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return Path(self.root).expanduser() / self.archive.folder

    def prepare_data(self) -> None:
        """Fetch the published archive if asked to; its folder gets its name only when whole and verified."""
        if self.download and not self._has_files(self.folder.parent):
            fetch(self.archive.url, self.folder, self.archive.md5)
        self.check_folder()

    def check_folder(self) -> None:
        """Refuse a folder in which something is missing.

        Raises:
            FileNotFoundError: If something is missing; the message says what to do in this case.
            ValueError: If the folder cannot be read.
        """
        folder = self.folder.absolute()
        root, name, title = folder.parent, self.archive.folder, self.archive.title
        file = root / self.archive.url.rsplit("/", 1)[-1]
        try:
            if self._has_files(folder):
                return
            missing = [part for part in self.files if not _exists(folder / part)]
            is_file, is_there, archive_is_there = folder.is_file(), _exists(folder), _exists(file)
            is_too_deep = self._has_files(root)
        except OSError as error:
            raise ValueError(f"cannot read {folder}: {error.strerror}; check its permissions") from None
        command = f"unzip -q {file} -d {root}" if file.suffix == ".zip" else f"tar -xf {file} -C {root}"
        if is_file:
            cure = f"{folder} is a file, not a folder; if it is the archive, rename it to {file.name} and unpack that"
        elif is_too_deep:
            cure = (
                f"--data.root is the folder of the files itself, but must be the one that holds {name}: {root.parent}"
            )
            cure += "" if root.name == name else f"; rename {root} to {root.parent / name}"
        elif is_there and archive_is_there:
            cure = f"the archive was unpacked only in part; unpack it again: {command}"
        elif is_there:
            cure = (
                f"it is only a part of {title}; move it away and set --data.download=true, or unpack "
                f"{self.archive.url} in {root}"
            )
        elif archive_is_there:
            cure = f"{file.name} has not been unpacked: {command}"
        else:
            cure = (
                f"set --data.root to the folder that holds {name}, or --data.download=true to fetch {title} "
                f"({self.archive.size})"
            )
        raise FileNotFoundError(f"no {', '.join(missing)} in {folder}; {cure}")

    def _has_files(self, folder: Path) -> bool:
        return all(_exists(folder / part) for part in self.files)

    def read(self, name: str) -> bytes:
        """Return what is in one of the files, with ``verify`` only if it is the published one.

        Raises:
            ValueError: If it cannot be read, is an archive or not the published file.
        """
        path = (self.folder / name).absolute()
        if path.is_dir():
            raise ValueError(f"{path} is a folder, but must be a file of {self.archive.title}")
        if not path.is_file() and _exists(path):  # a pipe would be waited for
            raise ValueError(f"{path} is a device or pipe, but must be a file of {self.archive.title}")
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}; check its permissions") from None
        for magic, kind in _MAGIC.items():
            if raw.startswith(magic):
                raise ValueError(f"{path} is {kind}, but must be a file out of one; unpack it")
        published = self.files[name]
        if self.verify and published and (md5 := hashlib.md5(raw, usedforsecurity=False).hexdigest()) != published:
            raise ValueError(
                f"{path} ({len(raw)} bytes) is not the published {self.archive.title} file: its md5 differs, {md5} "
                f"instead of {published}. If it is damaged, move {path.parent} away and set --data.download=true; for "
                "pictures of your own, set --data.verify=false"
            )
        return raw

    def pictures_of(self, name: str, image: NDArray[np.uint8], labels: Any, first: int = 0) -> Pictures:
        """Join the pictures of a file, shape ``(N, C, H, W)``, with their labels, which count from ``first``.

        Raises:
            ValueError: If the labels are not one integer for each picture or there is no such class.
        """
        path, last = (self.folder / name).absolute(), first + len(self.class_names) - 1
        try:
            target = np.asarray(labels)
        except ValueError:  # lists of several lengths
            target = np.empty(0, dtype=object)
        if target.ndim != 1 or (target.dtype.kind not in "iu" and len(image)):
            raise ValueError(f"the labels in {path} must be one integer for each picture; write the file again")
        if len(target) != len(image):
            raise ValueError(f"{path} holds {len(target)} labels for {len(image)} pictures; write the files again")
        if len(target) and (target.min() < first or target.max() > last):
            raise ValueError(
                f"labels in {path} must lie in {first}..{last} ({len(self.class_names)} classes are named), but they "
                f"lie in {target.min()}..{target.max()}; name all classes or correct the labels"
            )
        return Pictures(
            torch.from_numpy(np.ascontiguousarray(image)), torch.from_numpy(target.astype(np.int64) - first)
        )


def _exists(path: Path) -> bool:
    """Like ``path.exists()``, which later versions of Python let hide a lack of permission."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
