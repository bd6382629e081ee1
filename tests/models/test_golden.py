"""The networks against values measured on the published code of mdistiller and RepDistiller."""

import copy

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.functional import cross_entropy

from kdlit import models

THREE_STAGE = [f"resnet{name}" for name in ("8", "14", "20", "32", "44", "56", "110", "8x4", "32x4")]
FOUR_STAGE = [f"resnet{name}" for name in ("18", "34", "50", "101", "152")]
WRNS = [f"wrn_{name}" for name in ("16_1", "16_2", "16_4", "28_2", "28_4", "40_1", "40_2")]
VGGS = [f"vgg{name}" for name in ("8", "11", "13", "16", "19")]
SHUFFLENETS = ["shufflenetv1", "shufflenetv2"]
MOBILENETS = ["mobilenetv2", "mobilenetv2_tinyimagenet"]
TRAINED = [*THREE_STAGE, *FOUR_STAGE[:-1], *WRNS, *VGGS, *SHUFFLENETS, *MOBILENETS]
NETWORKS = [*TRAINED, "resnet152", "mobilenetv1"]  # one is slow, of the other no training was measured

trained_network = pytest.mark.parametrize("name", TRAINED, indirect=True)


def paths(name, model):
    """Where the published feature maps are, and those before ReLU, which linear bottlenecks have not."""
    if name in THREE_STAGE + FOUR_STAGE + SHUFFLENETS:
        layers = [f"layer{i}" for i in ((1, 2, 3, 4) if name in FOUR_STAGE else (1, 2, 3))]
        preacts = [f"{layer}.{len(model.get_submodule(layer)) - 1}.preact" for layer in layers]
        return ["relu", *layers], ["relu", *preacts]
    if name in WRNS:
        return ["conv1", "block1", "block2", "block3"], ["conv1", "block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]
    if name in VGGS:
        return [f"relu{i}" for i in range(5)], ["relu0", *(f"block{i}" for i in (1, 2, 3, 4))]
    return {
        "mobilenetv1": ([f"model.{i}" for i in (3, 5, 11, 13)], [f"model.{i}.4" for i in (3, 5, 11, 13)]),
        "mobilenetv2": (["conv1", *(f"blocks.{i}" for i in (1, 2, 4, 6))], []),
        "mobilenetv2_tinyimagenet": (["pre", "stage2", "stage3", "stage4", "conv1"], []),
    }[name]


def outputs(model, watched, image):
    """Logits, and the outputs of sub-modules by path."""
    caught = {}
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda _m, _x, y, path=path: caught.update({path: y}))
        for path in watched
    ]
    with torch.no_grad():
        logits = model(image)
    for hook in hooks:
        hook.remove()
    return logits, caught


def stats(feature):
    x = feature.numpy()
    return [x.mean(), x.std(), x.min(), x.max(), np.linalg.norm(x)]


@pytest.fixture(scope="module", params=NETWORKS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def filled(name, golden_fill):
    """Gives copies of the network with the parameters of the golden outputs."""
    model = golden_fill(name, getattr(models, name)())
    return lambda: copy.deepcopy(model)


@pytest.fixture
def image(name, golden, golden_image):
    return golden_image(golden["models"][name].get("input", [3, 32, 32])[1])


def test_names_shapes_and_counts_are_the_published_ones(name, golden):
    with torch.device("meta"):
        model = getattr(models, name)()
    expected = golden["models"][name]
    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == expected["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == expected["params"]


def test_eval_outputs_in_float64(name, golden, filled, image):
    arrays, scale = golden["arrays"], golden["models"][name]["logit_absmax"]
    model = filled().double().eval()
    features, preacts = paths(name, model)
    logits, caught = outputs(model, [*features, *preacts, "pool"], image.double())
    np.testing.assert_allclose(logits, arrays[f"{name}/logits64"], rtol=0, atol=1e-9 * scale)
    np.testing.assert_allclose(caught["pool"], arrays[f"{name}/pooled64"], rtol=1e-9, atol=1e-9)
    assert [list(caught[path].shape[1:]) for path in features] == golden["models"][name]["feats"]
    for watched, rows in ((features, "feat_stats64"), (preacts, "preact_stats64")):
        measured = arrays.get(f"{name}/{rows}", np.empty((0, 5)))
        found = np.reshape([stats(caught[path]) for path in watched], (-1, 5))
        assert found.shape == measured.shape
        np.testing.assert_allclose(found, measured, rtol=1e-9, atol=1e-9, err_msg=rows)


def test_eval_outputs_in_float32(name, golden, filled, image):
    arrays, expected = golden["arrays"], golden["models"][name]
    logits, caught = outputs(filled().eval(), ["pool"], image)
    tolerance = max(1e-5 * expected["logit_absmax"], 5 * expected["f32_vs_f64_maxabs"])
    np.testing.assert_allclose(logits, arrays[f"{name}/logits32"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(caught["pool"], arrays[f"{name}/pooled32"], rtol=0, atol=tolerance)


@trained_network
def test_train_outputs_and_gradient(name, golden, filled, image):
    arrays, scale = golden["arrays"], golden["models"][name]["logit_absmax"]
    model = filled().double().train()
    logits = model(image.double())
    loss = cross_entropy(logits, torch.tensor([3, 7]))
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    np.testing.assert_allclose(logits.detach(), arrays[f"{name}/train_logits64"], rtol=0, atol=1e-9 * scale)
    np.testing.assert_allclose([loss.item(), norm], arrays[f"{name}/train_ce_gradnorm64"], rtol=1e-9)
    batch_norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.num_batches_tracked.item() for m in batch_norms} == {1}, "each BatchNorm sees a batch once"


@trained_network
def test_initial_weights_follow_the_published_order(name, golden, image):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(models, name)()
    logits, _ = outputs(model.double().eval(), [], image.double())
    expected = golden["arrays"][f"{name}/init0_logits64"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_num_classes_sizes_the_classifier_alone(name, golden):
    with torch.device("meta"):
        model = getattr(models, name)(num_classes=7)
    published = [(key, tuple(shape)) for key, shape in golden["models"][name]["state_dict"]]
    shapes = [(key, tuple(value.shape)) for key, value in model.state_dict().items()]
    (weight, (_, *width)), (bias, _) = published[-2:]
    assert shapes == [*published[:-2], (weight, (7, *width)), (bias, (7,))]


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"], indirect=True)
def test_imagenet_resnets_are_torchvisions(name, golden):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    published = golden["torchvision"][name]
    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == published
