"""How a step is computed, as far as that changes its speed and not its meaning."""

from __future__ import annotations

import contextlib
import ctypes
import timeit
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from kdlit.losses.functional import check_one_of

Part = Literal["student", "teacher", "losses"]
Preset = Literal["plain", "exact", "fast"]

_TRIM_ABOVE, _MAPPED = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h

# Exact types: what a subclass does with its groups is unknown.
_FUSIBLE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


@dataclass
class Performance:
    """Options that make a step faster; by default those that leave every number as it is, up to rounding in float32.

    Losses compute in float32 under all of them, and checkpoints and exported students are the same files.

    Args:
        channels_last: lay out the convolutions' weights, and so their features, with the channels innermost. Exact up
            to the order of sums: 1e-6 of the largest logit.
        fold_teacher: make the batch norms of the teacher part of its convolutions, where both are torch's own. Exact up
            to rounding: 1e-5 of the largest logit.
        fused_optimizer: let SGD, Adam and AdamW update all weights in one pass. Exact up to rounding. An
            optimizer whose ``fused`` or ``foreach`` is set stays as it is.
        keep_memory: on a CPU, let the process keep freed memory for its next step instead of giving it back to the
            system (Linux with glibc). Exact.
        teacher_dtype: precision of the teacher; ``float32`` leaves it to the trainer's ``precision``. In ``bfloat16``
            its logits are off by 1 to 3 % of the largest (8 % seen), in ``float16`` by 0.1 %, unless they overflow.
        student_dtype: ``bfloat16`` runs the student's forward and backward passes under autocast, its weights staying
            in float32; ``float32`` leaves that to the trainer's ``precision``, too.
        tf32: whether GPUs may round the factors of float32 products to 10 bits; None leaves it as torch has it (on in
            convolutions, off elsewhere).
        compile: what to compile: any of ``student``, ``teacher`` and ``losses``. Needs a C++ compiler; the first steps
            take up to a minute.
        compile_mode: of :func:`torch.compile`; ``reduce-overhead`` replays CUDA graphs.

    Raises:
        ValueError: If a value is not one of those known.
    """

    channels_last: bool = True
    fold_teacher: bool = True
    fused_optimizer: bool = True
    keep_memory: bool = True
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    student_dtype: Literal["float32", "bfloat16"] = "float32"
    tf32: bool | None = None
    compile: Sequence[Part] = ()
    compile_mode: str | None = None

    def __post_init__(self) -> None:
        check_one_of("teacher_dtype", self.teacher_dtype, ("float32", "bfloat16", "float16"))
        check_one_of("student_dtype", self.student_dtype, ("float32", "bfloat16"))
        for part in self.compile:
            check_one_of("compile", part, ("student", "teacher", "losses"))
        if self.compile_mode is not None and not self.compile:
            raise ValueError("compile_mode says how to compile, but compile names nothing; name student or teacher")

    def begin_step(self) -> None:
        """Let CUDA graphs write over what a step before this one gave, and nothing that this one gives."""
        if self.compile_mode is not None:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def kept(self, value: Tensor) -> Tensor:
        """A value that is still there after the next step, where a CUDA graph may write over it; without a graph."""
        return value.detach() if self.compile_mode is None else value.detach().clone()

    def lay_out(self, network: nn.Module) -> None:
        """Put the weights of a network into the layout asked for."""
        if self.channels_last:
            network.to(memory_format=torch.channels_last)

    def prepare(self, device: torch.device) -> None:
        """Settle what concerns the whole process, before it trains on a device."""
        if device.type == "cpu":
            if self.keep_memory:
                keep_freed_memory()
            if self.student_dtype != "float32":
                warn_if_slower(getattr(torch, self.student_dtype))
        if self.tf32 is not None:
            torch.backends.cudnn.allow_tf32 = self.tf32
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")


_PRESETS: dict[Preset, Performance] = {
    "plain": Performance(channels_last=False, fold_teacher=False, fused_optimizer=False, keep_memory=False),
    "exact": Performance(),
    "fast": Performance(teacher_dtype="bfloat16", student_dtype="bfloat16", tf32=True),
}


def chosen(performance: Performance | Preset) -> Performance:
    """Return the options that a name stands for.

    Raises:
        ValueError: If there is no such name.
    """
    if isinstance(performance, Performance):
        return performance
    check_one_of("performance", performance, tuple(_PRESETS))
    return _PRESETS[performance]


def keep_freed_memory() -> None:
    """Tell the allocator of this process to keep what is freed.

    By itself it gives blocks of 32 MiB and more back to the system at once, and the next ones come as pages that must
    be filled with zeros first: half the time of a step whose features are that large.
    """
    with contextlib.suppress(OSError, AttributeError):  # of a system without glibc
        ctypes.CDLL(None).mallopt(_TRIM_ABOVE, -1)
        ctypes.CDLL(None).mallopt(_MAPPED, 0)


def warn_if_slower(dtype: torch.dtype) -> None:
    """Time a convolution of this CPU in half precision, and say so if float32 is faster."""
    seconds = {}
    for one in (torch.float32, dtype):
        image = torch.ones(16, 64, 16, 16, dtype=one).to(memory_format=torch.channels_last)
        weight = torch.ones(64, 64, 3, 3, dtype=one).to(memory_format=torch.channels_last)
        seconds[one] = min(timeit.repeat(lambda: F.conv2d(image, weight, padding=1), number=1, repeat=5))  # noqa: B023
    if (ratio := seconds[dtype] / seconds[torch.float32]) > 1:
        rank_zero_warn(
            f"this CPU takes {ratio:.1f} times as long for a convolution in {dtype} as in float32: performance 'exact' "
            "is faster here than 'fast'"
        )


def compile_in_place(model: nn.Module, mode: str | None) -> None:
    """Compile a network at its first call; the names of its weights stay."""
    if model._compiled_call_impl is None:
        model.compile(mode=mode)


def fused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let an optimizer update all weights in one pass, if it can and nothing else was said; return it."""
    groups = optimizer.param_groups
    settled = any(group.get(name) for group in groups for name in ("foreach", "differentiable"))
    if type(optimizer) not in _FUSIBLE or settled or any(group.get("fused") is not None for group in groups):
        return optimizer
    try:
        type(optimizer)([{**group, "fused": True} for group in groups], fused=True)  # type: ignore[call-arg]
    except (RuntimeError, TypeError):  # on a device or for numbers that have no such pass
        return optimizer
    for group in (*groups, optimizer.defaults):
        group["fused"] = True
    return optimizer
