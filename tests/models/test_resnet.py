import pytest
import torch

from kdlit.models import ResNet, resnet20


@pytest.fixture
def tiny():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield ResNet(8, widths=(4, 4, 8, 16), num_classes=10).eval()


def test_widths_are_stem_then_stages(tiny):
    model = ResNet(14, widths=(3, 5, 7, 11), num_classes=2)
    stages = [model.layer1, model.layer2, model.layer3]
    assert model.conv1.out_channels == 3
    assert [block.conv2.out_channels for stage in stages for block in stage] == [5, 5, 7, 7, 11, 11]
    assert "layer1.0.downsample.0.weight" in model.state_dict()
    assert "layer1.0.downsample.0.weight" not in tiny.state_dict()


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (33, 47), (8, 8), (4, 4)])
def test_any_image_size_gives_one_row_per_image(tiny, size):
    assert tiny(torch.zeros(2, 3, *size)).shape == (2, 10)


def test_pooling_is_the_mean_over_all_positions(tiny):
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    maps = tiny.layer3(tiny.layer2(tiny.layer1(tiny.relu(tiny.bn1(tiny.conv1(image))))))
    assert maps.shape == (1, 16, 16, 16)
    torch.testing.assert_close(tiny(image), tiny.fc(maps.mean(dim=(2, 3))))


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 32, 32, 3), (2, 3, 3, 32), (2, 3, 32, 1), (2, 10)])
def test_no_image(tiny, shape):
    with pytest.raises(ValueError, match=r"image must have shape \(B, 3, H, W\) with H and W >= 4, got ") as caught:
        tiny(torch.zeros(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("depth", [9, 2, 0, -4, 18, 20.0])
def test_bad_depth(depth):
    with pytest.raises(ValueError, match=rf"depth must be 6n\+2 with n >= 1, got {depth}"):
        ResNet(depth)


@pytest.mark.parametrize("widths", [(16, 32, 64), (16, 16, 32, 64, 128), ()])
def test_wrong_number_of_widths(widths):
    with pytest.raises(ValueError, match="widths must be four integers") as caught:
        ResNet(8, widths)
    assert str(widths) in str(caught.value)


@pytest.mark.parametrize("width", [0, -1, 1.5])
def test_bad_width(width):
    with pytest.raises(ValueError, match=f"widths must be an integer >= 1, got {width}"):
        ResNet(8, (16, 16, width, 64))


@pytest.mark.parametrize("num_classes", [0, -3, 10.0])
def test_bad_num_classes(num_classes):
    with pytest.raises(ValueError, match=f"num_classes must be an integer >= 1, got {num_classes}"):
        resnet20(num_classes)
