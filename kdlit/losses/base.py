"""The contract between a distillation method and the module that trains with it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from kdlit.losses.functional import check_not_negative
from kdlit.losses.gathering import gathered, process_count
from kdlit.types import Batch, ModelOutput


class DistillationLoss(nn.Module):
    """One term of the objective: override :meth:`forward`, and of the other hooks only what the method needs.

    Parameters and sub-modules of a loss (a learnable temperature, a connector) are optimised with the student; buffers
    (a memory bank) and parameters are saved in the checkpoint. None of them is part of the exported student.

    Attributes:
        student_layers: dotted paths of student layers whose outputs the loss reads from ``student.features``.
        teacher_layers: the same for the teacher.
        needs_teacher: whether the loss reads the teacher at all; a module without a teacher refuses those that do.
        needs_strong_view: whether the loss reads ``logits_strong``, what both networks gave for
            ``batch["image_strong"]``.
        reads_sample_weight: whether the loss multiplies each sample's term by ``batch["sample_weight"]`` where there is
            one.
        reads_image: whether the loss reads pictures from the batch; those of other processes come only to such losses.
        across_batch: whether the loss is no mean over samples: others of the batch have a say in each sample's term,
            be it by the formula, by a memory or by a batch norm in a connector. Several processes give what one with
            the whole batch gives only with ``WeightedLoss(..., gather=True)``.
    """

    student_layers: Sequence[str] = ()
    teacher_layers: Sequence[str] = ()
    needs_teacher: bool = True
    needs_strong_view: bool = False
    reads_sample_weight: bool = False
    reads_image: bool = False
    across_batch: bool = False

    def extend_student(
        self, student: nn.Module, teacher: nn.Module | None, example: Tensor, teacher_example: Tensor | None = None
    ) -> nn.Module:
        """Return the network to train, measure and export: the student, or a larger one around it.

        Called once, before :meth:`setup` of all losses; the arguments are those of the latter.
        """
        return student

    def setup(
        self, student: nn.Module, teacher: nn.Module | None, example: Tensor, teacher_example: Tensor | None = None
    ) -> None:
        """Build what depends on the networks; called once, when the module is built and before the optimizer is.

        Afterwards ``student_layers`` and ``teacher_layers`` are settled.

        Args:
            student: the network that will be trained.
            teacher: the frozen network, or None if the module has none.
            example: a batch of one black picture, shape ``(1, *input_size)``.
            teacher_example: likewise for the teacher, given only where it has an input of its own.
        """

    def on_fit_start(self, target: Tensor | None) -> None:
        """Learn about the training data before the run begins or a checkpoint is loaded.

        Args:
            target: labels in the order of ``batch["index"]``, int64, shape ``(N,)``; None if the data does not tell.
        """

    def on_train_epoch_start(self, epoch: int, max_epochs: int) -> None:
        """Move schedules.

        Args:
            epoch: number of the epoch that starts, from 0.
            max_epochs: how many epochs the run has; -1 if it has no end.
        """

    @abstractmethod
    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the scalar loss of one batch; read the state of the loss, do not change it.

        Args:
            student: what the student gave for ``batch["image"]``; logits and features in float32.
            teacher: what the teacher gave, without a graph; None for a module that has no teacher.
            batch: the pictures and their labels.
        """
        raise NotImplementedError

    def on_train_batch_end(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> None:
        """Update memories after the optimizer's step; the arguments are those of :meth:`forward`, detached."""


class LossWrapper(DistillationLoss):
    """A variation on any loss: passes every hook on and declares what the wrapped loss declares.

    Override :meth:`inputs` to change what the wrapped loss sees, or :meth:`forward` to change what it gives.

    Args:
        loss: the wrapped loss, itself a wrapper or not.
    """

    def __init__(self, loss: DistillationLoss) -> None:
        super().__init__()
        self.loss = loss
        self.needs_teacher = loss.needs_teacher
        self.needs_strong_view = loss.needs_strong_view
        self.reads_sample_weight = loss.reads_sample_weight
        self.reads_image = loss.reads_image
        self.across_batch = loss.across_batch

    @property
    def student_layers(self) -> Sequence[str]:  # type: ignore[override]
        """Those of the wrapped loss."""
        return self.loss.student_layers

    @property
    def teacher_layers(self) -> Sequence[str]:  # type: ignore[override]
        """Those of the wrapped loss."""
        return self.loss.teacher_layers

    @property
    def innermost(self) -> DistillationLoss:
        """The method inside all wrappers."""
        return self.loss.innermost if isinstance(self.loss, LossWrapper) else self.loss

    def inputs(
        self, student: ModelOutput, teacher: ModelOutput, batch: Batch
    ) -> tuple[ModelOutput, ModelOutput, Batch]:
        """What the wrapped loss gets in :meth:`forward` and :meth:`on_train_batch_end`: here, the same."""
        return student, teacher, batch

    def extend_student(  # type: ignore[override]
        self, student: nn.Module, teacher: nn.Module | None, *examples: Tensor
    ) -> nn.Module:
        """Let the wrapped loss decide."""
        return self.loss.extend_student(student, teacher, *examples)

    def setup(self, student: nn.Module, teacher: nn.Module | None, *examples: Tensor) -> None:  # type: ignore[override]
        """Set up the wrapped loss."""
        self.loss.setup(student, teacher, *examples)

    def on_fit_start(self, target: Tensor | None) -> None:
        """Tell the wrapped loss."""
        self.loss.on_fit_start(target)

    def on_train_epoch_start(self, epoch: int, max_epochs: int) -> None:
        """Tell the wrapped loss."""
        self.loss.on_train_epoch_start(epoch, max_epochs)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return what the wrapped loss gives for :meth:`inputs`."""
        loss: Tensor = self.loss(*self.inputs(student, teacher, batch))
        return loss

    def on_train_batch_end(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> None:
        """Tell the wrapped loss."""
        self.loss.on_train_batch_end(*self.inputs(student, teacher, batch))


class SampleWeighting(LossWrapper):
    """A wrapper that decides how much each sample counts: override :meth:`weigh`.

    Weights that the batch already has are multiplied by these.

    Args:
        loss: a loss that reads sample weights, or wrappers around one.

    Raises:
        ValueError: If the loss does not read sample weights.
    """

    def __init__(self, loss: DistillationLoss) -> None:
        super().__init__(loss)
        if not loss.reads_sample_weight:
            raise ValueError(
                f"loss must read sample weights, got {type(self.innermost).__name__}, which is no mean over samples"
            )
        self.needs_teacher = True

    @abstractmethod
    def weigh(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the weight of each sample, >= 0, shape ``(B,)``."""
        raise NotImplementedError

    def inputs(
        self, student: ModelOutput, teacher: ModelOutput, batch: Batch
    ) -> tuple[ModelOutput, ModelOutput, Batch]:
        """The batch with the weights in it; the outputs as they are."""
        weight = self.weigh(student, teacher, batch)
        weighted = batch.copy()
        weighted["sample_weight"] = weight * batch["sample_weight"] if "sample_weight" in batch else weight
        return student, teacher, weighted


class WeightedLoss(LossWrapper):
    """A loss and how much it counts: ``weight * min((epoch + 1) / warmup_epochs, 1) * loss``, epochs from 0.

    Args:
        loss: the term.
        weight: factor of the term in the objective, >= 0; 0 switches the term off but keeps logging it.
        warmup_epochs: epochs over which the factor rises linearly to ``weight``; 0 for none, 20 in DKD (Zhao et al.
            2022, appendix A.2).
        gather: where several processes train, give the loss the outputs and batches of all of them. A loss that looks
            across the batch (``across_batch``) then has the value and the gradients of one process with the whole
            batch, batch norms in its connectors included, as long as all processes draw the same random numbers; each
            computes the loss of the whole batch. Without it such a loss sees its own process's share; other losses are
            the same either way. Batch norms of the student are up to the trainer's ``sync_batchnorm``.

    Raises:
        ValueError: If the weight is negative or ``warmup_epochs`` is not a whole number of at least 0.
    """

    def __init__(
        self, loss: DistillationLoss, weight: float = 1.0, warmup_epochs: int = 0, gather: bool = False
    ) -> None:
        super().__init__(loss)
        if warmup_epochs != int(check_not_negative("warmup_epochs", warmup_epochs)):
            raise ValueError(f"warmup_epochs must be a whole number, got {warmup_epochs!r}")
        self.weight = check_not_negative("weight", weight)
        self.warmup_epochs = warmup_epochs
        self.gather = gather
        self.warmup = self._warmup(epoch=0)

    def _warmup(self, epoch: int) -> float:
        return min((epoch + 1) / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0

    @property
    def factor(self) -> float:
        """What the raw loss is multiplied by in this epoch."""
        return self.weight * self.warmup

    def inputs(
        self, student: ModelOutput, teacher: ModelOutput, batch: Batch
    ) -> tuple[ModelOutput, ModelOutput, Batch]:
        """With ``gather`` those of all processes, as far as the loss reads them; otherwise the same."""
        if not self.gather or process_count() == 1:
            return student, teacher, batch
        return gathered(
            student,
            teacher if self.needs_teacher else None,
            batch,
            student_layers=self.student_layers,
            teacher_layers=self.teacher_layers,
            pictures=self.reads_image,
        )

    def on_train_epoch_start(self, epoch: int, max_epochs: int) -> None:
        """Move the warm-up on, then the wrapped loss."""
        self.warmup = self._warmup(epoch)
        super().on_train_epoch_start(epoch, max_epochs)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the weighted loss of one batch."""
        return self.factor * super().forward(student, teacher, batch)

    def on_train_batch_end(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> None:
        """Tell the wrapped loss, unless it does not listen: then nothing is put together for it."""
        if not self.gather or _listens(self.loss):
            super().on_train_batch_end(student, teacher, batch)


def _listens(loss: DistillationLoss) -> bool:
    hook = type(loss).on_train_batch_end
    if isinstance(loss, LossWrapper) and hook is LossWrapper.on_train_batch_end:
        return _listens(loss.loss)
    return hook is not DistillationLoss.on_train_batch_end
