"""The embedded handwritten numbers."""

from __future__ import annotations

import pytest
import torch

from kdlit.data import DigitPairs
from kdlit.models import digit_pairs_teacher


@pytest.fixture(scope="module")
def data():
    module = DigitPairs()
    module.setup("fit")
    return module


def test_every_class_is_there_equally_often(data):
    for split, size in (("train", 300), ("val", 2000), ("test", 5000)):
        assert torch.bincount(data._pictures[split].target).tolist() == [size // 100] * 100
        assert data._pictures[split].image.shape == (size, 3, 8, 16)
    assert data.class_names[7] == "07"


def test_no_digit_is_in_two_parts(data):
    halves = {
        split: {tuple(half.flatten().tolist()) for image in pictures.image[:, 0] for half in image.split(8, dim=1)}
        for split, pictures in data._pictures.items()
    }
    assert not halves["train"] & halves["val"]
    assert not halves["train"] & halves["test"]
    assert not halves["val"] & halves["test"]


def test_pictures_are_the_same_in_every_run(data):
    again = DigitPairs()
    torch.manual_seed(5)
    again.setup("fit")
    assert torch.equal(data._pictures["train"].image, again._pictures["train"].image)


def test_more_training_pairs_leave_the_parts_apart():
    more = DigitPairs(train_size=1000)
    more.setup("fit")
    assert len(more._pictures["train"]) == 1000


def test_the_shipped_teacher_reads_them(data):
    teacher = digit_pairs_teacher().eval()
    pictures = data._pictures["test"][torch.arange(0, 5000, 5)]
    with torch.no_grad():
        hits = teacher(data.views.evaluation(pictures.image)["image"]).argmax(1) == pictures.target
    assert hits.float().mean() > 0.96


@pytest.mark.parametrize("size", [0, 50, 150])
def test_numbers_of_pairs_must_fill_all_classes(size):
    with pytest.raises(ValueError, match=f"train_size must be a positive multiple of 100, .* got {size}"):
        DigitPairs(train_size=size)
