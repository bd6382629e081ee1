"""The table of networks: complete, measured right, and true to what was published."""

from __future__ import annotations

import csv
import inspect
import io
import json
import sys
from pathlib import Path

import pytest
import torch

from kdlit import models, zoo
from kdlit.models import FeatureTap, feature_shapes

GOLDEN = Path(__file__).parent / "golden" / "models"
TORCHVISION = "torchvision.models."


@pytest.fixture(scope="module")
def table():
    pytest.importorskip("timm")
    return {row.name: row for row in zoo.model_table()}


def in_manifest(name):
    """The published name of one of our networks."""
    if name.startswith(TORCHVISION):
        return name.replace(f"{TORCHVISION}resnet", "imagenet/ResNet")
    renamed = {"shufflenetv1": "ShuffleV1", "shufflenetv2": "ShuffleV2", "mobilenetv2": "MobileNetV2"}
    renamed |= {"mobilenetv1": "imagenet/MobileNetV1", "mobilenetv2_tinyimagenet": "MobileNetV2_tinyimagenet"}
    renamed |= {f"resnet{depth}": f"ResNet{depth}" for depth in (18, 34, 50, 101, 152)}
    return renamed.get(name, name)


def test_every_network_of_kdlit_has_a_row(table):
    golden = {}
    for file in ("cifar.json", "more.json"):
        golden |= json.loads((GOLDEN / file).read_text())["models"]
    assert {name: table[name].parameters for name in golden} == {name: net["params"] for name, net in golden.items()}
    functions = {name for name in models.__all__ if inspect.isfunction(getattr(models, name))}
    assert {name for name in table if "." not in name} == functions - {
        "digit_pairs_teacher",
        "feature_layers",
        "feature_shapes",
        "from_checkpoint",
    }
    assert all(len(row.feature_layers) >= 4 for row in table.values())
    assert {row.name: (row.image_size, row.num_classes) for row in table.values() if row.image_size != 32} == {
        "mobilenetv2_tinyimagenet": (64, 200),
        **dict.fromkeys(("deit_tiny_distilled", "pit_tiny", "pvt_tiny", "t2t_vit_7"), (224, 100)),
        **dict.fromkeys(("deit_tiny", "deit3_small", "mobilenetv1"), (224, 1000)),
        **{name: (224, 1000) for name in table if name.startswith(TORCHVISION)},
    }


def test_parameters_and_multiply_adds_are_those_of_the_published_networks(table, shared):
    manifest = json.loads((shared / "models" / "manifest.json").read_text())["models"]
    names = {name: in_manifest(name) for name in table}
    measured = {names[name]: (row.parameters, row.multiply_adds) for name, row in table.items()}
    published = {name: (network["params"], network["macs"]) for name, network in manifest.items()}
    assert {name: measured.get(name) for name in published} == published
    shapes = {name: network["feats"] for name, network in manifest.items()}
    for name in ("resnet8", "resnet18", "vgg8", "wrn_16_2", "mobilenetv2", "mobilenetv2_tinyimagenet", "shufflenetv1"):
        *maps, _ = seen(table[name])
        assert [list(shape[1:]) for shape in maps] == shapes[names[name]], name


def seen(row):
    """Shapes that the layers named in a row give."""
    constructor = zoo.networks(row.name)[row.name]
    with torch.device("meta"):
        network = constructor(num_classes=row.num_classes)
        example = torch.empty(1, 3, row.image_size, row.image_size)
    return list(feature_shapes(network, row.feature_layers, example).values())


@pytest.mark.parametrize(
    "name", ["shufflenetv2", "mobilenetv1", *(TORCHVISION + n for n in ("resnet18", "mobilenet_v2"))]
)
def test_feature_layers_are_maps_that_shrink(table, name):
    shapes = [shape for shape in seen(table[name]) if len(shape) == 4]
    assert len(shapes) >= 4
    assert shapes == sorted(shapes, key=lambda shape: -shape[2])


@pytest.mark.parametrize(
    "name", ["deit_tiny", "deit_tiny_distilled", "deit3_small", "pit_tiny", "pvt_tiny", "t2t_vit_7"]
)
def test_feature_layers_of_transformers_are_tokens(table, name):
    *tokens, pooled = seen(table[name])
    assert {len(shape) for shape in tokens} == {3}
    assert len(pooled) == 2


def test_accuracies_are_the_published_ones(shared):
    published = {}
    with (shared / "reference" / "results.csv").open() as file:
        for row in csv.DictReader(file):
            is_one = row["method"] in ("teacher", "student") and row["metric"] == "top1"
            if is_one and row["dataset"] in ("cifar100", "imagenet") and row["variant"] in ("", "last epoch"):
                name = row[row["method"]].replace("-", "_").replace("deit_iii", "deit3")
                is_torchvision = row["dataset"] == "imagenet" and name.startswith("resnet")
                key = (TORCHVISION * is_torchvision + name, row["dataset"], row["value"])
                published.setdefault(key, set()).add(row["source"])
    with (Path(models.__file__).parent / "accuracy.csv").open() as file:
        ours = {(row["network"], row["dataset"], row["top1"]): row["source"] for row in csv.DictReader(file)}
    assert {key: set(sources.split()) for key, sources in ours.items()} == published
    assert {name for name, _, _ in ours} <= zoo.networks().keys()


def test_accuracies_stand_beside_their_networks():
    (row,) = zoo.model_table("resnet32x4")
    assert row.accuracy == (("79.42", "cifar100", "crd dkd lskd mlkd rld ttm"),)
    (row,) = zoo.model_table("torchvision.models.resnet50")
    assert {figure.top1 for figure in row.accuracy} == {"76.13", "76.16"}
    assert row.accuracy[-1] == ("76.13", "imagenet", "ResNet50_Weights.IMAGENET1K_V1")


def test_a_network_appears_by_itself(monkeypatch):
    def resnet_wide(num_classes: int = 10, image_size: int = 16) -> models.ResNet:
        return models.ResNet(8, (4, 4, 8, 16), num_classes)

    monkeypatch.setattr(models, "resnet_wide", resnet_wide, raising=False)
    monkeypatch.setattr(models, "__all__", [*models.__all__, "resnet_wide"])
    (row,) = zoo.model_table("ResNet_W")
    by_hand = 3 * 4 * 9 * 256 + 2 * 4 * 4 * 9 * 256 + (4 + 8) * 8 * 9 * 64 + (8 + 16) * 16 * 9 * 16
    assert row.multiply_adds == by_hand + 4 * 8 * 64 + 8 * 16 * 16 + 16 * 10  # projections and classifier
    assert row[:3] == ("resnet_wide", 16, 10)
    FeatureTap(resnet_wide(), row.feature_layers)


def test_text_for_a_pipe_has_one_whole_line_for_each_network(kdlit_cli):
    lines = [line.split() for line in kdlit_cli("models", "resnet18").splitlines()]
    own, imagenet = (line for line in lines if line and line[0].endswith("resnet18"))
    layers = ["relu,", "layer1,", "layer2,", "layer3,", "layer4,"]
    assert own == ["resnet18", "32", "100", "11,220,132", "555,468,800", *layers, "pool"]
    assert imagenet[:5] == ["torchvision.models.resnet18", "224", "1000", "11,689,512", "1,814,073,344"]
    assert imagenet[-3:] == ["69.758", "imagenet", "(ResNet18_Weights.IMAGENET1K_V1)"]


def test_other_formats(kdlit_cli):
    (row,) = csv.DictReader(io.StringIO(kdlit_cli("models", "vgg8", "--format", "csv")))
    assert row["parameters"] == "3965028"
    assert row["feature_layers"] == "relu0 relu1 relu2 relu3 relu4 pool"
    markdown = kdlit_cli("models", "vgg8", "--format=markdown").strip().splitlines()
    assert [len(line.split("|")) for line in markdown] == [9, 9, 9]


def test_no_such_network(kdlit_cli):
    message = kdlit_cli("models", "resnext")
    assert "kdlit: error: no network has 'resnext' in its name; the names are deit3_small, " in message
    assert message.endswith("exit 2")


def test_networks_of_timm_are_left_out_where_it_is_missing(kdlit_cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    output = kdlit_cli("models", "_tiny", "--format=csv")
    assert [line.split(",")[0] for line in output.splitlines()[:3]] == ["name", "mobilenetv2_tinyimagenet", "pvt_tiny"]
    last = 'Left out, as timm is missing: deit_tiny, deit_tiny_distilled, pit_tiny; pip install "kdlit[timm]"\n'
    assert output.endswith(last)
    assert kdlit_cli("models", "deit3") == 'Left out, as timm is missing: deit3_small; pip install "kdlit[timm]"\n'
