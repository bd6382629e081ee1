"""How good the features of a trained network are for other pictures: a linear classifier on top of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from kdlit.losses import CrossEntropyLoss
from kdlit.models.features import FeatureTap, feature_shapes
from kdlit.modules.classification import ClassificationDistillation
from kdlit.modules.finite import NonFinite
from kdlit.modules.performance import Performance, Preset


def probe_optimizer(params: Any) -> torch.optim.Optimizer:
    """SGD as Zhao et al. 2022 train the linear layer."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.0)


class FrozenFeatures(nn.Module):
    """A frozen network and a linear classifier of one of its features.

    The network gets no gradients and no graph and stays in eval mode, so nothing of it changes.

    Args:
        backbone: trained network.
        layer: dotted path of the layer whose output is the feature, shape ``(B, D)``, or ``(B, D, H, W)``, which is
            averaged over space.
        num_classes: classes of the classifier.
        input_size: size of one picture, ``(C, H, W)``.

    Raises:
        ValueError: If there is no such layer, its output has another shape or there is no class.
    """

    def __init__(self, backbone: nn.Module, layer: str, num_classes: int, input_size: Sequence[int]) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be >= 1, got {num_classes!r}")
        try:
            shape = feature_shapes(backbone, [layer], torch.zeros(1, *input_size))[layer]
        except RuntimeError as error:
            raise ValueError(
                f"the backbone ({type(backbone).__name__}) gives no feature {layer!r} for pictures of input_size "
                f"{tuple(input_size)}: {error}"
            ) from error
        if len(shape) not in (2, 4):
            raise ValueError(
                f"layer {layer!r} of {type(backbone).__name__} must give a feature of shape (B, D) or (B, D, H, W), "
                f"but gives {tuple(shape)}; name another layer"
            )
        self.layer = layer
        self.backbone = backbone.requires_grad_(False).eval()
        self.head = nn.Linear(shape[1], num_classes)
        self._tap = FeatureTap(backbone, [layer])

    def train(self, mode: bool = True) -> FrozenFeatures:
        """Set the mode of the classifier; the network stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def feature(self, image: Tensor) -> Tensor:
        """Shape ``(B, D)``, without a graph, for pictures of shape ``(B, C, H, W)``."""
        with torch.no_grad():
            self.backbone(image)
            output = self._tap.take()[self.layer]
            return output if output.ndim == 2 else output.mean((2, 3))

    def forward(self, image: Tensor) -> Tensor:
        """Return logits, shape ``(B, num_classes)``."""
        logits: Tensor = self.head(self.feature(image))
        return logits


class LinearProbe(ClassificationDistillation):
    """Trains a linear classifier on the frozen features of a network by cross-entropy, to compare features.

    The protocol of Zhao et al. 2022, table 13 and appendix A.7: a student distilled on CIFAR-100 is frozen and probed
    on STL-10 and Tiny-ImageNet. All else is as for any student: metrics, prediction, checkpoints and export.

    The student is the whole, backbone and classifier: so ``student.pt`` and the checkpoints hold both, as
    ``backbone.*`` and ``head.*``, and what was probed can be looked up later.

    Args:
        backbone: trained network, such as :func:`kdlit.models.from_checkpoint` gives with the classes it was trained
            for.
        num_classes: classes of the pictures to probe with.
        layer: dotted path of the layer whose output is the feature, averaged over space if it has any: ``pool`` in the
            networks of kdlit, ``avgpool`` in torchvision's ResNets.
        optimizer: makes the optimizer from the parameters of the linear layer.
        lr_scheduler: makes the learning-rate schedule from the optimizer, stepped once an epoch.
        input_size: size of one picture, ``(C, H, W)``.
        performance: how a step is computed, as in :class:`~kdlit.modules.DistillationModule`.
        non_finite: what to do if logits or the loss are not finite, as there.

    Raises:
        ValueError: If the layer does not exist or gives no feature, or the network cannot take such pictures.
    """

    student: FrozenFeatures

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        layer: str = "pool",
        optimizer: OptimizerCallable = probe_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        input_size: Sequence[int] = (3, 32, 32),
        performance: Performance | Preset = "exact",
        non_finite: NonFinite = "stop",
    ) -> None:
        super().__init__(
            FrozenFeatures(backbone, layer, num_classes, input_size),
            {"ce": CrossEntropyLoss()},
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            input_size=input_size,
            performance=performance,
            non_finite=non_finite,
        )
