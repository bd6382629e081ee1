"""What all picture data modules share: splits, subsets, label noise, the views of each network, loaders."""

from __future__ import annotations

import copy
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from kdlit.data.inputs import Interpolation, NetworkInput, Views
from kdlit.data.sampling import (
    EpochDataset,
    EpochLoader,
    EpochSampler,
    ResumableLoader,
    Samples,
    generator,
    start_worker,
)
from kdlit.data.transforms import crop_and_flip, cutout, one_by_one
from kdlit.fingerprint import of_tensors
from kdlit.types import Batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _whole(finish: Callable[[Any], Any], samples: Samples) -> Any:
    return finish(samples.batch)


class SplitDataModule(L.LightningDataModule):
    """Base of all data modules: loaders over a training, a validation and a test part.

    A subclass fills ``datasets`` (``train``, ``val`` and ``test``), ``class_names`` and ``num_classes`` in ``setup``;
    :meth:`divide` says which pictures are for what. Validation pictures are held out of the training pictures, the same
    number of each class, so that hyper-parameters and checkpoints are never chosen on the test pictures. A subclass may
    also give ``collate``, a function that has the last word on every batch.

    The order of the training pictures and their augmentation follow from ``seed``, the epoch and the
    picture alone: neither from ``num_workers`` nor from what networks and losses draw.

    Args:
        input: how the student wants its pictures.
        val_size: training pictures held out for validation: a count, or a share if below 1; 0 trains on all.
        batch_size: pictures a training step, on each device.
        eval_batch_size: pictures a step of validation, test and prediction.
        num_workers: processes that prepare batches.
        split_seed: draws the validation pictures and the subset; on its own, so that runs with other seeds share them.
        subset: share of the training pictures to train on, of what the validation leaves.
        subset_by: scores the training pictures, and those with the highest scores are kept; see
            :class:`~kdlit.data.TeacherConfidence`. By default the subset is drawn, the same share of each class.
        label_noise: share of the training labels replaced by another class, each of them equally likely (symmetric
            noise); labels for validation and test stay true.
        noise_seed: draws the label noise; teacher and student of one study need the same.
        seed: draws order and augmentation of the training pictures; by default the seed of the run.
        strong_view: whether training batches also hold ``image_strong``, for losses that compare two views.
        transforms: what happens to each training picture, uint8 ``(3, H, W)``, in place of the standard recipe.
        teacher_input: how the teacher wants its pictures, if not as the student does; batches then also hold
            ``image_teacher``, the same pictures with the same augmentation.

    Raises:
        ValueError: If a value is out of range.
    """

    num_classes: int
    class_names: Sequence[str]
    collate: Callable[[Any], Any] = staticmethod(_as_it_is)

    def __init__(
        self,
        input: NetworkInput,
        *,
        val_size: float = 0,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        split_seed: int = 0,
        subset: float = 1.0,
        subset_by: Callable[[DataLoader[Batch]], Any] | None = None,
        label_noise: float = 0.0,
        noise_seed: int = 0,
        seed: int | None = None,
        strong_view: bool = False,
        transforms: list[nn.Module] | None = None,
        teacher_input: NetworkInput | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        check_at_least(0, val_size=val_size, num_workers=num_workers, seed=seed or 0)
        if not 0 < subset <= 1:
            raise ValueError(f"subset must lie in (0, 1], got {subset!r}")
        if subset_by is not None and subset == 1:
            raise ValueError("subset_by says which pictures to keep, but subset=1 keeps all; set subset below 1")
        if not 0 <= label_noise < 1:
            raise ValueError(f"label_noise must lie in [0, 1), got {label_noise!r}")
        self.views = Views(input, teacher_input)
        self.val_size = val_size
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.split_seed = split_seed
        self.subset = subset
        self.subset_by = subset_by
        self.label_noise = label_noise
        self.noise_seed = noise_seed
        self.seed = seed
        self.strong_view = strong_view
        self.transforms = None if transforms is None else v2.Compose(transforms)
        self.datasets: dict[str, EpochDataset] = {}
        self._seed: tuple[int, L.Trainer | None] | None = None
        self._restored: tuple[int, int] | None = None
        self._passes = 0

    def __getstate__(self) -> dict[str, Any]:
        """What worker processes need of the views, without the trainer and the pictures."""
        return self.__dict__ | {"trainer": None, "datasets": {}, "_seed": None}

    # Which pictures

    def divide(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Divide the training pictures, given their true labels, shape ``(N,)``.

        Returns:
            train: positions of those to train on, int64; a subset by score is taken only when training starts.
            val: positions of those held out, int64.
            noisy: labels to train with, int64, shape ``(N,)``.

        Raises:
            ValueError: If too few are left for a batch.
        """
        held_out = hold_out(target, self.val_size, self.split_seed)
        train, val = (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
        size = round(self.subset * len(train))
        if size < self.batch_size:
            raise ValueError(f"batch_size is {self.batch_size}, but only {size} training pictures are there")
        if size < len(train) and self.subset_by is None:
            train = train[hold_out(target[train], size, self.split_seed)]
        return train, val, symmetric_noise(target, self.num_classes, self.label_noise, self.noise_seed)

    def _take_subset(self) -> None:
        """Keep the training pictures with the highest scores, once; the first process decides for all."""
        if self.subset_by is None:
            return
        ranking, self.subset_by = self.subset_by, None
        train = self.datasets["train"]
        plain = copy.copy(train)
        plain.augmented = False
        score = ranking(DataLoader(plain, batch_size=self.eval_batch_size, collate_fn=partial(_whole, _as_it_is))).cpu()
        if score.shape != (len(train),):
            raise ValueError(
                f"subset_by must give one score for each of {len(train)} training pictures, but gave shape "
                f"{tuple(score.shape)}"
            )
        kept = score.argsort(descending=True, stable=True)[: round(self.subset * len(train))].sort().values
        self.datasets["train"] = train.only(kept if self.trainer is None else self.trainer.strategy.broadcast(kept))

    @property
    def train_target(self) -> Tensor:
        """Labels of the training pictures in the order of ``batch["index"]``, int64, shape ``(N,)``."""
        self._take_subset()
        return self.datasets["train"].labels

    # What the teacher sees

    @property
    def mixes_batches(self) -> bool:
        """Whether ``collate`` changes what the data set gives."""
        return self.collate is not _as_it_is

    def teacher_view(self, augmented: bool) -> dict[str, Any]:
        """Every setting that changes the training pictures as the teacher sees them, plain values by name.

        Args:
            augmented: whether they are augmented.
        """
        shown = asdict(self.views.teacher or self.views.student)
        settings = {f"input {name}": value for name, value in shown.items()}
        return settings | self._recipe() if augmented else settings

    def _recipe(self) -> dict[str, Any]:
        """Every setting of the augmentation."""
        return {"transforms": without_addresses(self.transforms), "strong_view": self.strong_view}

    def in_order(self, dataset: EpochDataset, keys: Iterable[Sequence[int]]) -> DataLoader[Batch]:
        """Loader of samples in a given order, made where and as those of training are; ``collate`` has no word.

        Args:
            dataset: the samples.
            keys: those of each batch, ``epoch * len(dataset) + index``.
        """
        self._place(dataset)
        return EpochLoader(
            dataset,
            batch_sampler=keys,  # type: ignore[arg-type]
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available() and dataset.device.type == "cpu",
            collate_fn=partial(_whole, _as_it_is),
            worker_init_fn=start_worker,
            generator=torch.Generator(),
        )

    # Loaders

    def _place(self, dataset: EpochDataset) -> None:
        """Make batches on the device that trains, unless worker processes make them."""
        if self.trainer is not None and not self.num_workers:
            dataset.to(self.trainer.strategy.root_device)

    def _loader(self, split: str) -> DataLoader[Batch]:
        if split not in self.datasets:
            raise RuntimeError(f"{type(self).__name__} has no {split} pictures yet; call setup('fit') first")
        dataset = self.datasets[split]
        self._place(dataset)
        settings: dict[str, Any] = {"batch_size": self.eval_batch_size}
        if split == "train":
            dataset.seed = self._order_seed()
            settings = {"batch_size": self.batch_size, "sampler": self._sampler(dataset)}
        kind = EpochLoader if self.trainer is None else ResumableLoader
        return kind(
            dataset,
            **settings,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available() and dataset.device.type == "cpu",
            collate_fn=partial(_whole, self.collate),
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # otherwise each pass draws from the generator that dropout draws from
        )

    def _sampler(self, dataset: EpochDataset) -> EpochSampler:
        sampler = EpochSampler(len(dataset), self.batch_size, dataset.seed)
        trainer = self.trainer

        def progress() -> tuple[int, int]:
            if trainer is None:
                self._passes += 1
                return self._passes - 1, 0
            # Batches are done only in the trainer's own loader, and of these only when an epoch is taken up again.
            loaders = trainer.fit_loop._combined_loader.flattened if trainer.training else []  # type: ignore[union-attr]
            is_own = any(getattr(loader, "sampler", None) is sampler for loader in loaders)
            done = trainer.fit_loop.epoch_loop.batch_progress.current.ready if is_own and not sampler.passes else 0
            now = (self.batch_size, trainer.world_size)
            if done and self._restored not in (None, now):
                raise ValueError(
                    f"the checkpoint is from the middle of an epoch with (batch_size, processes) of {self._restored}, "
                    f"which cannot go on with {now}; use the same, or a checkpoint from the end of an epoch"
                )
            return trainer.current_epoch, done

        sampler.progress = progress
        return sampler

    def _order_seed(self) -> int:
        """The seed given, or that of the run: the same in all its processes, and after a resume."""
        if self._seed is None or self._seed[1] is not self.trainer:
            seed = (torch.initial_seed() if self.seed is None else self.seed) % 2**32
            self._seed = (seed if self.trainer is None else self.trainer.strategy.broadcast(seed), self.trainer)
        return self._seed[0]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same order."""
        processes = 1 if self.trainer is None else self.trainer.world_size
        return {"seed": self._order_seed(), "batch_size": self.batch_size, "processes": processes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the order of the run that is resumed.

        Raises:
            ValueError: If another one is asked for.
        """
        going_on = self.trainer is not None and self.trainer.training
        if going_on and self.seed is not None and self.seed % 2**32 != state_dict["seed"]:
            raise ValueError(
                f"data.seed is {self.seed}, but the run that is resumed draws by {state_dict['seed']}; set it to that"
            )
        self._seed = (state_dict["seed"], self.trainer)
        self._restored = (state_dict["batch_size"], state_dict["processes"])

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training pictures, shuffled and augmented."""
        self._take_subset()
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Held-out training pictures; no loader, and so no validation during training, if there are none.

        Raises:
            ValueError: If nothing is held out and validation was asked for by itself.
        """
        if len(self.datasets["val"]):
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


def without_addresses(transform: object) -> str:
    """How a transform describes itself, the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(transform))


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


class PictureDataset(EpochDataset):
    """Pictures in memory: one indexing and one transform for all pictures of a batch, on the device they lie on.

    Args:
        pictures: the pictures.
        data: gives the views.
        augmented: whether these are training pictures.
    """

    def __init__(self, pictures: Pictures, data: PictureDataModule, augmented: bool) -> None:
        super().__init__(len(pictures), columns=10 if data.strong_view else 4, augmented=augmented)
        self.pictures = pictures
        self.data = data

    def to(self, device: torch.device) -> None:
        """Move the pictures, so that batches are made there."""
        self.device = device
        self._draws = (None, torch.empty(0))
        self.pictures = Pictures(self.pictures.image.to(device), self.pictures.target.to(device))

    def fingerprint(self, times: bool = True) -> str:
        """Of all pixels."""
        return of_tensors({"image": self.pictures.image})

    @property
    def labels(self) -> Tensor:
        """Of all pictures, int64, shape ``(N,)``."""
        return self.pictures.target

    def only(self, index: Tensor) -> PictureDataset:
        """The same with fewer pictures."""
        return PictureDataset(self.pictures[index.to(self.device)], self.data, self.augmented)

    def read(self, index: Tensor, draws: Tensor) -> dict[str, Tensor]:
        """Make one batch."""
        image = self.pictures.image.index_select(0, index)
        if self.augmented:
            strong = self.data.augment_strongly(image, draws[:, 4:]) if self.data.strong_view else None
            views = self.data.views.training(self.data.augment(image, draws[:, :4]), strong)
        else:
            views = self.data.views.evaluation(image)
        return {**views, "target": self.pictures.target[index], "index": index}


class PictureDataModule(SplitDataModule):
    """Base of data modules whose pictures fit into memory: a subclass implements :meth:`load`.

    Without worker processes the pictures lie on the device that trains, and are augmented there.

    Args:
        mean: mean of each channel, for pictures scaled to 0..1.
        std: standard deviation of each channel, for pictures scaled to 0..1.
        size: side that pictures are scaled to for the student; None leaves them as they are.
        interpolation: how they are scaled.
        padding: black pixels around a training picture before a window of its size is cut out at random.
        flip: whether training pictures are mirrored at random.
        auto_augment: whether training pictures then undergo the AutoAugment policy of CIFAR-10.
        **kwargs: of :class:`~kdlit.data.SplitDataModule`: splits, subsets, label noise, views and batches.

    Raises:
        ValueError: If a value is out of range or ``mean`` and ``std`` do not fit each other.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: int | None = None,
        interpolation: Interpolation = "bilinear",
        padding: int = 4,
        flip: bool = True,
        auto_augment: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(NetworkInput(mean, std, size, interpolation), **kwargs)
        check_at_least(0, padding=padding)
        if auto_augment and self.transforms is not None:
            raise ValueError("auto_augment and transforms exclude each other; put v2.AutoAugment among the transforms")
        if (auto_augment or self.strong_view) and len(mean) not in (1, 3):
            raise ValueError(f"auto_augment and strong_view need pictures of 1 or 3 channels, got mean of {len(mean)}")
        self.padding = padding
        self.flip = flip
        self._policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10) if auto_augment else None
        self._rand_augment = v2.RandAugment(num_ops=2, magnitude=10)
        self._pictures: dict[str, Pictures] = {}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_pictures": {}}

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
            _check(pictures, split, self.num_classes, channels=len(self.views.student.mean))
        if "val" in splits and self.val_size:
            raise ValueError("the data has a validation part of its own, so val_size must be 0: nothing is held out")
        whole = splits["train"]
        train, val, noisy = self.divide(whole.target)
        splits = {"val": whole[val]} | splits | {"train": Pictures(whole.image[train], noisy[train])}
        self._pictures = splits
        self.datasets = {
            split: PictureDataset(pictures, self, augmented=split == "train") for split, pictures in splits.items()
        }

    def augment(self, image: Tensor, draws: Tensor) -> Tensor:
        """Augment training pictures by the standard recipe or ``transforms``.

        Args:
            image: uint8, shape ``(B, C, H, W)``.
            draws: random numbers in [0, 1), float64, shape ``(B, 4)``.
        """
        if self.transforms is not None:
            return one_by_one(self.transforms, image, draws[:, 3])
        top, left = (draws[:, :2] * (2 * self.padding + 1)).long().unbind(1)
        image = crop_and_flip(image, self.padding, top, left, (draws[:, 2] < 0.5) & self.flip)
        return image if self._policy is None else one_by_one(self._policy, image, draws[:, 3])

    def augment_strongly(self, image: Tensor, draws: Tensor) -> Tensor:
        """The same, then two operations of RandAugment at magnitude 10 and a grey square of half the picture's side.

        Args:
            image: uint8, shape ``(B, C, H, W)``.
            draws: random numbers in [0, 1), float64, shape ``(B, 6)``.
        """
        image = one_by_one(self._rand_augment, self.augment(image, draws), draws[:, 3])
        height, width = image.shape[-2:]
        row, column = (draws[:, 4] * height).long(), (draws[:, 5] * width).long()
        return cutout(image, min(height, width) // 2, row, column)

    def _recipe(self) -> dict[str, Any]:
        own = {} if self.transforms is not None else {"padding": self.padding, "flip": self.flip}
        strong = {"rand_augment": without_addresses(self._rand_augment)} if self.strong_view else {}
        return super()._recipe() | own | {"auto_augment": without_addresses(self._policy)} | strong


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


def symmetric_noise(target: Tensor, num_classes: int, share: float, seed: int) -> Tensor:
    """Replace a share of the labels by another class each, all equally likely.

    Args:
        target: labels, int64, shape ``(N,)``.
        num_classes: how many classes there are.
        share: which part of the labels is replaced, in [0, 1).
        seed: draws which, and by what.
    """
    draw = generator(seed, 2)  # unrelated to the stream that pictures are held out by
    chosen = torch.randperm(len(target), generator=draw)[: round(share * len(target))]
    shift = torch.randint(1, max(2, num_classes), (len(chosen),), generator=draw)
    noisy = target.clone()
    noisy[chosen] = (target[chosen] + shift) % num_classes
    return noisy


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
