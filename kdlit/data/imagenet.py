"""ImageNet, or any photographs in a folder for each class."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from kdlit.data.base import SplitDataModule, check_at_least, without_addresses
from kdlit.data.inputs import Interpolation, NetworkInput, Views
from kdlit.data.photographs import BrokenPhotograph, LostPhotograph, Photographs, list_photographs, read_photograph
from kdlit.data.sampling import EpochDataset
from kdlit.data.transforms import one_by_one
from kdlit.fingerprint import of_files

Transform = Callable[[Tensor], Tensor]


class ImageNet(SplitDataModule):
    """Photographs in ``<root>/train/<class>/*`` and ``<root>/val/<class>/*``, by the standard recipe.

    Training pictures: a random part of 8 to 100 % of the area at ``size`` pixels, mirrored at random. Evaluation: the
    shorter side scaled to ``resize`` pixels, then the middle ``size`` pixels. The pictures in ``val`` are the test set;
    validation pictures are held out of ``train``. Classes are numbered in the order of their folders' names, which is
    that of published ImageNet weights if the folders carry the WordNet numbers.

    Where the teacher has an input of its own, pictures are augmented at the larger of both sizes, then scaled to each.

    Args:
        root: folder that holds ``train`` and ``val``; relative to the working directory.
        size: side of the pictures in pixels.
        resize: shorter side before the middle is cut out for evaluation.
        mean: mean of each channel, for pictures scaled to 0..1.
        std: standard deviation of each channel, likewise.
        interpolation: how pictures are scaled.
        classes: file that names the class folders, one a line, in the order in which to number them; by default all
            folders, by name.
        broken: what to do about a file that cannot be decoded, or has vanished since the pictures were listed:
            ``"raise"`` an error that names it, or ``"skip"`` it, with a warning that names it and a count at the end.
        batch_size: pictures a training step, on each device.
        num_workers: processes that decode pictures.
        **kwargs: of :class:`~kdlit.data.SplitDataModule`: splits, subsets, label noise, views and batches.

    Raises:
        ValueError: If a value is out of range.
        FileNotFoundError: If ``train`` or ``val`` is missing.
    """

    def __init__(
        self,
        root: str = "data/imagenet",
        size: int = 224,
        resize: int = 256,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        interpolation: Interpolation = "bilinear",
        classes: str | None = None,
        broken: Literal["raise", "skip"] = "raise",
        batch_size: int = 256,
        num_workers: int = 8,
        **kwargs: Any,
    ) -> None:
        check_at_least(1, size=size)
        check_at_least(size, resize=resize)
        student = NetworkInput(mean, std, size, interpolation, resize=resize)
        super().__init__(student, batch_size=batch_size, num_workers=num_workers, **kwargs)
        if broken not in ("raise", "skip"):
            raise ValueError(f"broken must be 'raise' or 'skip', got {broken!r}")
        self.root = Path(root).expanduser()
        self.classes = None if classes is None else Path(classes).expanduser()
        self.broken = broken
        for part in ("train", "val"):
            if not (self.root / part).is_dir():
                raise FileNotFoundError(
                    f"no folder {(self.root / part).absolute()}; set --data.root to the folder that holds train and "
                    "val, with a folder for each class in both"
                )
        if self.classes is not None and not self.classes.is_file():
            raise FileNotFoundError(f"no file {self.classes.absolute()}; set --data.classes to a list of class folders")
        self.augment, self.augment_strongly = photograph_transforms(self.views, self.transforms)

    def setup(self, stage: str) -> None:
        """List the pictures and split them, once.

        Raises:
            ValueError: If the classes of ``train`` and ``val`` differ, or a split would be empty.
        """
        if self.datasets:
            return
        order = None if self.classes is None else _read_text(self.classes).split()
        if order == []:
            raise ValueError(f"{self.classes} names no class; write one a line, or set --data.classes to null")
        if twice := [name for name, count in Counter(order).items() if count > 1]:
            raise ValueError(f"{self.classes} names {', '.join(twice[:5])} more than once")
        train = list_photographs(self.root / "train", order)
        test = list_photographs(self.root / "val", train.class_names)
        self.class_names, self.num_classes = train.class_names, len(train.class_names)
        positions, held_out, noisy = self.divide(train.target)
        self.datasets = {
            "train": PhotographDataset(train, positions, noisy, self, augmented=True),
            "val": PhotographDataset(train, held_out, train.target, self, augmented=False),
            "test": PhotographDataset(test, torch.arange(len(test)), test.target, self, augmented=False),
        }

    def _recipe(self) -> dict[str, Any]:
        strong = {"strong": without_addresses(self.augment_strongly)} if self.strong_view else {}
        return {"transforms": without_addresses(self.augment), "strong_view": self.strong_view} | strong

    def teardown(self, stage: str) -> None:
        """Say how many files had to be skipped."""
        for split, dataset in self.datasets.items():
            assert isinstance(dataset, PhotographDataset)
            broken = dataset.broken.int()
            if self.trainer is not None and self.trainer.world_size > 1:  # each process has met its own
                broken = self.trainer.strategy.reduce(broken.to(self.trainer.strategy.root_device), reduce_op="sum")
            if skipped := int((broken > 0).sum()):
                rank_zero_warn(
                    f"{skipped} of {len(dataset)} {split} pictures could not be decoded and were skipped; figures for "
                    f"{split} are over the others"
                )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"cannot read {path.absolute()}: {error}; it must be text, with a class folder a line"
        ) from None


class PhotographDataset(EpochDataset):
    """Decodes pictures and makes their views; a file that cannot be decoded is named.

    Args:
        photographs: the files.
        positions: which of them to use, int64, shape ``(N,)``.
        target: labels of all files.
        data: gives the views.
        augmented: whether these are training pictures.

    Attributes:
        broken: which pictures have been skipped so far, bool, shape ``(N,)``, shared with the worker processes.
    """

    def __init__(
        self, photographs: Photographs, positions: Tensor, target: Tensor, data: ImageNet, augmented: bool
    ) -> None:
        super().__init__(len(positions), columns=2, augmented=augmented)
        self.photographs = photographs
        self.positions = positions
        self.target = target
        self.data = data
        self.broken = torch.zeros(len(positions), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]

    def fingerprint(self, times: bool = True) -> str:
        """Of the files: their names, sizes and times of change."""
        names = self.photographs.names.numpy().tobytes()
        ends = [0, *self.photographs.ends.tolist()]
        chosen = (names[ends[one] : ends[one + 1]] for one in self.positions.tolist())
        return of_files(self.photographs.folder, chosen, times)

    @property
    def labels(self) -> Tensor:
        """Of all pictures, int64, shape ``(N,)``."""
        return self.target[self.positions]

    def only(self, index: Tensor) -> PhotographDataset:
        """The same with fewer pictures."""
        return PhotographDataset(self.photographs, self.positions[index], self.target, self.data, self.augmented)

    def read(self, index: Tensor, draws: Tensor) -> dict[str, Tensor]:
        """Make one batch.

        Raises:
            ValueError: If a file cannot be decoded, or none of the batch where such files are skipped.
        """
        found = [(row, picture) for row, one in enumerate(index.tolist()) if (picture := self._decode(one)) is not None]
        if not found:
            raise ValueError(
                f"none of the {len(index)} pictures of a batch can be decoded, from "
                f"{self.photographs.path(int(self.positions[index[0]]))} on; replace them or set a larger batch size"
            )
        rows, pictures = [row for row, _ in found], [picture for _, picture in found]
        index, draws = index[rows], draws[rows]
        if self.augmented:
            strong = one_by_one(self.data.augment_strongly, pictures, draws[:, 1]) if self.data.strong_view else None
            views = self.data.views.training(one_by_one(self.data.augment, pictures, draws[:, 0]), strong)
        else:
            views = self.data.views.evaluation(pictures)
        return {**views, "target": self.target[self.positions[index]], "index": index}

    def _decode(self, index: int) -> Tensor | None:
        try:
            return read_photograph(self.photographs.path(int(self.positions[index])))
        except (BrokenPhotograph, LostPhotograph) as error:
            if self.data.broken == "raise":
                raise
            if not self.broken[index]:
                self.broken[index] = True
                warnings.warn(f"skipped: {error}", stacklevel=1)
            return None


def photograph_transforms(views: Views, weak: Transform | None = None) -> tuple[Transform, Transform]:
    """Augmentation of one photograph, at the size of the larger network.

    Args:
        views: what the networks want; their sizes must be set.
        weak: takes the place of the standard recipe.

    Returns:
        weak: by default a random part of 8 to 100 % of the area, mirrored at random.
        strong: the same, then two operations of RandAugment at magnitude 10 and a quarter of the area covered with
            grey.

    Raises:
        ValueError: If a size is not set.
    """
    inputs = [one for one in (views.student, views.teacher) if one is not None]
    sizes = [one.size for one in inputs if one.size is not None]
    if len(sizes) < len(inputs):
        raise ValueError("teacher_input needs a size: photographs have none of their own")
    if weak is None:
        mode = InterpolationMode(views.student.interpolation)
        crop = v2.RandomResizedCrop(max(sizes), interpolation=mode, antialias=True)
        weak = v2.Compose([crop, v2.RandomHorizontalFlip()])
    fill = [round(255 * level) for level in views.student.mean]
    grey = v2.RandomErasing(1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0), value=fill)
    return weak, v2.Compose([weak, v2.RandAugment(num_ops=2, magnitude=10), grey])
