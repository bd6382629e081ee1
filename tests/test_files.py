"""Files are whole or absent, and rows that find no room wait."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from kdlit.files import WholeCheckpointIO, WriteError, load_whole, remove_scratch, write_whole
from kdlit.loggers import RunLogger


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_good_file_is_never_replaced_by_half_of_another(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    write_whole(path, lambda file: file.write(b"good"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        with pytest.raises(WriteError, match="cannot write .*file: No space left"):
            write_whole(path, lambda file: file.write(b"bad"))
    with pytest.raises(ZeroDivisionError):
        write_whole(path, lambda file: (file.write(b"half"), 1 / 0))
    assert path.read_bytes() == b"good"
    assert [left.name for left in path.parent.iterdir()] == ["file"]
    (tmp_path / "plain").write_text("")
    with pytest.raises(WriteError, match="cannot write"):
        write_whole(tmp_path / "plain" / "file", lambda file: file.write(b"x"))


def test_a_checkpoint_that_finds_no_room_costs_a_warning(tmp_path, monkeypatch):
    files, path = WholeCheckpointIO(), tmp_path / "last.ckpt"
    files.save_checkpoint({"a": torch.ones(2)}, path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        with pytest.warns(UserWarning, match="No space left.*before is untouched"):
            files.save_checkpoint({"a": torch.zeros(2)}, path)
    assert list(files.failed) == [str(path)]
    assert torch.equal(load_whole(path)["a"], torch.ones(2))
    files.save_checkpoint({"a": torch.zeros(2)}, path)
    assert files.failed == {}


def test_broken_files_are_told_from_whole_ones(tmp_path):
    path = tmp_path / "file.ckpt"
    torch.save({"a": torch.arange(1000.0)}, path)
    content = path.read_bytes()
    assert load_whole(path)["a"][-1] == 999
    place = content.index(torch.arange(500.0, 600.0).numpy().tobytes())
    broken = {
        "a bit": content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
        "its end": content[:-300],
        "all": b"",
        "text": b"hello",
    }
    for changed in broken.values():
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"file\.ckpt is not a whole checkpoint"):
            load_whole(path)
    torch.save({"a": print}, path)
    with pytest.raises(ValueError, match="not a whole checkpoint of plain data"):
        load_whole(path)


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name in (".last.ckpt.12.kdlit", "last.ckpt", ".hidden"):
        (tmp_path / name).write_text("x")
    remove_scratch(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", ".hidden"}


def test_rows_wait_until_there_is_room(tmp_path, monkeypatch):
    logger = RunLogger(str(tmp_path))
    logger.log_metrics({"a": 1.0}, step=0)
    before = logger.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("kdlit.loggers.write_whole", no_room)
        patch.setattr(type(logger.path), "open", no_room)
        with pytest.warns(UserWarning, match="its rows wait in memory"):
            logger.log_metrics({"a": 2.0}, step=1)
        logger.log_metrics({"b": 3.0}, step=2)
    assert logger.path.read_bytes() == before
    logger.log_metrics({"a": 4.0}, step=3)
    assert logger.path.read_text().split() == ["step,a,b", "0,1.0,", "1,2.0,", "2,,3.0", "3,4.0,"]


def test_half_of_a_row_is_forgotten(tmp_path):
    logger = RunLogger(str(tmp_path))
    for step in range(3):
        logger.log_metrics({"a": float(step), "b": 0.5}, step=step)
    with logger.path.open("a") as file:
        file.write("3,3.")
    logger = RunLogger(str(tmp_path))
    logger.forget_from(2)
    logger.log_metrics({"a": 2.0, "b": 0.5}, step=2)
    assert logger.path.read_text().split() == ["step,a,b", "0,0.0,0.5", "1,1.0,0.5", "2,2.0,0.5"]
