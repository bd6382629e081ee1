"""Photographs in folders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from kdlit.data import ImageNet


@pytest.fixture
def folders(tmp_path):
    """Two classes of plain colour, six training and two test pictures of each, of odd sizes and modes."""
    for split, count in (("train", 6), ("val", 2)):
        for label, level in (("n01", 40), ("n02", 200)):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                mode = "L" if number == 1 else "RGB"
                shape = (50 + number, 70) if mode == "L" else (50 + number, 70, 3)
                Image.fromarray(np.full(shape, level, np.uint8), mode).save(folder / f"{number}.jpg")
    return tmp_path


def ready(root, **kwargs):
    settings = {"size": 32, "resize": 40, "batch_size": 4, "eval_batch_size": 4, "num_workers": 0}
    data = ImageNet(str(root), **(settings | kwargs))
    data.setup("fit")
    return data


def test_pictures_come_with_the_class_of_their_folder(folders):
    data = ready(folders)
    assert data.class_names == ["n01", "n02"]
    assert data.num_classes == 2
    batches = [*data.train_dataloader(), *data.test_dataloader()]
    assert sum(len(batch["target"]) for batch in batches) == 16
    for batch in batches:
        assert batch["image"].shape[1:] == (3, 32, 32)
        bright = batch["image"].mean((1, 2, 3)) > 0
        assert torch.equal(bright.long(), batch["target"])


def test_normalisation_is_that_of_the_arguments(folders):
    data = ready(folders, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    batch = next(iter(data.test_dataloader()))
    assert batch["image"][0].mean() == pytest.approx(40 / 255, abs=0.01)


def test_validation_pictures_are_held_out_of_training(folders):
    data = ready(folders, val_size=4)
    train, val = (
        torch.cat([b["index"] for b in loader]) for loader in (data.train_dataloader(), data.val_dataloader())
    )
    assert len(train) == 8
    assert len(val) == 4
    assert not set(train.tolist()) & set(val.tolist())
    assert ready(folders).val_dataloader() == []


def test_two_views(folders):
    batch = next(iter(ready(folders, strong_view=True).train_dataloader()))
    assert batch["image_strong"].shape == batch["image"].shape
    assert not torch.equal(batch["image_strong"], batch["image"])


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*train; set --data.root"):
        ImageNet(str(tmp_path))


def test_classes_must_agree(folders):
    (folders / "val" / "n02").rename(folders / "val" / "n03")
    with pytest.raises(ValueError, match="only one of them has n02, n03"):
        ready(folders)


def test_a_class_without_pictures_is_named(folders):
    (folders / "train" / "n00").mkdir()
    with pytest.raises(ValueError, match="cannot list the pictures in .*train: .*n00"):
        ready(folders)


def test_a_broken_picture_is_named(folders):
    broken = folders / "val" / "n01" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cannot decode .*n01/0.jpg: .*; replace the file or remove it"):
        list(ready(folders).test_dataloader())


@pytest.mark.parametrize(
    ("setting", "message"), [({"resize": 10}, "resize must be >= 32"), ({"batch_size": 0}, "batch")]
)
def test_bad_settings_are_refused(folders, setting, message):
    with pytest.raises(ValueError, match=message):
        ready(folders, **setting)


def test_real_photographs_are_read(shared):
    data = ready(shared / "data" / "imagenet-slice", size=64, resize=80)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].isfinite().all()
    assert data.num_classes == 40
