"""The CIFAR-100 files: read right, and refused clearly."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
import torchvision

from kdlit.data import CIFAR100


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


def test_labels_out_of_range_are_refused(cifar_folder):
    rewrite(cifar_folder / "test", fine_labels=[0] * 8 + [3])
    with pytest.raises(ValueError, match=r"labels of the test data must lie in 0\.\.2 .* they lie in 0\.\.3"):
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


def test_a_download_gets_its_name_only_when_whole(tmp_path, monkeypatch):
    def half(root, download):
        folder = os.path.join(root, "cifar-100-python")
        os.mkdir(folder)
        open(os.path.join(folder, "train"), "wb").close()
        raise RuntimeError("connection lost")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", half)
    data = CIFAR100(root=str(tmp_path / "data"), download=True)
    with pytest.raises(RuntimeError, match="connection lost"):
        data.prepare_data()
    assert list((tmp_path / "data").iterdir()) == []


def test_a_whole_download_is_moved_into_place(tmp_path, monkeypatch):
    from tests.conftest import write_cifar_layout

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", lambda root, download: write_cifar_layout(tmp_path / root))
    data = CIFAR100(root=str(tmp_path / "data"), download=True, verify=False, batch_size=4)
    data.prepare_data()
    data.setup("fit")
    assert data.num_classes == 3
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-100-python"]
    data.prepare_data()


def test_reading_uses_no_random_numbers(cifar_folder):
    state = torch.get_rng_state()
    load(cifar_folder.parent, val_size=6)
    assert torch.equal(state, torch.get_rng_state())
