"""Folded networks give what the originals give, and only what may be folded is."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdlit import models
from kdlit.models.folding import fold_batchnorm


def scrambled(model):
    """Batch norms that do something."""
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.3, 3, generator=generator)
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(layer.bias, generator=generator)
    return model.eval()


def norms(model):
    return sum(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules())


def relative_gap(one, other, image):
    with torch.no_grad():
        expected = one(image)
        return ((other(image) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("name", "left"),
    [("resnet8x4", 0), ("wrn_16_2", 6), ("vgg8", 0), ("mobilenetv2", 0), ("shufflenetv1", 0), ("shufflenetv2", 0)],
)
def test_published_networks_give_the_same(name, left):
    model = scrambled(getattr(models, name)(num_classes=10))
    before = copy.deepcopy(model.state_dict())
    folded = fold_batchnorm(model, torch.zeros(1, 3, 32, 32))
    assert norms(folded) == left
    assert relative_gap(model, folded, torch.randn(3, 3, 32, 32)) < 1e-5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Net(nn.Module):
    """Convolution, batch norm and a way between them that a case chooses."""

    def __init__(self, way, conv=None, norm=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3) if conv is None else conv
        self.norm = nn.BatchNorm2d(4) if norm is None else norm
        self.fc = nn.Linear(4, 3)
        self.way = way

    def forward(self, image):
        return self.fc(self.way(self, image).mean((2, 3)))


def beside(net, image):
    x = net.conv(image)
    return F.relu(net.norm(x)) + x


def in_place_first(net, image):
    return net.norm(net.conv(image).mul_(2))


def twice(net, image):
    return net.norm(net.conv(image)) + net.norm(net.conv(image.flip(-1)))


def stored(net, image):
    net.kept = net.conv(image)
    return net.norm(net.kept) + net.kept.sum()


def two_norms(net, image):
    x = net.conv(image)
    return net.norm(x) + net.other(x)


def reads_weights(net, image):
    return net.norm(net.conv(image)) * net.norm.weight.sum()


@pytest.mark.parametrize("way", [beside, in_place_first, twice, stored, two_norms, reads_weights])
def test_what_others_see_is_left_alone(way):
    net = Net(way)
    net.other = nn.BatchNorm2d(4)
    scrambled(net)
    folded = fold_batchnorm(net, torch.zeros(1, 3, 8, 8))
    assert isinstance(folded.norm, nn.BatchNorm2d)
    assert relative_gap(net, folded, torch.randn(2, 3, 8, 8)) == 0


def plain(net, image):
    return net.norm(net.conv(image))


class OddNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("conv", "norm", "folds"),
    [
        (None, None, True),
        (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), True),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4, eps=0.5), True),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), None, False),
        (None, nn.BatchNorm2d(4, track_running_stats=False), False),
        (None, OddNorm(4), False),
    ],
)
def test_layers_of_each_kind(conv, norm, folds):
    net = scrambled(Net(plain, conv, norm))
    folded = fold_batchnorm(net, torch.zeros(1, 3, 8, 8))
    assert isinstance(folded.norm, nn.Identity) == folds
    assert relative_gap(net, folded, torch.randn(2, 3, 8, 8)) < 1e-5


def test_linear_layers_fold_and_hooked_layers_do_not():
    net = scrambled(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Linear(6, 3), nn.BatchNorm1d(3))
    )
    seen = []
    net[1].register_forward_hook(lambda layer, args, output: seen.append(output))
    folded = fold_batchnorm(net, torch.zeros(1, 3, 2, 2))
    assert [type(layer) for layer in folded] == [nn.Flatten, nn.Linear, nn.BatchNorm1d, nn.Linear, nn.Identity]
    assert not seen  # the passes that find out are nobody's business
    assert relative_gap(net, folded, torch.randn(4, 3, 2, 2)) < 1e-5
    assert len(seen) == 2


def test_weights_that_two_layers_share_stay_with_the_other():
    conv = nn.Conv2d(3, 3, 1, bias=False)
    tied = nn.Conv2d(3, 3, 1, bias=False)
    tied.weight = conv.weight
    net = scrambled(nn.Sequential(conv, nn.BatchNorm2d(3), tied, nn.Flatten()))
    folded = fold_batchnorm(net, torch.zeros(1, 3, 2, 2))
    assert isinstance(folded[1], nn.Identity)
    assert relative_gap(net, folded, torch.randn(4, 3, 2, 2)) < 1e-5


def test_folding_computes_in_double_precision():
    """Against the network in float64, a folded one is as near as the network in float32."""
    model = scrambled(models.resnet20(num_classes=10))
    image = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(image.double())
        gaps = [(net(image) - exact).abs().max().item() for net in (model, fold_batchnorm(model, image[:1]))]
    assert gaps[1] < 3 * gaps[0]
