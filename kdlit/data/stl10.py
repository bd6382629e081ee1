"""STL-10, or any pictures in its file layout (Coates et al. 2011)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torchvision

from kdlit.data.base import Pictures
from kdlit.data.download import Archive, PublishedDataModule

_SIDE = 96


class STL10(PublishedDataModule):
    """STL-10 from its published files, or your own 96x96 pictures in the same layout.

    Reads ``<root>/stl10_binary/{train_X.bin,train_y.bin,test_X.bin,test_y.bin,class_names.txt}``: 5,000 training and
    8,000 test pictures of 10 classes. The pictures without labels and the folds are not used.

    Args:
        root: folder that holds ``stl10_binary``; relative to the working directory.
        download: fetch and unpack the published archive if the folder is not there; needs 6 GB.
        verify: compare the files with the md5 sums of the published ones; false for your own pictures in this layout.
        mean: mean of each channel, for pictures scaled to 0..1; by default the usual values.
        std: standard deviation of each channel, likewise.
        **kwargs: of :class:`~kdlit.data.PictureDataModule`: size, splits, augmentation and batches.

    Raises:
        FileNotFoundError: If a file is missing and ``download`` is false.
    """

    _published = torchvision.datasets.STL10
    archive = Archive("STL-10", _published.url, _published.tgz_md5, _published.base_folder, "2.6 GB")
    files: ClassVar = {
        **{name: md5 for name, md5 in [*_published.train_list, *_published.test_list] if name != "unlabeled_X.bin"},
        _published.class_names_file: None,
    }

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        verify: bool = True,
        mean: Sequence[float] = (0.4467, 0.4398, 0.4066),
        std: Sequence[float] = (0.2603, 0.2566, 0.2713),
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, download=download, verify=verify, mean=mean, std=std, **kwargs)

    def load(self) -> dict[str, Pictures]:
        """Read all files; labels 1, 2, ... become 0, 1, ...

        Raises:
            FileNotFoundError: If one is missing.
            ValueError: If one cannot be read, is not the published one (with ``verify``) or holds something else.
        """
        self.check_folder()
        self.class_names = self.read("class_names.txt").decode(errors="replace").split()
        return {split: self._split(split) for split in ("train", "test")}

    def _split(self, split: str) -> Pictures:
        name, one = f"{split}_X.bin", 3 * _SIDE * _SIDE
        raw = np.frombuffer(self.read(name), dtype=np.uint8)
        if len(raw) == 0 or len(raw) % one:
            raise ValueError(
                f"{(self.folder / name).absolute()} has {len(raw)} bytes, but must have {one} (3x{_SIDE}x{_SIDE}) for "
                "each picture; it is cut short or another file: unpack it again"
            )
        columns_first = raw.reshape(-1, 3, _SIDE, _SIDE)
        labels = np.frombuffer(self.read(f"{split}_y.bin"), dtype=np.uint8)
        return self.pictures_of(f"{split}_y.bin", columns_first.transpose(0, 1, 3, 2), labels, first=1)
