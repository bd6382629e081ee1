"""Networks without training logic, and the weights of others for them.

``resnet18`` to ``resnet152`` are the forms for small images; the ImageNet forms are torchvision's.
``kdlit models`` lists them all.
"""

from kdlit.models.checkpoint import CheckpointError, from_checkpoint
from kdlit.models.digits import digit_pairs_teacher
from kdlit.models.features import FeatureTap, feature_shapes
from kdlit.models.layers import FeatureLayers, feature_layers
from kdlit.models.mobilenetv1 import MobileNetV1, mobilenetv1
from kdlit.models.mobilenetv2 import MobileNetV2, MobileNetV2TinyImageNet, mobilenetv2, mobilenetv2_tinyimagenet
from kdlit.models.pvt import PVT, pvt_tiny
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
from kdlit.models.resnet_four_stage import FourStageResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from kdlit.models.shufflenet import ShuffleNetV1, ShuffleNetV2, shufflenetv1, shufflenetv2
from kdlit.models.simkd import SimKDStudent
from kdlit.models.t2t import T2TViT, t2t_vit_7
from kdlit.models.vgg import VGG, vgg8, vgg11, vgg13, vgg16, vgg19
from kdlit.models.vit import deit3_small, deit_tiny, deit_tiny_distilled, pit_tiny
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
    "PVT",
    "VGG",
    "CheckpointError",
    "FeatureLayers",
    "FeatureTap",
    "FourStageResNet",
    "MobileNetV1",
    "MobileNetV2",
    "MobileNetV2TinyImageNet",
    "ResNet",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "SimKDStudent",
    "T2TViT",
    "WideResNet",
    "deit3_small",
    "deit_tiny",
    "deit_tiny_distilled",
    "digit_pairs_teacher",
    "feature_layers",
    "feature_shapes",
    "from_checkpoint",
    "mobilenetv1",
    "mobilenetv2",
    "mobilenetv2_tinyimagenet",
    "pit_tiny",
    "pvt_tiny",
    "resnet8",
    "resnet8x4",
    "resnet14",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "resnet152",
    "shufflenetv1",
    "shufflenetv2",
    "t2t_vit_7",
    "vgg8",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_16_4",
    "wrn_28_2",
    "wrn_28_4",
    "wrn_40_1",
    "wrn_40_2",
]
