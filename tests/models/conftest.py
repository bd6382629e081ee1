"""Golden values of the networks, and the parameters and images that they were measured with."""

import json
import zlib
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent.parent / "golden" / "models"


def uniform(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [0, 1) that depend on the key alone."""
    raw = np.random.PCG64(zlib.crc32(key.encode())).random_raw(prod(shape))
    return ((raw >> np.uint64(11)) * 2.0**-53).reshape(shape)


def golden_value(key: str, shape: tuple[int, ...]) -> np.ndarray:
    u = uniform(key, shape)
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape)
    if key.endswith(("running_mean", "bias")):
        return 0.2 * u - 0.1
    if len(shape) == 1:
        return 0.5 + u
    return (2 * u - 1) * np.sqrt({4: 6, 2: 3}[len(shape)] / prod(shape[1:]))


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """What was measured on the published code: names, shapes and counts (json) and outputs (npz)."""
    merged: dict[str, Any] = {"models": {}, "arrays": {}}
    for file in ("cifar", "more"):
        measured = json.loads((FOLDER / f"{file}.json").read_text())
        merged["models"] |= measured.pop("models")
        merged |= measured
        with np.load(FOLDER / f"{file}.npz") as arrays:
            merged["arrays"] |= dict(arrays)
    return merged


@pytest.fixture(scope="session")
def golden_fill(golden: dict[str, Any]) -> Callable[[str, nn.Module], nn.Module]:
    """Give a network the parameters that the golden outputs belong to."""

    def fill(name: str, model: nn.Module) -> nn.Module:
        ends = golden["models"][name]["residual_ends"]
        state = {
            key: torch.from_numpy(
                np.asarray(golden_value(key, tuple(value.shape)) * (0.25 if key in ends else 1)).astype(np.float32)
            )
            for key, value in model.state_dict().items()
        }
        model.load_state_dict(state)
        return model

    return fill


@pytest.fixture(scope="session")
def golden_image() -> Callable[[int], Tensor]:
    """Two images of a size that is a multiple of 4."""

    def draw(size: int) -> Tensor:
        low = 4 * uniform("input.low", (2, 3, 4, 4)) - 2
        high = 2 * uniform("input.high", (2, 3, size, size)) - 1
        image = low.repeat(size // 4, axis=2).repeat(size // 4, axis=3) + high
        return torch.from_numpy(image.astype(np.float32))

    image = draw(32)
    assert image[0, 0, 0, 0].item() == pytest.approx(-0.4168524444103241, rel=1e-12)
    assert image[1, 2, 31, -1].item() == pytest.approx(-1.672490119934082, rel=1e-12)
    return draw
