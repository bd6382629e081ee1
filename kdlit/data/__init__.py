"""LightningDataModules."""

from kdlit.data.base import PictureDataModule, PictureDataset, Pictures, SplitDataModule
from kdlit.data.cifar import CIFAR100
from kdlit.data.digits import DigitPairs
from kdlit.data.imagenet import ImageNet

__all__ = ["CIFAR100", "DigitPairs", "ImageNet", "PictureDataModule", "PictureDataset", "Pictures", "SplitDataModule"]
