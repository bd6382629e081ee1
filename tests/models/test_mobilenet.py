import pytest
import torch
from torch import nn

from kdlit.models import MobileNetV2, mobilenetv1, mobilenetv2, mobilenetv2_tinyimagenet
from kdlit.models.mobilenetv2 import InvertedResidual


def test_width_is_a_factor_rounded_down_and_the_last_convolution_keeps_its_own():
    model = MobileNetV2(width=0.35)
    assert model.conv1[0].out_channels == 11
    assert [stage[-1].conv[6].out_channels for stage in model.blocks] == [5, 8, 11, 22, 33, 56, 112]
    assert model.conv2[0].out_channels == 1280


def test_width_without_channels():
    with pytest.raises(ValueError, match=r"width must be at least 1/16, so that every stage has a channel, got 0.05"):
        MobileNetV2(width=0.05)


@pytest.mark.parametrize(("widths", "stride", "adds"), [((4, 4), 1, True), ((4, 4), 2, False), ((4, 6), 1, False)])
def test_input_is_added_where_stride_is_1_and_widths_agree(widths, stride, adds):
    block = InvertedResidual(*widths, stride, expansion=2).eval()
    x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(block(x), block.conv(x) + (x if adds else 0))
    assert block(x).min() < 0, "nothing rectifies the result"


def test_activations_and_biases_of_each_form():
    for build, relu, has_bias in ((mobilenetv2, nn.ReLU, False), (mobilenetv2_tinyimagenet, nn.ReLU6, True)):
        model = build()
        assert {type(m) for m in model.modules() if isinstance(m, nn.ReLU | nn.ReLU6)} == {relu}
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert {m.bias is not None for m in convs} == {has_bias}
    assert {type(m) for m in mobilenetv1().modules() if isinstance(m, nn.ReLU | nn.ReLU6)} == {nn.ReLU}


def test_classes_of_the_data_sets_they_are_for():
    image = torch.zeros(1, 3, 32, 32)
    for build, classes in ((mobilenetv1, 1000), (mobilenetv2, 100), (mobilenetv2_tinyimagenet, 200)):
        assert build().eval()(image).shape == (1, classes)
