"""The LightningModule that distils: two forward passes a step, everything else delegated to the losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from kdlit.losses import DistillationLoss, WeightedLoss
from kdlit.losses.functional import widened
from kdlit.models.features import FeatureTap, dry_run
from kdlit.types import Batch, ModelOutput


def default_optimizer(params: Any) -> torch.optim.Optimizer:
    """SGD as the papers train ResNets on CIFAR-100."""
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=5e-4)


class DistillationModule(L.LightningModule):
    """Trains a student with a frozen teacher: ``objective = sum of weight * warm-up * loss``.

    The teacher takes no part in training: no gradients, always in eval mode, no graph, not in the optimizer, in no DDP
    bucket and no checkpoint; on resume its weights come from where they came from before. Without a teacher the module
    trains the student plainly, which is how teachers are made.

    A task is a subclass that adds metrics and the validation, test and predict steps.

    Args:
        student: network to train; its forward takes pictures and returns logits.
        losses: terms of the objective by name; a bare loss counts with weight 1, null stands for no term.
        teacher: frozen network with as many classes as the student, or null.
        optimizer: makes the optimizer from the parameters of student and losses.
        lr_scheduler: makes the learning-rate schedule from the optimizer, stepped once an epoch.
        input_size: size of one picture, ``(C, H, W)``, for the dry run that checks both networks at construction.
        teacher_input_size: likewise for the teacher, where the data gives it pictures of its own as ``image_teacher``.

    Raises:
        ValueError: If the class counts differ, a loss lacks its teacher, a layer path does not exist, there is no loss
            or a network cannot take pictures of ``input_size``.
    """

    teacher: nn.Module | None

    def __init__(
        self,
        student: nn.Module,
        losses: Mapping[str, WeightedLoss | DistillationLoss | None],
        teacher: nn.Module | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        input_size: Sequence[int] = (3, 32, 32),
        teacher_input_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if _given_hyperparameters.get() is not None:
            # From the command line these are plain specs, which rebuild the module from a checkpoint. Objects given
            # from Python would be pickled into it, so there they stay out.
            self.save_hyperparameters(logger=False)
        self.student = student
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        self.losses = nn.ModuleDict(weighted_terms(losses))
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler

        if teacher is not None and {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
            raise ValueError("student and teacher share parameters; give the teacher its own copy (copy.deepcopy)")
        terms = self._terms()
        for name, term in terms.items():
            if self.teacher is None and term.needs_teacher:
                raise ValueError(f"losses.{name} ({type(term.loss).__name__}) needs a teacher, but teacher is None")
        self._channels = input_size[0]
        self._teacher_has_own_input = teacher_input_size is not None
        example = torch.zeros(1, *input_size)
        teacher_example = torch.zeros(1, *(teacher_input_size or input_size))
        self.num_classes = self._count_classes("student", student, example)
        if teacher is not None:
            if (teacher_classes := self._count_classes("teacher", teacher, teacher_example)) != self.num_classes:
                raise ValueError(
                    f"student and teacher must have the same classes, but the student gives {self.num_classes} logits "
                    f"and the teacher {teacher_classes}; set num_classes of the student to {teacher_classes}"
                )
            # DDP reads this attribute of the module it wraps and then broadcasts nothing of the teacher.
            self._ddp_params_and_buffers_to_ignore = [f"teacher.{name}" for name in teacher.state_dict()]
        examples = [example, *([teacher_example] if self._teacher_has_own_input else [])]
        for term in terms.values():
            self.student = term.extend_student(self.student, teacher, *examples)
        for term in terms.values():
            term.setup(self.student, teacher, *examples)
        layers = {path for term in terms.values() for path in term.student_layers}
        self._student_tap = self._tap("student", self.student, example, layers)
        if teacher is not None:
            layers = {path for term in terms.values() for path in term.teacher_layers}
            self._teacher_tap = self._tap("teacher", teacher, teacher_example, layers)

    def _terms(self) -> dict[str, WeightedLoss]:
        return cast("dict[str, WeightedLoss]", dict(self.losses.items()))

    def _count_classes(self, role: str, model: nn.Module, example: Tensor) -> int:
        """Check that a network maps pictures to logits; return how many classes it has."""
        logits = logits_of(self._try(role, model, example), role)
        if logits.ndim != 2 or logits.shape[0] != 1:
            raise ValueError(
                f"the {role} ({type(model).__name__}) must give logits of shape (batch, classes), but gives "
                f"{tuple(logits.shape)} for a batch of shape {tuple(example.shape)}"
            )
        return logits.shape[1]

    def _tap(self, role: str, model: nn.Module, example: Tensor, layers: Iterable[str]) -> FeatureTap:
        """Hook some layers of a network, and check that pictures pass through them."""
        tap = FeatureTap(model, layers)
        if layers:
            self._try(role, model, example, tap)
        return tap

    def _try(self, role: str, model: nn.Module, example: Tensor, tap: FeatureTap | None = None) -> object:
        try:
            output = dry_run(model, example)
            if tap is not None:
                tap.take()
        except Exception as error:
            raise ValueError(
                f"the {role} ({type(model).__name__}) cannot take pictures of input_size "
                f"{tuple(example.shape[1:])}: {error}"
            ) from error
        return output

    # What a network sees

    def forward(self, image: Tensor) -> Tensor:
        """Return the student's logits, shape ``(B, C)``, for pictures of shape ``(B, *input_size)``."""
        return logits_of(self.student(image), "student")

    def run_student(self, batch: Batch) -> ModelOutput:
        """One forward pass of the student, and one more on the strong view if a loss needs it."""
        return self._run("student", self.student, batch, self._student_tap)

    def run_teacher(self, batch: Batch) -> ModelOutput:
        """The same of the teacher, without a graph, on its own form of the pictures; None if there is no teacher."""
        if self.teacher is None:
            return cast("ModelOutput", None)  # only losses with needs_teacher=False read it
        if "image_teacher" in batch:
            batch = cast("Batch", {**batch, "image": batch["image_teacher"]})
            if "image_teacher_strong" in batch:
                batch["image_strong"] = batch["image_teacher_strong"]
        elif self._teacher_has_own_input:
            raise ValueError(
                f"teacher_input_size is set, but the batch has no image_teacher, only {', '.join(batch)}; set "
                "--data.teacher_input, or add it in your own data module"
            )
        with torch.no_grad():
            return self._run("teacher", self.teacher, batch, self._teacher_tap)

    def _run(self, role: str, model: nn.Module, batch: Batch, tap: FeatureTap) -> ModelOutput:
        self._check_image(batch["image"])
        logits = logits_of(model(batch["image"]), role)
        output = ModelOutput(widened(logits), {path: widened(value) for path, value in tap.take().items()})
        if self.training and any(term.needs_strong_view for term in self._terms().values()):
            if "image_strong" not in batch:
                raise ValueError(
                    f"a loss needs a second view, image_strong, but the batch has only {', '.join(batch)}; "
                    "set --data.strong_view=true, or add it in your own data module"
                )
            output.logits_strong = widened(logits_of(model(batch["image_strong"]), role))
            tap.forget()
        return output

    def _check_image(self, image: Tensor) -> None:
        if image.ndim != 4 or image.shape[1] != self._channels or not image.is_floating_point():
            raise ValueError(
                f"image must be floating point of shape (batch, {self._channels}, height, width), got {image.dtype} of "
                f"shape {tuple(image.shape)}"
            )
        if image.dtype == torch.float64 != self.dtype:
            raise ValueError("image is float64, but the networks are float32: let the data give image.float()")

    # Training

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Run both networks once and add up the losses."""
        batch = as_batch(batch)
        teacher, student = self.run_teacher(batch), self.run_student(batch)
        objective = torch.zeros((), device=student.logits.device)
        logged = {}
        with torch.autocast(student.logits.device.type, enabled=False):
            for name, term in self._terms().items():
                value = run_loss(name, term, student, teacher, batch)
                objective = objective + term.factor * value
                logged[f"train/loss/{name}"] = value.detach()
        self.log("loss", objective.detach(), prog_bar=True, logger=False)
        self.log_dict(
            {"train/loss": objective.detach(), **logged},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=len(batch["image"]),
        )
        return {
            "loss": objective,
            "batch": batch,
            "student": student.detach(),
            "teacher": None if teacher is None else teacher.detach(),
        }

    def on_train_epoch_start(self) -> None:
        """Tell the losses which epoch starts."""
        for term in self._terms().values():
            term.on_train_epoch_start(self.current_epoch, self.trainer.max_epochs or -1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let the losses update their memories."""
        for term in self._terms().values():
            term.on_train_batch_end(outputs["student"], outputs["teacher"], outputs["batch"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimise what is trainable in student and losses, never the teacher."""
        for tensor in (*self.losses.parameters(), *self.losses.buffers()):
            tensor.data = widened(tensor.data)  # losses compute in float32 also when the networks run in half precision
        trainable = [p for name, p in self.named_parameters() if p.requires_grad and not name.startswith("teacher.")]
        if not trainable:
            raise ValueError("the student has no trainable parameter; all have requires_grad=False")
        try:
            optimizer = self.optimizer(trainable)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the optimizer cannot be built: {error}") from error
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        monitor = getattr(scheduler, "monitor", "val/cross_entropy")  # read by ReduceLROnPlateau alone
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}

    # Teacher hygiene

    def train(self, mode: bool = True) -> DistillationModule:
        """Set the mode of student and losses; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the teacher out."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith("teacher.")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the teacher's own weights in, so that loading stays strict.

        Raises:
            ValueError: If the checkpoint is of another student or of other losses.
        """
        saved, own = checkpoint["state_dict"], self.state_dict()
        if self.teacher is not None:
            saved.update(self.teacher.state_dict(prefix="teacher."))
        problems = {
            "missing": [name for name in own if name not in saved],
            "unexpected": [name for name in saved if name not in own],
            "of another shape": [
                name
                for name in own
                if name in saved and saved[name].shape != own[name].shape and own[name].numel()  # an empty memory grows
            ],
        }
        lists = [f"{len(names)} {kind} ({', '.join(names[:3])}, ...)" for kind, names in problems.items() if names]
        if lists:
            raise ValueError(
                f"the checkpoint is not of this student and these losses: {'; '.join(lists)}; use the config.yaml "
                "beside it"
            )

    def setup(self, stage: str) -> None:
        """Refuse a data set with other classes than the networks have, and tell the losses what they train on."""
        data = getattr(self.trainer, "datamodule", None)
        data_classes = getattr(data, "num_classes", None)
        if data_classes is not None and data_classes != self.num_classes:
            raise ValueError(
                f"the data has {data_classes} classes, but the student gives {self.num_classes} logits; "
                f"set num_classes of student and teacher to {data_classes}"
            )
        if stage == "fit":
            for term in self._terms().values():
                term.on_fit_start(getattr(data, "train_target", None))


def weighted_terms(losses: Mapping[str, WeightedLoss | DistillationLoss | None]) -> dict[str, WeightedLoss]:
    """Give bare losses weight 1 and drop the terms that are None.

    Raises:
        ValueError: If nothing is left or a name is empty or has dots.
    """
    terms = {
        name: loss if isinstance(loss, WeightedLoss) else WeightedLoss(loss)
        for name, loss in losses.items()
        if loss is not None
    }
    if not terms:
        raise ValueError("losses must name at least one loss, got none")
    for name in terms:
        if not name or "." in name:
            raise ValueError(f"the names in losses must be non-empty and without dots, got {name!r}")
    return terms


def logits_of(output: object, role: str) -> Tensor:
    """Logits in what a network returned: the tensor itself, or its attribute ``logits``.

    Raises:
        TypeError: If it is neither.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the {role} must return logits or an object with .logits, but returned {type(output).__name__}; "
            "wrap it in a module whose forward returns the logits alone"
        )
    return logits


def as_batch(batch: Any) -> Batch:
    """Name the parts of a batch: a tensor, ``(image,)``, ``(image, target)`` or ``(image, target, index)``.

    Raises:
        TypeError: If the batch is neither one of these nor a dictionary with the key ``image``.
    """
    if isinstance(batch, Tensor):
        batch = (batch,)
    if isinstance(batch, Mapping) and "image" in batch:
        return cast("Batch", batch)
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2, 3):
        return cast("Batch", dict(zip(("image", "target", "index"), batch, strict=False)))
    got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise TypeError(
        f"a batch must be image, (image, target), (image, target, index) or a dictionary with 'image', got {got}"
    )


def run_loss(name: str, term: WeightedLoss, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
    """Return the raw value of one term.

    Raises:
        TypeError: If it is not a tensor of one number.
        ValueError: If the loss needs a part of the batch that is not there.
    """
    try:
        value = term.loss(student, teacher, batch)
    except KeyError as error:
        if error.args and error.args[0] in Batch.__annotations__ and error.args[0] not in batch:
            raise ValueError(f"losses.{name} needs {error} in the batch, which has only {', '.join(batch)}") from error
        raise
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
        raise TypeError(f"losses.{name} ({type(term.loss).__name__}) must return a scalar tensor, got {got}")
    return value.reshape(())
