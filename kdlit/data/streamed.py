"""Photographs in shards, for data that outgrows one disk: written once, then streamed from a folder or a bucket.

``python -m kdlit.data.streamed FOLDER OUT`` writes the shards of one folder of class folders.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from kdlit.data.base import check_at_least, hold_out
from kdlit.data.imagenet import Transform, photograph_transforms
from kdlit.data.inputs import Interpolation, NetworkInput, Views
from kdlit.data.photographs import BrokenPhotograph, Photographs, decode_photograph, list_photographs
from kdlit.data.sampling import clear_errors, start_worker, watch_workers
from kdlit.types import Batch

try:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import Cache
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f'streaming needs litdata ({error}): pip install "kdlit[streaming]"') from None

HELD_OUT = "held_out"


def write_shards(
    folder: Path,
    out: Path,
    val_size: float = 0,
    split_seed: int = 0,
    shard_mb: int = 64,
    num_workers: int = 4,
) -> int:
    """Copy the pictures of a folder into shards, as they are and in random order; a terminal shows a progress bar.

    Every picture is decoded once, so that no broken one gets in: an error names those there are. ``out`` appears once
    all of it is written.

    Args:
        folder: folder of class folders, see :func:`~kdlit.data.photographs.list_photographs`.
        out: folder to write, which must not exist.
        val_size: pictures held out for validation: a count, or a share if below 1; they get shards of their own below
            ``out``. The same pictures as :class:`~kdlit.data.ImageNet` holds out.
        split_seed: draws them.
        shard_mb: size of a shard in megabytes.
        num_workers: processes that read and check pictures.

    Returns:
        How many pictures there are.

    Raises:
        ValueError: If ``out`` exists, a number is out of range, or a picture is broken.
        FileNotFoundError: If there is no such folder.
    """
    check_at_least(0, val_size=val_size, num_workers=num_workers)
    check_at_least(1, shard_mb=shard_mb)
    out = out.expanduser().absolute()
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another folder")
    photographs = list_photographs(folder)
    held_out = hold_out(photographs.target, val_size, split_seed)
    scratch = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        for part, chosen in ((scratch, ~held_out), (scratch / HELD_OUT, held_out)):
            if chosen.any():
                _write(photographs, chosen.nonzero().flatten(), part, shard_mb, num_workers, bool(held_out.any()))
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return len(photographs)


class StreamedPhotographs(L.LightningDataModule):
    """Photographs in shards ``<root>/train`` and ``<root>/val``, by the recipe of :class:`~kdlit.data.ImageNet`.

    Shards come from :func:`write_shards`. Those in a bucket pass through a cache of bounded size. The pictures in
    ``val`` are the test set; pictures for validation are held out of ``train`` when its shards are written.

    Each process and worker reads its own part of the shards. The order of the training pictures follows from ``seed``,
    the epoch, ``batch_size``, and the numbers of devices and workers; pictures that do not fill a batch on every device
    are left out of an epoch. A checkpoint within an epoch goes on with the next batch if these and ``root`` are the
    same, though with other random crops.

    Args:
        root: folder, or address that litdata knows (``s3://``, ``gs://``, ``azure://``, ``r2://``, ``hf://``; a disk
            to be cached as ``local:/path``), that holds ``train`` and ``val``.
        size: side of the pictures in pixels.
        resize: shorter side before the middle is cut out for evaluation.
        mean: mean of each channel, for pictures scaled to 0..1.
        std: standard deviation of each channel, likewise.
        interpolation: how pictures are scaled.
        strong_view: whether training batches also hold ``image_strong``, for losses that compare two views.
        transforms: what happens to each training picture, uint8 ``(3, H, W)``, in place of the standard recipe.
        teacher_input: how the teacher wants its pictures, if not as the student does, as for ImageNet.
        batch_size: pictures a training step, on each device.
        eval_batch_size: pictures a step of validation, test and prediction.
        num_workers: processes that decode pictures, for each device.
        seed: draws the order of the training pictures.
        cache_dir: folder for shards from afar; by default one of litdata's below the home folder.
        cache_gb: gigabytes that these may take.

    Raises:
        ValueError: If a value is out of range.
        FileNotFoundError: If a local root has no shards.
    """

    num_classes: int
    class_names: Sequence[str]

    def __init__(
        self,
        root: str,
        size: int = 224,
        resize: int = 256,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        interpolation: Interpolation = "bilinear",
        strong_view: bool = False,
        transforms: list[nn.Module] | None = None,
        teacher_input: NetworkInput | None = None,
        batch_size: int = 256,
        eval_batch_size: int = 256,
        num_workers: int = 8,
        seed: int = 0,
        cache_dir: str | None = None,
        cache_gb: int = 100,
    ) -> None:
        super().__init__()
        check_at_least(1, size=size, batch_size=batch_size, eval_batch_size=eval_batch_size, cache_gb=cache_gb)
        check_at_least(size, resize=resize)
        check_at_least(0, num_workers=num_workers, seed=seed)
        afar = re.match(r"\w+://|local:", root) is not None
        self.root = root.rstrip("/") if afar else str(Path(root).expanduser().absolute())
        for part in ("train", "val"):
            if not afar and not Path(self.root, part, "index.json").is_file():
                raise FileNotFoundError(
                    f"no shards in {self.root}/{part}; set --data.root to the folder that holds train and val, written "
                    "by `python -m kdlit.data.streamed FOLDER OUT`"
                )
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.cache = {"cache_dir": cache_dir, "max_cache_size": f"{cache_gb}GB"}
        self.views = Views(NetworkInput(mean, std, size, interpolation, resize=resize), teacher_input)
        weak, strong = photograph_transforms(self.views, None if transforms is None else v2.Compose(transforms))
        self._augment = {"weak": weak} | ({"strong": strong} if strong_view else {})
        self.datasets: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        """Fetch the lists of shards, once.

        Raises:
            ValueError: If something else wrote the shards, or the classes of ``train`` and ``val`` differ.
        """
        if self.datasets:
            return
        train, about = self._open("train", train=True)
        test, about_test = self._open("val", train=False)
        if about["class_names"] != about_test["class_names"]:
            odd = sorted(set(about["class_names"]) ^ set(about_test["class_names"]))
            raise ValueError(
                f"train and val must have the same classes, but in {self.root} only one of them has "
                f"{', '.join(odd[:5])}{' ...' if len(odd) > 5 else ''}; write the shards again from folders that agree"
            )
        self.class_names, self.num_classes = about["class_names"], len(about["class_names"])
        self.datasets = {"train": train, "test": test}
        if about[HELD_OUT]:
            self.datasets["val"], _ = self._open(f"train/{HELD_OUT}", train=False)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training pictures, shuffled and augmented.

        Raises:
            ValueError: If they do not fill a batch on every device.
        """
        loader = self._loader("train")
        if not len(loader):
            raise ValueError(
                f"batch_size is {self.batch_size} on each device, but too few training pictures are in {self.root}"
            )
        return loader

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Held-out training pictures; no loader, and so no validation during training, if there are none.

        Raises:
            ValueError: If nothing is held out and validation was asked for by itself.
        """
        if "val" in self.datasets:
            return self._loader("val")
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING:
            raise ValueError(
                f"there is nothing to validate on in {self.root}: write the training shards with --val_size, or use "
                "`kdlit test`"
            )
        return []

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test pictures."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Test pictures."""
        return self._loader("test")

    def _open(self, part: str, train: bool) -> tuple[Any, dict[str, Any]]:
        shards = StreamingDataset(
            f"{self.root}/{part}",
            shuffle=train,
            drop_last=train,
            seed=self.seed,
            item_shuffle_window=0,
            transform=_Decoder(self._augment if train else {"whole": nn.Identity()}),
            **self.cache,
        )
        index = json.loads(Path(shards.input_dir.path, "index.json").read_text())
        if "kdlit" not in index:
            raise ValueError(
                f"the shards in {self.root}/{part} hold no class names; write them by `python -m kdlit.data.streamed`"
            )
        return shards, index["kdlit"]

    def _loader(self, split: str) -> DataLoader[Batch]:
        processes = 1 if self.trainer is None else self.trainer.world_size
        if split != "train" and len(self.datasets[split]) // self.eval_batch_size < processes > 1:
            raise ValueError(
                f"{processes} processes share the {split} pictures by whole batches, but there are fewer batches of "
                f"eval_batch_size {self.eval_batch_size} than processes; set a smaller eval_batch_size"
            )
        loader = _Loader(
            self.datasets[split],
            batch_size=self.batch_size if split == "train" else self.eval_batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_Collate(self.views),
            worker_init_fn=start_worker,
        )
        return cast("DataLoader[Batch]", loader)


class _Loader(StreamingDataLoader):  # type: ignore[misc]
    """Begins a new epoch after a resumed one; litdata's own does so only for those who ask for one batch too many."""

    def __iter__(self) -> Iterator[Any]:
        with clear_errors():
            for batch in super().__iter__():
                watch_workers()
                self.restore = False
                yield batch


class _Decoder:
    """Turns what is in a shard into a sample: uint8 pictures, ``(3, H, W)``, by the name of their transform."""

    def __init__(self, transforms: dict[str, Transform]) -> None:
        self.transforms = transforms

    def __call__(self, stored: dict[str, Any]) -> dict[str, Any]:
        picture = decode_photograph(bytes(stored["image"]), os.fsdecode(bytes(stored["name"])))
        pictures = {name: transform(picture) for name, transform in self.transforms.items()}
        return {**pictures, "target": stored["target"], "index": stored["index"]}


class _Collate:
    """Makes a batch of samples, and of it what each network wants."""

    def __init__(self, views: Views) -> None:
        self.views = views

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        columns = {name: [sample[name] for sample in samples] for name in samples[0]}
        labels = {name: torch.as_tensor(columns.pop(name)) for name in ("target", "index")}
        if "whole" in columns:
            return {**self.views.evaluation(columns["whole"]), **labels}
        return {**self.views.training(**{name: torch.stack(one) for name, one in columns.items()}), **labels}


class _Files(Dataset[Any]):
    """What goes into the shards for each picture, or the error that says what is wrong with it."""

    def __init__(self, photographs: Photographs) -> None:
        self.photographs = photographs

    def __getitem__(self, index: int) -> dict[str, Any] | Exception:
        path = self.photographs.path(index)
        try:
            data = path.read_bytes()
            decode_photograph(data, path)
        except (OSError, BrokenPhotograph) as error:
            return error
        name, target = os.fsencode(self.photographs.name(index)), int(self.photographs.target[index])
        return {"image": data, "name": name, "target": target, "index": index}


def _write(
    photographs: Photographs, positions: Tensor, out: Path, shard_mb: int, num_workers: int, held_out: bool
) -> None:
    """Write the shards of some pictures and the list of them, with what is in them beside it."""
    # Neighbours in a shard come close together in every epoch, so they must not be of one class.
    order = positions[torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))].tolist()
    files = DataLoader(_Files(photographs), batch_size=None, sampler=order, num_workers=num_workers)
    quiet = not sys.stderr.isatty()
    shards, broken = Cache(str(out), chunk_bytes=f"{shard_mb}MB"), []
    bar = track(files, "writing shards", len(order), disable=quiet, console=Console(stderr=True))
    for number, sample in enumerate(bar):
        if isinstance(sample, Exception):
            broken.append(str(sample))
        elif not broken:
            shards[number] = sample
    if broken:
        more = f" ... ({len(broken)} pictures in all)" if len(broken) > 5 else ""
        raise ValueError("; ".join(broken[:5]) + more)
    shards.done()
    shards.merge()
    index = json.loads((out / "index.json").read_text())
    index["kdlit"] = {"class_names": photographs.class_names, HELD_OUT: held_out}
    (out / "index.json").write_text(json.dumps(index))


def main() -> None:
    """Write shards, as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m kdlit.data.streamed", description="Write the pictures of a folder of class folders into shards."
    )
    parser.add_argument("folder", type=Path, help="folder of class folders")
    parser.add_argument("out", type=Path, help="folder to write, as ROOT/train or ROOT/val")
    parser.add_argument("--val_size", type=float, default=0, help="pictures held out for validation: count or share")
    parser.add_argument("--split_seed", type=int, default=0, help="draws them")
    parser.add_argument("--shard_mb", type=int, default=64, help="size of a shard in megabytes")
    parser.add_argument("--num_workers", type=int, default=4, help="processes that read and check pictures")
    options = parser.parse_args()
    try:
        count = write_shards(**vars(options))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{count} pictures are in {options.out}")


if __name__ == "__main__":
    main()
