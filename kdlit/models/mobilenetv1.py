"""MobileNetV1 for ImageNet, the "MobileNet" student of the distillation literature.

Howard et al. 2017, "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications"
(arXiv:1704.04861), with plain ReLU. The code of two papers (MLKD, LSKD) calls this very network MobileNetV2; timm's
``mobilenetv1_100`` has ReLU6 and is another one. Parameters are named as in the published weights.
"""

from torch import Tensor, nn

from kdlit.models._common import check_count, check_image, conv1x1, conv3x3, depthwise3x3, global_pool
from kdlit.models.layers import FeatureLayers

STEM_WIDTH = 32
BLOCKS = (  # channels and stride
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1)),
    *((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
    *((1024, 2), (1024, 1)),
)
MIN_IMAGE_SIZE = 32  # stem and four blocks of stride 2


class MobileNetV1(nn.Module):
    """A 3x3 stem and thirteen depthwise separable convolutions.

    Paths of the published feature maps: ``model.3``, ``model.5``, ``model.11``, ``model.13`` and, pooled, ``pool``;
    before the last ReLU they are the outputs of ``model.3.4``, ``model.5.4``, ``model.11.4``, ``model.13.4``.

    Args:
        num_classes: Size of the classifier.

    Raises:
        ValueError: If ``num_classes`` < 1.
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Sequential(conv3x3(3, STEM_WIDTH, stride=2), nn.BatchNorm2d(STEM_WIDTH), nn.ReLU())
        )
        in_width = STEM_WIDTH
        for out_width, stride in BLOCKS:
            self.model.append(_separable(in_width, out_width, stride))
            in_width = out_width
        self.pool = global_pool()
        self.fc = nn.Linear(in_width, check_count("num_classes", num_classes))

    @property
    def feature_layers(self) -> FeatureLayers:
        """Where to look inside."""
        maps = ("model.3", "model.5", "model.11", "model.13")
        norms = tuple(f"{path}.4" for path in maps)
        return FeatureLayers(maps, norms, norms, "pool", "fc")

    def forward(self, image: Tensor) -> Tensor:
        """Classify images of any size from 32x32 on; the published network expects 224x224.

        Args:
            image: Shape ``(B, 3, H, W)``.

        Returns:
            Logits, shape ``(B, num_classes)``.

        Raises:
            ValueError: If ``image`` is no such batch.
        """
        check_image(image, MIN_IMAGE_SIZE)
        logits: Tensor = self.fc(self.pool(self.model(image)))
        return logits


def _separable(in_width: int, out_width: int, stride: int) -> nn.Sequential:
    """Filter every channel by itself, then mix them, BatchNorm and ReLU after each."""
    return nn.Sequential(
        *(depthwise3x3(in_width, stride), nn.BatchNorm2d(in_width), nn.ReLU()),
        *(conv1x1(in_width, out_width), nn.BatchNorm2d(out_width), nn.ReLU()),
    )


def mobilenetv1(num_classes: int = 1000) -> MobileNetV1:
    """MobileNetV1 of full width for ImageNet."""
    return MobileNetV1(num_classes)
