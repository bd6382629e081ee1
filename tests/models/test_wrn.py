import pytest
import torch

from kdlit.models import WideResNet, wrn_16_1


@pytest.fixture
def tiny():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield WideResNet(10, 1, num_classes=10).eval()


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (33, 47), (4, 4)])
def test_any_image_size_gives_one_row_per_image(tiny, size):
    assert tiny(torch.zeros(2, 3, *size)).shape == (2, 10)


def test_projection_exists_where_width_changes_and_not_where_stride_does(tiny):
    assert tiny.block1.layer[0].convShortcut is None
    wide = WideResNet(10, 2)
    assert [wide.get_submodule(f"block{i}.layer.0").convShortcut.stride for i in (1, 2, 3)] == [(1, 1), (2, 2), (2, 2)]


def test_projection_reads_the_activated_input(tiny):
    block = tiny.block2.layer[0]
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x), block.convShortcut(block.bn1(x).relu()))


def test_classifier_bias_starts_at_zero():
    assert wrn_16_1().fc.bias.abs().max() == 0


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 2, 2)])
def test_no_image(tiny, shape):
    with pytest.raises(ValueError, match=r"image must have shape \(B, 3, H, W\) with H and W >= 4, got ") as caught:
        tiny(torch.zeros(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("depth", [4, 20, 0, 16.0])
def test_bad_depth(depth):
    with pytest.raises(ValueError, match=rf"depth must be 6n\+4 with n >= 1, got {depth}"):
        WideResNet(depth, 1)


@pytest.mark.parametrize(("name", "arguments"), [("width", (0, 100)), ("width", (0.5, 100)), ("num_classes", (1, 0))])
def test_bad_count(name, arguments):
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
        WideResNet(16, *arguments)
