import pytest
import torch
from torch import nn

from kdlit.models import VGG, FeatureTap, vgg8


def tiny(convs=(1, 2, 1, 1, 3)):
    return VGG(convs, widths=(4, 5, 6, 7, 8), num_classes=10).eval()


def test_blocks_are_as_long_and_wide_as_asked_for():
    model = tiny()
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs] == [4, 5, 5, 6, 7, 8, 8, 8]
    assert all(m.bias is not None for m in convs)
    assert [type(m) for m in model.block1] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d]


def test_features_before_and_after_relu():
    model = tiny()
    tap = FeatureTap(model, [f"{kind}{i}" for kind in ("block", "relu") for i in range(5)])
    model(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    caught = tap.take()
    for i in range(5):
        assert caught[f"block{i}"].min() < 0
        assert torch.equal(caught[f"relu{i}"], caught[f"block{i}"].relu())


def test_biases_start_at_zero_and_the_classifier_small():
    model = vgg8()
    assert all(m.bias.abs().max() == 0 for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert model.block4.get_submodule("0").weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("name", ["convs", "widths"])
def test_bad_blocks(name):
    good = {"convs": (1, 1, 1, 1, 1)}
    for value in ((2, 2, 2, 2), (2, 2, 2, 2, 2, 2), ()):
        with pytest.raises(ValueError, match=f"{name} must be five integers, one a block, got ") as caught:
            VGG(**good | {name: value})
        assert str(value) in str(caught.value)
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
        VGG(**good | {name: (2, 2, 0, 2, 2)})
