"""The CIFAR networks against values measured on the published code of mdistiller and RepDistiller."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kdlit import models

RESNETS = [f"resnet{name}" for name in ("8", "14", "20", "32", "44", "56", "110", "8x4", "32x4")]
WRNS = [f"wrn_{name}" for name in ("16_1", "16_2", "16_4", "28_2", "28_4", "40_1", "40_2")]
every_network = pytest.mark.parametrize("name", RESNETS + WRNS)

PATHS = {"resnet": ["relu", "layer1", "layer2", "layer3"], "wrn": ["conv1", "block1", "block2", "block3"]}


def preact_paths(name, model):
    if name.startswith("wrn"):
        return ["conv1", "block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]
    return ["relu", *(f"layer{i}.{len(model.layer1) - 1}.preact" for i in (1, 2, 3))]


def outputs(model, paths, image):
    """Logits, and the outputs of sub-modules by path."""
    caught = {}
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda _m, _x, y, path=path: caught.update({path: y}))
        for path in paths
    ]
    with torch.no_grad():
        logits = model(image)
    for hook in hooks:
        hook.remove()
    return logits, caught


def stats(feature):
    x = feature.numpy()
    return [x.mean(), x.std(), x.min(), x.max(), np.linalg.norm(x)]


@every_network
def test_names_shapes_and_counts_are_the_published_ones(name, golden):
    model = getattr(models, name)()
    expected = golden["models"][name]
    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == expected["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == expected["params"]


@every_network
def test_eval_outputs_in_float64(name, golden, golden_fill, golden_image):
    arrays, scale = golden["arrays"], golden["models"][name]["logit_absmax"]
    model = golden_fill(name, getattr(models, name)()).double().eval()
    features, preacts = PATHS[name.rstrip("x_0123456789")], preact_paths(name, model)
    logits, caught = outputs(model, [*features, *preacts, "pool"], golden_image.double())
    np.testing.assert_allclose(logits, arrays[f"{name}/logits64"], rtol=0, atol=1e-9 * scale)
    np.testing.assert_allclose(caught["pool"], arrays[f"{name}/pooled64"], rtol=1e-9, atol=1e-9)
    assert [list(caught[path].shape[1:]) for path in features] == golden["models"][name]["feats"]
    for paths, rows in ((features, "feat_stats64"), (preacts, "preact_stats64")):
        np.testing.assert_allclose(
            [stats(caught[path]) for path in paths], arrays[f"{name}/{rows}"], rtol=1e-9, atol=1e-9, err_msg=rows
        )


@every_network
def test_eval_outputs_in_float32(name, golden, golden_fill, golden_image):
    arrays, expected = golden["arrays"], golden["models"][name]
    logits, caught = outputs(golden_fill(name, getattr(models, name)()).eval(), ["pool"], golden_image)
    tolerance = max(1e-5 * expected["logit_absmax"], 5 * expected["f32_vs_f64_maxabs"])
    np.testing.assert_allclose(logits, arrays[f"{name}/logits32"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(caught["pool"], arrays[f"{name}/pooled32"], rtol=0, atol=tolerance)


@every_network
def test_train_outputs_and_gradient(name, golden, golden_fill, golden_image):
    arrays, scale = golden["arrays"], golden["models"][name]["logit_absmax"]
    model = golden_fill(name, getattr(models, name)()).double().train()
    logits = model(golden_image.double())
    loss = cross_entropy(logits, torch.tensor([3, 7]))
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    np.testing.assert_allclose(logits.detach(), arrays[f"{name}/train_logits64"], rtol=0, atol=1e-9 * scale)
    np.testing.assert_allclose([loss.item(), norm], arrays[f"{name}/train_ce_gradnorm64"], rtol=1e-9)
    batch_norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.num_batches_tracked.item() for m in batch_norms} == {1}, "each BatchNorm sees a batch once"


@every_network
def test_initial_weights_follow_the_published_order(name, golden, golden_image):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(models, name)()
    logits, _ = outputs(model.double().eval(), [], golden_image.double())
    np.testing.assert_allclose(logits, golden["arrays"][f"{name}/init0_logits64"], rtol=1e-6, atol=1e-6)


@every_network
def test_num_classes_sizes_the_classifier_alone(name):
    model = getattr(models, name)(num_classes=7)
    shapes = {key: value.shape for key, value in getattr(models, name)().state_dict().items()}
    changed = {key for key, value in model.state_dict().items() if value.shape != shapes[key]}
    assert changed == {"fc.weight", "fc.bias"}
    assert model.fc.out_features == 7
