"""ReviewKD: stages of the teacher from all deeper stages of the student."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision

from kdlit import models
from kdlit.losses import CrossEntropyLoss, WeightedLoss
from kdlit.losses.reviewkd import ReviewKDLoss, hierarchical_context_loss
from kdlit.modules import ClassificationDistillation
from tests.conftest import TinyData
from tests.losses.heads import Own, check_gradients, close, in_float32, load_head
from tests.losses.test_golden import load

LAYERS = ["first", "second", "head.input"]


def golden(number, dtype):
    case = load("reviewkd", number)
    if dtype == torch.float32:
        in_float32(case)
    maps = range(case.n_stages - 1)
    features = [[*(case[f"{role}_feat_{k}"] for k in maps), case[f"{role}_pooled"]] for role in ("student", "teacher")]
    loss = ReviewKDLoss()
    loss.student_layers = loss.teacher_layers = ["x"] * case.n_stages
    shapes = [[feature.shape for feature in ours] for ours in features]
    loss.build(*shapes)
    for shape, channels in zip(shapes, (case.in_channels, case.out_channels), strict=True):
        assert [sizes[1] for sizes in shape] == channels
    assert loss.abf0.conv1.out_channels == case.mid_channels
    for shape, sizes in zip(shapes, (case.shapes, case.out_shapes), strict=True):
        assert [1, *(sizes[2] for sizes in shape[-2::-1])] == sizes
    load_head(loss, case)
    return case, loss.to(dtype), features


@pytest.mark.parametrize("number", range(3))
def test_golden_values_fusions_and_gradients(number):
    case, loss, (student, teacher) = golden(number, torch.float64)
    sizes = [tuple(feature.shape[2:]) or (1, 1) for feature in teacher]
    for index, fused in enumerate(loss.fuse(student, sizes)):
        close(fused, case[f"fused_{index}"], 1e-9)
    value = loss.compare(student, teacher)
    close(value, case["loss"], 1e-9)
    value.backward()
    check_gradients(loss, case, 1e-9)


@pytest.mark.parametrize("number", range(3))
def test_golden_in_float32(number):
    case, loss, features = golden(number, torch.float32)
    value = loss.compare(*features)
    close(value, case["loss"], 1e-4)
    value.backward()
    check_gradients(loss, case, 1e-4)


def test_laws_of_the_comparison():
    student, teacher = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    value = hierarchical_context_loss(student, teacher)
    assert hierarchical_context_loss(teacher, teacher) == 0
    torch.testing.assert_close(hierarchical_context_loss([student] * 2, [teacher] * 2), 2 * value)
    order = torch.randperm(3)
    torch.testing.assert_close(hierarchical_context_loss(student[order], teacher[order]), value)
    # A constant shift costs the same at every level; of two pixels only the full map is left.
    torch.testing.assert_close(hierarchical_context_loss(teacher + 3, teacher), torch.tensor(9.0).double())
    torch.testing.assert_close(
        hierarchical_context_loss(student[..., :1, :], teacher[..., :1, :]),
        torch.nn.functional.mse_loss(student[..., :1, :], teacher[..., :1, :]),
    )
    small = student[:1, :1, :3, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: hierarchical_context_loss(s, teacher[:1, :1, :3, :3]), small)
    teacher.requires_grad_()
    hierarchical_context_loss(student.requires_grad_(), teacher).backward()
    assert teacher.grad is None
    huge = hierarchical_context_loss(1e4 * student.bfloat16(), -1e4 * teacher.bfloat16())
    assert huge.dtype == torch.float32
    assert huge.isfinite()
    with pytest.raises(ValueError, match=r"one shape, got \(3, 4, 8, 8\) and \(3, 4, 4, 8\)"):
        hierarchical_context_loss(student, teacher[:, :, :4])


def build(name):
    if name.startswith("torchvision."):
        return getattr(torchvision.models, name.removeprefix("torchvision."))(num_classes=5)
    return getattr(models, name)(num_classes=5)


# Widths and heights of student and teacher, from deep to shallow; the first pair and the last two are in hparams.csv.
PUBLISHED = [
    ("resnet8x4", "resnet32x4", 32, False, [256, 256, 128, 64], [256, 256, 128, 64], [1, 8, 16, 32], [1, 8, 16, 32]),
    ("shufflenetv1", "wrn_40_2", 32, False, [960, 960, 480, 240], [128, 128, 64, 32], [1, 4, 8, 16], [1, 8, 16, 32]),
    ("mobilenetv2", "resnet50", 32, False, [1280, 160, 48, 16, 12], [2048, 2048, 1024, 512, 256],
     [1, 2, 4, 8, 16], [1, 4, 8, 16, 32]),
    ("shufflenetv1", "resnet50", 32, False, [960, 960, 480, 240, 24], [2048, 2048, 1024, 512, 256],
     [1, 4, 8, 16, 32], [1, 4, 8, 16, 32]),
    ("torchvision.resnet18", "torchvision.resnet34", 224, True, [512, 512, 256, 128, 64], [512, 512, 256, 128, 64],
     [1, 7, 14, 28, 56], [1, 7, 14, 28, 56]),
    ("mobilenetv1", "torchvision.resnet50", 224, True, [1024, 1024, 512, 256, 128], [2048, 2048, 1024, 512, 256],
     [1, 7, 14, 28, 56], [1, 7, 14, 28, 56]),
]  # fmt: skip


@pytest.mark.parametrize(("student", "teacher", "size", "preact", "ours", "theirs", "shapes", "out_shapes"), PUBLISHED)
def test_published_pairs_build_and_run(student, teacher, size, preact, ours, theirs, shapes, out_shapes):
    loss = ReviewKDLoss(student_preact=preact)
    networks, example = (build(student), build(teacher)), torch.zeros(1, 3, size, size)
    loss.setup(*networks, example)
    fusions = [loss.get_submodule(f"abf{index}") for index in range(len(ours))]
    assert not hasattr(loss, f"abf{len(ours)}")
    assert [fusion.conv1.in_channels for fusion in fusions] == ours
    assert [fusion.conv2.out_channels for fusion in fusions] == theirs
    assert {fusion.conv1.out_channels for fusion in fusions} == {min(512, ours[0])}
    features = []
    for network, paths, heights in zip(
        networks, (loss.student_layers, loss.teacher_layers), (shapes, out_shapes), strict=True
    ):
        found = models.feature_shapes(network, paths, example)
        assert [found[path][2:] or (1, 1) for path in reversed(paths)] == [(height, height) for height in heights]
        features.append([torch.randn(2, *found[path][1:]) for path in paths])
    value = loss.compare(*features)
    assert value.isfinite()
    if size == 32:
        value.backward()
        assert all(parameter.grad is not None for parameter in loss.parameters())


def test_the_students_maps_are_before_or_after_the_relu():
    for preact, path in ((False, "layer3"), (True, "layer3.0.preact")):
        loss = ReviewKDLoss(student_preact=preact)
        loss.setup(models.resnet8(), models.resnet14(), torch.zeros(1, 3, 32, 32))
        assert loss.student_layers[-2:] == (path, "pool")
        assert loss.teacher_layers == ("layer1.1.preact", "layer2.1.preact", "layer3.1.preact", "pool")


def test_a_student_of_fewer_stages_leaves_the_teachers_shallowest_out():
    loss = ReviewKDLoss(student_layers=["layer3", "pool"], max_mid_channels=16)
    loss.setup(models.resnet8(), models.vgg8(), torch.zeros(1, 3, 32, 32))
    assert loss.teacher_layers == ("block4", "pool")
    assert loss.abf1.conv1.out_channels == 16
    value = loss.compare(
        [torch.randn(3, 64, 8, 8), torch.randn(3, 64)], [torch.randn(3, 512, 4, 4), torch.randn(3, 512)]
    )
    assert value.isfinite()


def test_it_trains_warms_up_and_stays_out_of_the_export(trainer):
    review = ReviewKDLoss(LAYERS, LAYERS)
    losses = {"ce": CrossEntropyLoss(), "r": WeightedLoss(review, weight=5.0, warmup_epochs=20)}
    module = ClassificationDistillation(Own(), losses, Own(width=7), input_size=(3, 8, 8))
    before = copy.deepcopy(module.state_dict())
    fit = trainer()
    fit.fit(module, TinyData())
    assert module.losses["r"].factor == pytest.approx(5 / 20)
    changed = [
        name for name, value in module.losses.state_dict().items() if not torch.equal(before[f"losses.{name}"], value)
    ]
    assert {name.split(".")[2] for name in changed} == {"abf0", "abf1", "abf2"}
    held = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert {id(parameter) for parameter in review.parameters()} <= held
    assert not [name for name in module.student.state_dict() if "abf" in name]
    fresh = ReviewKDLoss(LAYERS, LAYERS)
    fresh.setup(Own(), Own(width=7), torch.zeros(1, 3, 8, 8))
    fresh.load_state_dict(review.state_dict())
    features = [[torch.randn(2, w, 4, 4), torch.randn(2, 2 * w, 2, 2), torch.randn(2, 2 * w)] for w in (6, 7)]
    assert torch.equal(fresh.compare(*features), copy.deepcopy(review).compare(*features))


def test_errors():
    loss = ReviewKDLoss(LAYERS, LAYERS)
    loss.setup(Own(), Own(), torch.zeros(1, 3, 8, 8))
    single = [torch.randn(1, 6, 4, 4), torch.randn(1, 12, 2, 2), torch.randn(1, 12)]
    with pytest.raises(ValueError, match=r"needs at least 2 pictures, got 1; change data.batch_size"):
        loss.compare(single, single)
    assert loss.eval().compare(single, single).isfinite()
    with pytest.raises(ValueError, match="ReviewKDLoss needs student_layers: Own does not say"):
        ReviewKDLoss().setup(Own(), models.resnet8(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="ReviewKDLoss needs teacher_layers: Own does not say"):
        ReviewKDLoss().setup(models.resnet8(), Own(), torch.zeros(1, 3, 8, 8))
    tokens = models.t2t_vit_7(image_size=32)
    with pytest.raises(
        ValueError, match=r"student_layers: 'layers.\d' must give \(B, C, H, W\) or \(B, C\), but gives"
    ):
        ReviewKDLoss().setup(tokens, models.resnet8(), torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="max_mid_channels must be >= 1, got 0"):
        ReviewKDLoss(max_mid_channels=0)
