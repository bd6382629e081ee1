"""Short names for what is in weights, pictures and files: two with the same name hold the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

_CHUNK = 2**26  # bytes copied from a device at a time


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, in this order; neither device nor memory layout count.

    Args:
        tensors: dense tensors of any type by name.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        values = tensor.detach().flatten()
        for part in values.split(max(1, _CHUNK // values.element_size())):  # type: ignore[no-untyped-call]
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def of_text(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def of_network(network: nn.Module) -> str:
    """:func:`of_tensors` of all parameters and buffers, those left out of its ``state_dict`` included."""
    named = (network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False))
    return of_tensors(dict(chain(*named)))


def of_files(folder: Path, names: Iterable[bytes], times: bool = True) -> str:
    """SHA-256 of names, sizes and times of change: a million files take seconds, and none is opened.

    A copy that does not keep the times, as ``cp`` without ``-p``, has another name. Where the folder lies does not
    count.

    Args:
        folder: what the names are relative to.
        names: relative paths, as the file system spells them.
        times: whether the times of change count.

    Raises:
        ValueError: If a file is not there or must not be looked at.
    """
    digest, place = hashlib.sha256(), os.fsencode(folder) + os.fsencode(os.sep)
    for name in names:
        try:
            found = os.stat(place + name)
        except OSError as error:
            raise ValueError(
                f"cannot look at {folder / os.fsdecode(name)}: {error.strerror}; the folder may have changed since it "
                "was listed"
            ) from None
        digest.update(b"%b\0%d\0%d\0" % (name, found.st_size, found.st_mtime_ns if times else 0))
    return digest.hexdigest()


def sketch(pictures: Tensor, numbers: int = 8) -> Tensor:
    """A few numbers for each picture that any change of it changes: sums of its values with random signs.

    The mean square of the differences of two sketches is, on average, the sum of the squared differences of the values.

    Args:
        pictures: float, shape ``(B, ...)``.
        numbers: how many numbers.

    Returns:
        float64, shape ``(B, numbers)``, on the CPU.
    """
    values = pictures.detach().cpu().double().flatten(1)
    draw = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (values.shape[1], numbers), generator=draw) * 2 - 1
    return values @ signs.double()
