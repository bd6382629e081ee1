"""The same name for the same content, and another for any other."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from kdlit.fingerprint import of_files, of_network, of_tensors, sketch


def test_values_names_types_shapes_and_order_count():
    tensor = torch.arange(6)
    base = {"a": tensor, "b": torch.zeros(2)}
    others = [
        {"a": tensor + 1, "b": torch.zeros(2)},
        {"c": tensor, "b": torch.zeros(2)},
        {"a": tensor.int(), "b": torch.zeros(2)},
        {"a": tensor.view(2, 3), "b": torch.zeros(2)},
        {"b": torch.zeros(2), "a": tensor},
        {"a": tensor},
        {"a": tensor, "b": -torch.zeros(2)},
    ]
    names = {of_tensors(one) for one in (base, *others)}
    assert len(names) == 1 + len(others)
    assert of_tensors({"a": tensor.clone(), "b": torch.zeros(2)}) == of_tensors(base)


def test_memory_layout_and_pieces_do_not_count(monkeypatch):
    picture = torch.randn(2, 3, 4, 5)
    whole = of_tensors({"x": picture})
    assert of_tensors({"x": picture.to(memory_format=torch.channels_last)}) == whole
    monkeypatch.setattr("kdlit.fingerprint._CHUNK", 12)
    assert of_tensors({"x": picture}) == whole


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.complex64])
def test_any_type_any_shape(dtype):
    assert of_tensors({"x": torch.ones((), dtype=dtype)}) != of_tensors({"x": torch.zeros((), dtype=dtype)})
    assert of_tensors({"x": torch.ones(0, 2, dtype=dtype)}) != of_tensors({"x": torch.ones(0, 3, dtype=dtype)})


def test_buffers_of_a_network_count_even_where_its_state_leaves_them_out():
    net = nn.BatchNorm1d(3)
    net.register_buffer("scale", torch.ones(1), persistent=False)
    before = of_network(net)
    assert of_network(net.train()) == of_network(net.eval()) == before
    net.scale += 1
    changed = of_network(net)
    net.running_mean += 1
    assert len({before, changed, of_network(net)}) == 3


def test_files_by_name_size_and_time(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"12")
    names = [b"a", b"b"]
    before = of_files(tmp_path, names)
    assert of_files(tmp_path, iter(names)) == before
    assert of_files(tmp_path, [b"b", b"a"]) != before
    os.utime(tmp_path / "a", ns=(0, 0))
    assert (touched := of_files(tmp_path, names)) != before
    (tmp_path / "a").write_bytes(b"123")
    os.utime(tmp_path / "a", ns=(0, 0))
    assert of_files(tmp_path, names) not in (before, touched)
    (tmp_path / "b").unlink()
    with pytest.raises(ValueError, match=f"cannot look at {tmp_path}/b: No such file"):
        of_files(tmp_path, names)


def test_a_sketch_shows_one_changed_pixel_and_how_far_off():
    pictures = torch.randn(4, 3, 32, 32)
    changed = pictures.clone()
    changed[2, 1, 5, 5] += 1 / 255
    odd = (sketch(changed) - sketch(pictures)).abs()
    assert odd[[0, 1, 3]].max() == 0
    assert odd[2].min() > 0.0039
    noise = 0.1 * torch.randn(256, 3, 8, 8)
    squares = float(sketch(noise).square().mean())
    assert squares == pytest.approx(float(noise.square().sum() / 256), rel=0.2)
