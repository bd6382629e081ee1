"""Methods at work without a trainer around them, and pictures in the shape of CIFAR-100."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, pairwise, repeat
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from kdlit import losses, models
from kdlit.benchmark.measure import now
from kdlit.data import PictureDataModule, Pictures
from kdlit.losses import DistillationLoss, WeightedLoss
from kdlit.modules import ClassificationDistillation, ManyStudents
from kdlit.modules.performance import Performance, Preset
from kdlit.types import Batch, ModelOutput

CLASSES = 100
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)

# With weights as published; what is measured does not depend on them.
METHODS: dict[str, Callable[[], dict[str, WeightedLoss | DistillationLoss]]] = {
    "KD": lambda: {"kd": losses.KDLoss()},
    "DKD": lambda: {"dkd": losses.DKDLoss()},
    "NKD": lambda: {"nkd": losses.NKDLoss()},
    "WTTM": lambda: {"wttm": losses.WTTMLoss()},
    "MLKD": lambda: {"mlkd": losses.MLKDTwoViewLoss()},
    "KD, standardised": lambda: {"kd": losses.LogitStandardization(losses.KDLoss())},
    "RLD": lambda: {"rld": losses.RLDLoss()},
    "CTKD": lambda: {"kd": losses.GlobalTemperature(losses.KDLoss())},
    "DIST": lambda: {"dist": losses.DISTLoss()},
    "FitNet": lambda: {"fitnet": WeightedLoss(losses.FitNetLoss(), 100.0)},
    "AT": lambda: {"at": WeightedLoss(losses.ATLoss(), 1000.0)},
    "VID": lambda: {"vid": losses.VIDLoss()},
    "RKD": lambda: {"rkd": losses.RKDLoss()},
    "CC": lambda: {"cc": WeightedLoss(losses.CCLoss(), 0.02)},
    "SP": lambda: {"sp": WeightedLoss(losses.SPLoss(), 3000.0)},
    "NST": lambda: {"nst": WeightedLoss(losses.NSTLoss(), 50.0)},
    "PKT": lambda: {"pkt": WeightedLoss(losses.PKTLoss(), 30000.0)},
    "CRD": lambda: {"crd": WeightedLoss(losses.CRDLoss(), 0.8)},
    "OFD": lambda: {"ofd": WeightedLoss(losses.OFDLoss(), 0.001)},
    "ReviewKD": lambda: {"reviewkd": losses.ReviewKDLoss()},
    "SimKD": lambda: {"simkd": losses.SimKDLoss()},
    "CAT-KD": lambda: {"catkd": losses.CATKDLoss()},
    "ITRD": lambda: {"itrd": losses.ITRDLoss()},
    "SRRL": lambda: {"srrl": losses.SRRLLoss()},
    "WTTM + CRD": lambda: {"wttm": losses.WTTMLoss(), "crd": WeightedLoss(losses.CRDLoss(), 0.8)},
}


class RandomPictures(PictureDataModule):
    """Random pictures with random labels in the shape of CIFAR-100; what they show does not change what they cost.

    Args:
        num_samples: training pictures.
        **kwargs: of :class:`~kdlit.data.PictureDataModule`.
    """

    def __init__(self, num_samples: int, **kwargs: Any) -> None:
        super().__init__(MEAN, STD, **kwargs)
        self.num_samples = num_samples

    def load(self) -> dict[str, Pictures]:
        """Draw the pictures."""
        self.class_names = [str(label) for label in range(CLASSES)]
        draw = np.random.default_rng(0)
        image = torch.from_numpy(draw.integers(0, 256, (self.num_samples, 3, 32, 32), dtype=np.uint8))
        pictures = Pictures(image, torch.arange(self.num_samples) % CLASSES)
        return {"train": pictures, "test": pictures}


class OneByOne(Dataset[dict[str, Any]]):
    """The usual pipeline: Pillow and torchvision's transforms, one picture after the other.

    Args:
        pictures: the pictures.
        strong_view: whether to add a strongly augmented view.
    """

    def __init__(self, pictures: Pictures, strong_view: bool = False) -> None:
        self.image = pictures.image.permute(0, 2, 3, 1).numpy()
        self.target = pictures.target.tolist()
        weak = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        finish = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        self.views = {"image": transforms.Compose([*weak, *finish])}
        if strong_view:
            self.views["image_strong"] = transforms.Compose([*weak, transforms.RandAugment(2, 10), *finish])

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One picture in all its views, its label and its position."""
        picture = Image.fromarray(self.image[index])
        views = {name: view(picture) for name, view in self.views.items()}
        return {**views, "target": self.target[index], "index": index}


def one_by_one(data: RandomPictures, num_workers: int = 0) -> DataLoader[Any]:
    """A loader of the usual pipeline over the training pictures of ``data``."""
    return DataLoader(
        OneByOne(data.load()["train"], data.strong_view),
        data.batch_size,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def endless(loader: DataLoader[Any], device: torch.device) -> Iterator[Batch]:
    """Batches on the device, epoch after epoch."""
    for batch in chain.from_iterable(repeat(loader)):
        yield cast("Batch", {name: value.to(device, non_blocking=True) for name, value in batch.items()})


def make_module(
    teacher: nn.Module, student: str, method: str, performance: Performance | Preset = "exact"
) -> ClassificationDistillation:
    """A module with cross-entropy and one of :data:`METHODS`.

    The learning rate is too low to get anywhere, so that random labels do no harm.

    Args:
        teacher: the network.
        student: name of a network in :mod:`kdlit.models`.
        method: name in :data:`METHODS`.
        performance: as of the module.
    """
    terms = METHODS[method]()
    if "simkd" not in terms:  # which is trained by its own loss alone
        terms = {"ce": losses.CrossEntropyLoss(), **terms}
    optimizer = partial(torch.optim.SGD, lr=1e-4, momentum=0.9, weight_decay=5e-4)
    network = getattr(models, student)()
    return ClassificationDistillation(network, terms, teacher, optimizer, performance=performance)


def _ignore(part: str) -> None:
    pass


class Training:
    """One method at work, step by step and without a loop around it; steps are those of a fit.

    Args:
        teacher: name of a network in :mod:`kdlit.models`.
        student: likewise.
        method: name in :data:`METHODS`.
        data: what is trained on, set up.
        device: where to run.
        performance: as of the module.
        students: how many are trained at once.

    Attributes:
        module: what is trained.
        extra_parameters: how many parameters are trained beside the student's.
        needs_teacher_features: whether the teacher must run even where its logits are known.
    """

    def __init__(
        self,
        teacher: str,
        student: str,
        method: str,
        data: RandomPictures,
        device: torch.device,
        performance: Performance | Preset = "exact",
        students: int = 1,
    ) -> None:
        network = getattr(models, teacher)()
        modules = [make_module(network, student, method, performance) for _ in range(students)]
        self._lap: Callable[[str], None] = _ignore
        for one in modules:
            self._watch(one)
        self.module: L.LightningModule = modules[0]
        if students > 1:
            self.module = ManyStudents({str(number): one for number, one in enumerate(modules)})
        self.module.to(device).train()
        self.module.trainer = quiet_trainer(device)
        self.module.trainer.datamodule = data  # type: ignore[attr-defined]
        self.module.setup("fit")
        found: Any = self.module.configure_optimizers()
        self.optimizer: torch.optim.Optimizer = found[0][0] if isinstance(found, tuple) else found
        trained = sum(parameter.numel() for group in self.optimizer.param_groups for parameter in group["params"])
        self.extra_parameters = trained - students * sum(p.numel() for p in getattr(models, student)().parameters())
        self.needs_teacher_features = any(term.teacher_layers for term in modules[0]._terms().values())

    def step(self, batch: Batch, lap: Callable[[str], None] = _ignore) -> None:
        """Both forward passes, all losses, the backward pass, one step of the optimizer.

        Args:
            batch: on the device.
            lap: called with ``teacher``, ``student``, ``losses`` or ``optimizer`` when a piece of that part is done.
        """
        self._lap = lap
        self.module.on_train_batch_start(batch, 1)
        outputs: Any = self.module.training_step(batch, 1)  # step 0 also writes to the progress bar
        lap("losses")
        self.optimizer.zero_grad()
        lap("optimizer")
        outputs["loss"].backward()
        lap("student")
        self.optimizer.step()
        lap("optimizer")
        self.module.on_train_batch_end(outputs, batch, 1)
        lap("losses")

    def run(self, batches: Iterator[Batch], steps: int) -> None:
        """So many steps."""
        for _ in range(steps):
            self.step(next(batches))

    def _watch(self, module: ClassificationDistillation) -> None:
        """Tell where the teacher and the student end, and where on the way back losses and student begin."""
        run_teacher, run_student, distil = module.run_teacher, module.run_student, module.distil

        def watched_teacher(batch: Batch) -> ModelOutput:
            self._lap("losses")  # of the student before this one
            output = run_teacher(batch)
            self._lap("teacher")
            return output

        def watched_student(batch: Batch) -> ModelOutput:
            output = run_student(batch)
            self._lap("student")
            pending = [output.logits, output.logits_strong, *output.features.values()]

            def reached(_: Tensor) -> None:
                if pending:
                    pending.clear()
                    self._lap("losses")

            # Backward goes from late to early nodes of the graph: all of the losses comes before any of the student.
            for tensor in pending:
                if tensor is not None and tensor.requires_grad:
                    tensor.register_hook(reached)  # type: ignore[no-untyped-call]
            return output

        def watched_distil(batch: Batch, teacher: ModelOutput) -> dict[str, Any]:
            outputs = distil(batch, teacher)
            outputs["loss"].register_hook(lambda _: self._lap("student"))
            return outputs

        module.run_teacher = watched_teacher  # type: ignore[method-assign]
        module.run_student = watched_student  # type: ignore[method-assign]
        module.distil = watched_distil  # type: ignore[method-assign]


def quiet_trainer(device: torch.device, **settings: Any) -> L.Trainer:
    """A trainer on one device that says and writes nothing, but for what ``settings`` add."""
    nothing = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    kind = "gpu" if device.type == "cuda" else device.type
    return L.Trainer(**{"accelerator": kind, "devices": 1, **dict.fromkeys(nothing, False), **settings})


def set_tf32(wanted: bool | None) -> None:
    """Set what torch keeps for the whole process as ``performance.tf32`` has it; None is torch's default."""
    torch.backends.cudnn.allow_tf32 = wanted is not False
    torch.set_float32_matmul_precision("high" if wanted else "highest")


class EpochClock(L.Callback):
    """Notes when each epoch of a fit starts, and when the last one has ended.

    Attributes:
        moments: in seconds.
    """

    def __init__(self) -> None:
        self.moments: list[float] = []

    @property
    def seconds(self) -> list[float]:
        """What each epoch took, with all that belongs to its end."""
        return [end - start for start, end in pairwise(self.moments)]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the time."""
        self.moments.append(now(trainer.strategy.root_device))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the time."""
        self.moments.append(now(trainer.strategy.root_device))
