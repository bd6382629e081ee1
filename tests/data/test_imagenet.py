"""Photographs in folders."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from kdlit.data import ImageNet, NetworkInput
from kdlit.losses import CrossEntropyLoss
from kdlit.modules import ClassificationDistillation
from tests.conftest import Diary, TinyNet


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
    train, val = (set(data.datasets[split].positions.tolist()) for split in ("train", "val"))
    assert len(val) == 4
    assert train | val == set(range(12))
    assert not train & val
    assert sum(len(batch["target"]) for batch in data.val_dataloader()) == 4
    assert ready(folders).val_dataloader() == []


def colours(batch):
    return (batch["image"].mean((1, 2, 3)) > 0).long()


def test_workers_change_nothing(folders):
    plain, helped = ready(folders, strong_view=True), ready(folders, strong_view=True, num_workers=2)
    for a, b in zip(plain.train_dataloader(), helped.train_dataloader(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_standard_recipe_is_that_of_torchvision(folders):
    data = ready(folders, num_workers=0)
    dataset = data.datasets["test"]
    recipe = v2.Compose([v2.Resize(40, antialias=True), v2.CenterCrop(32)])
    with Image.open(dataset.photographs.path(0)) as picture:
        pixels = torch.from_numpy(np.array(recipe(picture.convert("RGB")))).permute(2, 0, 1)
    expected = v2.functional.normalize(pixels / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert torch.allclose(dataset[0]["image"], expected, atol=0.02)


def test_classes_are_numbered_by_a_file_where_one_is_given(folders, tmp_path):
    order = tmp_path / "classes.txt"
    order.write_text("n02\nn01\n")
    data = ready(folders, classes=str(order))
    assert data.class_names == ["n02", "n01"]
    for batch in [*data.train_dataloader(), *data.test_dataloader()]:
        assert torch.equal(colours(batch), 1 - batch["target"])
    order.write_text("n02\nn01\nn03\n")
    with pytest.raises(ValueError, match="missing: n03"):
        ready(folders, classes=str(order))
    order.write_text("n02\nn01\nn02\n")
    with pytest.raises(ValueError, match=r"classes.txt names n02 more than once"):
        ready(folders, classes=str(order))
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere.txt; set --data.classes"):
        ready(folders, classes="nowhere.txt")


def test_labels_can_be_noisy_and_pictures_few(folders):
    data = ready(folders, subset=0.5, label_noise=0.5, batch_size=2)
    assert len(data.datasets["train"]) == 6
    (batch,) = ready(folders, label_noise=0.5, batch_size=12).train_dataloader()
    assert (batch["target"] != colours(batch)).sum() == 6
    for batch in data.test_dataloader():
        assert torch.equal(batch["target"], colours(batch))


def test_each_network_gets_its_size_from_the_same_crop(folders):
    teacher = NetworkInput((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), size=48, interpolation="bicubic", resize=48)
    data = ready(folders, teacher_input=teacher, strong_view=True)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == batch["image_strong"].shape == (4, 3, 32, 32)
    assert batch["image_teacher"].shape == batch["image_teacher_strong"].shape == (4, 3, 48, 48)
    smaller = v2.functional.resize(batch["image_teacher"], [32, 32], antialias=True)
    assert (smaller - batch["image"]).abs().mean() < 0.02
    assert next(iter(data.test_dataloader()))["image_teacher"].shape == (4, 3, 48, 48)
    with pytest.raises(ValueError, match="teacher_input needs a size"):
        ready(folders, teacher_input=NetworkInput((0.5,) * 3, (0.5,) * 3))


def test_two_views(folders):
    batch = next(iter(ready(folders, strong_view=True).train_dataloader()))
    assert batch["image_strong"].shape == batch["image"].shape
    assert not torch.equal(batch["image_strong"], batch["image"])


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*train; set --data.root"):
        ImageNet(str(tmp_path))


def test_classes_must_agree(folders):
    (folders / "val" / "n02").rename(folders / "val" / "n03")
    with pytest.raises(ValueError, match="val must have .* missing: n02; unexpected: n03"):
        ready(folders)


def test_a_class_without_pictures_is_named(folders):
    (folders / "train" / "n00").mkdir()
    with pytest.raises(ValueError, match=r"class folders without a picture in .*train: n00"):
        ready(folders)


def test_a_broken_picture_is_named(folders):
    broken = folders / "val" / "n01" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cannot decode .*n01/0.jpg: .*; replace the file or remove it"):
        list(ready(folders).test_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_are_skipped_and_counted_if_asked_to(folders, workers):
    broken = folders / "train" / "n01" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    (folders / "train" / "n02" / "3.jpg").write_bytes(b"")
    data = ready(folders, broken="skip", num_workers=workers, batch_size=3)
    loader = data.train_dataloader()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            batches = list(loader)
            assert sum(len(batch["target"]) for batch in batches) == 10
            for batch in batches:
                assert torch.equal(batch["target"], colours(batch))
                assert len(batch["image"]) == len(batch["target"]) == len(batch["index"])
    if not workers:  # those of workers go to their standard error
        assert [str(warning.message)[:7] for warning in caught] == ["skipped"] * 2
    with pytest.warns(match="2 of 12 train pictures could not be decoded and were skipped"):
        data.teardown("fit")


def test_a_disk_that_is_gone_is_not_skipped(folders):
    data = ready(folders, broken="skip")
    shutil.rmtree(folders / "val")
    with pytest.raises(ValueError, match=r"cannot read .*n01/0.jpg: No such file"):
        list(data.test_dataloader())


def test_a_batch_of_which_nothing_is_left_is_an_error(folders):
    for path in (folders / "val" / "n01").iterdir():
        path.write_bytes(b"")
    with (
        pytest.warns(match="skipped"),
        pytest.raises(ValueError, match=r"none of the 2 pictures .* from .*n01/0.jpg on"),
    ):
        list(ready(folders, broken="skip", eval_batch_size=2).test_dataloader())


def test_a_resumed_run_goes_on_with_the_very_next_batch(folders, trainer, tmp_path):
    def module():
        return ClassificationDistillation(TinyNet(2), {"ce": CrossEntropyLoss()}, input_size=(3, 32, 32))

    whole, rest = Diary(save_at=4, path=tmp_path / "at.ckpt"), Diary()
    settings = {"max_epochs": 2, "limit_val_batches": 0}
    for diary, path in ((whole, None), (rest, tmp_path / "at.ckpt")):
        data = ImageNet(str(folders), size=32, resize=40, batch_size=4, num_workers=0)
        trainer(callbacks=[diary], **settings).fit(module(), data, ckpt_path=path)
    assert len(whole.batches) == 6
    assert rest.batches == whole.batches[4:]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"broken": "ignore"}, "broken must be 'raise' or 'skip'"),
        ({"resize": 10}, "resize must be >= 32"),
        ({"batch_size": 0}, "batch"),
    ],
)
def test_bad_settings_are_refused(folders, setting, message):
    with pytest.raises(ValueError, match=message):
        ready(folders, **setting)


def test_real_photographs_are_read(shared):
    data = ready(shared / "data" / "imagenet-slice", size=64, resize=80)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].isfinite().all()
    assert data.num_classes == 40
