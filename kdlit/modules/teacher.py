"""The teacher at work: frozen, without a graph, and as fast as it can be."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdlit.losses.functional import widened
from kdlit.models.features import FeatureTap
from kdlit.models.folding import fold_batchnorm
from kdlit.modules.networks import run_network
from kdlit.modules.performance import Performance, compile_in_place
from kdlit.types import Batch, ModelOutput


class FrozenTeacher:
    """Gives what a teacher says about batches.

    Where ``performance`` asks for other weights (folded, in another layout or precision), they are made when first
    needed, made anew if those of the network change, and stand in their place during a pass and at no other time. So
    the network stays what it is, and no optimizer, checkpoint or strategy sees them.

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
        self.network = network.requires_grad_(False).eval()
        self.layers = frozenset(layers)
        self.performance = performance
        self.example = example
        self.has_own_input = has_own_input
        self._tap = FeatureTap(network, self.layers)
        self._weights = list(network.parameters())
        self._stand_ins: list[tuple[dict[str, Any], str, Any]] | None = None
        self._made_of: tuple[object, ...] = ()
        self._device = example.device

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
        """Make the other weights now, from what the network holds now: a strategy may take it apart before a step.

        Raises:
            ValueError: If the network cannot be copied.
        """
        self._stand_ins = None
        self._make_ready(next(iter(self._weights), self.example).device)
        if "teacher" in self.performance.compile:
            compile_in_place(self.network, self.performance.compile_mode)

    def _for_the_compiler(self, device: torch.device) -> AbstractContextManager[Any]:
        """Tell it that weights are constants, so that it packs them and fuses layers, on a CPU a third faster."""
        if "teacher" not in self.performance.compile or device.type != "cpu":
            return nullcontext()
        return cast("AbstractContextManager[Any]", torch._inductor.config.patch(freezing=True))

    @contextmanager
    def _in_place(self, device: torch.device) -> Iterator[None]:
        """The network with other weights for a while, on the device of the pictures."""
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
        made_of = self._weights[0].dtype if self._weights else None, sum([weight._version for weight in self._weights])
        if self._stand_ins is None or made_of != self._made_of:
            self._stand_ins, self._made_of = self._make(), made_of
            self._device = next(iter(self._weights), self.example).device
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
            if type(other) is not type(layer):
                # Whoever looks at the layer, now or later, looks at what stands there.
                other._forward_hooks, other._forward_pre_hooks = layer._forward_hooks, layer._forward_pre_hooks
                parent, _, name = path.rpartition(".")
                stand_ins.append((layers[parent]._modules, name, other))
            else:
                for mine, theirs in ((layer._parameters, other._parameters), (layer._buffers, other._buffers)):
                    stand_ins += [(mine, name, value) for name, value in theirs.items()]
        return stand_ins
