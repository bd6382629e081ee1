"""How fast training pictures of CIFAR-100's size come, against the usual pipeline of two workers that use Pillow.

Both in turn, several rounds, medians; pictures are random, as their content does not matter.
"""

from __future__ import annotations

import itertools
import statistics
import time

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from kdlit.data import PictureDataModule, Pictures

BATCH, ROUNDS, SECONDS = 64, 7, 3.0
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


class PerPicture(Dataset):
    def __init__(self, pictures):
        self.image = pictures.image.permute(0, 2, 3, 1).numpy()
        self.target = pictures.target.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self):
        return len(self.image)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.image[index])), self.target[index]


class InMemory(PictureDataModule):
    def load(self):
        self.class_names = [str(label) for label in range(100)]
        draw = np.random.default_rng(0)
        image = torch.from_numpy(draw.integers(0, 256, (50_000, 3, 32, 32), dtype=np.uint8))
        pictures = Pictures(image, torch.arange(50_000) % 100)
        return {"train": pictures, "test": pictures}


def pictures_a_second(batches):
    next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        next(batches)
        count += BATCH
    return count / (time.perf_counter() - start)


def endless(loader):
    return itertools.chain.from_iterable(itertools.repeat(loader))


def main():
    torch.set_num_threads(1)
    data = InMemory(MEAN, STD, batch_size=BATCH)
    data.setup("fit")
    per_picture = PerPicture(data._pictures["train"])
    rates = {"Pillow, 2 workers": [], "kdlit, no worker": []}
    for _ in range(ROUNDS):
        usual = DataLoader(per_picture, BATCH, shuffle=True, num_workers=2)
        rates["Pillow, 2 workers"].append(pictures_a_second(endless(usual)))
        rates["kdlit, no worker"].append(pictures_a_second(endless(data.train_dataloader())))
    for name, values in rates.items():
        print(f"{name}: {statistics.median(values):,.0f} pictures/s")
    ratios = [ours / usual for usual, ours in zip(*rates.values(), strict=True)]
    print(f"ratio: {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    main()
