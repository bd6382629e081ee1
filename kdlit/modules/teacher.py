"""The teacher at work: frozen, without a graph, and as fast as it can be."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import RLock
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdlit.losses.functional import widened
from kdlit.models.features import FeatureTap, version
from kdlit.models.folding import fold_batchnorm
from kdlit.modules.networks import run_network
from kdlit.modules.performance import Performance, compile_in_place
from kdlit.types import Batch, ModelOutput

_ONE_AT_A_TIME = RLock()  # threads may share a teacher
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class FrozenTeacher:
    """Gives what a teacher says about batches.

    Where ``performance`` asks for other weights (folded, in another layout or precision), they are made when first
    needed, made anew if those of the network change, and stand in their place during a pass and at no other time. So
    the network stays what it is, and no optimizer, checkpoint or strategy sees them. Weights written to through
    ``.data`` are followed from the next epoch on.

    Args:
        network: the teacher; it is frozen and put into eval mode.
        layers: dotted paths of the layers whose features are wanted.
        performance: how to run it.
        example: a batch of one black picture for it, shape ``(1, C, H, W)``.
        has_own_input: whether it sees ``image_teacher`` in place of ``image``.
    """

    def __init__(
        self, network: nn.Module, layers: Iterable[str], performance: Performance, example: Tensor, has_own_input: bool
    ) -> None:
        self.network = freeze(network)
        self.layers = frozenset(layers)
        self.performance = performance
        self.example = example
        self.has_own_input = has_own_input
        self._tap = FeatureTap(network, self.layers)
        self._stand_ins: list[tuple[dict[str, Any], str, Any]] | None = None
        self._made_of: tuple[object, ...] = ()
        self._content: list[float] = []
        self._device = example.device
        self._list_parts()

    def __call__(self, batch: Batch, with_strong_view: bool) -> ModelOutput:
        """Return what the teacher gives for its form of a batch, without a graph.

        Args:
            batch: the pictures, or what the teacher says about them.
            with_strong_view: whether a loss needs the strong view, too.

        Raises:
            ValueError: If the batch lacks what is needed, or the network cannot be copied.
        """
        if "teacher_logits" in batch:
            return self._recall(batch, with_strong_view)
        batch = self._its_own_form(batch)
        device = batch["image"].device
        dtype = getattr(torch, self.performance.teacher_dtype)
        with torch.no_grad(), self._in_place(device), self._for_the_compiler(device):
            if dtype == torch.float32:
                return run_network("teacher", self.network, self._tap, batch, with_strong_view)
            narrow = {name: batch[name].to(dtype) for name in ("image", "image_strong") if name in batch}
            with torch.autocast(device.type, enabled=False):
                narrowed = cast("Batch", {**batch, **narrow})
                return run_network("teacher", self.network, self._tap, narrowed, with_strong_view)

    def _recall(self, batch: Batch, with_strong_view: bool) -> ModelOutput:
        if self.layers:
            raise ValueError(
                f"the batch holds the teacher's logits, but losses need its features {', '.join(sorted(self.layers))}; "
                "let the teacher run"
            )
        if with_strong_view and "teacher_logits_strong" not in batch:
            raise ValueError(
                "a loss needs what the teacher says about the strong view, but of this the batch holds teacher_logits "
                "alone; add teacher_logits_strong, or let the teacher run"
            )
        strong = batch["teacher_logits_strong"] if with_strong_view else None
        return ModelOutput(widened(batch["teacher_logits"]), {}, widened(strong))

    def _its_own_form(self, batch: Batch) -> Batch:
        if "image_teacher" in batch:
            batch = cast("Batch", {**batch, "image": batch["image_teacher"]})
            if "image_teacher_strong" in batch:
                batch["image_strong"] = batch["image_teacher_strong"]
        elif self.has_own_input:
            raise ValueError(
                f"teacher_input_size is set, but the batch has no image_teacher, only {', '.join(batch)}; set "
                "--data.teacher_input, or add it in your own data module"
            )
        return batch

    def prepare(self) -> None:
        """Make the other weights now, unless they are there: a strategy may take the network apart before a step.

        Raises:
            ValueError: If the network cannot be copied, or not run in half precision.
        """
        self.look_again()
        if self._stand_ins is not None:
            return
        device = self._place()
        self._make_ready(device)
        dtype = getattr(torch, self.performance.teacher_dtype)
        if dtype != torch.float32:
            try:
                with torch.no_grad(), self._in_place(device), torch.autocast(device.type, enabled=False):
                    self.network(self.example.to(device, dtype))
            except Exception as error:  # whatever a network does with its pictures
                raise ValueError(
                    f"the teacher ({type(self.network).__name__}) cannot run in {self.performance.teacher_dtype}: "
                    f"{error}; set performance.teacher_dtype to float32"
                ) from error

    def compile(self) -> None:
        """Have the network compiled at its next pass, if that is asked for."""
        if "teacher" in self.performance.compile:
            compile_in_place(self.network, self.performance.compile_mode)

    def look_again(self) -> None:
        """Make the other weights anew if the network was changed in a way that a step does not notice."""
        self._list_parts()
        if self._content != (content := self._read_content()):
            self._stand_ins, self._content = None, content

    def _list_parts(self) -> None:
        """What is looked at in every step, listed beforehand, as that takes longer than to look."""
        self._tensors = [*self.network.parameters(), *self.network.buffers()]
        layers = list(self.network.modules())
        self._hooks = [hooks for one in layers for hooks in (one._forward_hooks, one._forward_pre_hooks)]

    def _read_content(self) -> list[float]:
        """A few numbers that change whenever weights do, in whatever way."""
        tensors = [one.detach() for one in self._tensors if one.is_floating_point() and one.numel()]
        if not tensors:
            return []
        norms = [norm.float() for norm in torch._foreach_norm(tensors)]
        flat = [one.flatten().float() for one in tensors]
        orders = [one @ torch.linspace(1, 2, len(one), device=one.device) for one in flat]
        return torch.stack([*norms, *orders]).nan_to_num(0.0).tolist()

    def _place(self) -> torch.device:
        return self._tensors[0].device if self._tensors else self.example.device

    def _for_the_compiler(self, device: torch.device) -> AbstractContextManager[Any]:
        """Tell it that weights are constants, so that it packs them and fuses layers, on a CPU a third faster."""
        if "teacher" not in self.performance.compile or device.type != "cpu":
            return nullcontext()
        return cast("AbstractContextManager[Any]", torch._inductor.config.patch(freezing=True))

    @contextmanager
    def _in_place(self, device: torch.device) -> Iterator[None]:
        """The network with other weights for a while, on the device of the pictures."""
        with _ONE_AT_A_TIME:
            stand_ins = self._make_ready(device)
            own = [place[name] for place, name, _ in stand_ins]
            for place, name, value in stand_ins:
                place[name] = value
            try:
                yield
            finally:
                for (place, name, _), value in zip(stand_ins, own, strict=True):
                    place[name] = value

    def _make_ready(self, device: torch.device) -> list[tuple[dict[str, Any], str, Any]]:
        made_of = (
            self._tensors[0].dtype if self._tensors else None,
            sum([version(one) for one in self._tensors]),
            sum(map(len, self._hooks)),
        )
        if self._stand_ins is None or made_of != self._made_of:
            self._stand_ins, self._made_of = self._make(), made_of
            self._device = self._place()
        if device != self._device:
            self._stand_ins = [
                (place, name, value.to(device) if isinstance(value, Tensor) else value)
                for place, name, value in self._stand_ins
            ]
            self._device = device
        return self._stand_ins

    def _make(self) -> list[tuple[dict[str, Any], str, Any]]:
        """What is to stand where: weights, buffers, and layers without work in place of batch norms."""
        options = self.performance
        if (options.fold_teacher, options.channels_last, options.teacher_dtype) == (False, False, "float32"):
            return []
        if any(isinstance(layer, torch.jit.ScriptModule) for layer in self.network.modules()):
            return []  # its weights cannot be exchanged, and it has been optimised already
        try:
            fold = options.fold_teacher
            twin = fold_batchnorm(self.network, self.example) if fold else copy.deepcopy(self.network)
        except Exception as error:  # another's network may refuse to be copied in any way
            raise ValueError(
                f"the teacher ({type(self.network).__name__}) cannot be copied: {error}; set performance to plain, "
                "which runs it as it is"
            ) from error
        if options.teacher_dtype != "float32":
            twin.to(getattr(torch, options.teacher_dtype))
        options.lay_out(twin)
        layers = dict(self.network.named_modules(remove_duplicate=False))
        stand_ins: list[tuple[dict[str, Any], str, Any]] = []
        for path, other in twin.named_modules(remove_duplicate=False):
            layer = layers[path]
            if isinstance(other, nn.Identity) and not isinstance(layer, nn.Identity):
                for hooks in _HOOKS:  # whoever looks at the layer, now or later, looks at what stands there
                    setattr(other, hooks, getattr(layer, hooks))
                parent, _, name = path.rpartition(".")
                stand_ins.append((layers[parent]._modules, name, other))
            else:
                for mine, theirs in ((layer._parameters, other._parameters), (layer._buffers, other._buffers)):
                    stand_ins += [
                        (mine, name, value)
                        for name, value in theirs.items()
                        if _differ(mine[name], value, look_at_values=mine is layer._parameters)
                    ]
        return stand_ins


def freeze(network: nn.Module) -> nn.Module:
    """Put a network into eval mode for good, without gradients."""
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network.eval()


def _differ(one: Tensor | None, other: Tensor | None, look_at_values: bool) -> bool:
    """Whether a tensor must take another's place; buffers that are a network's own affair are left to it."""
    if one is None or other is None:
        return one is not other
    same = one.dtype == other.dtype and one.stride() == other.stride()
    return not same or (look_at_values and not torch.equal(one, other))
