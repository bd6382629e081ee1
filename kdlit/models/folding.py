"""Batch norms of a frozen network, folded into the layers before them: the same function, in fewer passes."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from kdlit.models.features import dry_run

# Exact types: a subclass may compute something else.
_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batchnorm(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy of a network for evaluation in which batch norms are part of the convolutions they follow.

    One pass is watched to see what can be folded: what a convolution or linear layer gives must go into a batch norm
    and nowhere else, neither may be called twice, and no hook may look at what passes between them. ``nn.Identity``
    takes the place of the batch norm, so every other layer gives what it gave, up to rounding: 1e-5 of the largest
    value in float32. A network that does not bear it, because it reads the weights of its batch norms itself, comes
    back as a copy.

    Args:
        model: any network; it is not changed.
        example: a picture for the pass, shape ``(1, C, H, W)``.
    """
    example = example.expand(2, *example.shape[1:])  # some networks do otherwise with a single picture
    original = copy.deepcopy(model).eval()
    folded = copy.deepcopy(original)
    looked_at = {layer for layer in folded.modules() if layer._forward_hooks}
    with _unseen(original), _unseen(folded):
        for linear, norm in _in_a_row(folded, example):
            if linear not in looked_at and norm not in looked_at:
                _fold(linear, norm)
                for parent in folded.modules():
                    for name, child in parent.named_children():
                        if child is norm:
                            setattr(parent, name, nn.Identity())
        same = _equal(original, folded, example)
    return folded if same else original


@contextmanager
def _unseen(model: nn.Module) -> Iterator[None]:
    """Call nobody's hooks for a while."""
    hooks = {layer: layer._forward_hooks for layer in model.modules()}
    for layer in hooks:
        layer._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for layer, own in hooks.items():
            layer._forward_hooks = own


def _fold(linear: Any, norm: Any) -> None:
    """Let a layer do the work of the batch norm behind it; its new weights are computed in float64."""
    weight, mean, var = (value.detach().double() for value in (linear.weight, norm.running_mean, norm.running_var))
    bias, scale, shift = (
        None if value is None else value.detach().double() for value in (linear.bias, norm.weight, norm.bias)
    )
    weight, bias = fuse_conv_bn_weights(weight, bias, mean, var, norm.eps, scale, shift)
    dtype = linear.weight.dtype
    linear.weight, linear.bias = (nn.Parameter(value.to(dtype), requires_grad=False) for value in (weight, bias))


def _equal(one: nn.Module, other: nn.Module, example: Tensor) -> bool:
    """Whether two networks give the same for pictures of noise."""
    noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
    first = dry_run(one, noise)
    try:
        second = dry_run(other, noise)
    except Exception:  # whatever a network does with its layers
        return False
    pairs = list(zip(_tensors(first), _tensors(second), strict=True))
    return all(torch.allclose(a, b, 0, _rounding(a), equal_nan=True) for a, b in pairs)


def _rounding(value: Tensor) -> float:
    """What may be rounded off; values that stand for infinity do not count."""
    size = value.abs()[value.abs() < 1e20].amax() if (value.abs() < 1e20).any() else torch.ones(())
    return (1e-4 if value.dtype in (torch.float32, torch.float64) else 0.1) * float(size)


def _tensors(output: object) -> list[Tensor]:
    values = tree_leaves(getattr(output, "logits", output))
    return [value for value in values if isinstance(value, Tensor) and value.numel()]


def _in_a_row(model: nn.Module, example: Tensor) -> list[tuple[nn.Module, nn.Module]]:
    """Layers, each with the batch norm that alone takes what it gives."""
    watch, handles = _Watch(), []
    for layer in model.modules():
        if layer._forward_pre_hooks:
            continue  # somebody looks at what it is given, or makes its weights anew for every pass
        if type(layer) in _LINEAR:
            handles.append(layer.register_forward_hook(watch.gave))
        elif isinstance(layer, _NORM) and type(layer) in _NORM and layer.running_mean is not None:
            handles += [layer.register_forward_pre_hook(watch.enters), layer.register_forward_hook(watch.leaves)]
    try:
        with watch:
            watch.use(dry_run(model, example))
    finally:
        for handle in handles:
            handle.remove()
    return watch.pairs()


class _Watch(TorchFunctionMode):
    """Remembers, over one pass, which layer gave each tensor and who took it."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[int, tuple[nn.Module, Tensor]] = {}  # with the tensor, so that no other one gets its id
        self.taken: dict[nn.Module, int] = {}
        self.kept: list[Any] = []  # likewise
        self.calls: Counter[nn.Module] = Counter()
        self.uses: Counter[int] = Counter()
        self.within_norm = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.within_norm:
            self.use((args, kwargs))
        return func(*args, **(kwargs or {}))

    def use(self, values: object) -> None:
        self.uses.update(id(value) for value in tree_leaves(values) if id(value) in self.given)

    def gave(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.calls[layer] += 1
        if isinstance(output, Tensor) and output.ndim == layer.weight.ndim:
            self.given[id(output)] = layer, output

    def enters(self, norm: nn.Module, args: Any) -> None:
        self.calls[norm] += 1
        self.within_norm = True
        self.taken[norm] = id(args[0]) if args else 0
        self.kept.append(args)

    def leaves(self, norm: nn.Module, args: Any, output: Any) -> None:
        self.within_norm = False

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        takers = Counter(self.taken.values())
        found = [
            (self.given[value][0], norm)
            for norm, value in self.taken.items()
            if value in self.given and takers[value] == 1 and not self.uses[value]
        ]
        return [(layer, norm) for layer, norm in found if self.calls[layer] == self.calls[norm] == 1]
