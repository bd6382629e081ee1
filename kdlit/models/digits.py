"""The trained teacher of the quickstart."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from kdlit.models.checkpoint import from_checkpoint
from kdlit.models.resnet import ResNet, resnet20


def digit_pairs_teacher() -> ResNet:
    """ResNet-20 for :class:`kdlit.data.DigitPairs`, with the weights that come with the package.

    They were made by ``kdlit fit --config configs/quickstart/teacher.yaml`` and stored in half precision.
    """
    weights = Path(__file__).parent / "weights" / "digit_pairs_resnet20.pt"
    network = cast("ResNet", from_checkpoint(resnet20(num_classes=100), str(weights)))
    network.recorded_top1 = 0.981  # type: ignore[assignment]  # of the test pictures
    return network
