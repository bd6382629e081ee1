"""Networks without training logic, and the weights of others for them."""

from kdlit.models.checkpoint import CheckpointError, from_checkpoint
from kdlit.models.digits import digit_pairs_teacher
from kdlit.models.features import FeatureTap, feature_shapes
from kdlit.models.resnet import (
    ResNet,
    resnet8,
    resnet8x4,
    resnet14,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from kdlit.models.wrn import (
    WideResNet,
    wrn_16_1,
    wrn_16_2,
    wrn_16_4,
    wrn_28_2,
    wrn_28_4,
    wrn_40_1,
    wrn_40_2,
)

__all__ = [
    "CheckpointError",
    "FeatureTap",
    "ResNet",
    "WideResNet",
    "digit_pairs_teacher",
    "feature_shapes",
    "from_checkpoint",
    "resnet8",
    "resnet8x4",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet44",
    "resnet56",
    "resnet110",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_16_4",
    "wrn_28_2",
    "wrn_28_4",
    "wrn_40_1",
    "wrn_40_2",
]
