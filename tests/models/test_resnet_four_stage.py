import pytest
import torch

from kdlit.models import FourStageResNet


def tiny(**options):
    return FourStageResNet((1, 2, 1, 1), widths=(4, 8, 12, 16), num_classes=10, **options).eval()


def test_bottlenecks_are_four_times_as_wide_and_carry_the_stride_in_the_middle():
    model = tiny(bottleneck=True)
    first, second = model.layer2
    assert [m.conv2.stride for m in (model.layer1[0], first, second)] == [(1, 1), (2, 2), (1, 1)]
    assert first.conv1.stride == (1, 1)
    assert [model.get_submodule(f"layer{i}")[-1].conv3.out_channels for i in (1, 2, 3, 4)] == [16, 32, 48, 64]
    assert [m.conv2.out_channels for m in (first, second)] == [8, 8]
    assert model.linear.in_features == 64


def test_projection_is_called_shortcut_and_exists_where_width_or_stride_change():
    def projections(model):
        return [key.removesuffix(".shortcut.0.weight") for key in model.state_dict() if "shortcut.0" in key]

    assert projections(tiny()) == ["layer2.0", "layer3.0", "layer4.0"]
    assert projections(tiny(bottleneck=True)) == ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]


def test_pooling_is_the_mean_over_all_positions():
    model = tiny()
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    maps = model.layer4(model.layer3(model.layer2(model.layer1(model.bn1(model.conv1(image)).relu()))))
    assert maps.shape == (1, 16, 8, 8)
    torch.testing.assert_close(model(image), model.linear(maps.mean(dim=(2, 3))))


@pytest.mark.parametrize("name", ["blocks", "widths"])
def test_bad_stages(name):
    good = {"blocks": (1, 1, 1, 1)}
    for value in ((2, 2, 2), (2, 2, 2, 2, 2), ()):
        with pytest.raises(ValueError, match=f"{name} must be four integers, one a stage, got ") as caught:
            FourStageResNet(**good | {name: value})
        assert str(value) in str(caught.value)
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
        FourStageResNet(**good | {name: (2, 2, 0, 2)})
