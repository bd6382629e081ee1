"""The file of teacher logits: what is read is what was written, and nothing in it is trusted."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import signal
from collections import namedtuple

import numpy as np
import pytest
import torch

from kdlit.data import teacher_logits
from kdlit.data.teacher_logits import LogitFormat, TeacherLogits, create


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(teacher_logits, "BLOCK", 4)


def some_logits(row_format, seed=0):
    generator = torch.Generator().manual_seed(seed)
    both = 1 + row_format.strong
    return 4 * torch.randn(row_format.views, row_format.pictures, both, row_format.classes, generator=generator)


def filled(path, row_format, about=None):
    cache, logits = create(path, about or {}, row_format, seed=7), some_logits(row_format)
    rows = logits.flatten(0, 1)
    for block in cache.claims():
        cache.write(block, rows[list(cache.keys(block))])
    cache.close()
    return TeacherLogits(path), logits


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("float16", 2**-11)])
def test_what_is_read_is_what_was_written(tmp_path, strong, dtype, tolerance):
    cache, logits = filled(tmp_path / "c", LogitFormat(10, 5, epochs=3, strong=strong, dtype=dtype))
    index = torch.tensor([9, 0, 4, 4])
    for epoch in (0, 2, 3, 7):
        batch = cache.read(epoch, index)
        assert list(batch) == ["teacher_logits", "teacher_logits_strong"][: 1 + strong]
        for view, values in enumerate(batch.values()):
            assert values.dtype == torch.float32
            expected = logits[epoch % 3, index, view]
            assert ((values - expected).abs() <= tolerance * expected.abs()).all()
    assert cache.drawn_from(1, 5) == (7, 2)
    assert cache.complete
    assert cache.filled == 30
    assert (cache.path / "logits.bin").stat().st_size == cache.format.size


def test_pictures_as_they_are_have_one_view_and_leave_the_augmentation_alone(tmp_path):
    cache, logits = filled(tmp_path / "c", LogitFormat(10, 5, dtype="float32"))
    assert torch.equal(cache.read(8, torch.arange(10))["teacher_logits"], logits[0, :, 0])
    assert cache.drawn_from(1, 5) == (1, 5)


@pytest.mark.parametrize("classes", [12, 40_000])
def test_the_largest_logits_and_the_mass_of_the_others(tmp_path, classes):
    cache, logits = filled(tmp_path / "c", LogitFormat(6, classes, strong=True, dtype="float32", top_k=5))
    read = cache.read(0, torch.arange(6))["teacher_logits_strong"]
    expected = logits[0, :, 1]
    value, label = expected.topk(5)
    assert torch.equal(read.gather(1, label), value)
    assert torch.allclose(read.softmax(1).gather(1, label), expected.softmax(1).gather(1, label), rtol=1e-4)
    others = read.scatter(1, label, torch.nan)
    levels = others[~others.isnan()].view(6, -1)
    assert torch.equal(levels.amax(1), levels.amin(1))
    for temperature in (0.5, 2.0, 4.0):  # the bound of the docstring
        odds = [
            (1 - p) / p
            for p in ((z / temperature).double().softmax(1).gather(1, label).sum(1) for z in (read, expected))
        ]
        factor = odds[0] / odds[1]
        factor = factor if temperature > 1 else 1 / factor
        assert (factor > 1 - 1e-5).all()
        assert (factor < (classes - 5) ** abs(1 - 1 / temperature)).all()


def test_the_bound_on_other_temperatures_is_reached():
    row_format = LogitFormat(1, 10, dtype="float32", top_k=1)
    logits = torch.tensor([[[5.0, 4.0] + [-80.0] * 8]])
    rows = row_format.encode(logits)
    fields = {name: torch.from_numpy(rows[name].copy()) for name in rows.dtype.names}
    p, q = (((z / 4)[0, 0].softmax(0)[0]) for z in (row_format.decode(fields), logits.double()))
    assert float((1 - p) / p / ((1 - q) / q)) == pytest.approx(9**0.75, rel=1e-4)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"epochs": -1}, "epochs must be a whole number >= 0, got -1"),
        ({"epochs": 2.5}, "got 2.5"),
        ({"dtype": "bfloat16"}, "dtype must be 'float16' or 'float32', got 'bfloat16'"),
        ({"top_k": 0}, "top_k must be a whole number >= 1, got 0"),
        ({"top_k": 5}, "top_k must be below the number of classes, 5, got 5"),
        ({"strong": 1}, "strong must be true or false"),
    ],
)
def test_a_format_out_of_range_is_refused(odd, message):
    with pytest.raises(ValueError, match=message):
        LogitFormat(10, 5, **odd)


def test_a_worker_maps_the_file_itself(tmp_path):
    cache, _ = filled(tmp_path / "c", LogitFormat(40, 100))
    first = cache.read(0, torch.arange(3))["teacher_logits"]
    packed = pickle.dumps(cache)
    assert len(packed) < 2000
    assert torch.equal(pickle.loads(packed).read(0, torch.arange(3))["teacher_logits"], first)


def _read(path, queue):
    queue.put(TeacherLogits(path).read(1, torch.arange(10))["teacher_logits"].tolist())


def test_two_processes_read_at_once(tmp_path):
    cache, _ = filled(tmp_path / "c", LogitFormat(10, 5, epochs=2))
    fork, expected = multiprocessing.get_context("fork"), cache.read(1, torch.arange(10))["teacher_logits"].tolist()
    queue = fork.Queue()
    readers = [fork.Process(target=_read, args=(tmp_path / "c", queue)) for _ in range(2)]
    for reader in readers:
        reader.start()
    assert [queue.get(timeout=30) for _ in readers] == [expected, expected]
    for reader in readers:
        reader.join()


def _claim_one(path, ready):
    cache = TeacherLogits(path)
    ready.put(next(cache.claims()))
    signal.pause()


def test_a_block_belongs_to_who_claims_it_until_that_process_dies(tmp_path):
    cache = create(tmp_path / "c", {}, LogitFormat(10, 5), seed=0)
    fork = multiprocessing.get_context("fork")
    ready = fork.Queue()
    other = fork.Process(target=_claim_one, args=(tmp_path / "c", ready))
    other.start()
    assert ready.get(timeout=30) == 0
    assert list(cache.claims()) == [1, 2]
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert list(cache.claims()) == [0, 1, 2]
    cache.write(1, torch.zeros(4, 1, 5))
    assert list(cache.claims()) == [0, 2]
    assert cache.filled == 4
    assert not cache.complete


def test_who_comes_second_gets_the_folder_of_the_first(tmp_path):
    (tmp_path / "c").mkdir()
    first = create(tmp_path / "c", {"what": {"is": 1}}, LogitFormat(10, 5), seed=1)
    second = create(tmp_path / "c", {"what": {"is": 2}}, LogitFormat(9, 5), seed=2)
    assert (second.about, second.format, second.seed) == (first.about, first.format, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_what_is_no_cache_is_left_alone(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no teacher cache"):
        TeacherLogits(tmp_path / "c")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path in ("notes", "file"):
        for use in (TeacherLogits, lambda path: create(path, {}, LogitFormat(10, 5), 0)):
            with pytest.raises(ValueError, match=f"{path} exists but is no teacher cache.*name another path"):
                use(tmp_path / path)
    with pytest.raises(ValueError, match="file is a file, so that .*file/c cannot be made"):
        create(tmp_path / "file" / "c", {}, LogitFormat(10, 5), 0)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_logits.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(10**9))
    with pytest.raises(OSError, match=r"takes 2,562\.3 MB, but .* has room for 1,000\.0"):
        create(tmp_path / "c", {}, LogitFormat(1_281_167, 1000), 0)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_and_leaves_the_block_undone(tmp_path, monkeypatch):
    cache = create(tmp_path / "c", {}, LogitFormat(10, 5), 0)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher_logits.os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*logits.bin \(No space left on device\).*goes on from here"):
        cache.write(0, torch.zeros(4, 1, 5))
    assert not cache.marks().any()


def _cut(path):
    os.truncate(path, path.stat().st_size - 1)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _garbage(path):
    path.write_bytes(np.full(path.stat().st_size // 8, -5).tobytes())


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("logits.bin", _cut, r"logits.bin is damaged: it has 99 bytes, but must have 100; delete .*c "),
        ("logits.bin", _flip, "logits.bin is damaged: block 1 does not have its checksum"),
        ("logits.bin", os.remove, "there is no such file"),
        ("blocks.bin", _cut, "blocks.bin is damaged: it has 23 bytes, but must have 24"),
        ("blocks.bin", _garbage, "blocks.bin is damaged: it holds values that are no marks"),
        ("teacher_cache.json", _cut, "teacher_cache.json is damaged"),
        ("teacher_cache.json", lambda path: path.write_bytes(b"\xff\xfe"), "teacher_cache.json is damaged"),
        ("teacher_cache.json", lambda path: path.write_text("[]"), "teacher_cache.json is damaged"),
        (
            "teacher_cache.json",
            lambda path: (path.unlink(), path.mkdir()),
            "teacher_cache.json is damaged: Is a directory",
        ),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, harm, message):
    filled(tmp_path / "c", LogitFormat(10, 5))
    harm(tmp_path / "c" / name)
    with pytest.raises(ValueError, match=message):
        TeacherLogits(tmp_path / "c").check()


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "something else"},
        {"seed": "0"},
        {"about": {"teacher": "x"}},
        {"about": []},
        {"format": {"pictures": 10}},
        {"format": {"pictures": 10, "classes": 10**30}},
        {"format": {"pictures": 10, "classes": 5, "colour": 1}},
        {"format": {"pictures": -10, "classes": 5}},
        {"format": {"pictures": math.inf, "classes": 5}},
        {"format": None},
    ],
)
def test_fields_of_the_description_are_checked(tmp_path, change):
    filled(tmp_path / "c", LogitFormat(10, 5))
    about = tmp_path / "c" / "teacher_cache.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | change))
    with pytest.raises(ValueError, match="teacher_cache.json is damaged: .*delete .*c to have it made anew"):
        TeacherLogits(tmp_path / "c")
    about.write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        TeacherLogits(tmp_path / "c")
