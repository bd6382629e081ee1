"""Where to look inside a network: the layers that published methods take their features from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision.models as tv
from torch import Tensor, nn

from kdlit.models.features import dry_run


@dataclass(frozen=True)
class FeatureLayers:
    """Paths for :class:`~kdlit.models.FeatureTap`; empty where a network has no such thing or it is not known.

    Attributes:
        maps: the feature maps, from shallow to deep: that of the stem, if published code counts it, and of each stage;
            of a transformer the tokens after each block.
        preact: the same maps before their last ReLU; of the stem, the map itself.
        norms: the batch norms before these ReLUs, one for each of the last maps in ``preact``.
        pool: the feature of the whole picture, shape ``(B, D)``: what the classifier is given.
        classifier: the last layer.
        averaged: the map whose mean the classifier is given, where it is neither what ``pool`` is given nor the last of
            ``maps``.
    """

    maps: tuple[str, ...] = ()
    preact: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    pool: str = ""
    classifier: str = ""
    averaged: str = ""

    @property
    def pooled_map(self) -> str:
        """Path of the map whose spatial mean the classifier is given; empty if that is not known.

        Of some networks it is not the last of ``maps``: a WRN's batch norm and ReLU and the last convolution of a
        MobileNetV2 come between.
        """
        if self.averaged:
            return self.averaged
        if self.maps and self.pool and not self.pool.endswith(".input"):
            return f"{self.pool}.input"
        return self.maps[-1] if self.maps else ""


def feature_layers(model: nn.Module, example: Tensor | None = None) -> FeatureLayers:
    """Name the layers of a network that published methods use.

    Networks of kdlit say so themselves, by a property ``feature_layers`` that any other network may have too. It is
    known of torchvision's ResNets and MobileNetV2 and of timm's plain vision transformers. Of any other network a pass
    with an example shows which linear layer gives the logits.

    Args:
        model: any network.
        example: a batch of pictures, shape ``(B, C, H, W)``; None: unknown networks stay unknown.
    """
    own = getattr(model, "feature_layers", None)
    if isinstance(own, FeatureLayers):
        return own
    for kind, layers in _OF_OTHERS.items():
        if isinstance(model, kind):
            return layers(model)
    if hasattr(model, "patch_embed"):  # as timm's vision transformers, which are not imported for this
        for holder, inner in (("blocks", ""), ("transformers", ".blocks")):
            if isinstance(blocks := getattr(model, holder, None), nn.Sequential):
                maps = tuple(f"{holder}.{index}{inner}" for index in range(len(blocks)))
                return FeatureLayers(maps, maps, pool="head.input", classifier="head")
    classifier = "" if example is None else _classifier(model, example)
    return FeatureLayers(pool=f"{classifier}.input", classifier=classifier) if classifier else FeatureLayers()


def _classifier(model: nn.Module, example: Tensor) -> str:
    """Path of the one linear layer whose output are the logits; empty if there is none, or several."""
    outputs: list[tuple[str, Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda _, args, output, name=name: outputs.append((name, output)))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name
    ]
    try:
        logits = dry_run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    logits = getattr(logits, "logits", logits)
    found = {name for name, output in outputs if isinstance(logits, Tensor) and torch.equal(output, logits)}
    return found.pop() if len(found) == 1 else ""


def _resnet(model: nn.Module) -> FeatureLayers:
    last = [f"layer{stage}.{len(getattr(model, f'layer{stage}')) - 1}" for stage in range(1, 5)]
    norm = "bn3" if isinstance(model.get_submodule(last[0]), tv.resnet.Bottleneck) else "bn2"
    return FeatureLayers(
        maps=("relu", "layer1", "layer2", "layer3", "layer4"),
        # The one ReLU of a block is called several times, so that what it was given last is the sum.
        preact=("relu", *(f"{block}.relu.input" for block in last)),
        norms=tuple(f"{block}.{norm}" for block in last),
        pool="fc.input",
        classifier="fc",
    )


def _mobilenet_v2(model: nn.Module) -> FeatureLayers:
    stages = tuple(f"features.{index}" for index in (1, 3, 6, 13, 18))
    return FeatureLayers(stages, stages, pool="classifier.1.input", classifier="classifier.1")


_OF_OTHERS: dict[type[nn.Module], Callable[[nn.Module], FeatureLayers]] = {
    tv.ResNet: _resnet,
    tv.MobileNetV2: _mobilenet_v2,
}
