"""Notices what is not finite in a step, and a teacher that says the same of all pictures."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from kdlit.losses import functional
from kdlit.types import Batch, ModelOutput

NonFinite = Literal["stop", "skip"]

_IN_A_ROW = 100  # batches passed over, after which the run is lost
_NOT_READ = 64  # steps whose numbers may lie on a device that cannot tell whether they are ready
_PICTURES = 8  # that a teacher must have said the same of, before it is blamed
_SAME = 1e-6  # of the largest logit
_OF_STUDENT = (
    "lower the learning rate, let it and the losses warm up (warmup_epochs), clip gradients "
    "(--trainer.gradient_clip_val=1), train in float32"
)
_OF_TEACHER = (
    "see that its weights and the mean and std of its pictures are right, and let it run in float32 "
    "(--model.performance.teacher_dtype=float32 --trainer.precision=32-true)"
)
_OF_PICTURES = "look at that picture and at what the data does to it"


class NonFiniteError(ValueError):
    """Logits, a loss or weights are not finite.

    Attributes:
        shared: whether the cause is what students share, the teacher or the pictures.
    """

    def __init__(self, message: str, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


@dataclass
class _Step:
    """What is needed to tell what was wrong in a step."""

    place: tuple[int, int, int] | None
    logits: dict[str, Tensor]
    index: Tensor | None
    image: Tensor | None
    terms: tuple[str, ...] = ()


class FiniteWatch:
    """Looks whether the logits and losses of every training step are finite.

    On a CPU it looks while the step is computed. An accelerator is not waited for: it copies a few numbers of every
    step, which are read as soon as they have arrived, so that the error comes some steps late; :meth:`look_back` with
    ``wait=True`` makes up for that.

    Args:
        policy: ``stop`` or ``skip`` such a batch; to skip it, it must be looked at while the step is computed.

    Attributes:
        skipped: batches passed over in this epoch.
        in_a_row: batches passed over since the last one that was not.
        over: set where training has ended and nothing is to be looked at any more.
    """

    def __init__(self, policy: NonFinite = "stop") -> None:
        functional.check_one_of("non_finite", policy, ("stop", "skip"))
        self.policy = policy
        self.over = False
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.skipped = self.in_a_row = self._in_all = 0
        self._now: tuple[int, int, int] | None = None
        self._step: _Step | None = None
        self._last: NonFiniteError | None = None
        self._unread: deque[tuple[_Step, Tensor, Any]] = deque()

    def begin(
        self, place: tuple[int, int, int] | None, networks: Mapping[str, ModelOutput | None], batch: Batch
    ) -> None:
        """Look at the logits, before losses do.

        Args:
            place: epoch, batch and step, if known.
            networks: what the networks gave, by what to call them, the first to blame first.
            batch: the pictures.

        Raises:
            NonFiniteError: If a logit is not finite.
        """
        self._step, self._now = None, place
        if self.over or torch.compiler.is_compiling():
            return
        logits = {}
        for name, output in networks.items():
            if output is not None:
                logits[f"{name}'s logits"] = output.logits.detach()
                if output.logits_strong is not None:
                    logits[f"{name}'s logits of the strong view"] = output.logits_strong.detach()
        step = _Step(place, logits, batch.get("index"), batch["image"])
        if self._is_late(next(iter(logits.values()))):
            step.image = None
            step.logits = {name: one.clone() for name, one in logits.items()}  # CUDA graphs write over theirs
        elif not all(math.isfinite(one.sum().item()) for one in logits.values()):  # a tenth of the time of isfinite
            self._judge(step, {})
        self._step = step

    def end(self, objective: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Look at the losses.

        Args:
            objective: what is minimised, a scalar.
            terms: what it is made of, scalars by name.

        Raises:
            NonFiniteError: If it is not finite.
        """
        step, self._step = self._step, None
        if step is None:
            return
        named = {f"losses.{name}": value for name, value in terms.items()} | {"the objective": objective}
        if not self._is_late(objective):
            if not math.isfinite(objective.item()):
                self._judge(step, {name: value.item() for name, value in named.items()})
            return
        step.terms = tuple(named)
        sums = [logits.sum() for logits in step.logits.values()]
        numbers = torch.stack([one.detach().float() for one in (*sums, *named.values())])
        self._unread.append((step, *_on_its_way(numbers)))

    def look_back(self, wait: bool = False) -> None:
        """Look at the steps that were not waited for.

        Args:
            wait: whether to wait for those that are not done, too.

        Raises:
            NonFiniteError: If something was not finite in one of them.
        """
        while self._unread and not self.over:
            step, numbers, event = self._unread[0]
            if not wait and (len(self._unread) <= _NOT_READ if event is None else not event.query()):
                return
            if event is not None:
                event.synchronize()
            self._unread.popleft()
            values = numbers.tolist()
            if not all(map(math.isfinite, values)):
                self._judge(step, dict(zip(step.terms, values[len(step.logits) :], strict=True)))

    def look_at_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Look at weights, which takes a while.

        Raises:
            NonFiniteError: If one is not finite.
        """
        plain = {name: one.detach() for name, one in weights if one.is_floating_point() and one.numel()}
        if self.over or not plain:
            return
        finite = torch.stack([one.isfinite().all() for one in plain.values()]).tolist()
        if odd := [name for name, is_finite in zip(plain, finite, strict=True) if not is_finite]:
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            raise NonFiniteError(
                f"weights must be finite, but {', '.join(odd[:3])}{more} are not{_at(self._now)}; no checkpoint is "
                f"written, an earlier one stays; {_OF_STUDENT}"
            )

    def look_for_cause(self, weights: Iterable[tuple[str, Tensor]], error: NonFiniteError) -> None:
        """Tell a student that is spoiled for good from a batch that it cannot take.

        Args:
            weights: the student's, by name.
            error: what was found.

        Raises:
            NonFiniteError: If a weight is not finite.
        """
        odd = [name for name, one in weights if not bool(one.detach().isfinite().all())]
        if odd:
            raise NonFiniteError(
                f"{error}; {len(odd)} of the student's weights are no longer finite, as {odd[0]}: the gradients of an "
                "earlier step were not, and passing over batches or clipping gradients that are infinite cannot help"
            ) from None

    def pass_over(self, error: NonFiniteError) -> None:
        """Count a batch that is skipped.

        Raises:
            NonFiniteError: If that happens all the time.
        """
        self.skipped += 1
        self.in_a_row += 1
        self._in_all += 1
        if self.in_a_row >= _IN_A_ROW:
            raise self._lost(f"{_IN_A_ROW} batches in a row were skipped", error)
        if math.log10(self._in_all).is_integer():
            rank_zero_warn(f"skipped a batch, {self._in_all} in this run: {error}")
        self._last = error

    def end_epoch(self, trained: bool) -> None:
        """Stop where an epoch was skipped as a whole.

        Args:
            trained: whether any batch was not.

        Raises:
            NonFiniteError: If none was.
        """
        if self._last is not None and self.skipped and not trained:
            raise self._lost("all batches of an epoch were skipped", self._last)

    def _lost(self, what: str, error: NonFiniteError) -> NonFiniteError:
        why = "teacher or pictures are of no use" if error.shared else "the weights have probably diverged"
        return NonFiniteError(f"{what}, so {why}; the last of them: {error}", error.shared)

    def _is_late(self, value: Tensor) -> bool:
        return self.policy == "stop" and not functional._values_are_cheap(value)

    def _judge(self, step: _Step, terms: Mapping[str, float]) -> None:
        """Raise an error if the logits or losses of a step are not finite."""
        for name, logits in step.logits.items():
            if not logits.isfinite().all():
                raise self._error(step, name, _first(logits, step.index, "class"))
        for name, value in terms.items():
            if not math.isfinite(value):
                raise self._error(step, name, f"got {value}")

    def _error(self, step: _Step, name: str, got: str) -> NonFiniteError:
        of_teacher = name.startswith("the teacher's")
        parts = [f"{name} must be finite, {got}{_at(step.place)}"]
        if step.place != self._now:
            parts[0] += f", noticed{_at(self._now)}, as no step waits for the device"
        advice = _OF_TEACHER if of_teacher else _OF_STUDENT
        of_pictures = step.image is not None and not bool(step.image.isfinite().all())
        if step.image is not None and of_pictures:
            where = _first(step.image.flatten(1), step.index, "value")
            parts.append(f"the pictures are not finite themselves, {where}")
            advice = _OF_PICTURES
        parts += [f"{key}: {_statistics(logits)}" for key, logits in step.logits.items()]
        skip = "" if self.policy == "skip" else ", or skip such batches by --model.non_finite=skip"
        return NonFiniteError("; ".join([*parts, f"{advice}{skip}"]), of_teacher or of_pictures)


class TeacherDoubt:
    """Notices in the first batches of a fit that a teacher says the same of all pictures.

    Attributes:
        settled: whether nothing is left to be looked at.
    """

    def __init__(self) -> None:
        self.settled = True
        self._alike = 0

    def arise(self) -> None:
        """A fit begins."""
        self.settled, self._alike = False, 0

    def look(self, batch: Batch, logits: Tensor) -> None:
        """Look at one batch; accelerators are waited for.

        Args:
            batch: the pictures.
            logits: what the teacher gave for them, shape ``(B, C)``.

        Raises:
            ValueError: If the logits are all the same, for two different pictures and all classes, or for eight
                different pictures.
        """
        image = batch.get("image_teacher", batch["image"])
        different = int((image != image[:1]).flatten(1).any(dim=1).sum())
        if not different:
            return
        limit = _SAME * logits.abs().max()
        if not (logits - logits[:1]).abs().max() <= limit:
            self.settled = True
            return
        self._alike += 1 + different
        says_nothing = bool((logits - logits[:1, :1]).abs().max() <= limit)
        if says_nothing or self._alike >= _PICTURES:
            what = "the same logit for all classes and pictures" if says_nothing else "the same logits for all pictures"
            raise ValueError(
                f"the teacher gives {what} (from {logits.min():.4g} to {logits.max():.4g}, {self._alike} pictures that "
                "differ), so there is nothing to learn from it. Usual causes: its weights are zero or those of "
                "another network, a batch norm in it has no or wrong statistics, or the mean and std of its pictures "
                "are wrong by orders of magnitude; see --model.teacher and --data, and measure it by itself first"
            )


def _on_its_way(numbers: Tensor) -> tuple[Tensor, Any]:
    """A copy of numbers for the host, and what says when it is there; None if only waiting shows."""
    if numbers.device.type != "cuda":
        return numbers, None
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return copy, event


def _first(values: Tensor, index: Tensor | None, what: str) -> str:
    """How many values are not finite, shape ``(B, N)``, and where the first of them is, ``what`` being a column."""
    odd = ~values.isfinite()
    row, column = odd.nonzero()[0].tolist()
    picture = "" if index is None or len(index) <= row else f" (picture {int(index[row])} of the data)"
    return (
        f"but {int(odd.sum())} of {values.numel()} are not, the first {values[row, column].item()} at sample {row}"
        f"{picture}, {what} {column}"
    )


def _statistics(logits: Tensor) -> str:
    finite = logits[logits.isfinite()].double()
    if not len(finite):
        return "none finite"
    figures = {"min": finite.min(), "max": finite.max(), "mean": finite.mean(), "std": finite.std(correction=0)}
    text = ", ".join(f"{name} {value.item():.4g}" for name, value in figures.items())
    return f"{text} of {len(finite)} finite ones, {logits.numel() - len(finite)} not finite"


def _at(place: tuple[int, int, int] | None) -> str:
    return "" if place is None else " in epoch {}, batch {}, step {}".format(*place)
