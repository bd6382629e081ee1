r"""What all processes of a distributed run saw, put together as if one process had seen the whole batch.

Each of :math:`W` processes computes the same loss :math:`L` of all outputs :math:`z_1, \dots, z_W`, of which only its
own, :math:`z_r`, has a graph there. DDP takes the mean of the processes' gradients. So the backward pass gives a
process's own outputs :math:`W \, \partial L / \partial z_r`: the mean is then :math:`\sum_r J_r^\top \partial L /
\partial z_r`, the student's gradient of the whole batch. Parameters of the loss itself get the same gradient in all
processes, which the mean leaves as it is.

Samples come in the order in which :class:`~torch.utils.data.DistributedSampler` deals them out: the first of every
process, the second of every process, and so on. Batches may differ in size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from kdlit.types import Batch, ModelOutput

PICTURES = ("image", "teacher_logits")  # how the keys begin of what the networks were given


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def of_all_processes(*own: Tensor) -> tuple[Tensor, ...]:
    """What all processes have of some tensors, shape ``(B, ...)`` each with one ``B``; without a graph.

    For memories that are to be the same everywhere. What has been put together before may be again: each sample is then
    there several times.
    """
    if process_count() == 1:
        return own
    sizes = _sizes(own[0])
    return tuple(_together(one.detach(), sizes) for one in own)


def gathered(
    student: ModelOutput,
    teacher: ModelOutput | None,
    batch: Batch,
    *,
    student_layers: Sequence[str],
    teacher_layers: Sequence[str],
    pictures: bool,
) -> tuple[ModelOutput, ModelOutput, Batch]:
    """Outputs and batches of all processes; gradients flow back as the head of this file says.

    Args:
        student: of this process.
        teacher: of this process; None where nobody reads it.
        batch: of this process. What is not one entry a sample stays its own.
        student_layers: features that are put together; others are left out.
        teacher_layers: likewise of the teacher.
        pictures: whether the pictures are put together as well, and what is known of them beforehand; or else left out.
    """
    sizes = _sizes(student.logits)
    kept = {key: value for key, value in sorted(batch.items()) if pictures or not key.startswith(PICTURES)}
    for key, value in kept.items():
        if isinstance(value, Tensor) and value.shape[:1] == student.logits.shape[:1]:
            kept[key] = _together(value, sizes)
    return (
        _output(student, student_layers, sizes),
        cast("ModelOutput", None if teacher is None else _output(teacher, teacher_layers, sizes)),
        cast("Batch", kept),
    )


def _output(own: ModelOutput, layers: Sequence[str], sizes: Sequence[int]) -> ModelOutput:
    return ModelOutput(
        _together(own.logits, sizes),
        {path: _together(own.features[path], sizes) for path in dict.fromkeys(layers)},
        None if own.logits_strong is None else _together(own.logits_strong, sizes),
    )


def _sizes(own: Tensor) -> list[int]:
    sizes: list[int] = _Together.apply(torch.tensor([len(own)], device=own.device)).flatten().tolist()
    return sizes


def _together(own: Tensor, sizes: Sequence[int]) -> Tensor:
    largest = max(sizes)
    padded = torch.cat([own, own.new_zeros(largest - len(own), *own.shape[1:])]) if len(own) < largest else own
    whole: Tensor = _Together.apply(padded).flatten(0, 1)
    if min(sizes) == largest:
        return whole
    there = torch.arange(largest)[:, None] < torch.tensor(sizes)
    return whole[there.flatten().to(whole.device)]


class _Together(torch.autograd.Function):
    """From shape ``(B, ...)`` on each process to ``(B, processes, ...)``."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        own = own.contiguous()
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        return torch.stack(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return dist.get_world_size() * grad_outputs[0][:, dist.get_rank()]
