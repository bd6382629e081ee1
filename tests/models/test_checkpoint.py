"""Every format of weights in the wild is written to a file and read back; whatever cannot be loaded is refused."""

import argparse
import gzip
import io
import lzma
import os
import pickle
import re
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from kdlit import models
from kdlit.models import (
    CheckpointError,
    FourStageResNet,
    ResNet,
    WideResNet,
    from_checkpoint,
    resnet8,
    resnet20,
    resnet32,
    resnet56,
    wrn_16_2,
)


def random_state(model, seed):
    """Values for every entry, all different, BatchNorm statistics included."""
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict(
        (key, torch.rand(value.shape, generator=generator) + 0.5 if value.is_floating_point() else torch.tensor(seed))
        for key, value in model.state_dict().items()
    )


def tiny_resnet():
    return ResNet(8, widths=(4, 4, 8, 16), num_classes=10)


def tiny_wrn():
    return WideResNet(10, 1, num_classes=10)


@pytest.fixture
def weights():
    return random_state(tiny_resnet(), seed=3)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "ckpt_epoch_240.pth"


def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def renamed(weights, *rules):
    result = {}
    for key, value in weights.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        result[key] = value
    return result


def assert_loads(path, weights, model=None, **options):
    model = model or tiny_resnet()
    assert from_checkpoint(model, str(path), **options) is model
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0, check_dtype=False, msg=key)


def refusal(path, model=None, **options):
    """The message of the refusal, after which the model must be as before."""
    model = model or tiny_resnet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        from_checkpoint(model, str(path), **options)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} changed"
    assert caught.value.__suppress_context__
    message = str(caught.value)
    assert message.startswith(f"{Path(path).expanduser().absolute()}: ")
    assert "Traceback" not in message
    return message


# Formats and containers


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("name", ["weights.pth", "student_best", "model_best.pth.tar", "a.b.th", "odd.safetensors"])
def test_torch_files_of_any_name(tmp_path, weights, name, new_format):
    torch.save(weights, tmp_path / name, _use_new_zipfile_serialization=new_format)
    assert_loads(tmp_path / name, weights)


@pytest.mark.parametrize("name", ["model.safetensors", "student_best"])
def test_safetensors_of_any_name(tmp_path, weights, name):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(dict(weights), str(tmp_path / name))
    assert_loads(tmp_path / name, weights)


@pytest.mark.parametrize("container", ["model", "state_dict", "net", "model_state"])
def test_containers(file, weights, container):
    torch.save({"epoch": 240, "best_acc": torch.tensor(0.7), container: weights, "optimizer": {"lr": 0.1}}, file)
    assert_loads(file, weights)


def test_first_container_in_the_documented_order_wins(file, weights):
    order = ["model", "state_dict", "net", "model_state"]
    states = {name: random_state(tiny_resnet(), seed) for seed, name in enumerate(order)}
    for i, winner in enumerate(order):
        torch.save({name: states[name] for name in reversed(order[i:])}, file)
        assert_loads(file, states[winner])


def test_container_that_is_no_dict_is_passed_over(file, weights):
    torch.save({"model": "resnet8", "state_dict": weights}, file)
    assert_loads(file, weights)


@pytest.mark.parametrize("new_format", [True, False])
def test_argparse_namespace_beside_the_weights(file, weights, new_format):
    opt = argparse.Namespace(model_s="resnet8", learning_rate=0.05, lr_decay_epochs=[150, 180])
    torch.save({"opt": opt, "model": weights}, file, _use_new_zipfile_serialization=new_format)
    assert_loads(file, weights)
    assert argparse.Namespace not in torch.serialization.get_safe_globals(), "allowed for this file alone"


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(
    "scalar", [np.float64(71.4), np.float32(0.5), np.int64(240), np.bool_(True), np.str_("resnet8")], ids=repr
)
def test_numpy_scalars_beside_the_weights(file, weights, scalar, new_format):
    content = {"best_acc": scalar, "opt": argparse.Namespace(lr=scalar), "model": weights, "history": [scalar] * 2}
    torch.save(content, file, _use_new_zipfile_serialization=new_format)
    with pytest.raises(pickle.UnpicklingError, match="multiarray"):
        torch.load(file, weights_only=True)
    assert_loads(file, weights)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numpy_scalars_of_version_1_and_2(file, weights, module):
    torch.save({"best_acc": np.float64(71.4), "model": weights}, file, _use_new_zipfile_serialization=False)
    content, found = re.subn(rb"numpy\._?core\.multiarray(?=\nscalar)", module, file.read_bytes())
    assert found == 1
    file.write_bytes(content)
    assert_loads(file, weights)


class Scalar:
    """Unpickled, a NumPy scalar of any type and value."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return np.float64(0).__reduce__()[0], self.arguments


def test_numpy_scalar_of_any_size_takes_no_memory(file, weights):
    huge = Scalar(np.dtype("V500000000"))  # without a value NumPy takes as many zeros
    torch.save({"model": weights, "epoch": huge}, file)
    peaks = []
    for load in (lambda: assert_loads(file, weights), lambda: pickle.loads(pickle.dumps(huge))):
        tracemalloc.start()
        load()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 5e7
    assert peaks[1] > 5e8, "NumPy would have taken it"


def test_numpy_scalar_that_is_none_is_passed_over(file, weights):
    odd = Scalar(np.dtype("O"), b"\x80")
    torch.save({"model": weights, "epoch": odd}, file)
    assert_loads(file, weights)
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(odd))


def test_numpy_scalar_in_place_of_a_weight(file, weights):
    torch.save({**weights, "fc.bias": np.float64(1.0)}, file)
    assert "holds no weights at its top" in refusal(file)


def test_numpy_array_beside_the_weights(file, weights):
    torch.save({"model": weights, "epoch": np.ones(3)}, file)
    assert "_reconstruct, and unpickling that could run code, so it is refused" in refusal(file)


@pytest.mark.parametrize("new_format", [True, False])
def test_cuda_tensors(file, weights, new_format, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"model": weights, "best_acc": torch.tensor(0.7)}, file, _use_new_zipfile_serialization=new_format)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(file, weights_only=True)
    assert_loads(file, weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precision_becomes_the_networks_own(file, weights, dtype):
    stored = {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()}
    torch.save(stored, file)
    model = tiny_resnet()
    assert_loads(file, stored, model)
    assert model.conv1.weight.dtype == torch.float32


def test_loaded_parameters_still_train(file, weights):
    torch.save(
        {key: nn.Parameter(value) if value.is_floating_point() else value for key, value in weights.items()}, file
    )
    model = tiny_resnet()
    identity = id(model.conv1.weight)
    from_checkpoint(model, str(file))
    assert id(model.conv1.weight) == identity
    assert all(p.requires_grad for p in model.parameters())


def test_missing_num_batches_tracked_is_forgiven(file, weights):
    torch.save({k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}, file)
    expected = {k: torch.tensor(0) if k.endswith("num_batches_tracked") else v for k, v in weights.items()}
    assert_loads(file, expected)


# Prefixes, students and teachers


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "model.", "net.", "student.", "teacher.", "backbone."),
        *("module._orig_mod.", "_orig_mod.module.", "model.net.", "net.module.model._orig_mod.", "module.module."),
        *("module.student.", "student._orig_mod.module.", "_orig_mod.teacher.model.", "model.student.net.backbone."),
    ],
)
def test_prefixes_in_any_order(file, weights, prefix):
    torch.save({"state_dict": prefixed(prefix, weights)}, file)
    assert_loads(file, weights)


def test_prefix_of_the_network_itself_is_kept(file):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Linear(2, 2))

    state = random_state(Wrapped(), seed=1)
    for prefix in ("", "model.", "module."):
        torch.save(prefixed(prefix, state), file)
        assert_loads(file, state, Wrapped())


def test_prefix_on_some_names_only_is_kept(file, weights):
    torch.save({**prefixed("model.", weights), "criterion.weight": torch.ones(10)}, file)
    message = refusal(file)
    assert "model.conv1.weight" in message
    assert f"{len(weights) + 1} unexpected" in message


def lightning_file(path, **sides):
    state = {key: value for side, weights in sides.items() for key, value in prefixed(f"{side}.", weights).items()}
    state["losses.kd.loss.projector.weight"] = torch.ones(3, 3)
    entries = {"epoch": 1, "global_step": 2, "loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}
    entries |= {"pytorch-lightning_version": "2.6.6", "hparams_name": "kwargs", "hyper_parameters": {"lr": 0.1}}
    torch.save({**entries, "state_dict": state}, path)


@pytest.mark.parametrize("part", [None, "student"])
def test_lightning_file_with_a_student_alone(tmp_path, weights, part):
    lightning_file(tmp_path / "last.ckpt", student=weights)
    assert_loads(tmp_path / "last.ckpt", weights, part=part)


def test_lightning_file_with_student_and_teacher(tmp_path, weights):
    teacher = random_state(tiny_wrn(), seed=9)
    lightning_file(tmp_path / "last.ckpt", student=weights, teacher=teacher)
    assert_loads(tmp_path / "last.ckpt", weights, part="student")
    assert_loads(tmp_path / "last.ckpt", teacher, tiny_wrn(), part="teacher")
    message = refusal(tmp_path / "last.ckpt")
    assert "both a student and a teacher" in message
    assert "part='student' or part='teacher'" in message


def test_mdistiller_run_with_both_sides(tmp_path, weights):
    teacher = random_state(tiny_resnet(), seed=9)
    state = {**prefixed("module.student.", weights), **prefixed("module.teacher.", teacher)}
    torch.save({"epoch": 240, "model": {**state, "module.conv_reg.weight": torch.ones(2)}}, tmp_path / "latest")
    assert "both a student and a teacher" in refusal(tmp_path / "latest")
    assert_loads(tmp_path / "latest", weights, part="student")
    assert_loads(tmp_path / "latest", teacher, part="teacher")


def test_part_that_the_file_lacks(file, weights):
    torch.save(weights, file)
    assert "holds one network" in refusal(file, part="teacher")
    torch.save(prefixed("student.", weights), file)
    assert "holds no teacher, only a student" in refusal(file, part="teacher")


def test_part_of_another_name(file):
    with pytest.raises(ValueError, match="part must be 'student', 'teacher' or None, got 'pupil'"):
        from_checkpoint(tiny_resnet(), str(file), part="pupil")


# Names of other code bases


PYTORCHCV = [
    (r"^conv1\.", "features.init_block.conv."),
    (r"^bn1\.", "features.init_block.bn."),
    (r"^layer(\d)\.(\d+)", lambda m: f"features.stage{m[1]}.unit{int(m[2]) + 1}"),
    (r"(unit\d+)\.(conv|bn)(\d)\.", r"\1.body.conv\3.\2."),
    (r"downsample\.0\.", "identity_conv.conv."),
    (r"downsample\.1\.", "identity_conv.bn."),
    (r"^fc\.", "output."),
]
PYCLS = [
    (r"^(conv|bn)1\.", r"stem.\1."),
    (r"^layer(\d)\.(\d+)", lambda m: f"s{m[1]}.b{int(m[2]) + 1}"),
    (r"(b\d+)\.conv1\.", r"\1.f.a."),
    (r"(b\d+)\.bn1\.", r"\1.f.a_bn."),
    (r"(b\d+)\.conv2\.", r"\1.f.b."),
    (r"(b\d+)\.bn2\.", r"\1.f.b_bn."),
    (r"downsample\.0\.", "proj."),
    (r"downsample\.1\.", "bn."),
    (r"^fc\.", "head.fc."),
]
MMPRETRAIN = [(r"^(?!fc\.)", "backbone."), (r"^fc\.", "head.fc.")]
KUANGLIU = [(r"downsample\.", "shortcut."), (r"^fc\.", "linear.")]


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("rules", [PYTORCHCV, PYCLS, MMPRETRAIN, KUANGLIU])
def test_names_of_other_code_bases(file, rules, prefix):
    network = ResNet(14, widths=(4, 4, 8, 16), num_classes=10)
    expected = random_state(network, seed=5)
    foreign = renamed(expected, *rules)
    assert not foreign.keys() & {"conv1.weight", "fc.weight"} or rules is KUANGLIU
    torch.save(prefixed(prefix, foreign), file)
    assert_loads(file, expected, network)


def tiny_four_stage(bottleneck=False, num_classes=10):
    return FourStageResNet((1, 2, 1, 2), bottleneck, widths=(4, 4, 8, 16), num_classes=num_classes)


WEIAICUNZAI = [
    (r"^conv1\.", "conv1.0."),
    (r"^bn1\.", "conv1.1."),
    (r"^layer(\d)", lambda m: f"conv{int(m[1]) + 1}_x"),
    (r"(_x\.\d+)\.conv(\d)", lambda m: f"{m[1]}.residual_function.{3 * int(m[2]) - 3}"),
    (r"(_x\.\d+)\.bn(\d)", lambda m: f"{m[1]}.residual_function.{3 * int(m[2]) - 2}"),
    (r"^linear\.", "fc."),
]
TIMM = [(r"shortcut\.", "downsample."), (r"^linear\.", "fc.")]
MMPRETRAIN_CIFAR = [(r"shortcut\.", "downsample."), (r"^(?!linear\.)", "backbone."), (r"^linear\.", "head.fc.")]


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("rules", [WEIAICUNZAI, TIMM, MMPRETRAIN_CIFAR, []])
def test_four_stage_names_of_other_code_bases(file, rules, prefix, bottleneck):
    expected = random_state(tiny_four_stage(bottleneck), seed=5)
    foreign = renamed(expected, *rules)
    assert ("linear.weight" in foreign) is not bool(rules)
    torch.save(prefixed(prefix, foreign), file)
    assert_loads(file, expected, tiny_four_stage(bottleneck))


def test_pycls_resnet56_as_measured(file, golden):
    shapes = dict(golden["pycls_resnet56"])
    state = {key: torch.rand(shape) if shape else torch.tensor(7) for key, shape in shapes.items()}
    torch.save({"epoch": 300, "model_state": state, "ema_state": random_state(resnet56(), 1), "cfg": "MODEL:"}, file)
    loaded = from_checkpoint(resnet56(), str(file)).state_dict()
    assert len(loaded) == len(state)
    for ours, theirs in {
        "conv1.weight": "stem.conv.weight",
        "layer1.8.bn2.running_var": "s1.b9.f.b_bn.running_var",
        "layer2.0.downsample.0.weight": "s2.b1.proj.weight",
        "layer3.0.downsample.1.bias": "s3.b1.bn.bias",
        "fc.bias": "head.fc.bias",
    }.items():
        assert torch.equal(loaded[ours], state[theirs])


def test_synonyms_go_both_ways(file, weights):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 4, 3)
            self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1))
            self.linear = nn.Linear(4, 2)

    state = random_state(Other(), seed=2)
    torch.save(renamed(state, ("shortcut", "downsample"), ("linear", "fc")), file)
    assert_loads(file, state, Other())


def test_two_names_do_not_become_one(file, weights):
    torch.save({**weights, "linear.weight": torch.ones(10, 16)}, file)
    assert "1 unexpected: linear.weight" in refusal(file)


def test_xternalz_wide_resnet(file):
    state = random_state(tiny_wrn(), seed=4)
    torch.save({"epoch": 200, "state_dict": prefixed("module.", state), "best_prec1": 80.0}, file)
    assert_loads(file, state, tiny_wrn())


# Weights that do not fit


def test_torchdistill_wide_resnet(file):
    state = random_state(wrn_16_2(), seed=4)
    theirs = renamed(state, (r"^block(\d)\.layer", r"layer\1"), ("convShortcut", "shortcut.0"))
    assert "layer2.0.shortcut.0.weight" in theirs
    torch.save(theirs, file)
    message = refusal(file, wrn_16_2())
    assert "torchdistill" in message
    assert "other logits" in message


def test_option_a_resnet(file):
    state = renamed(random_state(resnet20(), seed=4), (r"^fc\.", "linear."))
    torch.save({"state_dict": prefixed("module.", {k: v for k, v in state.items() if "downsample" not in k})}, file)
    message = refusal(file, resnet20())
    assert "option A" in message
    assert "10 missing: layer2.0.downsample.0.weight" in message


@pytest.mark.parametrize(("build", "classes"), [(tiny_resnet, 200), (tiny_wrn, 1000)])
def test_other_number_of_classes(file, build, classes):
    state = random_state(build(), seed=4)
    width = state["fc.weight"].shape[1]
    torch.save({**state, "fc.weight": torch.ones(classes, width), "fc.bias": torch.ones(classes)}, file)
    message = refusal(file, build())
    assert f"the file has {classes} classes, the network 10" in message
    assert f"2 of another shape: fc.weight ({classes}, {width}) instead of (10, {width})" in message


@pytest.mark.parametrize("rules", [[], PYCLS])
def test_other_depth(file, rules):
    torch.save(renamed(random_state(resnet20(), seed=4), *rules), file)
    message = refusal(file, resnet32())
    assert "the file has 3-3-3 blocks (depth 20), the network 5-5-5 blocks (depth 32)" in message
    assert "missing" in message
    assert "unexpected" not in message
    torch.save(renamed(random_state(resnet32(), seed=4), *rules), file)
    message = refusal(file, resnet20())
    assert "the file has 5-5-5 blocks (depth 32), the network 3-3-3 blocks (depth 20)" in message
    assert "unexpected" in message
    assert "missing" not in message


def test_other_depth_of_wide_resnet(file):
    torch.save(random_state(WideResNet(16, 1), seed=4), file)
    assert "2-2-2 blocks (depth 16), the network 1-1-1 blocks (depth 10)" in refusal(file, WideResNet(10, 1))


def test_other_width(file, weights):
    torch.save(weights, file)
    message = refusal(file, resnet8(num_classes=10))
    assert "of another shape: conv1.weight (4, 3, 3, 3) instead of (16, 3, 3, 3)" in message
    assert "blocks" not in message
    assert "classes" not in message


def test_other_family(file):
    torch.save(random_state(tiny_wrn(), seed=4), file)
    message = refusal(file)
    assert "do not fit this ResNet" in message
    assert "block1.layer.0.bn1.weight" in message
    assert "depth" not in message
    assert "option A" not in message


def test_depth_and_kind_of_four_stage_resnet(file):
    other = FourStageResNet((2, 2, 1, 2), widths=(4, 4, 8, 16), num_classes=10)
    torch.save(random_state(other, seed=4), file)
    assert "the file has 2-2-1-2 blocks, the network 1-2-1-2 blocks" in refusal(file, tiny_four_stage())
    torch.save(random_state(tiny_four_stage(), seed=4), file)
    message = refusal(file, tiny_four_stage(bottleneck=True))
    assert "the file has basic blocks, the network bottlenecks; build the network of the file" in message
    assert "option A" not in message
    torch.save(random_state(tiny_four_stage(bottleneck=True), seed=4), file)
    assert "the file has bottlenecks, the network basic blocks" in refusal(file, tiny_four_stage())


def test_other_depth_of_vgg(file):
    torch.save(random_state(tiny_vgg((1, 1, 2, 2, 2)), seed=4), file)
    message = refusal(file, tiny_vgg((1, 1, 1, 1, 1)))
    expected = "the file has 1-1-2-2-2 convolutions (VGG-11), the network 1-1-1-1-1 convolutions (VGG-8)"
    assert expected in message


def tiny_vgg(convs):
    return models.VGG(convs, widths=(2, 2, 3, 3, 4), num_classes=10)


@pytest.mark.parametrize(
    ("build", "head"),
    [
        ("resnet18", "linear.weight"),
        ("vgg8", "classifier.weight"),
        ("mobilenetv2", "classifier.0.weight"),
        ("mobilenetv2_tinyimagenet", "conv2.weight"),
        ("shufflenetv2", "linear.weight"),
        ("mobilenetv1", "fc.weight"),
    ],
)
def test_head_of_every_family(file, build, head):
    network, other = (getattr(models, build)(n) for n in (10, 20))
    torch.save(other.state_dict(), file)
    message = refusal(file, network)
    assert "the file has 20 classes, the network 10" in message
    assert f"2 of another shape: {head}" in message
    assert_loads(file, other.state_dict(), getattr(models, build)(20))


def test_imagenet_resnet_into_the_form_for_small_images(file):
    torch.save(torchvision.models.resnet18().state_dict(), file)
    message = refusal(file, models.resnet18(num_classes=1000))
    assert "the file's first convolution is 7x7, the network's 3x3" in message
    assert "1 of another shape: conv1.weight (64, 3, 7, 7) instead of (64, 3, 3, 3)" in message
    assert "missing" not in message


TORCHVISION_VGG = {"features.0.weight": (64, 3, 3, 3), "classifier.0.weight": (512, 512), "classifier.6.bias": (100,)}
TIMM_VGG = {
    "features.0.weight": (64, 3, 3, 3),
    "pre_logits.fc1.weight": (4096, 512, 1, 1),
    "head.fc.weight": (100, 4096),
}
TORCHVISION_MOBILENETV2 = {"features.0.0.weight": (32, 3, 3, 3), "features.1.conv.0.0.weight": (32, 1, 3, 3)}
TORCHVISION_SHUFFLENETV2 = {"conv1.0.weight": (24, 3, 3, 3), "stage2.0.branch1.0.weight": (24, 1, 3, 3)}
TIMM_MOBILENETV1 = {"conv_stem.weight": (32, 3, 3, 3), "blocks.0.0.conv_dw.weight": (32, 1, 3, 3)}
KUANGLIU_MOBILENET = {"conv1.weight": (32, 3, 3, 3), "layers.0.conv1.weight": (32, 1, 3, 3)}
LSKD_MOBILENETV2 = {"model.0.0.weight": (32, 3, 3, 3), "model.1.3.weight": (64, 32, 1, 1), "fc.weight": (1000, 1024)}


@pytest.mark.parametrize(
    ("build", "shapes", "expected"),
    [
        ("vgg16", TORCHVISION_VGG, "of a VGG as in torchvision"),
        ("vgg16", TIMM_VGG, "of a VGG as in torchvision"),
        ("mobilenetv2", TORCHVISION_MOBILENETV2, "of a MobileNet as in torchvision"),
        ("mobilenetv2_tinyimagenet", TORCHVISION_MOBILENETV2, "of a MobileNet as in torchvision"),
        ("mobilenetv2", KUANGLIU_MOBILENET, "kuangliu"),
        ("mobilenetv1", TIMM_MOBILENETV1, "timm"),
        ("mobilenetv1", KUANGLIU_MOBILENET, "kuangliu"),
        ("mobilenetv2", LSKD_MOBILENETV2, "MobileNetV1, which the code of MLKD and LSKD calls MobileNetV2; build"),
        ("mobilenetv2_tinyimagenet", LSKD_MOBILENETV2, "build mobilenetv1"),
        ("shufflenetv2", TORCHVISION_SHUFFLENETV2, "of a ShuffleNetV2 as in torchvision"),
    ],
)
def test_other_networks_of_the_same_name(file, build, shapes, expected):
    torch.save({key: torch.ones(shape) for key, shape in shapes.items()}, file)
    message = refusal(file, getattr(models, build)())
    assert expected in message
    assert "missing" in message
    assert "option A" not in message
    assert message.count("they are") == 1


def test_each_mobilenetv2_names_the_other(file):
    half, tiny = models.mobilenetv2(), models.mobilenetv2_tinyimagenet(100)
    torch.save(tiny.state_dict(), file)
    assert "build mobilenetv2_tinyimagenet;" in refusal(file, half)
    torch.save(half.state_dict(), file)
    assert "build mobilenetv2;" in refusal(file, tiny)


def test_shufflenet_is_no_option_a_resnet(file):
    torch.save(models.shufflenetv1().state_dict(), file)
    message = refusal(file, resnet20())
    assert "do not fit this ResNet" in message
    assert "option A" not in message


def test_kuangliu_shufflenetv2_has_another_stem(file):
    state = models.shufflenetv2().state_dict()
    torch.save({**state, "conv1.weight": torch.ones(24, 3, 3, 3)}, file)
    assert "the file's first convolution is 3x3, the network's 1x1" in refusal(file, models.shufflenetv2())


def test_mobilenetv1_with_the_prefix_of_a_wrapper(file):
    state = random_state(models.mobilenetv1(10), seed=4)
    for prefix in ("", "module.", "model.", "net.model.", "student."):
        torch.save({"state_dict": prefixed(prefix, state)}, file)
        assert_loads(file, state, models.mobilenetv1(10))


def test_lists_are_short_and_counted(file, weights):
    torch.save({**weights, **{f"extra{i}": torch.ones(1) for i in range(50)}}, file)
    message = refusal(file)
    assert "50 unexpected: extra0, extra1, extra2, extra3, ..." in message
    assert "extra4" not in message


@pytest.mark.parametrize("key", ["layer1.0.bn1.running_mean", "fc.bias"])
def test_any_other_missing_name_is_not_forgiven(file, weights, key):
    del weights[key]
    torch.save(weights, file)
    assert f"1 missing: {key}" in refusal(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["layer3.0.conv2.weight", "bn1.running_var"])
def test_not_finite(file, weights, key, value):
    weights[key].view(-1)[-1] = value
    torch.save(weights, file)
    assert f"1 weights are NaN or infinite: {key}" in refusal(file)


def test_overflow_in_the_networks_precision(file, weights):
    weights["fc.bias"] = weights["fc.bias"].double() * 1e300
    torch.save(weights, file)
    assert "NaN or infinite: fc.bias" in refusal(file)


@pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning")
@pytest.mark.parametrize("change", [torch.Tensor.int, torch.Tensor.to_sparse, lambda v: v.to("meta")])
def test_what_holds_no_dense_numbers(file, weights, change):
    weights["fc.bias"] = change(weights["fc.bias"])
    torch.save(weights, file)
    assert "fc.bias" in refusal(file)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"epoch": 3, "weights": {"a": torch.ones(1)}}, "its entries are epoch, weights"),
        ({}, "its entries are nothing"),
        ({"model": {}}, "holds no weights"),
        ({0: torch.ones(1)}, "holds no weights"),
        ([torch.ones(1)], "holds a list"),
        (torch.ones(3), "holds a Tensor"),
        (None, "holds a NoneType"),
    ],
)
def test_files_without_weights(file, content, expected):
    torch.save(content, file)
    assert expected in refusal(file)


# Files that run code


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("hide", [lambda x: x, lambda x: argparse.Namespace(seed=x)])
def test_malicious_pickle_does_not_run(tmp_path, file, weights, hide, new_format):
    marker = tmp_path / "payload_ran"
    torch.save({"model": weights, "epoch": hide(Payload(marker))}, file, _use_new_zipfile_serialization=new_format)
    message = refusal(file)
    assert not marker.exists()
    assert re.search(r"refers to \w+\.mkdir, and unpickling that could run code, so it is refused", message)
    assert "state_dict or safetensors" in message
    torch.load(file, weights_only=False)
    assert marker.exists(), "the payload works, had it been run"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_plain_pickle_does_not_run(tmp_path, file, protocol):
    marker = tmp_path / "payload_ran"
    file.write_bytes(pickle.dumps(Payload(marker), protocol=protocol))
    refusal(file)
    assert not marker.exists()
    pickle.loads(file.read_bytes())
    assert marker.exists(), "the payload works, had it been run"


def test_whole_network_pickled(file):
    torch.save(tiny_resnet(), file)
    message = refusal(file)
    assert "kdlit.models.resnet.ResNet" in message
    assert "torch.save(network.state_dict(), ...)" in message


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_torchscript_program(file):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), file)
    assert "is a TorchScript program" in refusal(file)


# Files that are no checkpoints


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("fraction", [0.00001, 0.0005, 0.01, 0.5, 0.999])
def test_truncated_torch_file(file, weights, fraction, new_format):
    torch.save(weights, file, _use_new_zipfile_serialization=new_format)
    content = file.read_bytes()
    file.write_bytes(content[: max(1, int(len(content) * fraction))])
    assert "is truncated, damaged or no checkpoint" in refusal(file)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.999])
def test_truncated_safetensors(tmp_path, weights, fraction):
    file = tmp_path / "model.safetensors"
    pytest.importorskip("safetensors.torch").save_file(dict(weights), str(file))
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * fraction)])
    assert "truncated" in refusal(file)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty (0 bytes)"),
        (b"weights, honestly", "no checkpoint (17 bytes"),
        (bytes(2000), "no checkpoint"),
        (b"<!DOCTYPE html><title>404</title>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "is a Git LFS pointer"),
        (b"7z\xbc\xaf\x27\x1c\0\0", "is a 7z archive"),
    ],
)
def test_other_files(file, content, expected):
    file.write_bytes(content)
    assert expected in refusal(file)


def tar_of(content):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("cifar_teachers/resnet56_vanilla/ckpt_epoch_240.pth")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


@pytest.mark.parametrize("name", ["cifar_teachers.tar", "ckpt_epoch_240.pth"])
def test_archives_are_told_by_content(tmp_path, weights, name):
    inner, file = tmp_path / "inner.pth", tmp_path / name
    torch.save(weights, inner)
    tar = tar_of(inner.read_bytes())
    for content, kind in ((tar, "a tar"), (gzip.compress(tar), "a gzip"), (lzma.compress(tar), "an xz")):
        file.write_bytes(content)
        message = refusal(file)
        assert f"is {kind} archive, not a checkpoint; unpack it" in message
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(inner, "resnet56_vanilla/ckpt_epoch_240.pth")
    message = refusal(file)
    assert "is a zip archive of resnet56_vanilla/ckpt_epoch_240.pth, not a checkpoint; unpack it" in message


def test_missing_file_names_its_neighbours(tmp_path, file, weights, monkeypatch):
    torch.save(weights, file)
    (tmp_path / "notes.txt").touch()
    message = refusal(tmp_path / "ckpt_epoch_204.pth")
    assert f"{tmp_path} has no 'ckpt_epoch_204.pth' but ckpt_epoch_240.pth" in message
    assert "notes.txt" not in message
    assert "but ckpt_epoch_240.pth, notes.txt" in refusal(tmp_path / "zzz")
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "ckpt_epoch_24") in refusal("ckpt_epoch_24")


def test_missing_folder_names_its_neighbours(tmp_path):
    (tmp_path / "resnet56_vanilla").mkdir()
    message = refusal(tmp_path / "resnet56_vanila" / "deep" / "ckpt_epoch_240.pth")
    assert f"no such file; {tmp_path} has no 'resnet56_vanila' but resnet56_vanilla" in message
    assert "but nothing" in refusal(tmp_path / "resnet56_vanilla" / "ckpt_epoch_240.pth")


def test_dangling_link(tmp_path, file):
    file.symlink_to(tmp_path / "gone.pth")
    assert f"is a link to {tmp_path / 'gone.pth'}, which does not exist" in refusal(file)


def test_folder(tmp_path, file):
    file.touch()
    assert "is a folder; give one of its files: ckpt_epoch_240.pth" in refusal(tmp_path)


def test_path_through_a_file(file):
    file.touch()
    assert "cannot be read: Not a directory" in refusal(file / "inner.pth")


def test_special_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in refusal(tmp_path / "pipe")


def test_home_folder_is_expanded(tmp_path, file, weights, monkeypatch):
    torch.save(weights, file)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_loads("~/ckpt_epoch_240.pth", weights)


@pytest.mark.parametrize("locked", ["file", "folder"])
def test_no_permission(weights, locked):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pth"
        torch.save(weights, file)
        os.chmod(folder, 0o755 if locked == "file" else 0o000)
        os.chmod(file, 0o000 if locked == "file" else 0o644)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)  # chmod does not bind root
            message = refusal(file)
        finally:
            os.seteuid(user)
            os.chmod(folder, 0o755)
        assert "no permission to read it" in message


# Use from a config


def test_as_class_path_in_a_config(file, weights):
    jsonargparse = pytest.importorskip("jsonargparse")
    torch.save(weights, file)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--teacher", type=nn.Module)
    network = {
        "class_path": "kdlit.models.ResNet",
        "init_args": {"depth": 8, "widths": [4, 4, 8, 16], "num_classes": 10},
    }
    config = {"class_path": "kdlit.models.from_checkpoint", "init_args": {"model": network, "path": str(file)}}
    teacher = parser.instantiate(parser.parse_object({"teacher": config})).teacher
    assert isinstance(teacher, ResNet)
    assert torch.equal(teacher.fc.bias, weights["fc.bias"])


def test_logits_are_those_of_the_network_saved(file):
    network = tiny_resnet().eval()
    torch.save({"net": prefixed("module.", network.state_dict()), "acc": 95.0, "epoch": 1}, file)
    loaded = from_checkpoint(tiny_resnet(), str(file)).eval()
    image = torch.from_numpy(np.linspace(-1, 1, 3 * 32 * 32, dtype=np.float32).reshape(1, 3, 32, 32))
    assert torch.equal(loaded(image), network(image))
