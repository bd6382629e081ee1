"""Files from elsewhere run nothing, and write nothing outside their folder."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from kdlit.chain import read_chain
from kdlit.command_files import CommandFileError
from kdlit.data import CIFAR10, CIFAR100
from kdlit.data.download import fetch
from kdlit.data.photographs import BrokenPhotograph, read_photograph
from kdlit.models import from_checkpoint
from kdlit.models.checkpoint import CheckpointError
from tests.conftest import TinyNet
from tests.test_cli import project  # noqa: F401  the folder of a user


class Evil:
    """Once unpickled, makes a file."""

    def __init__(self, marker, how):
        self.marker, self.how = str(marker), how

    def __reduce__(self):
        import builtins
        import subprocess

        return {
            "os.system": (os.system, (f"touch {self.marker}",)),
            "eval": (builtins.eval, (f"open({self.marker!r}, 'w').close()",)),
            "open": (builtins.open, (self.marker, "w")),
            "Popen": (subprocess.Popen, (["touch", self.marker],)),
            "getattr": (builtins.getattr, (Later(self.marker), "x")),
        }[self.how]


class Later:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


HOWS = ("os.system", "eval", "open", "Popen", "getattr")


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "pwned"
    yield path
    assert not path.exists(), "the file ran code"


def test_the_trap_works(tmp_path):
    for how in HOWS:
        pickle.loads(pickle.dumps(Evil(tmp_path / how, how))) if how != "getattr" else None
        if how == "Popen":
            continue
        assert how == "getattr" or (tmp_path / how).exists()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_weights_of_a_teacher_run_nothing(tmp_path, marker, how, kind):
    path = tmp_path / "teacher.pth"
    content = {"model": TinyNet().state_dict(), "note": Evil(marker, how)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"note": Evil(marker, how)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"teacher\.pth"):
        from_checkpoint(TinyNet(), str(path))


@pytest.mark.parametrize("option", ["--ckpt_path", "--model.student"])
def test_checkpoints_on_the_command_line_run_nothing(project, kdlit_cli, marker, option):  # noqa: F811
    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": Evil(marker, "os.system")}, project / "bad.ckpt")
    value = "bad.ckpt"
    if option == "--model.student":
        value = '{"class_path": "kdlit.models.from_checkpoint", "init_args": {"model": {"class_path": "own.OwnNet"}, "path": "bad.ckpt"}}'
    out = kdlit_cli("fit", "--config", "tiny.yaml", f"{option}={value}")
    assert out.count("kdlit: error:") == 1, out
    assert "bad.ckpt" in out
    assert "Traceback" not in out


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_pickles_of_cifar_100_run_nothing(cifar_folder, marker, how, name):
    content = pickle.loads((cifar_folder / name).read_bytes())
    for place in ("beside", "inside"):
        spoilt = (
            {**content, "extra": Evil(marker, how)}
            if place == "beside"
            else {key: Evil(marker, how) for key in content}
        )
        (cifar_folder / name).write_bytes(pickle.dumps(spoilt, protocol=2))
        with pytest.raises(ValueError, match=f"{name}.*no data file needs"):
            CIFAR100(str(cifar_folder.parent), verify=False, batch_size=4).setup("fit")


@pytest.mark.parametrize(
    "gadget",
    [
        b"cnumpy\nload\n",
        b"cnumpy.testing\nrundocs\n",
        b"cbuiltins\nexec\n",
        b"c_codecs\nlookup\n",
        b"cnumpy._core.multiarray\nfromfile\n",
    ],
)
def test_a_pickle_of_cifar_may_name_no_other_function(cifar_folder, gadget):
    (cifar_folder / "meta").write_bytes(gadget + b".")
    with pytest.raises(ValueError, match="meta.*would run"):
        CIFAR100(str(cifar_folder.parent), verify=False).setup("fit")


def test_pickles_of_cifar_10_run_nothing(tmp_path, marker):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        content = {"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 0, 1]}
        (folder / name).write_bytes(
            pickle.dumps(content | ({"x": Evil(marker, "eval")} if name == "data_batch_3" else {}))
        )
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b"]}))
    with pytest.raises(ValueError, match=r"data_batch_3.*builtins\.eval"):
        CIFAR10(str(tmp_path), verify=False, batch_size=4).setup("fit")


def test_yaml_tags_run_nothing(project, kdlit_cli, marker):  # noqa: F811
    tag = f"!!python/object/apply:os.system ['touch {marker}']"
    (project / "bad.yaml").write_text(f"trainer: {tag}\n")
    out = kdlit_cli("fit", "--config", "tiny.yaml", "--config", "bad.yaml")
    assert "kdlit: error: Problems parsing config bad.yaml: line 1: could not determine a constructor" in out
    (project / "bad_chain.yaml").write_text(f"links: {tag}\n")
    with pytest.raises(CommandFileError, match=r"bad_chain\.yaml"):
        read_chain(project / "bad_chain.yaml")
    kdlit_cli("fit", "--config", "tiny.yaml", f"--model.teacher={tag}", "--print_config")


def member(archive, name, content=b"text", kind=None, goal=""):
    """Add a member to a tar or zip archive."""
    if isinstance(archive, zipfile.ZipFile):
        info = zipfile.ZipInfo(name)
        info.external_attr = 0o120777 << 16 if kind else 0o644 << 16
        archive.writestr(info, goal if kind else content)
        return
    info = tarfile.TarInfo(name)
    info.size = 0 if kind else len(content)
    if kind:
        info.type, info.linkname = kind, goal
    archive.addfile(info, io.BytesIO(content))


ESCAPES = {
    "above": [("../pwned",)],
    "above, from within": [("things/../../pwned",)],
    "absolute": [("{outside}/pwned",)],
    "with backslashes": [("..\\pwned",)],
    "of another drive": [("C:\\pwned",)],
    "symbolic link outside": [("things/link", b"", tarfile.SYMTYPE, "{outside}/secret")],
    "symbolic link above": [("things/link", b"", tarfile.SYMTYPE, "../../../secret")],
    "file through a link": [("things/link", b"", tarfile.SYMTYPE, "{outside}"), ("things/link/pwned",)],
}


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("escape", ESCAPES)
def test_archives_write_nothing_outside(tmp_path, marker, kind, escape):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") if kind == "tar" else zipfile.ZipFile(file, "w") as archive:
        member(archive, "things/good.txt")
        for name, *rest in ESCAPES[escape]:
            filled = [part.format(outside=outside) if isinstance(part, str) else part for part in (name, *rest)]
            member(archive, *filled)
    _refused(tmp_path, file.getvalue())
    assert {path.name for path in outside.iterdir()} == {"secret"}


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_archives_hold_no_hard_links_and_devices(tmp_path, kind):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member(archive, "things/odd", kind=kind, goal="/etc/passwd")
    _refused(tmp_path, file.getvalue())


def test_archives_that_unpack_to_more_than_there_is_room_for_are_refused(tmp_path, monkeypatch):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("things/zeros", bytes(10**7))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
    _refused(tmp_path, file.getvalue(), "more than the 1000000 bytes that are free")


def _refused(tmp_path, data, message="is refused"):
    (tmp_path / "things.bin").write_bytes(data)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises((ValueError, OSError), match=message):
        fetch((tmp_path / "things.bin").as_uri(), tmp_path / "goal" / "things", hashlib.md5(data).hexdigest())
    assert not list((tmp_path / "goal").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == before | {"goal"}


def test_no_picture_starts_a_program(tmp_path, marker, monkeypatch):
    fake = tmp_path / "bin" / "gs"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\ntouch {marker}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None, raising=False)
    path = tmp_path / "picture.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(BrokenPhotograph, match=r"picture\.jpg: not a picture"):
        read_photograph(path)


@pytest.mark.skipif(sys.platform == "win32", reason="has no pipes in folders")
def test_nothing_waits_for_a_pipe(tmp_path, cifar_folder):
    os.mkfifo(tmp_path / "picture.jpg")
    with pytest.raises(BrokenPhotograph, match="not a regular file"):
        read_photograph(tmp_path / "picture.jpg")
    (cifar_folder / "meta").unlink()
    os.mkfifo(cifar_folder / "meta")
    with pytest.raises(ValueError, match="meta is a device or pipe"):
        CIFAR100(str(cifar_folder.parent), verify=False).setup("fit")
