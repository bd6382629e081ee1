"""What all picture data modules share: a held-out validation split, augmentation of whole batches, loaders."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from kdlit.data.transforms import cutout, normalize, random_crop, random_flip
from kdlit.types import Batch


@dataclass
class Pictures:
    """Labelled pictures that fit into memory.

    Attributes:
        image: uint8, shape ``(N, C, H, W)``.
        target: int64, shape ``(N,)``.
    """

    image: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: Tensor) -> Pictures:
        return Pictures(self.image[index], self.target[index])


class PictureDataset(Dataset[Batch]):
    """Hands out whole batches: one indexing and one transform call for all pictures of a batch."""

    def __init__(self, pictures: Pictures, transform: Callable[[Tensor], dict[str, Tensor]]) -> None:
        self.pictures = pictures
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Batch:
        """One sample without a batch dimension."""
        return cast("Batch", {key: value[0] for key, value in self.__getitems__([index]).items()})  # type: ignore[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """One batch; the DataLoader prefers this to one call a picture."""
        index = torch.as_tensor(indices)
        pictures = self.pictures[index]
        return cast("Batch", {**self.transform(pictures.image), "target": pictures.target, "index": index})


def _as_it_is(batch: Any) -> Any:
    return batch


class SplitDataModule(L.LightningDataModule):
    """Base of all data modules: loaders over a training, a validation and a test part.

    A subclass fills ``datasets`` (``train``, ``val`` and ``test``), ``class_names`` and ``num_classes`` in ``setup``.
    Validation pictures are held out of the training pictures, the same number of each class, so that hyper-parameters
    and checkpoints are never chosen on the test pictures.

    Args:
        val_size: training pictures held out for validation: a count, or a share if below 1; 0 trains on all.
        batch_size: pictures a training step, on each device.
        eval_batch_size: pictures a step of validation, test and prediction.
        num_workers: processes that prepare batches.
        split_seed: draws the validation pictures; on its own, so that runs with other seeds share the split.

    Raises:
        ValueError: If a size is out of range.
    """

    num_classes: int
    class_names: Sequence[str]
    collate: Callable[[Any], Any] | None = None

    def __init__(
        self, val_size: float, batch_size: int, eval_batch_size: int, num_workers: int, split_seed: int
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        check_at_least(0, val_size=val_size, num_workers=num_workers)
        self.val_size = val_size
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.split_seed = split_seed
        self.datasets: dict[str, Dataset[Batch]] = {}

    def _loader(self, split: str) -> DataLoader[Batch]:
        train = split == "train"
        return DataLoader(
            self.datasets[split],
            batch_size=self.batch_size if train else self.eval_batch_size,
            shuffle=train,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self.collate,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training pictures, shuffled and augmented."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Held-out training pictures; no loader, and so no validation during training, if there are none.

        Raises:
            ValueError: If nothing is held out and validation was asked for by itself.
        """
        if len(self.datasets["val"]):  # type: ignore[arg-type]
            return self._loader("val")
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING:
            raise ValueError("there is nothing to validate on: val_size is 0; set --data.val_size or use `kdlit test`")
        return []

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test pictures."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Test pictures."""
        return self._loader("test")


def check_at_least(least: float, **values: float) -> None:
    """Raise ValueError, naming the argument, unless every value is at least ``least``."""
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{name} must be >= {least}, got {value!r}")


class PictureDataModule(SplitDataModule):
    """Base of data modules whose pictures fit into memory: a subclass implements :meth:`load`.

    Args:
        mean: mean of each channel, for pictures scaled to 0..1.
        std: standard deviation of each channel, for pictures scaled to 0..1.
        val_size: training pictures held out for validation: a count, or a share if below 1; 0 trains on all.
        padding: black pixels around a training picture before a window of its size is cut out at random.
        flip: whether training pictures are mirrored at random.
        batch_size: pictures a training step, on each device.
        eval_batch_size: pictures a step of validation, test and prediction.
        strong_view: whether training batches also hold ``image_strong``, for losses that compare two views.
        num_workers: processes that prepare batches; 0 is fastest for small pictures, prepared a batch at a time.
        split_seed: draws the validation pictures; on its own, so that runs with other seeds share the split.

    Raises:
        ValueError: If a size is out of range or ``mean`` and ``std`` do not fit each other.
    """

    collate = staticmethod(_as_it_is)

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        val_size: float = 0,
        padding: int = 4,
        flip: bool = True,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        strong_view: bool = False,
        num_workers: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__(val_size, batch_size, eval_batch_size, num_workers, split_seed)
        check_at_least(0, padding=padding)
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ValueError(f"mean and std must have one value a channel, std above 0; got {mean!r} and {std!r}")
        self.mean, self.std = tuple(mean), tuple(std)
        self.padding = padding
        self.flip = flip
        self.strong_view = strong_view
        self._rand_augment = v2.RandAugment(num_ops=2, magnitude=10)
        self._pictures: dict[str, Pictures] = {}

    @abstractmethod
    def load(self) -> dict[str, Pictures]:
        """Set ``class_names`` and return the ``train`` and ``test`` pictures, and ``val`` where it comes apart."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Read, check and split the pictures, once.

        Raises:
            ValueError: If a label is out of range or a split would be empty.
        """
        if self._pictures:
            return
        splits = self.load()
        self.num_classes = len(self.class_names)
        for split, pictures in splits.items():
            _check(pictures, split, self.num_classes, channels=len(self.mean))
        if "val" not in splits:
            held_out = hold_out(splits["train"].target, self.val_size, self.split_seed)
            splits |= {"train": splits["train"][~held_out], "val": splits["train"][held_out]}
        if (train_size := len(splits["train"])) < self.batch_size:
            raise ValueError(f"batch_size is {self.batch_size}, but only {train_size} training pictures are there")
        self._pictures = splits
        self.datasets = {
            split: PictureDataset(pictures, self._views if split == "train" else self._as_they_are)
            for split, pictures in splits.items()
        }

    def augment(self, image: Tensor) -> Tensor:
        """Shift and mirror a batch of training pictures: uint8 ``(B, C, H, W)`` in and out."""
        image = random_crop(image, self.padding)
        return random_flip(image) if self.flip else image

    def augment_strongly(self, image: Tensor) -> Tensor:
        """The same, then two operations of RandAugment at magnitude 10 and a grey square of half the picture's side."""
        distorted = torch.stack([self._rand_augment(one) for one in self.augment(image)])
        return cutout(distorted, min(image.shape[-2:]) // 2)

    def prepare(self, image: Tensor) -> Tensor:
        """Normalise a batch of pictures: uint8 ``(B, C, H, W)`` in, float32 out."""
        return normalize(image, self.mean, self.std)

    def _views(self, image: Tensor) -> dict[str, Tensor]:
        """What a training batch shows of its pictures."""
        views = {"image": self.prepare(self.augment(image))}
        if self.strong_view:
            views["image_strong"] = self.prepare(self.augment_strongly(image))
        return views

    def _as_they_are(self, image: Tensor) -> dict[str, Tensor]:
        """What a batch for evaluation shows of its pictures."""
        return {"image": self.prepare(image)}


def hold_out(target: Tensor, size: float, seed: int) -> Tensor:
    """Choose pictures to hold out, evenly over the classes.

    Args:
        target: labels, shape ``(N,)``.
        size: how many pictures, or which share of them if below 1.
        seed: draws them.

    Returns:
        Boolean mask of shape ``(N,)`` with ``size`` true values.

    Raises:
        ValueError: If no picture would be left to train on.
    """
    count = round(size * len(target)) if size < 1 else int(size)
    if count >= len(target):
        raise ValueError(f"val_size must leave pictures to train on, got {size!r} of {len(target)}")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(target), generator=generator)
    # The n-th picture of every class comes before the (n+1)-th of any: the first ones are spread evenly.
    rank_in_class = torch.empty_like(shuffled)
    for label in torch.unique(target):
        members = shuffled[target[shuffled] == label]
        rank_in_class[members] = torch.arange(len(members))
    order = shuffled[rank_in_class[shuffled].argsort(stable=True)]
    held_out = torch.zeros(len(target), dtype=torch.bool)
    held_out[order[:count]] = True
    return held_out


def _check(pictures: Pictures, split: str, num_classes: int, channels: int) -> None:
    if len(pictures) == 0:
        raise ValueError(f"the {split} data holds no picture")
    if len(pictures.image) != len(pictures.target):
        raise ValueError(f"the {split} data holds {len(pictures.image)} pictures but {len(pictures.target)} labels")
    if pictures.image.shape[1] != channels:
        raise ValueError(f"the {split} pictures have {pictures.image.shape[1]} channels, but mean and std {channels}")
    low, high = int(pictures.target.min()), int(pictures.target.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels of the {split} data must lie in 0..{num_classes - 1} ({num_classes} classes are named), "
            f"but they lie in {low}..{high}"
        )
