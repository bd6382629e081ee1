"""Which layers losses on layers compare."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from kdlit.losses import (
    ATLoss,
    CATKDLoss,
    FitNetLoss,
    LogitStandardization,
    OFDLoss,
    RKDLoss,
    SimKDLoss,
    SRRLLoss,
)
from kdlit.models import ResNet, SimKDStudent, wrn_16_1
from kdlit.types import ModelOutput

PICTURE = torch.zeros(1, 3, 32, 32)


def settled(loss, student=None, teacher=None):
    loss.setup(student or ResNet(8, (4, 4, 8, 16)), teacher or ResNet(8, (4, 8, 16, 32)), PICTURE)
    return list(loss.student_layers), list(loss.teacher_layers)


def test_defaults_are_paired_as_far_as_both_go():
    vgg_like = torchvision.models.resnet18()
    student, teacher = settled(ATLoss(), teacher=vgg_like)
    assert student == ["layer1", "layer2", "layer3"]
    assert teacher == ["layer1", "layer2", "layer3"]
    student, teacher = settled(OFDLoss(), teacher=vgg_like)
    assert teacher == ["layer2.1.relu.input", "layer3.1.relu.input", "layer4.1.relu.input"]


@pytest.mark.parametrize(
    ("loss", "named"),
    [(ATLoss, ["layer3"]), (FitNetLoss, ["layer2", "layer3"]), (OFDLoss, ["relu", "layer1", "layer2", "layer3"])],
)
def test_layers_named_on_one_side_alone_must_be_as_many(loss, named):
    with pytest.raises(ValueError, match=r"student_layers .* and teacher_layers .* must be as many; name both"):
        settled(loss(student_layers=named))
    with pytest.raises(ValueError, match="must name at least one layer"):
        loss(student_layers=[])


def test_one_side_may_be_named_where_the_numbers_agree():
    assert settled(FitNetLoss(student_layers="layer1"))[0] == ["layer1"]


def test_methods_that_pair_from_the_deepest_leave_the_others_shallowest_out():
    assert settled(OFDLoss(student_layers="layer3.0.preact"))[1] == ["layer3.0.preact"]


def test_a_wrong_path_says_whose_it_is():
    with pytest.raises(ValueError, match=r"ATLoss, teacher_layers: ResNet has no layer 'layer4'; close names: layer"):
        settled(ATLoss("layer3", "layer4"))


class Gated(nn.Module):
    """A network whose classifier is neither its last linear layer nor the only one."""

    def __init__(self, width=6):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.head = nn.Linear(width, 10)
        self.gate = nn.Linear(width, width)

    def forward(self, image):
        feature = self.conv(image).mean((2, 3))
        return self.head(feature) + self.gate(feature).sum()


def test_the_classifier_of_a_users_network_is_not_guessed():
    class Plain(Gated):
        def forward(self, image):
            return self.head(self.conv(image).mean((2, 3)))

    assert settled(RKDLoss(), Plain(), Plain())[0] == ["head.input"]
    loss = CATKDLoss("conv", "conv")
    settled(loss, Plain(), Plain())
    assert all(classifier.out_features == 10 for classifier in loss._classifiers)
    with pytest.raises(ValueError, match="RKDLoss needs student_layers: Gated does not say"):
        settled(RKDLoss(), Gated(), Plain())
    with pytest.raises(ValueError, match=r"'gate' has 6 classes, but the student gives 10; set student_classifier"):
        settled(CATKDLoss("conv", "conv", student_classifier="gate"), Plain(), Plain())
    student = SimKDLoss("conv", "conv", teacher_classifier="head").extend_student(Plain(), Plain(), PICTURE)
    assert isinstance(student, SimKDStudent)


def test_of_a_simkd_student_the_projected_map_belongs_to_the_classifier():
    teacher = ResNet(8, (4, 8, 16, 32))
    made = SimKDLoss().extend_student(ResNet(8, (4, 4, 8, 16)), teacher, PICTURE)
    for loss in (SRRLLoss(), CATKDLoss()):
        assert settled(loss, teacher=made)[1] == ["projector"]
    again = SimKDLoss().extend_student(wrn_16_1(), made, PICTURE)
    assert torch.equal(again.classifier.weight, made.classifier.weight)


def test_srrl_is_the_same_inside_wrappers_that_change_logits():
    student, teacher = ResNet(8, (4, 4, 8, 16)), ResNet(8, (4, 8, 16, 32)).eval()
    loss = SRRLLoss()
    student_layers, teacher_layers = settled(loss, student, teacher)
    outputs = []
    for layers, width in ((student_layers, 16), (teacher_layers, 32)):
        outputs.append(ModelOutput(torch.randn(4, 100), {layers[0]: torch.randn(4, width, 8, 8)}))
    batch = {"target": torch.arange(4)}
    assert torch.equal(LogitStandardization(loss)(*outputs, batch), loss(*outputs, batch))
