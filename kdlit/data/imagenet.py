"""ImageNet, or any photographs in a folder for each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from kdlit.data.base import SplitDataModule, check_at_least, hold_out
from kdlit.types import Batch


class ImageNet(SplitDataModule):
    """Photographs in ``<root>/train/<class>/*`` and ``<root>/val/<class>/*``, by the standard recipe.

    Training pictures: a random part of 8 to 100 % of the area at ``size`` pixels, mirrored at random. Evaluation: the
    shorter side scaled to ``resize`` pixels, then the middle ``size`` pixels. The pictures in ``val`` are the test set;
    validation pictures are held out of ``train``. Classes are numbered in the order of their folders' names, which is
    that of published ImageNet weights if the folders carry the WordNet numbers.

    Args:
        root: folder that holds ``train`` and ``val``; relative to the working directory.
        size: side of the pictures in pixels.
        resize: shorter side before the middle is cut out for evaluation.
        mean: mean of each channel, for pictures scaled to 0..1.
        std: standard deviation of each channel, likewise.
        val_size: training pictures held out for validation: a count, or a share if below 1; 0 trains on all.
        strong_view: whether training batches also hold ``image_strong``, for losses that compare two views.
        batch_size: pictures a training step, on each device.
        eval_batch_size: pictures a step of validation, test and prediction.
        num_workers: processes that decode pictures.
        split_seed: draws the validation pictures.

    Raises:
        ValueError: If a size is out of range.
        FileNotFoundError: If ``train`` or ``val`` is missing.
    """

    def __init__(
        self,
        root: str = "data/imagenet",
        size: int = 224,
        resize: int = 256,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        val_size: float = 0,
        strong_view: bool = False,
        batch_size: int = 256,
        eval_batch_size: int = 256,
        num_workers: int = 8,
        split_seed: int = 0,
    ) -> None:
        super().__init__(val_size, batch_size, eval_batch_size, num_workers, split_seed)
        check_at_least(1, size=size)
        check_at_least(size, resize=resize)
        self.root = Path(root).expanduser()
        for part in ("train", "val"):
            if not (self.root / part).is_dir():
                raise FileNotFoundError(
                    f"no folder {(self.root / part).absolute()}; set --data.root to the folder that holds train and "
                    "val, with a folder for each class in both"
                )
        finish = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
        weak = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        train_views = {"image": v2.Compose([*weak, *finish])}
        if strong_view:
            grey = v2.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0))
            train_views["image_strong"] = v2.Compose([*weak, v2.RandAugment(2, 10), *finish, grey])
        eval_views = {"image": v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(size), *finish])}
        self._views = {"train": train_views, "val": eval_views, "test": eval_views}

    def setup(self, stage: str) -> None:
        """List the pictures and split them, once.

        Raises:
            ValueError: If the classes of ``train`` and ``val`` differ, or a split would be empty.
        """
        if self.datasets:
            return
        train, test = _list(self.root / "train"), _list(self.root / "val")
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise ValueError(
                f"train and val must have the same class folders, but in {self.root.absolute()} only one of them has "
                f"{', '.join(odd[:5])}{' ...' if len(odd) > 5 else ''}"
            )
        self.class_names, self.num_classes = train.classes, len(train.classes)
        held_out = hold_out(torch.tensor(train.targets), self.val_size, self.split_seed)
        pictures = {
            split: _Photographs(train if split != "test" else test, self._views[split]) for split in self._views
        }
        self.datasets = {
            "train": Subset(pictures["train"], (~held_out).nonzero().flatten().tolist()),
            "val": Subset(pictures["val"], held_out.nonzero().flatten().tolist()),
            "test": pictures["test"],
        }


class _Photographs(Dataset[Batch]):
    """Decodes a picture and makes its views; a file that cannot be decoded is named."""

    def __init__(self, folder: ImageFolder, views: dict[str, v2.Compose]) -> None:
        self.folder = folder
        self.views = views

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> Batch:
        path, target = self.folder.samples[index]
        try:
            picture = self.folder.loader(path)
        except OSError as error:
            raise ValueError(f"cannot decode {path}: {error}; replace the file or remove it") from None
        views = {name: view(picture) for name, view in self.views.items()}
        return cast("Batch", {**views, "target": target, "index": index})


def _list(folder: Path) -> ImageFolder:
    try:
        return ImageFolder(str(folder))
    except OSError as error:
        raise ValueError(f"cannot list the pictures in {folder.absolute()}: {error}") from None
