"""What each process of the distributed test of CRD does; kept apart, so that processes start quickly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdlit.losses.crd import CRDLoss
from kdlit.types import ModelOutput

SIZE, WIDTH = 20, 5
SPLITS = ([5, 3], [2, 6], [4, 4], [4, 4])  # samples of each process, step by step; while equal, the embeddings train


class Step(nn.Module):
    """A loss as DDP sees it inside the module that trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loss = CRDLoss("feat", "feat", feat_dim=6, negatives=4)
        self.loss.student_layers = self.loss.teacher_layers = ("feat",)
        self.loss.build([(1, WIDTH)], [(1, WIDTH)])
        self.loss.on_fit_start(torch.arange(SIZE) % 4)
        self.given = torch.empty(0)
        self.loss.contrast = lambda index: self.given  # type: ignore[method-assign]
        self.double()

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor, contrast_index: Tensor) -> Tensor:
        self.given = contrast_index
        return self.loss(
            ModelOutput(student, {"feat": student}), ModelOutput(teacher, {"feat": teacher}), {"index": index}
        )


def batches() -> list[list[Tensor]]:
    """Whole batches: features of both networks, indices (one twice, in both halves) and what they are contrasted with."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in SPLITS:
        index = torch.randperm(SIZE, generator=generator)[:8]
        index[-1] = index[0]
        contrast = torch.randint(SIZE, (8, 5), generator=generator)
        contrast[:, 0] = index
        student, teacher = torch.randn(2, 8, WIDTH, generator=generator, dtype=torch.float64)
        made.append([student, teacher, index, contrast])
    return made


def train(step: nn.Module, loss: CRDLoss, rank: int | None) -> dict[str, Any]:
    """All steps of one process, or of the only one; return what is left."""
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    for batch, split in zip(batches(), SPLITS, strict=True):
        mine = batch if rank is None else [one.split(split)[rank] for one in batch]
        step(*mine).backward()
        if len(set(split)) == 1:
            optimizer.step()
        optimizer.zero_grad()
        loss.on_train_batch_end(None, None, None)  # type: ignore[arg-type]
    return {name: value.clone() for name, value in loss.state_dict().items()}


def process(rank: int, folder: str) -> None:
    """One of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        step = Step()
        torch.save(train(nn.parallel.DistributedDataParallel(step), step.loss, rank), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
