"""Whole-batch augmentation against the per-picture recipe of torchvision."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.functional as per_picture
from torchvision.transforms import v2

from kdlit.data.transforms import crop_and_flip, cutout, one_by_one


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crop_and_flip_equal_the_per_picture_recipe_at_the_same_offsets(padding):
    image = torch.randint(0, 256, (12, 3, 10, 13), dtype=torch.uint8)
    top, left = torch.randint(0, 2 * padding + 1, (2, 12))
    flip = torch.arange(12) % 3 == 0
    got = crop_and_flip(image, padding, top, left, flip)
    for row, one in enumerate(image):
        padded = per_picture.pad(one, [padding])
        expected = per_picture.crop(padded, int(top[row]), int(left[row]), 10, 13)
        assert torch.equal(got[row], per_picture.hflip(expected) if flip[row] else expected)


def test_cutout_covers_one_square_around_its_centre():
    image = torch.full((3, 3, 8, 8), 255, dtype=torch.uint8)
    covered = (cutout(image, 4, torch.tensor([4, 0, 7]), torch.tensor([4, 0, 2])) == 127).all(1)
    assert covered[0].nonzero().tolist() == [[row, column] for row in range(2, 6) for column in range(2, 6)]
    assert covered[1].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert covered[2].nonzero().tolist() == [[row, column] for row in (5, 6, 7) for column in range(4)]


def test_one_by_one_draws_for_each_picture_from_its_own_number():
    image = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    draw = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    transform = v2.RandomResizedCrop(8, antialias=True)
    before = torch.get_rng_state()
    all_at_once = one_by_one(transform, image, draw)
    assert torch.equal(torch.get_rng_state(), before)
    order = torch.tensor([2, 0])
    assert torch.equal(one_by_one(transform, image[order], draw[order]), all_at_once[order])
    other = one_by_one(transform, image, draw + 1e-9)
    assert not torch.equal(other, all_at_once)


def test_transforms_that_give_several_sizes_are_refused():
    pictures = [torch.zeros(3, 8, width, dtype=torch.uint8) for width in (8, 9)]
    with pytest.raises(ValueError, match=r"pictures of one size, got \(3, 8, 8\), \(3, 8, 9\); end them with"):
        one_by_one(lambda one: one, pictures, torch.zeros(2))
