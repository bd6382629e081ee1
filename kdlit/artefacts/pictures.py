"""Real pictures of a run, and whether two forms of a network say the same about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeGuard, cast

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from kdlit.artefacts.formats import ExportError, Predict
from kdlit.data import SplitDataModule
from kdlit.data.inputs import NetworkInput
from kdlit.modules.base import as_given

TOLERANCE = 1e-4  # of the largest logit: float32 in another order of sums differs by 1e-6


class Shown(NamedTuple):
    """Pictures as the networks are shown them.

    Attributes:
        split: ``val`` or ``test``.
        image: for the student, float32, shape ``(N, C, H, W)``.
        image_teacher: for the teacher, likewise; those of the student where it has none of its own.
        target: labels, if there are any: class indices of shape ``(N,)``, or whatever else the task has.
    """

    split: str
    image: Tensor
    image_teacher: Tensor
    target: Tensor | None


def real_pictures(data: L.LightningDataModule, count: int) -> Shown:
    """Take validation pictures, or test pictures where none are held out; evenly over those that there are.

    Args:
        data: the data of the run; data modules that are not of kdlit give their first ones.
        count: how many.

    Raises:
        FileNotFoundError: If the data is not there.
        ValueError: If there are fewer than 4 pictures.
    """
    try:
        split, batches = _gather(data, count)
    except FileNotFoundError as error:
        hint = "" if "--data." in str(error) else "; where the pictures have moved, say so, as by --data.root=FOLDER"
        raise FileNotFoundError(f"{error}{hint}") from error
    image, teacher, target = (
        torch.cat([one[name] for one in batches])[:count] if name in batches[0] else None
        for name in ("image", "image_teacher", "target")
    )
    assert image is not None
    return Shown(split, image, image if teacher is None else teacher, target)


def _gather(data: L.LightningDataModule, count: int) -> tuple[str, list[Any]]:
    """Batches with that many pictures, and the split that they are from."""
    data.prepare_data()
    for split, stage in (("val", "fit"), ("test", "test")):
        data.setup(stage)
        batches: list[Any] = []
        found = 0
        for batch in _batches(data, split, count):
            batches.append(as_given(data, batch))
            found += len(batches[-1]["image"])
            if found >= count:
                break
        if found >= 4:
            return split, batches
    raise ValueError(f"{type(data).__name__} gives fewer than 4 pictures for validation or test to check with")


def _batches(data: L.LightningDataModule, split: str, count: int) -> Iterable[Any]:
    if isinstance(data, SplitDataModule) and not data.mixes_batches:
        dataset = data.datasets.get(split)
        if dataset is None or not len(dataset):
            return []
        chosen = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().long().tolist()
        size = data.eval_batch_size
        return data.in_order(dataset, [chosen[at : at + size] for at in range(0, len(chosen), size)])
    try:
        loader = getattr(data, f"{split}_dataloader")()
    except MisconfigurationException:  # a data module without that method
        return []
    return cast("Iterable[Any]", loader[0] if isinstance(loader, (list, tuple)) and loader else loader)


def raw(image: Tensor, normalisation: NetworkInput) -> Tensor:
    """The uint8 pictures that normalised ones came from, shape ``(N, C, H, W)``.

    Args:
        image: normalised, float32, likewise.
        normalisation: how that was done.

    Raises:
        ValueError: If more was done to them.
    """
    mean, std = (torch.tensor(value)[:, None, None] for value in (normalisation.mean, normalisation.std))
    pictures = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    if not torch.allclose(normalisation.normalize(pictures), image, atol=1e-4):
        raise ValueError(
            "--with_preprocessing: the data does more to its pictures than mean and std say; export without it"
        )
    return pictures


class Parity(NamedTuple):
    """How far two forms of a network are apart.

    Attributes:
        split: ``val`` or ``test``.
        pictures: how many.
        batch_sizes: in which they were shown.
        largest_difference: of any logit.
        relative_difference: the same over the largest logit.
        same_class: share of pictures for which both name the same class; near ties alone may differ. None where
            the task has no classes.
        tolerance: of the relative difference.
    """

    split: str
    pictures: int
    batch_sizes: list[int]
    largest_difference: float
    relative_difference: float
    same_class: float | None
    tolerance: float = TOLERANCE


def logits_in_batches(predict: Predict, image: Tensor, batch_size: int) -> Tensor:
    """Logits of all pictures, shape ``(N, K)``, in batches of 1, 3 and then ``batch_size``."""
    with torch.no_grad():
        return torch.cat([predict(part) for part in _parts(image, batch_size)])


def _parts(image: Tensor, batch_size: int) -> Iterator[Tensor]:
    starts = [0, 1, *range(4, len(image), batch_size)]
    yield from (image[start:end] for start, end in zip(starts, [*starts[1:], len(image)], strict=True))


def are_classes(target: Tensor | None, logits: Tensor) -> TypeGuard[Tensor]:
    """Whether targets are the index of one of at least two logits for each picture.

    Args:
        target: of all pictures, if they have any.
        logits: of the same pictures, shape ``(N, K)``.
    """
    if target is None or logits.ndim != 2 or target.shape != logits.shape[:1] or logits.shape[1] < 2:
        return False
    if target.dtype == torch.bool or target.is_floating_point() or target.is_complex():
        return False
    return int(target.min()) >= 0 and int(target.max()) < logits.shape[1]


def differences(logits: Tensor, trained: Tensor) -> tuple[float, float]:
    """The largest difference of any logit, and the same over the largest logit.

    Args:
        logits: shape ``(N, K)``.
        trained: likewise, of the trained student.
    """
    difference = float((logits.double() - trained.double()).abs().max())
    return difference, difference / max(float(trained.abs().max()), torch.finfo(torch.float32).tiny)


def check_parity(
    predict: Callable[[], Predict], image: Tensor, trained: Tensor, shown: Shown, batch_size: int
) -> tuple[Parity, Tensor]:
    """Compare what a file gives with what the trained student gives.

    Args:
        predict: reads the file.
        image: what the file takes, shape ``(N, C, H, W)``.
        trained: logits of the trained student, shape ``(N, K)``.
        shown: the pictures as the data gives them, for their split and targets.
        batch_size: of most batches.

    Returns:
        How far they are apart, and the logits of the file.

    Raises:
        ExportError: If it cannot be read or run, or the difference is too large.
    """
    try:
        logits = logits_in_batches(predict(), image, batch_size)
    except Exception as error:  # whatever reader or runtime make of it
        raise ExportError(f"the file cannot be used: {type(error).__name__}: {error}") from error
    if logits.shape != trained.shape:
        raise ExportError(f"it gives logits of shape {tuple(logits.shape)}, the student {tuple(trained.shape)}")
    difference, relative = differences(logits, trained)
    same = logits.argmax(1) == trained.argmax(1) if are_classes(shown.target, trained) else None
    parity = Parity(
        shown.split,
        len(image),
        sorted({len(part) for part in _parts(image, batch_size)}),
        difference,
        relative,
        None if same is None else float(same.double().mean()),
    )
    if not relative <= TOLERANCE:
        raise ExportError(
            f"its logits are off by {difference:.3g}, {relative:.2g} of the largest and more than {TOLERANCE:g}"
            + said_of_class(parity)
        )
    return parity, logits


def said_of_class(parity: Parity) -> str:
    """What to add of the classes where the task has some."""
    return "" if parity.same_class is None else f", {100 * parity.same_class:g} % the same class"
