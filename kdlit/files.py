"""Writing files so that a good one is never replaced by half of another, and telling whole ones from others."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn


class WriteError(OSError):
    """A file could not be written; what was there before is untouched."""


def write_whole(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, and give it that name once all of it is on disk.

    Args:
        path: final name; missing folders are made.
        write: gets the open binary file.

    Raises:
        WriteError: If the disk is full, a quota is reached, or the folder cannot be written to.
    """
    path = Path(path)
    scratch = scratch_for(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with scratch.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        cause = _of_the_system(error)
        if cause is None:
            raise
        kept = "; the file that was there before is untouched" if path.exists() else ""
        raise WriteError(f"cannot write {path}: {cause.strerror}{kept}") from error


def _of_the_system(error: BaseException | None) -> OSError | None:
    """What the system said: torch wraps it into an error about positions in the file."""
    while error is not None and not (isinstance(error, OSError) and error.strerror):
        error = error.__cause__ or error.__context__
    return error


def scratch_for(path: Path) -> Path:
    """The name under which this process writes a file before it is whole.

    Args:
        path: its final name.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.kdlit")


def remove_scratch(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left; nobody else may be writing there.

    Args:
        folder: that of the files it wrote.
    """
    for left in folder.glob(".*.kdlit"):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep a folder for this process, until it ends in whatever way.

    Args:
        folder: made if it is not there.

    Raises:
        FileExistsError: If another process has it.
    """
    try:
        import fcntl
    except ImportError:  # as on Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / ".lock"
    with contextlib.ExitStack() as stack:
        while True:
            lock = stack.enter_context(place.open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FileExistsError(
                    f"another process trains in {folder}; wait for it, or name another folder"
                ) from None
            except OSError:  # a file system without locks
                break
            with contextlib.suppress(FileNotFoundError):
                if place.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                    break  # or else its owner has removed it at this very moment
        try:
            yield
        finally:
            place.unlink(missing_ok=True)


def load_whole(path: str | Path) -> Any:
    """Load plain data that ``torch.save`` wrote, after checking that every byte of the file is as it was written.

    Tensors stay on disk until they are used.

    Args:
        path: the file.

    Raises:
        ValueError: If the file is broken, or holds anything but plain data.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (broken := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {broken} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a whole checkpoint: {error}") from None
    except Exception as error:  # a broken file can raise almost anything
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a whole checkpoint of plain data: {first_line}") from None


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoint writer whose files are whole or absent, wherever the system keeps its temporary files.

    A checkpoint that cannot be written costs a warning, not the run, which may find room for the next.

    Attributes:
        failed: why the newest file of each name could not be written, of those that could not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed: dict[str, str] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; a crash or a full disk leaves the one before it."""
        try:
            write_whole(path, lambda file: torch.save(checkpoint, file))
            self.failed.pop(str(path), None)
        except WriteError as error:
            self.failed[str(path)] = str(error)
            rank_zero_warn(f"{error}. Training goes on, and tries again with the next checkpoint: make room for it")
