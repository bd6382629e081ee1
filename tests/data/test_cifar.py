"""The CIFAR-100 files: read right, and refused clearly."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
import torchvision

from kdlit.data import CIFAR10, CIFAR100
from tests.conftest import write_cifar_layout


def load(root, **kwargs):
    data = CIFAR100(root=str(root), verify=kwargs.pop("verify", False), batch_size=4, **kwargs)
    data.setup("fit")
    return data


def test_pictures_labels_and_names_are_those_of_the_files(cifar_folder):
    data = load(cifar_folder.parent)
    content = pickle.loads((cifar_folder / "train").read_bytes())
    train = data._pictures["train"]
    assert data.class_names == ["c0", "c1", "c2"]
    assert data.num_classes == 3
    assert train.target.tolist() == content["fine_labels"]
    red_second_row = content["data"][5, 32:64]
    assert train.image[5, 0, 1].tolist() == red_second_row.tolist()


def test_it_reads_what_torchvision_reads(cifar_folder):
    class AnyLayout(torchvision.datasets.CIFAR100):
        train_list = [["train", None]]
        test_list = [["test", None]]
        meta = {"filename": "meta", "key": "fine_label_names", "md5": None}

    theirs = AnyLayout(cifar_folder.parent, train=False)
    ours = load(cifar_folder.parent)._pictures["test"]
    assert np.array_equal(ours.image.permute(0, 2, 3, 1).numpy(), theirs.data)
    assert ours.target.tolist() == theirs.targets


def test_own_pictures_need_the_explicit_option(cifar_folder):
    with pytest.raises(ValueError, match=r"not the published CIFAR-100 file: its md5 differs.*--data.verify=false"):
        load(cifar_folder.parent, verify=True)


def test_missing_files_are_named_with_the_cure(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no train, test, meta in .*cifar-100-python; set --data.root"):
        CIFAR100(root=str(tmp_path))


@pytest.mark.parametrize("name", ["train", "test", "meta"])
@pytest.mark.parametrize("keep", [0, 10, -3])
def test_empty_and_truncated_files_are_named(cifar_folder, name, keep):
    path = cifar_folder / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{name} .*is not a whole CIFAR-100 file"):
        load(cifar_folder.parent)


def rewrite(path, **changes):
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | changes, protocol=2))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0] * 8 + [3], r"labels in .*test must lie in 0\.\.2 \(3 classes are named\), but they lie in 0\.\.3"),
        ([0] * 8 + [-1], r"but they lie in -1\.\.0"),
        ([0] * 8, "test holds 8 labels for 9 pictures"),
        ([], "test holds 0 labels for 9 pictures|labels in .*test must be one integer"),
        ([0.5] * 9, "labels in .*test must be one integer for each picture"),
        ([[0, 1]] * 9, "must be one integer for each picture"),
        ([[0], [0, 1]], "must be one integer for each picture"),
        (["a"] * 9, "must be one integer for each picture"),
        (None, "must be one integer for each picture"),
    ],
)
def test_labels_that_do_not_fit_are_refused(cifar_folder, labels, message):
    rewrite(cifar_folder / "test", fine_labels=labels)
    with pytest.raises(ValueError, match=message):
        load(cifar_folder.parent)


def test_other_contents_are_refused(cifar_folder):
    rewrite(cifar_folder / "train", data=np.zeros((24, 100), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"must be uint8 of shape \(N, 3072\), got uint8 of shape \(24, 100\)"):
        load(cifar_folder.parent)
    (cifar_folder / "train").write_bytes(pickle.dumps({"labels": []}, protocol=2))
    with pytest.raises(ValueError, match="has no 'data', only 'labels'"):
        load(cifar_folder.parent)
    (cifar_folder / "train").write_bytes(pickle.dumps([1], protocol=2))
    with pytest.raises(ValueError, match="holds a list"):
        load(cifar_folder.parent)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("planted",)


def test_a_file_that_would_run_code_is_refused_and_does_not(cifar_folder, monkeypatch):
    monkeypatch.chdir(cifar_folder)
    (cifar_folder / "train").write_bytes(pickle.dumps({"data": Payload()}))
    with pytest.raises(ValueError, match="it would run (posix|nt)?.*mkdir, which no data file needs"):
        load(cifar_folder.parent)
    assert not (cifar_folder / "planted").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_files_written_by_any_pickle_protocol_are_read(cifar_folder, protocol):
    path = cifar_folder / "train"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol=protocol))
    assert len(load(cifar_folder.parent)._pictures["train"]) == 24


def test_a_folder_without_read_permission_is_named(cifar_folder, as_nobody_can_enter, request):
    (cifar_folder / "train").chmod(0)
    request.getfixturevalue("as_nobody")
    with pytest.raises(ValueError, match=r"cannot read .*train: Permission denied; check its permissions"):
        load(cifar_folder.parent)


def test_a_folder_that_cannot_be_entered_is_named(cifar_folder, as_nobody_can_enter, request):
    cifar_folder.chmod(0)
    request.getfixturevalue("as_nobody")
    try:
        with pytest.raises(ValueError, match="cannot read .*: Permission denied; check its permissions"):
            load(cifar_folder.parent)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        cifar_folder.chmod(0o755)


@pytest.fixture
def as_nobody_can_enter(tmp_path):
    """Open the folders above, which pytest keeps to their owner."""
    opened = []
    for folder in (tmp_path, *tmp_path.parents):
        mode = folder.stat().st_mode
        if folder.owner() != "root" or mode & 0o001:
            continue
        folder.chmod(mode | 0o055)
        opened.append((folder, mode))
    yield
    if os.getuid() == 0:
        os.seteuid(0)
    for folder, mode in opened:
        folder.chmod(mode)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A small CIFAR-100 published on this machine."""
    write_cifar_layout(tmp_path / "source")
    with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "source" / "cifar-100-python", "cifar-100-python")
    file = tmp_path / "cifar-100-python.tar.gz"
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "archive", dataclasses.replace(CIFAR100.archive, url=file.as_uri(), md5=md5))


def test_it_is_fetched_once(tmp_path, published):
    data = CIFAR100(root=str(tmp_path / "data"), download=True, verify=False, batch_size=4)
    data.prepare_data()
    data.setup("fit")
    assert data.num_classes == 3
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-100-python"]
    (tmp_path / "cifar-100-python.tar.gz").unlink()
    data.prepare_data()


def test_fetching_does_not_touch_a_folder_that_lacks_a_file(tmp_path, published):
    folder = write_cifar_layout(tmp_path / "data")
    (folder / "meta").unlink()
    data = CIFAR100(root=str(tmp_path / "data"), download=True, verify=False, batch_size=4)
    with pytest.raises(FileNotFoundError, match=r"no meta in .*; it is only a part of CIFAR-100; move it away and set"):
        data.prepare_data()
    assert sorted(path.name for path in folder.iterdir()) == ["test", "train"]


def test_the_published_addresses_and_sums_are_those_of_torchvision():
    for ours, theirs in ((CIFAR10, torchvision.datasets.CIFAR10), (CIFAR100, torchvision.datasets.CIFAR100)):
        assert (ours.archive.url, ours.archive.md5, ours.archive.folder) == (
            theirs.url,
            theirs.tgz_md5,
            theirs.base_folder,
        )
        assert ours.files[theirs.meta["filename"]] == theirs.meta["md5"]
        assert len(ours.files) == len(theirs.train_list) + len(theirs.test_list) + 1


# What is often given in place of the folder


def test_the_folder_itself_is_recognised(cifar_folder):
    with pytest.raises(
        FileNotFoundError, match=rf"--data.root is the folder of the files itself.*: {cifar_folder.parent}$"
    ):
        CIFAR100(root=str(cifar_folder))
    with pytest.raises(FileNotFoundError, match="is the folder of the files itself"):
        CIFAR100(root=str(cifar_folder), download=True).prepare_data()
    renamed = cifar_folder.rename(cifar_folder.with_name("cifar100"))
    with pytest.raises(FileNotFoundError, match=f"; rename {renamed} to {cifar_folder}$"):
        CIFAR100(root=str(renamed))


def test_an_archive_that_was_not_unpacked_is_recognised(tmp_path):
    file = tmp_path / "cifar-100-python.tar.gz"
    file.write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"has not been unpacked: tar -xf {file} -C {tmp_path}$"):
        CIFAR100(root=str(tmp_path))
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(FileNotFoundError, match="no train, test, meta in .* only in part; unpack it again: tar -xf"):
        CIFAR100(root=str(tmp_path))


def test_an_archive_in_place_of_the_folder_is_recognised(tmp_path):
    (tmp_path / "cifar-100-python").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match="is a file, not a folder; if it is the archive, rename it to cifar-100-python.tar.gz"
    ):
        CIFAR100(root=str(tmp_path))


@pytest.mark.parametrize(("head", "kind"), [(b"\x1f\x8b\x08", "gzip"), (b"PK\x03\x04", "zip")])
def test_an_archive_in_place_of_a_file_is_recognised(cifar_folder, head, kind):
    (cifar_folder / "train").write_bytes(head + b"...")
    with pytest.raises(ValueError, match=f"train is a {kind} archive, but must be a file out of one; unpack it"):
        load(cifar_folder.parent, verify=True)


def test_a_folder_in_place_of_a_file_is_recognised(cifar_folder):
    (cifar_folder / "meta").unlink()
    (cifar_folder / "meta").mkdir()
    with pytest.raises(ValueError, match="meta is a folder, but must be a file of CIFAR-100"):
        load(cifar_folder.parent)


# CIFAR-10


def write_cifar10(root, sizes=(4, 4, 4, 4, 4, 6)):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, size in zip(names, sizes, strict=True):
        content = {"data": generator.integers(0, 256, (size, 3072), dtype=np.uint8), "labels": list(range(size))}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, protocol=2))
    return folder


def test_cifar_10_joins_its_five_batches_in_order(tmp_path):
    folder = write_cifar10(tmp_path, sizes=(3, 4, 5, 6, 7, 8))
    data = CIFAR10(root=str(tmp_path), verify=False, batch_size=4)
    data.setup("fit")
    train = data._pictures["train"]
    assert data.class_names == list("abcdefghij")
    assert (len(train), len(data._pictures["test"])) == (25, 8)
    assert train.target.tolist() == [label for size in (3, 4, 5, 6, 7) for label in range(size)]
    second = pickle.loads((folder / "data_batch_2").read_bytes())["data"]
    assert np.array_equal(train.image[3:7].flatten(1).numpy(), second)
    assert data.views.student.mean == (0.4914, 0.4822, 0.4465)


def test_a_missing_batch_of_cifar_10_is_named(tmp_path):
    (write_cifar10(tmp_path) / "data_batch_4").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no data_batch_4 in .*cifar-10-batches-py; it is only a part of CIFAR-10"
    ):
        CIFAR10(root=str(tmp_path))


def test_a_damaged_batch_of_cifar_10_is_named(tmp_path):
    write_cifar10(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"data_batch_1 .*not the published CIFAR-10 file: its md5 differs, \w{32} instead of c99cafc152244af753f735de768cd75f",
    ):
        CIFAR10(root=str(tmp_path), batch_size=4).load()


def test_reading_uses_no_random_numbers(cifar_folder):
    state = torch.get_rng_state()
    load(cifar_folder.parent, val_size=6)
    assert torch.equal(state, torch.get_rng_state())
