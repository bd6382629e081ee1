"""The folders of Tiny-ImageNet: read right, and refused clearly."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from kdlit.data import TinyImageNet, tiny_imagenet

WNIDS = ("n03", "n01", "n02")  # as in the published list, not sorted


def picture(path, seed, mode="RGB", size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    level = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(level).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path, "JPEG", quality=95)


def write_tiny(root, train=3, val=2):
    folder = root / "tiny-imagenet-200"
    lines = []
    for label, wnid in enumerate(WNIDS):
        for i in range(train):
            picture(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", seed=100 * label + i)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for i in range(val):
            name = f"val_{i * len(WNIDS) + label}.JPEG"
            picture(folder / "val" / "images" / name, seed=1000 * (label + 1) + i)
            lines.append(f"{name}\t{wnid}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (folder / "words.txt").write_text("n00\tentity\nn01\tgoldfish, Carassius auratus\nn03\tsalamander\n")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_tiny(tmp_path)


def load(folder, **kwargs):
    return TinyImageNet(root=str(folder.parent), **({"verify": False, "batch_size": 2} | kwargs)).load()


def by_pillow(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def test_classes_are_numbered_by_their_sorted_wordnet_numbers(folder):
    data = TinyImageNet(root=str(folder.parent), verify=False, batch_size=2)
    splits = data.load()
    assert data.class_names == ["goldfish, Carassius auratus", "n02", "salamander"]
    assert splits["train"].target.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert splits["test"].target.tolist() == [0, 0, 1, 1, 2, 2]
    assert splits["train"].image.shape == (9, 3, 64, 64)
    assert splits["train"].image.dtype == torch.uint8


def test_every_picture_has_the_label_of_its_folder_or_line(folder):
    splits = load(folder)
    expected = by_pillow(folder / "train" / "n02" / "images" / "n02_1.JPEG")
    assert (splits["train"].image[4].int() - expected.int()).abs().max() <= 3
    expected = by_pillow(folder / "val" / "images" / "val_3.JPEG")  # the second of n03
    assert (splits["test"].image[5].int() - expected.int()).abs().max() <= 3


@pytest.mark.parametrize("inner", ["", "images"])
@pytest.mark.parametrize("left_over", [False, True])
def test_a_sorted_val_gives_the_same(folder, inner, left_over):
    before = load(folder)["test"]
    listing = folder / "val" / "val_annotations.txt"
    for line in listing.read_text().splitlines():
        name, wnid = line.split("\t")[:2]
        goal = folder / "val" / wnid / inner / name
        goal.parent.mkdir(parents=True, exist_ok=True)
        (folder / "val" / "images" / name).rename(goal)
    if not left_over:
        (folder / "val" / "images").rmdir()
        listing.unlink()
    after = load(folder)["test"]
    assert torch.equal(before.image, after.image)
    assert torch.equal(before.target, after.target)


def test_grey_pictures_get_three_equal_channels(folder):
    picture(folder / "train" / "n01" / "images" / "n01_0.JPEG", seed=0, mode="L")
    first = load(folder)["train"].image[0]
    assert torch.equal(first[0], first[1])
    assert first.float().std() > 0


def test_many_pictures_stay_in_order(folder, monkeypatch):
    whole = load(folder)["train"].image
    monkeypatch.setattr(tiny_imagenet, "_CHUNK", 2)
    assert torch.equal(load(folder)["train"].image, whole)


def test_without_words_classes_go_by_their_numbers(folder):
    (folder / "words.txt").unlink()
    data = TinyImageNet(root=str(folder.parent), verify=False, batch_size=2)
    data.load()
    assert data.class_names == ["n01", "n02", "n03"]


def test_it_trains(folder, trainer):
    from kdlit.losses import CrossEntropyLoss
    from kdlit.modules import ClassificationDistillation
    from tests.conftest import TinyNet

    module = ClassificationDistillation(TinyNet(3), {"ce": CrossEntropyLoss()}, input_size=(3, 32, 32))
    fitted = trainer()
    fitted.fit(module, TinyImageNet(root=str(folder.parent), verify=False, batch_size=2, val_size=3, size=32))
    assert fitted.global_step == 3
    assert "val/top1" in fitted.callback_metrics


# What is refused


def test_missing_parts_are_named_with_the_cure(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no wnids.txt, train, val in .*tiny-imagenet-200; set --data.root"):
        TinyImageNet(root=str(tmp_path))
    (tmp_path / "tiny-imagenet-200.zip").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"unpacked: unzip -q {tmp_path}/tiny-imagenet-200.zip -d {tmp_path}$"):
        TinyImageNet(root=str(tmp_path))


def test_class_folders_must_be_those_of_the_list(folder):
    (folder / "train" / "n02").rename(folder / "train" / "n09")
    with pytest.raises(
        ValueError,
        match=r"class folders in .*train do not fit wnids.txt: without a folder n02; not in wnids.txt n09\. Unpack",
    ):
        load(folder)


def test_pictures_and_annotations_must_fit(folder):
    (folder / "val" / "images" / "val_4.JPEG").rename(folder / "val" / "images" / "val_7.JPEG")
    with pytest.raises(
        ValueError,
        match=r"val/images do not fit val_annotations.txt: without a line val_7.JPEG; without a picture val_4.JPEG",
    ):
        load(folder)


def test_annotations_must_be_there_and_name_known_classes(folder):
    listing = folder / "val" / "val_annotations.txt"
    listing.write_text(listing.read_text().replace("n02", "n09"))
    with pytest.raises(ValueError, match="val_annotations.txt names classes that wnids.txt does not: n09"):
        load(folder)
    listing.write_text(listing.read_text().replace("n09", "n01"))
    with pytest.raises(ValueError, match="val_annotations.txt has no picture of n02"):
        load(folder)
    listing.unlink()
    with pytest.raises(FileNotFoundError, match="no .*val_annotations.txt and no class folders beside it"):
        load(folder)


def test_an_empty_class_is_named(folder):
    for path in (folder / "train" / "n01" / "images").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no picture in .*train/n01; unpack"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_corrupt_picture_is_named(folder, content):
    path = folder / "train" / "n01" / "images" / "n01_2.JPEG"
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    with pytest.raises(ValueError, match=f"cannot decode {path}: .*; replace the file or remove it"):
        load(folder)


def test_a_picture_of_another_size_is_named(folder):
    picture(folder / "val" / "images" / "val_2.JPEG", seed=0, size=(64, 32))
    with pytest.raises(ValueError, match="val_2.JPEG has 64x32 pixels, but must have 64x64"):
        load(folder)


@pytest.mark.parametrize("text", ["", "n01\nn01\nn02\nn03\n"])
def test_an_empty_or_repeated_list_is_refused(folder, text):
    (folder / "wnids.txt").write_text(text)
    with pytest.raises(ValueError, match="wnids.txt must name each class once"):
        load(folder)


def test_a_file_in_place_of_a_folder_is_named(folder):
    (folder / "train").rename(folder / "elsewhere")
    (folder / "train").write_text("")
    with pytest.raises(ValueError, match="cannot read .*train: Not a directory; check type and permissions"):
        load(folder)


def test_half_of_the_archive_is_refused_unless_told_otherwise(folder, monkeypatch):
    with pytest.raises(
        ValueError, match="has 3 classes, not 200 as published; unpack it again, or set --data.verify=false"
    ):
        load(folder, verify=True)
    monkeypatch.setattr(tiny_imagenet, "_PUBLISHED", {"classes": 3, "train": 3, "val": 2})
    assert len(load(folder, verify=True)["train"]) == 9
    (folder / "train" / "n02" / "images" / "n02_0.JPEG").unlink()
    with pytest.raises(
        ValueError, match="a class in .*train has 2 pictures, not 3 as published, the first of them .*n02_1"
    ):
        load(folder, verify=True)


def test_it_is_fetched_as_a_zip(folder, tmp_path, monkeypatch):
    file = tmp_path / "published.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(folder.parent))
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setattr(TinyImageNet, "archive", replace(TinyImageNet.archive, url=file.as_uri(), md5=md5))
    data = TinyImageNet(root=str(tmp_path / "new"), download=True, verify=False, batch_size=2)
    data.prepare_data()
    assert len(data.load()["train"]) == 9
