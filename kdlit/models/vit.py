"""Vision transformers of timm, which an extra of the package brings: ``pip install "kdlit[timm]"``.

DeiT: Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention"
(arXiv:2012.12877). DeiT III: Touvron et al. 2022, "DeiT III: Revenge of the ViT" (arXiv:2204.07118). PiT: Heo et al.
2021, "Rethinking Spatial Dimensions of Vision Transformers" (arXiv:2103.16302).

``deit_tiny`` and ``deit3_small`` are the ImageNet networks of WTTM (Zheng and Yang 2024, table 13), with 1000 classes
unless told otherwise; ``deit_tiny_distilled`` and ``pit_tiny`` are students of LSKD (Sun et al. 2024) on CIFAR-100 at
224x224, with 100. All take ``image_size``, height and width of the pictures; ``drop_path``, the probability that a
branch of the last block is left out for a picture in training, which rises evenly from 0; and ``pretrained``, whether
to download the ImageNet weights that timm names (for other class counts, without classifier).
"""

from torch import nn

from kdlit.models._common import check_count
from kdlit.models._transformer import check_drop_path


def deit_tiny(
    num_classes: int = 1000, image_size: int = 224, drop_path: float = 0.1, pretrained: bool = False
) -> nn.Module:
    """DeiT-Tiny without distillation token: 12 blocks of width 192 on patches of 16x16.

    Paths of feature maps, of shape ``(B, N, C)`` with the class token first: ``blocks.0``, ``blocks.6``, ``blocks.11``
    and, normalised, ``norm``.
    """
    return _create("deit_tiny_patch16_224.fb_in1k", num_classes, image_size, drop_path, pretrained)


def deit_tiny_distilled(
    num_classes: int = 100, image_size: int = 224, drop_path: float = 0.1, pretrained: bool = False
) -> nn.Module:
    """DeiT-Tiny with a distillation token and a head of its own; gives the mean of the logits of both heads.

    Paths of feature maps, of shape ``(B, N, C)`` with the two tokens first: ``blocks.0``, ``blocks.6``, ``blocks.11``
    and, normalised, ``norm``. The logits of each head: ``head`` and ``head_dist``.
    """
    return _create("deit_tiny_distilled_patch16_224.fb_in1k", num_classes, image_size, drop_path, pretrained)


def deit3_small(
    num_classes: int = 1000, image_size: int = 224, drop_path: float = 0.0, pretrained: bool = False
) -> nn.Module:
    """DeiT III-Small: 12 blocks of width 384; its pretrained weights are those from ImageNet-21k, a teacher's.

    Paths of feature maps, of shape ``(B, N, C)`` with the class token first: ``blocks.0``, ``blocks.6``, ``blocks.11``
    and, normalised, ``norm``.
    """
    return _create("deit3_small_patch16_224.fb_in22k_ft_in1k", num_classes, image_size, drop_path, pretrained)


def pit_tiny(
    num_classes: int = 100, image_size: int = 224, drop_path: float = 0.1, pretrained: bool = False
) -> nn.Module:
    """PiT-Tiny without distillation token: 2, 6 and 4 blocks of widths 64, 128 and 256, pooled in between.

    Paths of feature maps, of shape ``(B, N, C)`` with the class token first: ``transformers.0.blocks``,
    ``transformers.1.blocks``, ``transformers.2.blocks`` and, the class token alone and normalised, ``norm``.
    """
    return _create("pit_ti_224.in1k", num_classes, image_size, drop_path, pretrained)


def _create(name: str, num_classes: int, image_size: int, drop_path: float, pretrained: bool) -> nn.Module:
    """Build a network of timm.

    Raises:
        ValueError: If ``num_classes``, ``image_size`` or ``drop_path`` is out of range.
        ImportError: If timm is not installed.
    """
    check_count("num_classes", num_classes)
    if check_count("image_size", image_size) < 16:
        raise ValueError(f"image_size must be at least 16, the size of a patch, got {image_size}")
    check_drop_path(drop_path)
    try:
        import timm
    except ImportError:
        raise ImportError(f'{name} is a network of timm, which is missing: pip install "kdlit[timm]"') from None
    return timm.create_model(
        name, pretrained=pretrained, num_classes=num_classes, img_size=image_size, drop_path_rate=drop_path
    )
