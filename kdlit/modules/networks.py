"""One forward pass of a network on a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdlit.losses.functional import widened
from kdlit.models.features import FeatureTap
from kdlit.types import Batch, ModelOutput


def run_network(role: str, model: nn.Module, tap: FeatureTap, batch: Batch, with_strong_view: bool) -> ModelOutput:
    """Run a network on a batch, and once more on the strong view if a loss needs it.

    Args:
        role: ``student`` or ``teacher``, for the messages.
        model: the network.
        tap: catches its features.
        batch: the pictures.
        with_strong_view: whether ``image_strong`` is needed.

    Raises:
        ValueError: If the batch lacks the strong view.
        TypeError: If the network gives no logits.
    """
    logits = logits_of(model(batch["image"]), role)
    output = ModelOutput(widened(logits), {path: widened(value) for path, value in tap.take().items()})
    if with_strong_view:
        if "image_strong" not in batch:
            raise ValueError(
                f"a loss needs a second view, image_strong, but the batch has only {', '.join(batch)}; "
                "set --data.strong_view=true, or add it in your own data module"
            )
        output.logits_strong = widened(logits_of(model(batch["image_strong"]), role))
        tap.forget()
    return output


def logits_of(output: object, role: str) -> Tensor:
    """Logits in what a network returned: the tensor itself, or its attribute ``logits``.

    Raises:
        TypeError: If it is neither.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the {role} must return logits or an object with .logits, but returned {type(output).__name__}; "
            "wrap it in a module whose forward returns the logits alone"
        )
    return logits


def check_image(image: Tensor, channels: int, dtype: torch.dtype | str) -> None:
    """Raise ValueError unless pictures have the form that networks with weights of ``dtype`` take."""
    if image.ndim != 4 or image.shape[1] != channels or not image.is_floating_point():
        raise ValueError(
            f"image must be floating point of shape (batch, {channels}, height, width), got {image.dtype} of "
            f"shape {tuple(image.shape)}"
        )
    if image.dtype == torch.float64 != dtype:
        raise ValueError("image is float64, but the networks are float32: let the data give image.float()")
