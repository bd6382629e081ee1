"""The STL-10 files: read right, and refused clearly."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torchvision

from kdlit.data import STL10


def write_stl10(root, train=6, test=4, classes=3):
    folder = root / "stl10_binary"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, size in (("train", train), ("test", test)):
        pictures = generator.integers(0, 256, (size, 3, 96, 96), dtype=np.uint8)
        (folder / f"{split}_X.bin").write_bytes(pictures.tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes(index % classes + 1 for index in range(size)))
    (folder / "class_names.txt").write_text("".join(f"class{i}\n" for i in range(classes)))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_stl10(tmp_path)


def load(folder, **kwargs):
    data = STL10(root=str(folder.parent), **({"verify": False, "batch_size": 2} | kwargs))
    data.setup("fit")
    return data


def test_it_reads_what_torchvision_reads(folder, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    data = load(folder)
    for split in ("train", "test"):
        theirs = torchvision.datasets.STL10(str(folder.parent), split=split)
        ours = data._pictures[split]
        assert np.array_equal(ours.image.numpy(), theirs.data)
        assert ours.target.tolist() == theirs.labels.tolist()
    assert data.class_names == ["class0", "class1", "class2"]


def test_columns_come_first_in_the_file(folder):
    raw = np.frombuffer((folder / "train_X.bin").read_bytes(), dtype=np.uint8)
    image = load(folder)._pictures["train"].image
    assert image.shape == (6, 3, 96, 96)
    assert image[0, 0, :, 0].tolist() == raw[:96].tolist()
    assert image[1, 2, 5, 7] == raw[27648 + 2 * 9216 + 7 * 96 + 5]


def test_labels_count_from_zero(folder):
    assert load(folder)._pictures["train"].target.tolist() == [0, 1, 2, 0, 1, 2]


def test_networks_of_another_size_get_scaled_pictures(folder):
    batch = next(iter(load(folder, size=32).test_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32)


def test_missing_files_are_named_with_the_cure(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"no train_X.bin, .*class_names.txt in .*stl10_binary; set --data.root.*fetch STL-10 \(2.6 GB\)",
    ):
        STL10(root=str(tmp_path))
    (write_stl10(tmp_path) / "test_y.bin").unlink()
    with pytest.raises(FileNotFoundError, match="no test_y.bin in .*; it is only a part of STL-10"):
        STL10(root=str(tmp_path))
    (tmp_path / "stl10_binary.tar.gz").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match="unpacked only in part; unpack it again: tar -xf .*stl10_binary.tar.gz -C"
    ):
        STL10(root=str(tmp_path))


@pytest.mark.parametrize("keep", [0, 27647, -1])
def test_pictures_cut_short_are_refused(folder, keep):
    path = folder / "train_X.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match=r"train_X.bin has \d+ bytes, but must have 27648 \(3x96x96\) for each picture; it is cut"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (b"\x01\x02\x03\x01\x02", "train_y.bin holds 5 labels for 6 pictures"),
        (b"\x01\x02\x03\x01\x02\x04", r"labels in .*train_y.bin must lie in 1\.\.3 .* they lie in 1\.\.4"),
        (b"\x01\x02\x03\x01\x02\x00", r"but they lie in 0\.\.3"),
    ],
)
def test_labels_that_do_not_fit_are_refused(folder, labels, message):
    (folder / "train_y.bin").write_bytes(labels)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_only_the_published_files_pass_unless_told_otherwise(folder, monkeypatch):
    with pytest.raises(
        ValueError,
        match="train_X.bin .* not the published STL-10 file: its md5 differs, .* instead of 918c28.*--data.verify=false",
    ):
        load(folder, verify=True)
    sums = {name: md5 and hashlib.md5((folder / name).read_bytes()).hexdigest() for name, md5 in STL10.files.items()}
    monkeypatch.setattr(STL10, "files", sums)
    assert load(folder, verify=True).num_classes == 3
