"""Every network takes images of any size from its smallest on, and refuses the rest; shapes need no numbers."""

import pytest
import torch

from kdlit import models

SMALLEST = {
    "resnet20": 4,
    "wrn_16_1": 4,
    "resnet18": 8,
    "resnet50": 8,
    "vgg8": 8,
    "vgg19": 8,
    "shufflenetv1": 8,
    "shufflenetv2": 8,
    "mobilenetv2_tinyimagenet": 8,
    "mobilenetv2": 16,
    "mobilenetv1": 32,
}
every_family = pytest.mark.parametrize("name", SMALLEST)


def build(name, num_classes=10):
    with torch.device("meta"):
        return getattr(models, name)(num_classes)


def image(*shape):
    return torch.empty(shape, device="meta")


@every_family
def test_any_size_gives_one_row_per_image(name):
    model = build(name)
    for size in ((SMALLEST[name],) * 2, (64, 64), (33, 47)):
        assert model(image(2, 3, *size)).shape == (2, 10), size


@every_family
def test_what_is_no_image_or_too_small(name):
    smallest = SMALLEST[name]
    model = build(name)
    small = [(2, 3, smallest - 1, 65), (2, 3, 65, smallest - 1)]
    for shape in ((3, 65, 65), (2, 1, 65, 65), (2, 65, 65, 3), (2, 10), *small):
        with pytest.raises(
            ValueError, match=r"image must have shape \(B, 3, H, W\) with H and W >= \d+, got "
        ) as caught:
            model(image(*shape))
        assert str(caught.value).endswith(f">= {smallest}, got {shape}")


@every_family
@pytest.mark.parametrize("num_classes", [0, 10.0])
def test_bad_num_classes(name, num_classes):
    with pytest.raises(ValueError, match=f"num_classes must be an integer >= 1, got {num_classes}"):
        build(name, num_classes)


@pytest.mark.parametrize("name", ["vgg8", "vgg19"])
def test_vgg_has_a_fourth_max_pool_at_64_pixels_height_alone(name):
    model = build(name)
    sizes = {
        (32, 32): (4, 4),
        (64, 64): (4, 4),
        (64, 32): (4, 2),
        (32, 64): (4, 8),
        (96, 96): (12, 12),
        (65, 65): (8, 8),
    }
    for size, expected in sizes.items():
        assert models.feature_shapes(model, ["block4"], image(2, 3, *size))["block4"] == (2, 512, *expected), size
    with pytest.raises(ValueError, match=r"H and W >= 16, got \(2, 3, 64, 8\)"):
        model(image(2, 3, 64, 8))
