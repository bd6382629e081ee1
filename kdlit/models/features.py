"""Looking inside any network by dotted path, without touching its code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from collections.abc import Iterator


class FeatureTap:
    """Catches what some layers of a network give, or are given, during its forward pass.

    A path names the layer whose output is wanted, such as ``layer3.0.bn2``; with ``.input`` after it, what the layer is
    given first, such as ``fc.input``, the pooled feature. Of a layer that is called several times the last call counts.

    Register the tap before the network is compiled: hooks added later are not called by compiled code. A value that is
    overwritten in place by what follows (a ReLU with ``inplace=True``) is noticed on the first pass; from then on the
    tap keeps a copy.

    Args:
        model: the network to watch.
        paths: dotted paths of its layers.

    Raises:
        ValueError: If a path does not exist; the message lists close names.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self._caught: dict[str, tuple[Tensor, int]] = {}
        self._overwritten: set[str] = set()
        self._paths = frozenset(paths)
        self._handles = [self._hook(model, path) for path in sorted(self._paths)]

    def _hook(self, model: nn.Module, path: str) -> RemovableHandle:
        layer, at_input = _locate(model, path)
        if at_input:
            return layer.register_forward_pre_hook(_CatchInput(self, path))
        return layer.register_forward_hook(_Catch(self, path))

    def catch(self, path: str, value: object) -> None:
        """Remember what was caught at ``path``; called by the hook."""
        if not isinstance(value, Tensor):
            raise TypeError(f"layer {path!r} gave {type(value).__name__}, but only tensors can be used as features")
        if path in self._overwritten:
            value = value.clone()
        self._caught[path] = (value, version(value))

    def take(self) -> dict[str, Tensor]:
        """Return what the last forward pass gave, by path, and forget it.

        Raises:
            RuntimeError: If the pass went around one of the layers.
        """
        caught, self._caught = self._caught, {}
        if missing := self._paths - caught.keys():
            raise RuntimeError(f"the forward pass did not go through layer {', '.join(sorted(missing))}")
        self._overwritten |= {path for path, (value, count) in caught.items() if version(value) != count}
        return {path: value for path, (value, _) in caught.items()}

    def forget(self) -> None:
        """Drop what the last forward pass gave."""
        self._caught = {}

    def remove(self) -> None:
        """Unhook from the network."""
        for handle in self._handles:
            handle.remove()


class _Catch:
    """A forward hook that survives copying and pickling, which a closure would not."""

    def __init__(self, tap: FeatureTap, path: str) -> None:
        self.tap = tap
        self.path = path

    def __call__(self, module: nn.Module, args: Any, output: object) -> None:
        self.tap.catch(self.path, output)


class _CatchInput(_Catch):
    """The same for what a layer is given."""

    def __call__(self, module: nn.Module, args: Any, output: object = None) -> None:
        self.tap.catch(self.path, args[0] if args else None)


def version(value: Tensor) -> int:
    """How often a tensor has been written to; 0 in inference mode, where nobody counts and earlier passes must do."""
    try:
        return value._version
    except RuntimeError:
        return 0


def _locate(model: nn.Module, path: str) -> tuple[nn.Module, bool]:
    """The layer of a path, and whether its input is meant; a layer of the name ``input`` comes first."""
    owner = path.removesuffix(".input")
    if owner != path and path not in dict(model.named_modules()):
        return find_layer(model, owner), True
    return find_layer(model, path), False


def find_layer(model: nn.Module, path: str) -> nn.Module:
    """Return the sub-module at a dotted path.

    Raises:
        ValueError: If there is none; the message lists close names.
    """
    layers: dict[str, nn.Module] = dict(model.named_modules())
    if path and path in layers:
        return layers[path]
    close = difflib.get_close_matches(path, filter(None, layers), n=5, cutoff=0.4) or [
        name for name, _ in model.named_children()
    ]
    raise ValueError(f"{type(model).__name__} has no layer {path!r}; close names: {', '.join(close)}")


def feature_shapes(model: nn.Module, paths: Iterable[str], example: Tensor) -> dict[str, tuple[int, ...]]:
    """Shapes that some layers give for a batch like ``example``, batch dimension included.

    The pass leaves the network as it was: batch-norm statistics, training mode and random state.

    Args:
        model: any network.
        paths: dotted paths of its layers.
        example: a batch of pictures, shape ``(B, C, H, W)``.

    Raises:
        ValueError: If a path does not exist.
    """
    tap = FeatureTap(model, paths)
    try:
        dry_run(model, example)
        return {path: tuple(output.shape) for path, output in tap.take().items()}
    finally:
        tap.remove()


def dry_run(model: nn.Module, example: Tensor) -> object:
    """Return what ``model`` gives for ``example`` in eval mode; nothing of the model or the random state changes."""
    parameter = next(model.parameters(), example)
    with torch.no_grad(), torch.random.fork_rng(), eval_mode(model):
        return model(example.to(parameter.device, parameter.dtype))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a network into eval mode for a while; afterwards every part of it is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
