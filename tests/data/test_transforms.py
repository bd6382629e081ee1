"""Whole-batch augmentation against the per-picture recipe of torchvision."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.functional as per_picture

from kdlit.data.transforms import crop, cutout, normalize, random_crop, random_flip


def test_crop_equals_padding_and_cropping_each_picture():
    image = torch.randint(0, 256, (6, 3, 10, 12), dtype=torch.uint8)
    top, left = torch.randint(0, 9, (2, 6))
    for got, one, t, l in zip(crop(image, 4, top, left), image, top.tolist(), left.tolist(), strict=True):  # noqa: E741
        assert torch.equal(got, per_picture.crop(per_picture.pad(one, [4]), t, l, 10, 12))


def test_random_crop_draws_every_offset_equally_often():
    image = torch.zeros(9000, 1, 3, 3, dtype=torch.uint8)
    image[:, :, 1, 1] = 1
    places = random_crop(image, padding=1).flatten(1).float().mean(0)
    assert places.sum() == pytest.approx(1.0)
    assert places.min() > 0.095
    assert places.max() < 0.128


def test_without_padding_pictures_stay_as_they_are():
    image = torch.rand(2, 3, 4, 4)
    assert random_crop(image, padding=0) is image


def test_random_flip_mirrors_about_half_and_only_left_to_right():
    image = torch.arange(4.0).view(1, 1, 2, 2).expand(4000, 1, 2, 2)
    flipped = random_flip(image)
    mirrored = (flipped == image.flip(-1)).flatten(1).all(1)
    assert ((flipped == image).flatten(1).all(1) | mirrored).all()
    assert mirrored.float().mean() == pytest.approx(0.5, abs=0.04)


def test_cutout_covers_one_square_whose_centre_lies_in_the_picture():
    image = torch.full((2000, 3, 8, 8), 255, dtype=torch.uint8)
    covered = (cutout(image, 4) == 127).all(1)
    sizes = covered.flatten(1).sum(1)
    assert sizes.max() == 16
    assert sizes.min() >= 4
    rows, columns = covered.any(2).sum(1), covered.any(1).sum(1)
    assert torch.equal(sizes, rows * columns)
    assert covered.float().mean(0).min() > 0.05


def test_normalize_equals_scaling_then_subtracting():
    image = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    expected = per_picture.normalize(image.float() / 255, mean, std)
    assert torch.allclose(normalize(image, mean, std), expected, atol=1e-6)
