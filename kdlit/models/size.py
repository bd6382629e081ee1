"""How large a network is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(network: nn.Module) -> int:
    """Weights that are parameters, trained or not.

    Args:
        network: any.
    """
    return sum(parameter.numel() for parameter in network.parameters())


def count_multiply_adds(network: nn.Module, image: Tensor) -> int:
    """Products in convolutions, linear layers and attention in one forward pass.

    Args:
        network: in eval mode.
        image: shape ``(N, C, H, W)``, 1 for the products for one picture; on the meta device if the network is.
    """
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    quick = torch.backends.mha.get_fastpath_enabled()
    try:
        for parameter in learning:  # the counter fails where one is given to a module, as PiT's class token is
            parameter.requires_grad_(False)
        # fused kernels of attention are not counted, what they are made of is
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(quick)
        for parameter in learning:
            parameter.requires_grad_(True)
    return int(counter.get_total_flops()) // 2
