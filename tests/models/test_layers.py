"""The layers that published methods look at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from kdlit import models
from kdlit.models import FeatureLayers, FeatureTap, feature_layers, feature_shapes

PUBLISHED = json.loads((Path(__file__).parents[1] / "golden" / "models" / "layers.json").read_text())
CONSTRUCTORS = {
    "ResNet18": "resnet18", "ResNet50": "resnet50", "MobileNetV2": "mobilenetv2", "ShuffleV1": "shufflenetv1",
    "ShuffleV2": "shufflenetv2", "imagenet/MobileNetV1": "mobilenetv1",
    "MobileNetV2_tinyimagenet": "mobilenetv2_tinyimagenet",
}  # fmt: skip
SIZES = {"imagenet/": 224, "MobileNetV2_tinyimagenet": 64}


def build(name):
    if name.startswith("imagenet/ResNet"):
        return getattr(torchvision.models, name.removeprefix("imagenet/").lower())()
    return getattr(models, CONSTRUCTORS.get(name, name))()


@pytest.mark.parametrize("name", PUBLISHED)
def test_layers_are_the_published_ones(name):
    network, published = build(name), PUBLISHED[name]
    layers = feature_layers(network)
    size = next((size for part, size in SIZES.items() if name.startswith(part)), 32)
    image = torch.zeros(2, 3, size, size)
    shapes = feature_shapes(network, {*layers.maps, *layers.preact, layers.pool}, image)
    assert [list(shapes[path][1:]) for path in layers.maps] == published["feats"]
    if published["preact_feats"]:
        assert [list(shapes[path][1:]) for path in layers.preact] == published["preact_feats"]
    else:
        assert layers.preact == layers.maps
    assert shapes[layers.pool] == (2, published["pooled"])
    assert layers.classifier == published["classifier"]
    if not name.startswith("imagenet/ResNet"):  # three are published, but a stage has one each
        assert list(layers.norms) == (published["bn_before_relu"] or [])
    for path, norm in zip(layers.preact[-len(layers.norms) :], layers.norms, strict=False):
        assert network.get_submodule(norm).num_features == shapes[path][1]


def test_the_input_of_a_relu_is_the_sum_before_it():
    network = torchvision.models.resnet18(num_classes=5).eval()
    layers = feature_layers(network)
    tap = FeatureTap(network, [*layers.preact, *layers.maps])
    for _ in range(2):  # the first pass notices that these ReLUs overwrite what they are given
        network(torch.randn(2, 3, 64, 64))
        caught = tap.take()
    for before, after in zip(layers.preact, layers.maps, strict=True):
        assert torch.equal(caught[before].relu(), caught[after])
    assert (caught[layers.preact[1]] < 0).any()


def test_of_any_other_network_the_linear_layer_that_gives_the_logits_is_the_classifier():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3))
    network.append(nn.Identity())
    assert feature_layers(network, torch.zeros(1, 3, 2, 2)) == FeatureLayers(pool="3.input", classifier="3")
    assert feature_layers(network) == FeatureLayers()
    network.append(nn.Softmax(1))  # no layer gives the logits
    assert feature_layers(network, torch.zeros(1, 3, 2, 2)) == FeatureLayers()
    assert feature_shapes(network, ["3.input"], torch.zeros(1, 3, 2, 2)) == {"3.input": (1, 4)}
    assert feature_layers(nn.Conv2d(3, 3, 1)) == FeatureLayers()


def test_linear_layers_beside_the_classifier_do_not_mislead():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(12, 5)
            self.gate = nn.Linear(12, 12)
            self.unused = nn.Linear(12, 5)

        def forward(self, image):
            feature = image.flatten(1)
            return self.head(feature * self.gate(feature).sigmoid())

    assert feature_layers(Gated(), torch.rand(1, 3, 2, 2)).classifier == "head"


def test_a_network_may_say_so_itself():
    class Own(nn.Module):
        feature_layers = FeatureLayers(maps=("stage",))

    assert feature_layers(Own()).maps == ("stage",)


def test_a_wrong_path_of_an_input_is_named():
    with pytest.raises(ValueError, match=r"has no layer 'fcc'; close names: fc"):
        FeatureTap(models.resnet8(), ["fcc.input"])


def test_a_tap_sees_through_gradient_checkpointing():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
            self.fc = nn.Linear(4, 2)

        def forward(self, image):
            return self.fc(checkpoint(self.stage, image, use_reentrant=False).mean((2, 3)))

    torch.manual_seed(0)
    network = Checkpointed()
    tap = FeatureTap(network, ["stage", "fc.input"])
    image = torch.randn(2, 3, 6, 6)
    for _ in range(2):
        logits = network(image)
        caught = tap.take()
        network.zero_grad()
        (logits.sum() + caught["stage"].square().sum()).backward()
    checkpointed = network.stage[0].weight.grad.clone()
    network.zero_grad()
    feature = network.stage(image)
    (network.fc(feature.mean((2, 3))).sum() + feature.square().sum()).backward()
    assert torch.allclose(checkpointed, network.stage[0].weight.grad)
