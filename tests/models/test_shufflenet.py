import pytest
import torch

from kdlit.models import FeatureTap, shufflenetv1, shufflenetv2
from kdlit.models.shufflenet import channel_shuffle


def test_shuffle_interleaves_the_groups():
    x = torch.arange(2 * 6 * 2 * 3).view(2, 6, 2, 3)
    assert torch.equal(channel_shuffle(x, 2), x[:, [0, 3, 1, 4, 2, 5]])
    assert torch.equal(channel_shuffle(x, 3), x[:, [0, 2, 4, 1, 3, 5]])
    assert torch.equal(channel_shuffle(x, 1), x)


@pytest.mark.parametrize(("build", "groups"), [(shufflenetv1, 1), (shufflenetv2, 2)])
def test_features_are_the_rectified_and_shuffled_preactivations(build, groups):
    model = build().eval()
    tap = FeatureTap(model, ["layer2", "layer2.7.preact"])
    model(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    caught = tap.take()
    assert caught["layer2.7.preact"].min() < 0
    assert torch.equal(caught["layer2"], channel_shuffle(caught["layer2.7.preact"].relu(), groups))


def test_v2_passes_half_of_the_channels():
    model = shufflenetv2().eval()
    block = model.layer1[1]
    x = torch.rand(1, 116, 4, 4, generator=torch.Generator().manual_seed(1))
    y = block(x)
    assert torch.equal(y[:, ::2], x[:, :58])
    assert not torch.equal(y[:, 1::2], x[:, 58:])


def test_v1_strided_block_appends_the_pooled_input():
    block = shufflenetv1().eval().layer1[0]
    x = torch.rand(1, 24, 8, 8, generator=torch.Generator().manual_seed(1))
    y = block(x)
    assert y.shape == (1, 240, 4, 4)
    torch.testing.assert_close(y[:, 216:, 1, 1], x[:, :, 1:4, 1:4].mean(dim=(2, 3)))
    torch.testing.assert_close(y[:, 216:, 0, 0], x[:, :, :2, :2].sum(dim=(2, 3)) / 9)
