"""VGG networks with BatchNorm for CIFAR.

Simonyan and Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (arXiv:1409.1556), in
the form of Tian et al. 2020, "Contrastive Representation Distillation" (arXiv:1910.10699): fewer max-pools and one
linear layer as classifier. Parameters are named as in the published weights. The VGGs of torchvision and of most other
CIFAR collections are other networks.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from kdlit.models._common import check_count, check_image, global_pool, init_classifier, init_convs
from kdlit.models.layers import FeatureLayers

WIDTHS = (64, 128, 256, 512, 512)
HEIGHT_OF_FOURTH_POOL = 64  # the published networks pool once more after block3 if, and only if, images are this high


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions, each with BatchNorm and ReLU, and a linear classifier.

    Paths of the published feature maps: ``relu0`` to ``relu4`` (after a block's last ReLU, before pooling) and, pooled,
    ``pool``; before that ReLU they are the outputs of ``block0`` to ``block4``.

    Args:
        convs: Number of convolutions in each of the five blocks.
        widths: Channels of each block.
        num_classes: Size of the classifier.

    Raises:
        ValueError: If ``convs`` or ``widths`` are not five integers >= 1 or ``num_classes`` < 1.
    """

    def __init__(self, convs: Sequence[int], widths: Sequence[int] = WIDTHS, num_classes: int = 100) -> None:
        super().__init__()
        for name, values in (("convs", convs), ("widths", widths)):
            if len(values) != 5:
                raise ValueError(f"{name} must be five integers, one a block, got {values!r}")
            for value in values:
                check_count(name, value)
        for i, ((in_width, out_width), n_convs) in enumerate(zip(pairwise((3, *widths)), convs, strict=True)):
            self.add_module(f"block{i}", _block(in_width, out_width, n_convs))
            self.add_module(f"relu{i}", nn.ReLU())
        self.max_pool = nn.MaxPool2d(2)
        self.pool = global_pool()
        self.classifier = nn.Linear(widths[-1], check_count("num_classes", num_classes))
        init_convs(self)
        init_classifier(self.classifier)

    @property
    def feature_layers(self) -> FeatureLayers:
        """Where to look inside."""
        blocks = [f"block{number}" for number in range(5)]
        norms = tuple(f"{block}.{len(getattr(self, block)) - 1}" for block in blocks[1:])
        return FeatureLayers(tuple(f"relu{number}" for number in range(5)), tuple(blocks), norms, "pool", "classifier")

    def forward(self, image: Tensor) -> Tensor:
        """Classify images of any size from 8x8 on; the published weights expect 32x32 or 64x64.

        Images 64 pixels high, and no others, go through a fourth max-pool, as in the published networks.

        Args:
            image: Shape ``(B, 3, H, W)``.

        Returns:
            Logits, shape ``(B, num_classes)``.

        Raises:
            ValueError: If ``image`` is no such batch, or is 64 pixels high and less than 16 wide.
        """
        n_pools = 4 if image.ndim == 4 and image.shape[2] == HEIGHT_OF_FOURTH_POOL else 3
        check_image(image, 2**n_pools)
        x = image
        for i in range(5):
            x = self.get_submodule(f"relu{i}")(self.get_submodule(f"block{i}")(x))
            if i < n_pools:
                x = self.max_pool(x)
        logits: Tensor = self.classifier(self.pool(x))
        return logits


def _block(in_width: int, out_width: int, n_convs: int) -> nn.Sequential:
    """Convolutions with bias, BatchNorm after each and ReLU between them."""
    layers: list[nn.Module] = []
    for width in (in_width, *[out_width] * (n_convs - 1)):
        layers += [nn.Conv2d(width, out_width, kernel_size=3, padding=1), nn.BatchNorm2d(out_width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def vgg8(num_classes: int = 100) -> VGG:
    """VGG-8: one convolution a block."""
    return VGG((1, 1, 1, 1, 1), num_classes=num_classes)


def vgg11(num_classes: int = 100) -> VGG:
    """VGG-11: 1-1-2-2-2 convolutions."""
    return VGG((1, 1, 2, 2, 2), num_classes=num_classes)


def vgg13(num_classes: int = 100) -> VGG:
    """VGG-13: two convolutions a block."""
    return VGG((2, 2, 2, 2, 2), num_classes=num_classes)


def vgg16(num_classes: int = 100) -> VGG:
    """VGG-16: 2-2-3-3-3 convolutions."""
    return VGG((2, 2, 3, 3, 3), num_classes=num_classes)


def vgg19(num_classes: int = 100) -> VGG:
    """VGG-19: 2-2-4-4-4 convolutions."""
    return VGG((2, 2, 4, 4, 4), num_classes=num_classes)
