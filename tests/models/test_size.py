"""What networks are said to take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdlit import models, zoo
from kdlit.models.size import count_multiply_adds, count_parameters
from tests.conftest import TinyNet


class Attention(nn.Module):
    def forward(self, image):
        tokens = image.flatten(2).mT[:, None]
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)


def test_multiply_adds_are_those_of_the_table_of_networks():
    (row,) = zoo.model_table("resnet8x4")
    assert count_multiply_adds(models.resnet8x4(num_classes=100).eval(), torch.zeros(1, 3, 32, 32)) == row.multiply_adds


def test_products_of_attention_count():
    assert count_multiply_adds(Attention(), torch.zeros(1, 4, 3, 3)) == 2 * 9 * 9 * 4


def test_attention_counts_where_torch_has_a_kernel_for_all_of_it():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    with torch.device("meta"):
        unreal = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    image = torch.zeros(1, 5, 8)
    assert count_multiply_adds(layer, image) == count_multiply_adds(unreal, image.to("meta")) > 5 * 8 * (4 * 8 + 2 * 16)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_scripted_network_is_counted():
    scripted = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)))
    assert count_multiply_adds(scripted, torch.zeros(1, 3, 2, 2)) == 60
    assert all(parameter.requires_grad for parameter in scripted.parameters())


def test_by_hand():
    network = TinyNet(num_classes=5, width=8)
    assert count_parameters(network) == sum(value.numel() for _, value in network.named_parameters())
    products = network.stem.weight.numel() * 3 * 3 + network.fc.weight.numel()
    assert count_multiply_adds(network.eval(), torch.zeros(1, 3, 8, 8)) == products


def test_a_network_that_trains_goes_on_to():
    pytest.importorskip("timm")
    network = models.pit_tiny(num_classes=5).eval()  # gives a parameter to a module, which the counter cannot stand
    network.head.requires_grad_(False)
    before = {name: value.requires_grad for name, value in network.named_parameters()}
    assert count_multiply_adds(network, torch.zeros(1, 3, 224, 224)) > 6e8
    assert before == {name: value.requires_grad for name, value in network.named_parameters()}
    assert set(before.values()) == {True, False}
