"""LightningDataModules."""

from kdlit.data.base import PictureDataModule, PictureDataset, Pictures, SplitDataModule
from kdlit.data.cifar import CIFAR10, CIFAR100
from kdlit.data.digits import DigitPairs
from kdlit.data.download import PublishedDataModule, fetch
from kdlit.data.imagenet import ImageNet
from kdlit.data.inputs import NetworkInput
from kdlit.data.ranking import TeacherConfidence
from kdlit.data.stl10 import STL10
from kdlit.data.tiny_imagenet import TinyImageNet

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "STL10",
    "DigitPairs",
    "ImageNet",
    "NetworkInput",
    "PictureDataModule",
    "PictureDataset",
    "Pictures",
    "PublishedDataModule",
    "SplitDataModule",
    "TeacherConfidence",
    "TinyImageNet",
    "fetch",
]
