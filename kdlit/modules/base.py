"""The LightningModule that distils: two forward passes a step, everything else delegated to the losses."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdlit.losses import DistillationLoss, WeightedLoss
from kdlit.losses.functional import widened
from kdlit.models.features import FeatureTap, dry_run
from kdlit.modules.clock import StepClock
from kdlit.modules.epoch_log import log_epoch
from kdlit.modules.finite import FiniteWatch, NonFinite, NonFiniteError, TeacherDoubt
from kdlit.modules.means import RunningMeans
from kdlit.modules.networks import check_image, logits_of, run_network
from kdlit.modules.performance import Performance, Preset, chosen, compile_in_place, fused
from kdlit.modules.teacher import FrozenTeacher, freeze
from kdlit.types import Batch, ModelOutput


def default_optimizer(params: Any) -> torch.optim.Optimizer:
    """SGD as the papers train ResNets on CIFAR-100."""
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=5e-4)


class DistillationModule(L.LightningModule):
    """Trains a student with a frozen teacher: ``objective = sum of weight * warm-up * loss``.

    The teacher takes no part in training: no gradients, always in eval mode, no graph, not in the optimizer, in no DDP
    bucket and no checkpoint; on resume its weights come from where they came from before. Without a teacher the module
    trains the student plainly, which is how teachers are made.

    A task is a subclass that adds the validation, test and predict steps. What these give to ``means[stage].add`` is
    averaged over the epoch and logged when it ends, by ``on_train_epoch_end``, ``on_validation_epoch_end`` and
    ``on_test_epoch_end``: whoever overrides one calls ``super()``, as in ``on_train_batch_end``, by which losses update
    their memories.

    Args:
        student: network to train; its forward takes pictures and returns logits.
        losses: terms of the objective by name; a bare loss counts with weight 1, null stands for no term.
        teacher: frozen network with as many classes as the student, or null.
        optimizer: makes the optimizer from the parameters of student and losses.
        lr_scheduler: makes the learning-rate schedule from the optimizer, stepped once an epoch.
        input_size: size of one picture, ``(C, H, W)``, for the dry run that checks both networks at construction.
        teacher_input_size: likewise for the teacher, where the data gives it pictures of its own as ``image_teacher``.
        performance: how a step is computed: ``exact``, every number as in plain float32 up to rounding; ``fast``,
            the networks in bfloat16; ``plain``, nothing changed; or single options.
        non_finite: what to do if logits or a loss are NaN or infinite in a training step: ``stop`` with an error that
            says where and what; or ``skip`` the batch, which moves neither weights nor statistics nor memories, and
            stop after 100 in a row. Skipped batches count as steps (of gradients that are accumulated, the others of
            the step count less), and are logged as ``train/skipped``. To skip them
            an accelerator is waited for in every step, and the run must have one process; to stop, it is not waited
            for, and the error comes some steps late.

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
        performance: Performance | Preset = "exact",
        non_finite: NonFinite = "stop",
    ) -> None:
        super().__init__()
        if _given_hyperparameters.get() is not None:
            # From the command line these are plain specs, which rebuild the module from a checkpoint. Objects given
            # from Python would be pickled into it, so there they stay out.
            self.save_hyperparameters(logger=False)
        self.student = student
        self.teacher = None if teacher is None else freeze(teacher)
        self.losses = nn.ModuleDict(weighted_terms(losses))
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.performance = chosen(performance)
        self.finite = FiniteWatch(non_finite)
        self._teacher_doubt = TeacherDoubt()
        self.means = {stage: RunningMeans() for stage in ("train", "val", "test")}
        self._means_of: int | None = None  # the epoch that the means of a checkpoint are of
        self._outputs: tuple[ModelOutput, ModelOutput, Batch] | None = None  # of a step whose end is yet to come
        self.step_terms: dict[str, Tensor] = {}  # the weighted terms of a step that is under way, with their graph
        self.shown: dict[str, float] = {}  # what was logged of the step that was last looked at
        self.clock = StepClock()
        self._log_prefix = ""  # of the names of training figures, where there are several students

        if teacher is not None and {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
            raise ValueError("student and teacher share parameters; give the teacher its own copy (copy.deepcopy)")
        terms = self._terms()
        for name, term in terms.items():
            if self.teacher is None and term.needs_teacher:
                raise ValueError(f"losses.{name} ({type(term.loss).__name__}) needs a teacher, but teacher is None")
        for name, size in (("input_size", input_size), ("teacher_input_size", teacher_input_size)):
            if size is not None and (len(size) != 3 or min(size) < 1):
                raise ValueError(f"{name} must be (channels, height, width), each at least 1, got {size!r}")
        self._channels = input_size[0]
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
        examples = [example, *([] if teacher_input_size is None else [teacher_example])]
        for term in terms.values():
            self.student = term.extend_student(self.student, teacher, *examples)
        for term in terms.values():
            term.setup(self.student, teacher, *examples)
        layers = {path for term in terms.values() for path in term.student_layers}
        self._student_tap = self._tap("student", self.student, example, layers)
        self._frozen_teacher: FrozenTeacher | None = None
        if teacher is not None:
            layers = {path for term in terms.values() for path in term.teacher_layers}
            self._tap("teacher", teacher, teacher_example, layers).remove()  # it was a trial
            own = teacher_input_size is not None
            self._frozen_teacher = FrozenTeacher(teacher, layers, self.performance, teacher_example, own)
            self._frozen_teacher.prepare()

    def __setattr__(self, name: str, value: Any) -> None:
        """Like its base, but quick about the name of the hook at work, which Lightning sets some 40 times a step."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

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
        with self.student_precision(image.device):
            return logits_of(self.student(image), "student")

    def run_student(self, batch: Batch) -> ModelOutput:
        """One forward pass of the student, and one more on the strong view if a loss needs it."""
        check_image(batch["image"], self._channels, self.dtype)
        with self.student_precision(batch["image"].device):
            return run_network("student", self.student, self._student_tap, batch, self._needs_strong_view())

    def run_teacher(self, batch: Batch) -> ModelOutput:
        """The same of the teacher, without a graph, on its own form of the pictures; None if there is no teacher."""
        if self._frozen_teacher is None:
            return cast("ModelOutput", None)  # only losses with needs_teacher=False read it
        check_image(batch["image"], self._channels, self.dtype)
        return self._frozen_teacher(batch, self._needs_strong_view())

    def _needs_strong_view(self) -> bool:
        return self.training and any(term.needs_strong_view for term in self._terms().values())

    def student_precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """Autocast, if that is asked for and the trainer does not do it anyway."""
        is_half = self.dtype in (torch.float16, torch.bfloat16)
        if self.performance.student_dtype == "float32" or is_half or torch.is_autocast_enabled(device.type):
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)

    # Training

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        """Run both networks once and add up the losses; None if the batch is skipped.

        Raises:
            NonFiniteError: If something is not finite, in this step or, on an accelerator, in an earlier one.
        """
        self.finite.look_back()
        self.step_terms = {}  # of a step that was broken off
        skips = self.finite.policy == "skip"
        # Losses leave their memories alone until the step is done, but not the statistics of their connectors.
        moving = [*self.trained(), *(one for one in self.losses.modules() if isinstance(one, _BatchNorm))]
        before = [{name: one.clone() for name, one in part.named_buffers()} for part in moving if skips]
        try:
            outputs = self.run_step(as_batch(batch))
        except NonFiniteError as error:
            if not skips:
                self.finite.look_for_cause(self.named_weights(), error)
                raise
            self.finite.pass_over(error)
            self.step_terms = {}
            with torch.no_grad():
                for network, buffers in zip(moving, before, strict=True):
                    for name, buffer in network.named_buffers():
                        buffer.copy_(buffers[name])
            return None
        self.finite.in_a_row = 0
        every = getattr(self._trainer, "log_every_n_steps", 0)
        if every and batch_idx % every == 0:
            self.show(outputs)
            self.clock.skip()
        return outputs

    def run_step(self, batch: Batch) -> dict[str, Any]:
        """What :meth:`training_step` computes, ``loss`` and what it came from, without a graph."""
        self.clock.mark("update")
        teacher = self.run_teacher(batch)
        self.clock.mark("teacher")
        return self.distil(batch, teacher)

    def trained(self) -> list[nn.Module]:
        """The networks that are trained."""
        return [self.student]

    def distil(self, batch: Batch, teacher: ModelOutput) -> dict[str, Any]:
        """Run the student and add up the losses.

        Args:
            batch: the pictures and their labels.
            teacher: what :meth:`run_teacher` gave for them.

        Returns:
            ``loss``, the objective, and what it came from, without a graph: ``batch``, ``student``, ``teacher``; and
            ``figures``, what is logged of the step.
        """
        student = self.run_student(batch)
        self.finite.begin(self.place(), {"the teacher": teacher, "the student": student}, batch)
        if not self._teacher_doubt.settled and cast("ModelOutput | None", teacher) is not None:
            self._teacher_doubt.look(batch, teacher.logits)
        self.clock.mark("student")
        objective = torch.zeros((), device=student.logits.device)
        figures = {}
        with torch.autocast(student.logits.device.type, enabled=False):
            for name, term in self._terms().items():
                value = run_loss(name, term, student, teacher, batch)
                self.step_terms[name] = self.share_of(name) * value
                objective = objective + self.step_terms[name]
                figures[name] = self.performance.kept(value)
        self.clock.mark("losses")
        self.finite.end(objective, figures)
        if self.training and torch.is_grad_enabled() and not objective.requires_grad:
            raise ValueError(
                f"no loss depends on the student: {', '.join(self._terms())} came without a graph; see that they use "
                "student.logits or student.features, without detach or no_grad"
            )
        seen = student.detach()
        figures = self._note(objective.detach(), figures, seen, batch)
        teacher = cast("ModelOutput", None) if teacher is None else teacher.detach()
        self._outputs = seen, teacher, batch
        return {"loss": objective, "batch": batch, "student": seen, "teacher": teacher, "figures": figures}

    def _note(
        self, objective: Tensor, terms: Mapping[str, Tensor], student: ModelOutput, batch: Batch
    ) -> dict[str, Tensor]:
        """Count what is logged of a step; return it by name."""
        figures = {"train/loss": objective, **{f"train/loss/{name}": value for name, value in terms.items()}}
        figures |= self.watch(student, batch)
        self.means["train"].add(figures, batch["image"].shape[0])
        return figures

    def share_of(self, name: str) -> float:
        """What the raw value of a term is multiplied by in the objective of this epoch.

        Args:
            name: of the term.
        """
        return self._terms()[name].factor

    def place(self) -> tuple[int, int, int] | None:
        """Epoch, batch and step of the training that is under way; None if none is."""
        if self._trainer is None or not self.trainer.training:
            return None
        return self.current_epoch, self.trainer.fit_loop.epoch_loop.batch_idx, self.global_step

    def show(self, outputs: dict[str, Any]) -> None:
        """Look at a step more closely, once in ``log_every_n_steps`` of the trainer, and tell the progress bar.

        Args:
            outputs: of :meth:`run_step`.
        """
        batch = outputs["batch"]
        if closely := self.watch_closely(outputs["student"], outputs["teacher"], batch):
            self.means["train"].add(closely, len(batch["image"]))
        # The bar reads these after every step, which must not wait for an accelerator.
        means = torch.stack([value.float().mean() for value in outputs["figures"].values()])
        self.shown = dict(zip(outputs["figures"], means.tolist(), strict=True))
        loss = self.shown["train/loss"]
        self.trainer.progress_bar_metrics[f"{self._log_prefix}loss"] = loss
        self.trainer.callback_metrics[f"{self._log_prefix}loss"] = torch.tensor(loss)
        self.finite.look_back(wait=True)

    def watch(self, student: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """What else to log about a training batch, by name: means over it, scalars, or values of each sample, ``(B,)``.

        Without a graph. Here, nothing.

        Args:
            student: what the student gave, without a graph.
            batch: the pictures and their labels.
        """
        return {}

    def watch_closely(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """What else to log about one training batch in ``log_every_n_steps``, so that it may take a while; as above.

        Args:
            student: what the student gave, without a graph.
            teacher: what the teacher gave; None if there is none.
            batch: the pictures and their labels.
        """
        return {}

    def figures(self, stage: str) -> dict[str, Tensor]:
        """Return the means of a part of the epoch that has ended, by name, over all processes.

        For ``train`` also what each term counted for: its ``weight``, its ``warmup`` and, both multiplied with the raw
        term, ``weighted``.

        Args:
            stage: ``train``, ``val`` or ``test``.
        """
        figures = self.means[stage].take(self._over_processes)
        for name, term in self._terms().items() if stage == "train" else ():
            if (raw := figures.get(f"train/loss/{name}")) is not None:
                figures[f"train/weight/{name}"] = torch.tensor(term.weight)
                figures[f"train/warmup/{name}"] = torch.tensor(term.warmup)
                figures[f"train/weighted/{name}"] = self.share_of(name) * raw
        return figures

    def _over_processes(self, sums: Tensor) -> Tensor:
        return cast("Tensor", self.trainer.strategy.reduce(sums, reduce_op="sum"))

    def _of_each_process(self, sums: Tensor) -> Tensor:
        """Those of all processes, one after the other."""
        gathered = self.trainer.strategy.all_gather(sums)
        return gathered.reshape(self.trainer.world_size, *sums.shape)

    def _own_share(self, sums: Tensor) -> Tensor:
        """Of those of all processes the own; if there are now more or fewer, the first takes all."""
        if len(sums) == self.trainer.world_size:
            return sums[self.global_rank]
        return sums.sum(dim=0) if self.global_rank == 0 else torch.zeros_like(sums[0])

    def on_train_epoch_end(self) -> None:
        """Log the means over the epoch.

        Raises:
            NonFiniteError: If something was not finite, or the whole epoch was skipped.
        """
        self.finite.look_back(wait=True)
        self.finite.look_at_weights(_kept(self.state_dict()))
        figures = self.figures("train")
        self.finite.end_epoch(trained=bool(figures))
        if self.finite.skipped:
            figures["train/skipped"] = torch.tensor(float(self.finite.skipped))
        self._log_training(figures)

    def _log_training(self, figures: Mapping[str, Tensor | float]) -> None:
        if type(self).log is not L.LightningModule.log:  # whoever overrides it wants to see all
            for name, value in figures.items():
                self.log(name, value, sync_dist=True)
            return
        log_epoch(self.trainer, {f"{self._log_prefix}{name}": value for name, value in figures.items()})

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """All parameters but the teacher's, by name."""
        return (item for item in self.named_parameters() if not item[0].startswith("teacher."))

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self._start_anew("val")

    def on_test_epoch_start(self) -> None:
        """Start counting."""
        self._start_anew("test")

    def _start_anew(self, stage: str) -> None:
        self.means[stage] = RunningMeans()  # an epoch that was broken off may have left some
        if self._frozen_teacher is not None:
            self._frozen_teacher.look_again()

    def on_validation_epoch_end(self) -> None:
        """Log the means over the validation pictures."""
        self._log_figures("val")

    def on_test_epoch_end(self) -> None:
        """Log the means over the test pictures."""
        self._log_figures("test")

    def _log_figures(self, stage: str) -> None:
        for name, value in self.figures(stage).items():
            self.log(name, value, prog_bar=name == "val/top1", sync_dist=True)

    def on_train_start(self) -> None:
        """Tell the losses which epoch goes on, where a run is taken up in the middle of one."""
        if self._means_of not in (None, self.current_epoch):
            self.means["train"] = RunningMeans()  # the checkpoint is from the last step of the epoch before
            self.finite.skipped = 0
        if self.trainer.fit_loop.restarted_mid_epoch:
            self.on_epoch(self.current_epoch)

    def on_train_epoch_start(self) -> None:
        """Tell the losses which epoch starts."""
        self._start_anew("train")
        self.finite.skipped = 0
        self.on_epoch(self.current_epoch)

    def on_epoch(self, epoch: int) -> None:
        """Move the losses to an epoch, counted from 0."""
        for term in self._terms().values():
            term.on_train_epoch_start(epoch, self.trainer.max_epochs or -1)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin a step."""
        self.performance.begin_step()

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Likewise."""
        self.performance.begin_step()

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Likewise."""
        self.performance.begin_step()

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Likewise."""
        self.performance.begin_step()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let the losses update their memories."""
        self._remember()

    def _remember(self) -> None:
        """Update them after a step, once."""
        self.step_terms = {}
        outputs, self._outputs = self._outputs, None
        if outputs is not None:
            for term in self._terms().values():
                term.on_train_batch_end(*outputs)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimise what is trainable in student and losses, never the teacher."""
        for tensor in (*self.losses.parameters(), *self.losses.buffers()):
            tensor.data = widened(tensor.data)  # losses compute in float32 also when the networks run in half precision
        trainable = [p for _, p in self.named_weights() if p.requires_grad]
        if not trainable:
            raise ValueError("the student has no trainable parameter; all have requires_grad=False")
        try:
            optimizer = self.fast_optimizer(self.optimizer(trainable))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the optimizer cannot be built: {error}") from error
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        monitor = getattr(scheduler, "monitor", "val/cross_entropy")  # read by ReduceLROnPlateau alone
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}

    def fast_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return the optimizer in the form that ``performance`` asks for."""
        sparse = any(getattr(module, "sparse", False) for module in self.modules())
        return fused(optimizer) if self.performance.fused_optimizer and not sparse else optimizer

    # Teacher hygiene

    def train(self, mode: bool = True) -> DistillationModule:
        """Set the mode of student and losses; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the teacher out; of a step that is done, the losses' memories are part.

        Raises:
            NonFiniteError: If weights, or logits or losses that they came from, are not finite.
        """
        state = checkpoint["state_dict"]
        self.finite.look_back(wait=True)
        for kept in (state, checkpoint.get("current_model_state", {})):  # the latter where averages stand in for them
            self.finite.look_at_weights(_kept(kept))
        if self._trainer is not None:
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            if progress.processed > progress.completed:  # by a callback, whose turn at the end of a step comes first
                self._remember()
                state.update(self.losses.state_dict(prefix="losses."))
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith("teacher.")}
        sums = self.means["train"].state_dict()
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            sums = {
                names: {part: self._of_each_process(values) for part, values in own.items()}
                for names, own in sums.items()
            }
        checkpoint["train_means"] = {"epoch": self.current_epoch, "sums": sums, "skipped": self.finite.skipped}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the teacher's own weights in, so that loading stays strict.

        Raises:
            ValueError: If the checkpoint is of another student or of other losses.
        """
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING and "train_means" in checkpoint:
            sums = {
                names: {part: self._own_share(values) for part, values in all_of.items()}
                for names, all_of in checkpoint["train_means"]["sums"].items()
            }
            self.means["train"].load_state_dict(sums)
            self._means_of = checkpoint["train_means"]["epoch"]
            self.finite.skipped = checkpoint["train_means"].get("skipped", 0)
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
        """Refuse a data set with other classes than the networks have, and make everything ready to run."""
        data = getattr(self.trainer, "datamodule", None)
        data_classes = getattr(data, "num_classes", None)
        if data_classes is not None and data_classes != self.num_classes:
            raise ValueError(
                f"the data has {data_classes} classes, but the student gives {self.num_classes} logits; "
                f"set num_classes of student and teacher to {data_classes}"
            )
        if self._frozen_teacher is not None:
            self._frozen_teacher.prepare()
            self._frozen_teacher.compile()
        options = self.performance
        options.prepare(self.trainer.strategy.root_device)
        options.lay_out(self.student)
        if "student" in options.compile:
            compile_in_place(self.student, options.compile_mode)
        if "losses" in options.compile:
            for term in self._terms().values():
                compile_in_place(term.loss, options.compile_mode)
        if stage == "fit":
            self._be_watchful()
            for term in self._terms().values():
                term.on_fit_start(getattr(data, "train_target", None))

    def _be_watchful(self) -> None:
        if self.finite.policy == "skip":
            if self.trainer.world_size > 1:
                raise ValueError(
                    f"non_finite=skip works in one process, but this run has {self.trainer.world_size}, which would "
                    "have to skip the same batches; set --model.non_finite=stop or --trainer.devices=1"
                )
            # Lightning's own word on a step that gives None
            warnings.filterwarnings("ignore", ".training_step. returned .None.")
        self.finite.reset()
        self._teacher_doubt.arise()

    def teardown(self, stage: str) -> None:
        """Give the student back in the usual layout, and let go of a step that was broken off."""
        self.step_terms = {}
        self.student.to(memory_format=torch.contiguous_format)


def _kept(state: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    """What a checkpoint keeps and has to be finite: all but the teacher, and memories of losses yet to be filled."""
    for name, value in state.items():
        is_memory = name.startswith("losses.") and not name.endswith(("weight", "bias", "running_mean", "running_var"))
        if isinstance(value, Tensor) and not name.startswith("teacher.") and not is_memory:
            yield name, value


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
        if hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"a loss cannot be named {name!r}, which is a name of torch's own modules; name it otherwise"
            )
    return terms


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


def as_given(data: L.LightningDataModule, batch: Any) -> Batch:
    """A batch of a loader as the networks get it, after what the data module does to it on its way.

    Args:
        data: the pictures.
        batch: what its loader gave.
    """
    return as_batch(data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0))


def run_loss(name: str, term: WeightedLoss, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
    """Return the raw value of one term.

    Raises:
        TypeError: If it is not a tensor of one number.
        ValueError: If the loss needs a part of the batch that is not there.
    """
    student, teacher, batch = term.inputs(student, teacher, batch)
    try:
        value = term.loss(student, teacher, batch)
    except KeyError as error:
        if error.args and error.args[0] in Batch.__annotations__ and error.args[0] not in batch:
            hint = "; gather leaves pictures out for losses without reads_image" if term.gather else ""
            raise ValueError(
                f"losses.{name} needs {error} in the batch, which has only {', '.join(batch)}{hint}"
            ) from error
        raise
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = f"shape {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"losses.{name} ({type(term.loss).__name__}) must return a scalar tensor, got {got}")
    return value.reshape(())
