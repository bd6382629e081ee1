"""Listing photographs in folders, and decoding them."""

from __future__ import annotations

import csv
import io
import logging
import os
import pickle
import stat
import warnings
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from kdlit.data import photographs
from kdlit.data.photographs import BrokenPhotograph, decode_photograph, list_photographs, read_photograph


def put(root, *names):
    """Empty files; listing does not look inside."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def samples(found):
    return [(str(found.path(i)), int(found.target[i])) for i in range(len(found))]


def encoded(picture, form, **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def reference(data):
    """What ImageFolder's loader makes of it."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


@pytest.fixture
def picture():
    """A smooth picture of odd size."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((67, 53), Image.Resampling.BICUBIC)


# Listing


def test_order_is_that_of_image_folder(tmp_path):
    names = [
        "b/2.jpg",
        "b/10.JPEG",
        "b/x/1.png",
        "b/x-1/1.webp",
        "b/x/deep/0.bmp",
        "a/ä.tiff",
        "a/1.txt",
        "a/.jpg",
        "C/1.ppm",
    ]
    put(tmp_path, *names, "readme.txt")
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    found, expected = list_photographs(tmp_path), ImageFolder(str(tmp_path))
    assert samples(found) == expected.samples
    assert found.class_names == expected.classes == ["C", "a", "b", "linked"]
    assert found.target.dtype == torch.int64
    assert found.name(0) == "C/1.ppm"


def test_order_is_that_of_image_folder_on_photographs(shared):
    for part in ("train", "val"):
        folder = shared / "data" / "imagenet-slice" / part
        found, expected = list_photographs(folder), ImageFolder(str(folder))
        assert samples(found) == expected.samples
        assert found.class_names == expected.classes


def test_a_list_is_small_and_shared_with_workers(tmp_path):
    names = [f"n{label:08}/n{label:08}_{i}.JPEG" for label in range(3) for i in range(100)]
    found = list_photographs(put(tmp_path, *names))
    assert len(pickle.dumps(found)) < 60 * len(found)
    assert len(ForkingPickler.dumps(found)) < 4 * len(found)  # what a spawned worker gets
    assert found.names.is_shared()
    assert [found.name(i) for i in range(300)] == sorted(names)


def test_classes_given_are_numbered_in_their_order(tmp_path):
    put(tmp_path, "a/1.jpg", "b/1.jpg", "c/1.jpg")
    found = list_photographs(tmp_path, ["c", "a", "b"])
    assert found.class_names == ["c", "a", "b"]
    assert [found.name(i) for i in range(3)] == ["c/1.jpg", "a/1.jpg", "b/1.jpg"]
    assert found.target.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"no class folder in .*it must hold a folder of pictures for each class"),
        (
            ["a/1.jpg", "b/1.txt"],
            r"class folders without a picture in .*: b; fill or remove them \(pictures are files in \.jpg",
        ),
        (
            [f"ILSVRC2012_val_0000000{i}.JPEG" for i in range(5)],
            r"lie directly in .* and so have no label: ILSVRC2012_val_00000000.JPEG, .* \.\.\. \(5 in all\); move each",
        ),
        (
            ["n01440764.tar", "n01443537/1.JPEG"],
            r"archives that are not unpacked lie in .*: n01440764.tar; unpack each",
        ),
        (["images.tar.gz"], r"archives that are not unpacked .*images.tar.gz"),
        (
            ["n01440764/1.JPEG", "n01443537/1.JPEG", "__MACOSX/1.JPEG"],
            r"WordNet numbers .* are not: __MACOSX; remove or",
        ),
        (["n01440764/1.JPEG", "lost+found/x"], r"are not: lost\+found; remove or rename"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        list_photographs(put(tmp_path, *names))


def test_an_archive_beside_its_folder_does_no_harm(tmp_path):
    put(tmp_path, "n01440764.tar", "n01440764/1.JPEG", "ILSVRC2012_img_train.tar")
    assert len(list_photographs(tmp_path)) == 1


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere; it must hold"):
        list_photographs(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a", "b", "c"], r"the 3 class folders .*, but missing: c;"),
        (["a"], r"unexpected: b;"),
        (["a", *"cdefg"], r"missing: c, d, e \.\.\. \(5 in all\); unexpected: b;"),
        (["a", "b", "a"], r"names more than once: a$"),
    ],
)
def test_classes_must_be_those_given(tmp_path, classes, message):
    with pytest.raises(ValueError, match=message):
        list_photographs(put(tmp_path, "a/1.jpg", "b/1.jpg"), classes)


@pytest.mark.parametrize("closed", ["", "a", "a/deep"])
def test_an_unreadable_folder_is_named(tmp_path, as_nobody, closed, monkeypatch):
    root = tmp_path / "pictures"
    os.seteuid(0) if os.getuid() == 0 else None
    put(root, "a/1.jpg", "a/deep/1.jpg")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and not folder.stat().st_mode & stat.S_IXOTH:
            folder.chmod(0o755)
    (root / closed).chmod(0)
    os.seteuid(65534) if os.getuid() == 0 else None
    with pytest.raises(ValueError, match=rf"this user may not read {root / closed}.*; change its permissions"):
        list_photographs(root)
    os.seteuid(0) if os.getuid() == 0 else None
    (root / closed).chmod(0o755)


def test_a_thousand_wordnet_numbers_must_be_those_of_ilsvrc(tmp_path, shared):
    with (shared / "data" / "imagenet-slice" / "imagenet1k_classes.csv").open() as file:
        wordnet = [row["wnid"] for row in csv.DictReader(file)]
    put(tmp_path, *(f"{name}/1.JPEG" for name in wordnet))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list_photographs(tmp_path).class_names == wordnet
    (tmp_path / wordnet[7]).rename(tmp_path / "n00000007")
    with pytest.raises(ValueError, match="are not those of ILSVRC-2012"):
        list_photographs(tmp_path)


def test_a_thousand_other_names_warn_of_the_order(tmp_path):
    put(tmp_path, *(f"{label}/1.jpg" for label in range(1000)))
    with pytest.warns(UserWarning, match="in the order of their WordNet numbers"):
        found = list_photographs(tmp_path)
    assert found.class_names[:3] == ["0", "1", "10"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list_photographs(tmp_path, [str(label) for label in range(1000)]).class_names[2] == "2"


def test_only_a_long_listing_says_so(tmp_path, caplog, monkeypatch):
    put(tmp_path, *(f"{label}/1.jpg" for label in "abcd"))
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    list_photographs(tmp_path)
    assert not caplog.messages
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(photographs.time, "monotonic", lambda: next(clock))
    list_photographs(tmp_path)
    assert caplog.messages == [f"listing the pictures in {tmp_path}: 1 of 4 classes in 10 s"]


# Decoding


def test_photographs_have_the_pixels_of_image_folder(shared):
    files = sorted((shared / "data" / "imagenet-slice").glob("train/*/*.JPEG"))
    assert len(files) == 205
    for file in files:
        assert torch.equal(read_photograph(file), reference(file.read_bytes())), file


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCbCr"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}, {"keep_rgb": True}]
)
def test_any_jpeg_has_the_pixels_of_pil(picture, mode, options):
    data = encoded(picture.convert(mode), "JPEG", **options)
    pixels = decode_photograph(data, "x")
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 53, 67)
    assert torch.equal(pixels, reference(data))


def test_orientation_of_exif_is_not_applied(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture, "JPEG", exif=exif)
    assert decode_photograph(data, "x").shape == (3, 53, 67)
    assert torch.equal(decode_photograph(data, "x"), reference(data))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_any_png_has_the_pixels_of_pil(picture, mode):
    if mode == "I;16":
        data = encoded(Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 200), "PNG")
    else:
        data = encoded(picture.convert(mode), "PNG")
    pixels = decode_photograph(data, "x")
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, reference(data))


@pytest.mark.parametrize("form", ["WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_other_formats_have_the_pixels_of_pil(picture, form):
    data = encoded(picture, form)
    assert torch.equal(decode_photograph(data, "x"), reference(data))


def test_channels_are_last_in_memory(picture):
    for form in ("JPEG", "PNG"):
        assert decode_photograph(encoded(picture, form), "x").permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("form", ["JPEG", "progressive", "PNG", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_part_of_a_picture_is_refused(picture, form, share):
    data = encoded(picture, "JPEG", progressive=True) if form == "progressive" else encoded(picture, form)
    with pytest.raises(BrokenPhotograph, match=r"cannot decode some/1\.jpg: .+; replace the file or remove it"):
        decode_photograph(data[: int(share * len(data))], "some/1.jpg")


@pytest.mark.parametrize(("data", "reason"), [(b"", "it is empty"), (b"<html>404</html>", "not a picture")])
def test_what_is_no_picture_is_refused(tmp_path, data, reason):
    file = tmp_path / "1.jpg"
    file.write_bytes(data)
    with pytest.raises(BrokenPhotograph, match=rf"cannot decode {file}: {reason}; replace"):
        read_photograph(file)


def test_a_file_that_is_gone_is_not_called_broken(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*1.jpg: No such file or directory") as caught:
        read_photograph(tmp_path / "1.jpg")
    assert not isinstance(caught.value, BrokenPhotograph)


def test_corrupt_files_are_named(shared):
    folder = shared / "data" / "imagenet-slice" / "corrupt" / "n01496331"
    for what, reason in (("truncated", "image file is truncated"), ("empty", "it is empty"), ("text", "not a picture")):
        with pytest.raises(BrokenPhotograph, match=rf"cannot decode .*_{what}.JPEG: {reason}"):
            read_photograph(folder / f"n01496331_{what}.JPEG")
