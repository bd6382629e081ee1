"""LightningDataModules."""

from kdlit.data.base import PictureDataModule, PictureDataset, Pictures
from kdlit.data.cifar import CIFAR100
from kdlit.data.digits import DigitPairs

__all__ = ["CIFAR100", "DigitPairs", "PictureDataModule", "PictureDataset", "Pictures"]
