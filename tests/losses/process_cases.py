"""Every loss on a small student, in one process or in each of two; kept apart, so that processes start quickly."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdlit import losses as kd
from kdlit.losses import DistillationLoss, WeightedLoss
from kdlit.models.features import FeatureTap
from kdlit.modules import ClassificationDistillation, ManyStudents
from kdlit.types import Batch, ModelOutput
from tests.conftest import TinyData, TinyNet

BATCH, CLASSES, SAMPLES = 8, 5, 24
EXAMPLE = torch.zeros(1, 3, 8, 8)
MAPS = {"student_layers": ["act1", "act2"], "teacher_layers": ["act1", "act2"]}
LAST_MAP = {"student_layers": "act2", "teacher_layers": "act2"}
POOLED = {"student_layers": "pool", "teacher_layers": "pool"}


class Tokens(nn.Module):
    """A map as tokens, ``(B, N, C)``."""

    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(2).mT


class Net(nn.Module):
    """Two convolutions and a head, with layers of every kind; batch norms in the teacher only."""

    def __init__(self, width: int, norm: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.norm1, self.act1 = norm(width), nn.ReLU()
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.norm2, self.act2 = norm(2 * width), nn.ReLU()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.tokens1, self.tokens2 = Tokens(), Tokens()
        self.fc = nn.Linear(2 * width, CLASSES)
        self.second_head = nn.Linear(2 * width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        first = self.act1(self.norm1(self.conv1(image)))
        last = self.act2(self.norm2(self.conv2(first)))
        self.tokens1(first), self.tokens2(last)
        pooled = self.pool(last)
        self.second_head(pooled)
        return self.fc(pooled)


def _crd() -> DistillationLoss:
    return kd.CRDLoss(**POOLED, feat_dim=6, negatives=4, num_samples=SAMPLES)


def _vitkd(ratio: float) -> DistillationLoss:
    layers = ["tokens1", "tokens2"]
    return kd.ViTKDLoss(layers, layers, alpha=1.0, beta=1.0, mask_ratio=ratio)


# Means over samples: several processes are as good as one.
MEANS: dict[str, Callable[[], DistillationLoss]] = {
    "ATLoss": lambda: kd.ATLoss(**MAPS),
    "CATKDLoss": lambda: kd.CATKDLoss(**LAST_MAP, student_classifier="fc", teacher_classifier="fc"),
    "CRLDLoss": lambda: kd.CRLDLoss(weak_threshold=0.25, strong_threshold=0.25),
    "CrossEntropyLoss": lambda: kd.CrossEntropyLoss(label_smoothing=0.1),
    "DKDLoss": kd.DKDLoss,
    "DMLLoss": kd.DMLLoss,
    "EntropyWeighting": lambda: kd.EntropyWeighting(kd.KDLoss()),
    "GlobalTemperature": lambda: kd.GlobalTemperature(kd.KDLoss()),
    "InstanceTemperature": lambda: kd.InstanceTemperature(kd.KDLoss(), hidden=4),
    "KDLoss": kd.KDLoss,
    "LALoss": kd.LALoss,
    "LogitStandardization": lambda: kd.LogitStandardization(kd.KDLoss()),
    "NKDLoss": kd.NKDLoss,
    "NSTLoss": lambda: kd.NSTLoss(**MAPS),
    "OnHead": lambda: kd.OnHead(kd.KDLoss(), "second_head"),
    "RCLoss": kd.RCLoss,
    "RLDLoss": kd.RLDLoss,
    "RenyiEntropyLoss": kd.RenyiEntropyLoss,
    "SimKDLoss": lambda: kd.SimKDLoss(**LAST_MAP, teacher_classifier="fc"),  # the batch norms are the student's
    "TTMLoss": kd.TTMLoss,
    "VIDLoss": lambda: kd.VIDLoss(**MAPS),
    "ViTKDLoss": lambda: _vitkd(1.0),  # all tokens: nothing is drawn
    "WKDLoss": kd.WKDLoss,
    "WTTMLoss": kd.WTTMLoss,
}
# Not so: samples have a say in each other's terms, by the formula,
ACROSS: dict[str, Callable[[], DistillationLoss]] = {
    "CCLoss": lambda: kd.CCLoss(**POOLED, feat_dim=6),
    "DISTLoss": kd.DISTLoss,
    "ITRDLoss": lambda: kd.ITRDLoss(**POOLED),
    "LRLoss": kd.LRLoss,
    "MLKDLoss": kd.MLKDLoss,
    "MLKDSingleViewLoss": kd.MLKDSingleViewLoss,
    "MLKDTwoViewLoss": kd.MLKDTwoViewLoss,
    "PKTLoss": lambda: kd.PKTLoss(**POOLED),
    "RKDLoss": lambda: kd.RKDLoss(**POOLED),
    "SPLoss": lambda: kd.SPLoss(**LAST_MAP),
    "TeacherRightCrossEntropyLoss": kd.TeacherRightCrossEntropyLoss,
    # by a memory,
    "AutoBetaDKDLoss": lambda: kd.AutoBetaDKDLoss(offset=-5.0),
    "CRDLoss": _crd,
    "ConfidenceSelection": lambda: kd.ConfidenceSelection(kd.KDLoss(), num_samples=SAMPLES),
    # or by a batch norm in a connector.
    "FitNetLoss": lambda: kd.FitNetLoss(**LAST_MAP),
    "OFDLoss": lambda: kd.OFDLoss("conv2", "norm2"),
    "ReviewKDLoss": lambda: kd.ReviewKDLoss(["conv1", "conv2", "pool"], ["norm1", "norm2", "pool"]),
    "SRRLLoss": lambda: kd.SRRLLoss(**LAST_MAP, teacher_classifier="fc"),
}
# What is exact only where all processes see the whole batch, because they draw random numbers.
DRAWING: dict[str, Callable[[], DistillationLoss]] = {"ViTKDLoss, half of the tokens": lambda: _vitkd(0.5)}
CASES = MEANS | ACROSS | DRAWING
MEMORIES = ("AutoBetaDKDLoss", "CRDLoss", "ConfidenceSelection")
UNEQUAL = ("CCLoss", "CRDLoss", "FitNetLoss", "GlobalTemperature")


class Step(nn.Module):
    """A student and a loss as DDP sees them inside the module that trains."""

    def __init__(self, name: str, gather: bool) -> None:
        super().__init__()
        teacher, student = make_teacher(), Net(4)
        self.term = WeightedLoss(CASES[name](), gather=gather)
        self.student = self.term.extend_student(student, teacher, EXAMPLE)
        self.term.setup(self.student, teacher, EXAMPLE)
        self.term.on_fit_start(torch.arange(SAMPLES) % CLASSES)
        self.taps = [FeatureTap(self.student, self.term.student_layers), FeatureTap(teacher, self.term.teacher_layers)]
        self.teacher = (teacher.double().eval(),)  # in a tuple, so that DDP does not see it
        self.double()
        self.student.eval()  # for the batch norms of SimKD's student, which trainer.sync_batchnorm would be for

    def forward(self, batch: Batch) -> Tensor:
        self.seen = self._run(self.student, 0, batch), self._run(self.teacher[0], 1, batch).detach(), batch
        loss: Tensor = self.term(*self.seen)
        return loss

    def _run(self, net: nn.Module, role: int, batch: Batch) -> ModelOutput:
        strong = net(batch["image_strong"])
        return ModelOutput(net(batch["image"]), self.taps[role].take(), strong)

    def finish(self) -> None:
        student, teacher, batch = self.seen
        self.term.on_train_batch_end(student.detach(), teacher, batch)


def make_teacher() -> Net:
    """A network that is sure of what it says, the same at every call; leaves the generator in the same state."""
    torch.manual_seed(0)
    teacher = Net(6, nn.BatchNorm2d)
    for parameter in (teacher.norm1.bias, teacher.norm2.bias):
        nn.init.normal_(parameter)
    with torch.no_grad():
        teacher.fc.weight *= 10
    return teacher


@functools.cache
def batches() -> list[Batch]:
    """Whole batches; the teacher is right of more samples that one process gets than of those that the other gets."""
    teacher, generator = make_teacher().double().eval(), torch.Generator().manual_seed(3)
    found: list[Batch] = []
    for index in torch.randperm(SAMPLES, generator=generator).split(BATCH):
        image, strong = torch.randn(2, BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
        target = teacher(image).argmax(1)
        target[1:5] = (target[1:5] + 1) % CLASSES
        target[7] = (target[7] + 2) % CLASSES
        found.append({"image": image, "image_strong": strong, "target": target, "index": index})
    return found


def share(batch: Batch, rank: int | None, sizes: tuple[int, int]) -> Batch:
    """What one of two processes gets of a whole batch, dealt out in turns as long as both get more; None for all."""
    turns = [rank for turn in range(max(sizes)) for rank, size in enumerate(sizes) if turn < size]
    kept = [place for place, whose in enumerate(turns) if rank in (None, whose)]
    return {key: value[kept] for key, value in batch.items()}  # type: ignore[index, return-value]


def train(
    name: str, gather: bool, rank: int | None, sizes: tuple[int, int] = (BATCH // 2, BATCH // 2)
) -> dict[str, Tensor]:
    """All gradients of all steps and what is left in the buffers, of one of two processes or of the only one."""
    step = Step(name, gather)
    wrapped = step if rank is None else nn.parallel.DistributedDataParallel(step, find_unused_parameters=True)
    optimizer = torch.optim.SGD(step.parameters(), lr=0.01)
    found: dict[str, Tensor] = {}
    for number, batch in enumerate(batches()):
        torch.manual_seed(number)
        optimizer.zero_grad()
        wrapped(share(batch, rank, sizes)).backward()
        found |= {f"{number} {key}": p.grad.clone() for key, p in step.named_parameters() if p.grad is not None}
        optimizer.step()
        step.finish()
    return found | {f"buffer {key}": buffer.clone() for key, buffer in step.term.named_buffers()}


# What a loss is given


class Spy(DistillationLoss):
    """Reads the maps, the labels and, if that is asked for, the pictures; notes all it gets."""

    student_layers = teacher_layers = ("act1",)

    def __init__(self, reads_image: bool) -> None:
        super().__init__()
        self.reads_image = reads_image
        self.notes: list[dict[str, list[int]]] = []

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Note the shapes."""
        parts = {**batch, "student": student.logits, "teacher": teacher.logits, "strong": student.logits_strong}
        parts |= {f"student.{path}": value for path, value in student.features.items()}
        parts |= {f"teacher.{path}": value for path, value in teacher.features.items()}
        self.notes.append({key: list(value.shape) for key, value in parts.items() if isinstance(value, Tensor)})
        return student.logits.mean()

    def on_train_batch_end(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> None:
        """Note them again."""
        self(student, teacher, batch)


def look(rank: int) -> list[dict[str, list[int]]]:
    """What a loss without and one with pictures is given, in a step and after it."""
    notes = []
    batch = share(batches()[0], rank, (5, 3))
    batch["note"] = torch.tensor(7)  # type: ignore[typeddict-unknown-key]
    net = Net(4).double()
    tap = FeatureTap(net, ["act1", "act2"])
    output = ModelOutput(net(batch["image"]), tap.take(), net(batch["image"]))
    for reads_image in (False, True):
        spy = Spy(reads_image)
        term = WeightedLoss(kd.LogitStandardization(spy), gather=True)
        term(output, output.detach(), batch)
        term.on_train_batch_end(output.detach(), output.detach(), batch)
        notes += spy.notes
    return notes


# A whole run


class Plain(TinyNet):
    """No batch norm, so that batches of half the size are the same."""

    def __init__(self, width: int) -> None:
        super().__init__(width=width)
        self.bn = nn.Identity()  # type: ignore[assignment]


def distiller(gather: bool) -> ClassificationDistillation:
    """A student with terms of every kind: a mean, one across the batch, one with a batch norm, one with a memory."""
    torch.manual_seed(0)
    losses = {
        "ce": kd.CrossEntropyLoss(),
        "dist": WeightedLoss(kd.DISTLoss(), gather=gather),
        "fitnet": WeightedLoss(kd.FitNetLoss("stem", "stem"), gather=gather),
        "auto": WeightedLoss(kd.AutoBetaDKDLoss(offset=0.0), weight=0.5, warmup_epochs=2, gather=gather),
    }
    return ClassificationDistillation(Plain(8), losses, Plain(12), input_size=(3, 8, 8))


def fit(module: L.LightningModule, folder: str, processes: int) -> None:
    """Two epochs of four steps."""
    data = TinyData(batch_size=16 // processes)
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = L.Trainer(
        accelerator="cpu", strategy="ddp" if processes > 1 else "auto", devices=processes, max_epochs=2,
        precision="64-true", enable_model_summary=False, limit_val_batches=0, default_root_dir=folder, **quiet,
    )  # fmt: skip
    trainer.fit(module, data)
    assert trainer.global_step == 8


def process(rank: int, folder: str) -> None:
    """One of two: all cases without and with gather, then a whole run of students without and with it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["LOCAL_RANK"] = str(rank)  # for Lightning: the other process is there already
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        found: dict[Any, Any] = {
            (name, gather): train(name, gather, rank) for name in CASES for gather in (False, True)
        }
        found["unequal"] = {name: train(name, True, rank, (5, 3)) for name in UNEQUAL}
        found["look"] = look(rank)
        many = ManyStudents({"own": distiller(False), "all": distiller(True)})
        fit(many, folder, 2)
        found["run"] = {name: module.state_dict() for name, module in many.students.items()}
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
