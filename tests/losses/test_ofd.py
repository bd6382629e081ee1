"""OFD: partial distances of maps before the ReLU."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

from kdlit import models
from kdlit.losses import CrossEntropyLoss
from kdlit.losses.ofd import OFDLoss, negative_mean, ofd_loss
from kdlit.modules import ClassificationDistillation
from tests.conftest import TinyData
from tests.losses.heads import Own, check_gradients, close, in_float32, load_head
from tests.losses.test_golden import load

OWN = {"student_layers": ["first.1", "second"], "teacher_layers": ["first.1", "second.1"]}


def at(case, stage, dtype):
    norm = nn.BatchNorm2d(len(case[f"teacher_bn_bias_{stage}"]))
    norm.load_state_dict(
        norm.state_dict() | {"weight": case[f"teacher_bn_weight_{stage}"], "bias": case[f"teacher_bn_bias_{stage}"]}
    )
    return negative_mean(norm).to(dtype)


def golden(number, dtype):
    case = load("ofd", number)
    if dtype == torch.float32:
        in_float32(case)
    features = [[case[f"{role}_feat_{k}"] for k in range(case.n_stages)] for role in ("student", "teacher")]
    loss = OFDLoss(*(["x"] * case.n_stages for _ in range(2)), kernel_size=case.kernel_size)
    loss.student_layers = loss.teacher_layers = ["x"] * case.n_stages
    loss.build(*([feature.shape for feature in ours] for ours in features))
    for stage in range(case.n_stages):
        loss.register_buffer(f"margin_{stage}", at(case, stage, dtype))
    load_head(loss, case)
    return case, loss.to(dtype), features


@pytest.mark.parametrize("number", range(3))
def test_golden_values_margins_and_gradients(number):
    case, loss, features = golden(number, torch.float64)
    for stage in range(case.n_stages):
        close(loss.get_buffer(f"margin_{stage}"), case[f"margin_{stage}"].double(), 1e-7)
    value = loss.compare(*features)
    close(value, case["loss"], 1e-7)  # the released margins are in float32
    if "loss_clovaai_div_batch" in case.arrays:
        close(value, case["loss_clovaai_div_batch"], 1e-7)
    value.backward()
    check_gradients(loss, case, 1e-7)
    projected = [case[f"student_feat_proj_{k}"] for k in range(case.n_stages)]
    for k, feature in enumerate(features[0]):
        close(loss.get_submodule(f"connector{k}")(feature), projected[k], 1e-9)
    margins = [case[f"margin_{k}"].double() for k in range(case.n_stages)]
    close(ofd_loss(projected, features[1], margins=margins), case["loss"], 1e-9)


@pytest.mark.parametrize("number", range(3))
def test_golden_in_float32(number):
    case, loss, features = golden(number, torch.float32)
    loss.compare(*features).backward()
    close(loss.compare(*features), case["loss"], 1e-4)
    check_gradients(loss, case, 1e-4)


def test_margins_are_the_means_of_what_is_negative():
    norm = nn.BatchNorm2d(6)
    norm.weight.data = torch.tensor([1.0, -2.0, 0.5, 1.0, 0.0, 0.0])
    norm.bias.data = torch.tensor([0.0, 1.0, -3.0, 8.0, -1.5, 1.5])
    torch.manual_seed(0)
    drawn = norm.bias + norm.weight.abs() * torch.randn(200_000, 6)
    margin = negative_mean(norm)
    for channel in range(3):
        values = drawn[:, channel]
        assert margin[channel].item() == pytest.approx(values[values < 0].mean().item(), abs=0.02)
    assert margin[3:].tolist() == pytest.approx([-3.0, -1.5, 0.0])  # all but never negative; no spread at all
    assert not margin.requires_grad
    with pytest.raises(ValueError, match="margins follow from weight and bias of a batch norm, got Identity"):
        negative_mean(nn.Identity())


def test_laws():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    margin = -torch.rand(3, dtype=torch.float64)
    cut = torch.maximum(teacher, margin.view(-1, 1, 1))
    assert ofd_loss(cut, teacher, margins=[margin]) == 0
    assert ofd_loss(torch.where(teacher > 0, teacher, cut - 5), teacher, margins=[margin]) == 0  # as low as it likes
    assert ofd_loss(torch.where(teacher > 0, teacher - 5, cut), teacher, margins=[margin]) > 0
    order = torch.randperm(4)
    value = ofd_loss(student, teacher, margins=[margin])
    torch.testing.assert_close(ofd_loss(student[order], teacher[order], margins=[margin]), value)
    both = ofd_loss([student, student], [teacher, teacher], margins=[margin, margin])
    torch.testing.assert_close(both, 1.5 * value)
    single = torch.stack([ofd_loss(student[i : i + 1], teacher[i : i + 1], margins=[margin]) for i in range(4)])
    torch.testing.assert_close(single.mean(), value)
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ofd_loss(s, teacher, margins=[margin]), student.requires_grad_())
    ofd_loss(student, teacher, margins=[margin]).backward()
    assert teacher.grad is None
    huge = ofd_loss(1e4 * student.bfloat16(), -1e4 * teacher.bfloat16(), margins=[margin.bfloat16()])
    assert huge.dtype == torch.float32
    assert huge.isfinite()
    with pytest.raises(ValueError, match="margins must be one for each of the 1 maps, got 2"):
        ofd_loss(student, teacher, margins=[margin, margin])


@pytest.mark.parametrize(
    ("student", "teacher", "size", "expected", "norms"),
    [
        # Three stages of the student and four of the teacher: the deepest three.
        ("shufflenetv1", "vgg8", 32, ["layer1.3.preact", "layer2.7.preact", "layer3.3.preact"], (256, 512, 512)),
        ("mobilenetv2", "wrn_16_2", 32, ["blocks.2", "blocks.4", "blocks.6"], (32, 64, 128)),
        ("resnet8", "torchvision", 32, [f"layer{stage}.0.preact" for stage in (1, 2, 3)], (128, 256, 512)),
    ],
)
def test_default_layers_are_paired_from_the_deepest(student, teacher, size, expected, norms):
    student = getattr(models, student)(num_classes=5)
    teacher = torchvision.models.resnet18(num_classes=5) if teacher == "torchvision" else getattr(models, teacher)(5)
    norm = teacher.get_submodule(models.feature_layers(teacher).norms[-1])
    norm.bias.data.fill_(2.5)  # tells the deepest norm from the others: too high for a mean of negative values
    norm.weight.data.fill_(0.5)
    loss = OFDLoss()
    module = ClassificationDistillation(student, {"ofd": loss}, teacher.eval(), input_size=(3, size, size))
    assert list(loss.student_layers) == expected
    assert list(loss.teacher_layers) == list(models.feature_layers(teacher).preact[-3:])
    channels = [loss.get_buffer(f"margin_{k}").numel() for k in range(3)]
    assert channels == [loss.get_submodule(f"connector{k}.conv").out_channels for k in range(3)]
    assert channels == list(norms)
    assert loss.margin_2.unique().tolist() == [-1.5]
    assert loss.margin_1.unique().tolist() != [-1.5]
    module.train()
    batch = {"image": torch.rand(2, 3, size, size)}
    value = loss(module.run_student(batch), module.run_teacher(batch), batch)
    assert value.isfinite()
    assert value > 0


def test_it_trains_with_the_student_and_stays_out_of_the_export(trainer):
    losses = {"ce": CrossEntropyLoss(), "ofd": OFDLoss(**OWN, teacher_norms=["first.1", "second.1"])}
    module = ClassificationDistillation(Own(), losses, Own(width=7), input_size=(3, 8, 8))
    before = copy.deepcopy(module.state_dict())
    trainer().fit(module, TinyData())
    after = module.state_dict()
    name = "losses.ofd.loss.connector1.conv.weight"
    assert not torch.equal(before[name], after[name])
    assert torch.equal(before["losses.ofd.loss.margin_1"], after["losses.ofd.loss.margin_1"])
    held = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert {id(parameter) for parameter in losses["ofd"].parameters()} <= held
    assert not [name for name in module.student.state_dict() if "connector" in name]
    copied = copy.deepcopy(losses["ofd"])
    assert not [name for name in copied.state_dict() if name.startswith("teacher")]
    features = {"first.1": torch.randn(2, 6, 4, 4), "second": torch.randn(2, 12, 2, 2)}
    theirs = [torch.randn(2, 7, 4, 4), torch.randn(2, 14, 2, 2)]
    assert torch.equal(
        copied.compare(list(features.values()), theirs), losses["ofd"].compare(list(features.values()), theirs)
    )


def setup(loss, student=None, teacher=None):
    loss.setup(student or Own(), teacher or Own(), torch.zeros(1, 3, 8, 8))
    return loss


def test_a_batch_norm_among_the_layers_is_its_own():
    assert setup(OFDLoss(["first.1", "second"], ["first.1", "second.1"])).margin_1.shape == (12,)


def test_errors():
    with pytest.raises(ValueError, match=r"teacher_norms: Own names no batch norm before the ReLU after 'second'"):
        setup(OFDLoss(["second"], ["second"]))
    with pytest.raises(ValueError, match=r"ShuffleNetV1 names no batch norm before the ReLU after 'layer1.3.preact'"):
        setup(OFDLoss(), models.resnet8(), models.shufflenetv1())
    with pytest.raises(ValueError, match="'first.1' has 6 channels, but layer 'second' of the teacher gives 12"):
        setup(OFDLoss("second", "second", teacher_norms="first.1"))
    with pytest.raises(ValueError, match=r"one for each of the teacher's layers second, got first.1, second.1"):
        setup(OFDLoss("second", "second", teacher_norms=["first.1", "second.1"]))
    with pytest.raises(
        ValueError, match=r"student_layers: 'head' must give a map of shape \(B, C, H, W\), but gives \(1, 5\)"
    ):
        setup(OFDLoss("head", "second.1"))
    with pytest.raises(ValueError, match="OFDLoss needs student_layers: Own does not say"):
        setup(OFDLoss())
    with pytest.raises(ValueError, match="must be as many"):
        OFDLoss(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="kernel_size must be an odd number >= 1, got 2"):
        OFDLoss(kernel_size=2)
