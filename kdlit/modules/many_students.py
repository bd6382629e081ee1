"""Many students in one run: the same batches, one forward pass of one teacher, and to each its own training."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import _configure_optimizers, _configure_schedulers_automatic_opt
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import LRSchedulerConfig, OptimizerLRScheduler
from torch import Tensor

from kdlit.modules.base import DistillationModule, as_batch
from kdlit.modules.finite import NonFiniteError
from kdlit.modules.streams import RandomStream
from kdlit.modules.teacher import FrozenTeacher
from kdlit.types import Batch, ModelOutput

# What decides over a step of all students at once, so that one of them cannot have it its own way.
_NOT_FOR_ONE = ("optimizer_step", "optimizer_zero_grad", "backward", "configure_model")
_SEEN_BY_TEACHER = (
    "image",
    "image_strong",
    "image_teacher",
    "image_teacher_strong",
    "teacher_logits",
    "teacher_logits_strong",
)


class ManyStudents(L.LightningModule):
    """Trains students that have nothing in common but their batches and their teacher, each as if it were alone.

    A student is a whole module with losses, optimizer, schedule and precision of its own. What each of them reaches is
    what it reaches in a run of its own, bit for bit on the same machine: its gradients are clipped by their own norm, a
    loss that is not finite harms no other student, and each draws from a random stream of its own. A student whose run
    would end because it has diverged is dropped, and the others go on; one with ``non_finite=skip`` skips batches by
    itself. The teacher runs once a batch, with the layers that any of them reads; where one reads what a convolution
    gives to its batch norm, this batch norm is not folded, and the others see the teacher up to rounding only.

    All passes of a step are held until its backward pass, so memory grows with the number of students.

    Logged are the figures of each student, its name in front: ``NAME/train/loss``, ``NAME/val/top1``. Callbacks that
    watch a figure need that name, too.

    Args:
        students: modules by name. Their teachers must be equal and are replaced by the first; some may have none.
        seeds: where the random stream of each begins when training does: a seed, as ``seed_everything`` called right
            before the separate run is fitted, or a :class:`~kdlit.modules.streams.RandomStream`. Those not named go on
            from the state in which the global generators are when the run is set up.

    Raises:
        ValueError: If there is no student, a name is not made of letters, digits, ``_`` and ``-``, two share
            parameters, or teachers or classes differ.
    """

    def __init__(
        self, students: Mapping[str, DistillationModule], seeds: Mapping[str, int | RandomStream] | None = None
    ) -> None:
        super().__init__()
        _check(students)
        if unknown := set(seeds or {}) - set(students):
            raise ValueError(f"seeds names {', '.join(sorted(unknown))}, but the students are {', '.join(students)}")
        self.names = tuple(students)
        self.num_classes = next(iter(students.values())).num_classes
        self.streams = {
            name: seed if isinstance(seed, RandomStream) else RandomStream(seed) for name, seed in (seeds or {}).items()
        }
        self.schedules: dict[str, list[LRSchedulerConfig]] = {}
        self.dropped: dict[str, str] = {}
        self.scalers: _StudentScalers | None = None
        self._restored: dict[str, dict[str, Any]] = {}
        self._frozen_teacher = _share_teacher(students)
        ignored = []
        for name, student in students.items():
            self.add_module(_key(name), student)  # as a direct child it gets the trainer from Lightning
            student.log = partial(self._log_of, name)  # type: ignore[method-assign]
            student._log_prefix = f"{name}/"
            if student.teacher is not None:
                ignored += [f"{_key(name)}.teacher.{key}" for key in student.teacher.state_dict()]
        self._ddp_params_and_buffers_to_ignore = ignored

    @property
    def students(self) -> dict[str, DistillationModule]:
        """All students by name."""
        return {name: cast("DistillationModule", self._modules[_key(name)]) for name in self.names}

    @property
    def going(self) -> list[str]:
        """Names of the students that have not been dropped."""
        return [name for name in self.names if name not in self.dropped]

    @property
    def shown(self) -> dict[str, float]:
        """The objectives of the step that was last looked at."""
        every = {name: self.students[name].shown for name in self.going}
        return {f"train/loss/{name}": shown["train/loss"] for name, shown in every.items() if shown}

    @contextmanager
    def turn(self, name: str) -> Iterator[DistillationModule]:
        """Give a student, while the global random generators are its own; errors are told with its name."""
        try:
            with self.streams.setdefault(name, RandomStream()).flowing(self.device):
                yield self.students[name]
        except Exception as error:
            if error.args and isinstance(error.args[0], str) and not error.args[0].startswith(f"student {name}: "):
                error.args = (f"student {name}: {error.args[0]}", *error.args[1:])
            raise

    def _log_of(self, student: str, name: str, *args: Any, **kwargs: Any) -> None:
        self.log(f"{student}/{name}", *args, **kwargs)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return the logits of every student, shape ``(B, C)``, for pictures of shape ``(B, *input_size)``."""
        return {name: student(image) for name, student in self.students.items()}

    # Steps

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        """Let every student take its step; the sum of their objectives gives each the gradient of its own.

        None if all of them skip the batch.
        """
        losses, outputs = [], {}
        for name, output in self._each("training_step", as_batch(batch), batch_idx):
            output = {"loss": output} if isinstance(output, Tensor) else output or {}
            if "loss" in output:
                losses.append(output["loss"] if self.scalers is None else self.scalers.of[name].scale(output["loss"]))
                output = {**output, "loss": output["loss"].detach()}
            outputs[name] = output
        return {"loss": sum(losses), "students": outputs} if losses else None

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Measure every student on validation pictures."""
        return {"students": dict(self._each("validation_step", as_batch(batch), batch_idx))}

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Measure every student on test pictures."""
        return {"students": dict(self._each("test_step", as_batch(batch), batch_idx))}

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Let every student name the classes of pictures."""
        return {"students": dict(self._each("predict_step", as_batch(batch), batch_idx))}

    def _each(self, step: str, batch: Batch, batch_idx: int) -> Iterator[tuple[str, Any]]:
        """What a step of each student gives for the same batch."""
        if self._frozen_teacher is not None:
            self._frozen_teacher.forget()
        for name in self.going:
            before = _versions(batch)
            try:
                with self.turn(name) as student:
                    output = getattr(student, step)({**batch}, batch_idx)
            except Exception as error:  # what is no number makes losses and solvers fail in many ways
                if step != "training_step" or not self._may_drop(name, error, batch):
                    raise
                self._drop(name, str(error))
                continue
            if _versions(batch) != before:
                raise ValueError(
                    f"student {name} writes into its pictures, which others see too; let it copy them first"
                )
            yield name, output

    def _may_drop(self, name: str, error: Exception, batch: Batch | None = None) -> bool:
        """Whether a step failed because the student has diverged, so that the others had better go on without it."""
        if len(self.going) == 1 or self.trainer.world_size > 1:
            return False
        if batch is None or isinstance(error, NonFiniteError):
            return isinstance(error, NonFiniteError) and not error.shared
        try:
            with torch.no_grad():
                return not self.students[name](batch["image"]).isfinite().all()
        except Exception:  # something else is wrong, and the first error says what
            return False

    def _drop(self, name: str, reason: str) -> None:
        self.dropped[name] = reason
        self.students[name].finite.over = True
        for config in self.trainer.lr_scheduler_configs:
            if getattr(config.scheduler, "student", None) == name:
                config.strict = False  # its figures will be missing
        rank_zero_warn(f"{reason}; the others go on without it")

    # Training

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Bind the optimizers of all students into one; their schedules go on by themselves."""
        optimizers, schedules = {}, []
        for name in self.names:
            with self.turn(name) as student:
                found, schedulers, monitor = _configure_optimizers(student.configure_optimizers())  # type: ignore[arg-type]
                if len(found) != 1 or isinstance(found[0], torch.optim.LBFGS):
                    raise ValueError("in a run with other students it needs one optimizer that takes one pass a step")
                optimizers[name] = found[0]
                self.schedules[name] = _configure_schedulers_automatic_opt(schedulers, monitor)
        self.scalers = None
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
            self.scalers = _StudentScalers(self.names, plugin.scaler)
            plugin.scaler = cast("torch.amp.GradScaler", self.scalers)
        everybody = StudentOptimizers(optimizers)
        for name, configs in self.schedules.items():
            for config in configs:
                adapter = _Schedule(name, config.scheduler, everybody)
                schedules.append({**vars(config), "scheduler": adapter, "monitor": f"{name}/{config.monitor}"})
        return cast("OptimizerLRScheduler", ([everybody], schedules))

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Move on the schedule of one student."""
        with self.turn(scheduler.student) as student:
            student.lr_scheduler_step(scheduler.scheduler, metric)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of every student by themselves."""
        for name in self.names:
            with self.turn(name) as student:
                student.configure_gradient_clipping(
                    _own(optimizer, name),
                    gradient_clip_val=gradient_clip_val,
                    gradient_clip_algorithm=gradient_clip_algorithm,
                )

    def setup(self, stage: str) -> None:
        """Set every student up, each from the state of the generators that it would find alone."""
        if stage == "fit" and isinstance(self.trainer.strategy, ParallelStrategy):
            for stream in self.streams.values():
                stream.restart()  # as such a strategy does to the generators when it starts
        if self._frozen_teacher is not None:
            self._frozen_teacher.frozen.prepare()
            self._frozen_teacher.frozen.compile()
        for name in self.names:
            with self.turn(name) as student:
                student.setup(stage)

    def on_train_start(self) -> None:
        """Take up the random streams of a checkpoint, and tell the students."""
        for name, state in self._restored.items():
            self.streams[name].load_state_dict(state)
        self._restored = {}
        _tell(self, "on_train_start")

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep every student apart under ``students``, with what it keeps itself and its random stream."""
        whole = checkpoint.pop("state_dict")
        kept = {}
        for name, student in self.students.items():
            prefix = f"{_key(name)}."
            state = {key.removeprefix(prefix): value for key, value in whole.items() if key.startswith(prefix)}
            own = {**checkpoint, "state_dict": state}
            try:
                with self.turn(name):
                    student.on_save_checkpoint(own)
            except NonFiniteError as error:
                if not self._may_drop(name, error):
                    raise
                self._drop(name, str(error))
                student.on_save_checkpoint(own)
            kept[name] = {key: value for key, value in own.items() if value is not checkpoint.get(key)}
            if name in self.streams:
                kept[name]["random"] = self.streams[name].state_dict()
        checkpoint.update(state_dict={}, students=kept, dropped=self.dropped)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give every student what it kept.

        Raises:
            ValueError: If the checkpoint is of other students.
        """
        kept = checkpoint.get("students", {})
        if set(kept) != set(self.names):
            raise ValueError(
                f"the checkpoint is of the students {', '.join(kept) or '(none)'}, but these are "
                f"{', '.join(self.names)}; use the config.yaml beside it"
            )
        self.dropped = dict(checkpoint["dropped"])
        for name in self.dropped:
            self.students[name].finite.over = True
        state = {}
        for name in self.names:
            own = {**checkpoint, **kept[name], "state_dict": dict(kept[name]["state_dict"])}
            with self.turn(name) as student:
                student.on_load_checkpoint(own)
            state.update({f"{_key(name)}.{key}": value for key, value in own["state_dict"].items()})
            if self._trainer is not None and self.trainer.training and "random" in own:
                self._restored[name] = own["random"]
        checkpoint["state_dict"] = state


def frozen_teacher_of(module: L.LightningModule) -> FrozenTeacher | None:
    """The teacher at work in a module, or in one of several students; None if there is none.

    Args:
        module: any.
    """
    teacher = getattr(module, "_frozen_teacher", None)
    teacher = teacher.frozen if isinstance(teacher, _SharedTeacher) else teacher
    return teacher if isinstance(teacher, FrozenTeacher) else None


class StudentOptimizers(torch.optim.Optimizer):
    """The optimizers of several students, which step together.

    Args:
        optimizers: one for each student by name.
    """

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        self.optimizers = dict(optimizers)
        super().__init__([torch.zeros(1)], {})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all students, as they are now: a restored optimizer has new ones."""
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        """Each optimizer keeps its own."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Each optimizer keeps its own."""

    def step(self, closure: Any = None) -> Any:
        """Compute all gradients, then let every optimizer step."""
        loss = None if closure is None else closure()
        for optimizer in self.optimizers.values():
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """That of each optimizer by the student's name."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each optimizer its own."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state_dict[name])


class _StudentScalers:
    """A gradient scaler for each student, so that an overflow of one has no other miss its step."""

    def __init__(self, names: Sequence[str], scaler: torch.amp.GradScaler) -> None:
        scaler = next(iter(scaler.of.values())) if isinstance(scaler, _StudentScalers) else scaler
        self.of = {name: copy.deepcopy(scaler) for name in names}
        self._stepped: list[tuple[str, torch.optim.Optimizer]] = []

    def scale(self, loss: Tensor) -> Tensor:
        """Nothing: each student's part of the sum is scaled before."""
        return loss

    def unscale_(self, optimizer: StudentOptimizers) -> None:
        for name, own in self._with_gradients(optimizer):
            if not getattr(own, "_step_supports_amp_scaling", False):  # those that do unscale as they step
                self.of[name].unscale_(own)

    def step(self, optimizer: StudentOptimizers) -> None:
        self._stepped = self._with_gradients(optimizer)
        for name, own in self._stepped:
            self.of[name].step(own)

    def update(self) -> None:
        for name, _ in self._stepped:
            self.of[name].update()

    def _with_gradients(self, optimizer: StudentOptimizers) -> list[tuple[str, torch.optim.Optimizer]]:
        """Those that have any: a student that is dropped or skips the batch has none, which no scaler takes."""
        return [
            (name, own)
            for name, own in optimizer.optimizers.items()
            if any(weight.grad is not None for group in own.param_groups for weight in group["params"])
        ]

    def state_dict(self) -> dict[str, Any]:
        return {name: scaler.state_dict() for name, scaler in self.of.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, scaler in self.of.items():
            scaler.load_state_dict(state_dict[name])


class _Schedule:
    """The schedule of one student, in a form that Lightning accepts beside the optimizer of all."""

    def __init__(self, student: str, scheduler: Any, optimizer: StudentOptimizers) -> None:
        self.student = student
        self.scheduler = scheduler
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state_dict)


class _SharedTeacher:
    """A frozen teacher that runs once for a batch, whoever asks first."""

    def __init__(self, frozen: FrozenTeacher, needs_strong_view: bool) -> None:
        self.frozen = frozen
        self.needs_strong_view = needs_strong_view
        self._said: tuple[list[Any], ModelOutput] | None = None

    def forget(self) -> None:
        self._said = None

    def __call__(self, batch: Batch, training: bool) -> ModelOutput:
        seen = [batch.get(key) for key in _SEEN_BY_TEACHER]
        if self._said is None or any(one is not other for one, other in zip(seen, self._said[0], strict=True)):
            has_strong_view = "image_strong" in batch or "teacher_logits_strong" in batch
            self._said = seen, self.frozen(batch, training and self.needs_strong_view and has_strong_view)
        return self._said[1]


class _ShareOfTeacher:
    """What one student sees of it; takes the place of the student's own :class:`FrozenTeacher`."""

    def __init__(self, shared: _SharedTeacher, student: DistillationModule, layers: frozenset[str]) -> None:
        self.shared = shared
        self.student = student
        self.layers = layers

    def __call__(self, batch: Batch, with_strong_view: bool) -> ModelOutput:
        said = self.shared(batch, self.student.training)
        features = {path: said.features[path] for path in self.layers}
        return ModelOutput(said.logits, features, said.logits_strong if with_strong_view else None)

    def prepare(self) -> None:
        """Nothing: it is prepared once for all."""

    def compile(self) -> None:
        """Likewise."""

    def look_again(self) -> None:
        """See whether the network was changed."""
        self.shared.frozen.look_again()


def own_values(values: Mapping[str, Any], student: str) -> dict[str, Any]:
    """Those of one student, under the names that they have in its separate run."""
    prefix = f"{student}/"
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _key(name: str) -> str:
    return f"students/{name}"


def _share_teacher(students: Mapping[str, DistillationModule]) -> _SharedTeacher | None:
    """Let the first teacher speak to all students that have one.

    Raises:
        ValueError: If the teachers differ.
    """
    taught = {
        name: (student, student._frozen_teacher)
        for name, student in students.items()
        if student._frozen_teacher is not None
    }
    if not taught:
        return None
    first, (owner, frozen) = next(iter(taught.items()))
    for name, (student, other) in taught.items():
        if difference := _difference(frozen, other):
            raise ValueError(
                f"all students must have the same teacher, but those of {first} and {name} differ in {difference}"
            )
        student.teacher = owner.teacher
        other._tap.remove()  # what it looks at is looked at for all
    layers = {path for _, own in taught.values() for path in own.layers}
    strong = any(term.needs_strong_view for student, _ in taught.values() for term in student._terms().values())
    union = FrozenTeacher(frozen.network, layers, frozen.performance, frozen.example, frozen.has_own_input)
    union.prepare()
    shared = _SharedTeacher(union, strong)
    for student, own in taught.values():
        student._frozen_teacher = _ShareOfTeacher(shared, student, own.layers)  # type: ignore[assignment]
    return shared


def _difference(one: FrozenTeacher, other: FrozenTeacher) -> str:
    """What two teachers differ in; empty if nothing."""
    if one.has_own_input != other.has_own_input or one.example.shape != other.example.shape:
        return f"their input, {tuple(one.example.shape[1:])} and {tuple(other.example.shape[1:])}"
    for option in ("channels_last", "fold_teacher", "teacher_dtype", "tf32", "compile_mode"):
        ours, theirs = getattr(one.performance, option), getattr(other.performance, option)
        if ours != theirs:
            return f"performance.{option}, {ours!r} and {theirs!r}"
    if ("teacher" in one.performance.compile) != ("teacher" in other.performance.compile):
        return "whether performance.compile names the teacher"
    if one.network is other.network:
        return ""
    if repr(one.network) != repr(other.network):
        return f"their layers ({type(one.network).__name__} and {type(other.network).__name__})"
    ours, theirs = one.network.state_dict(), other.network.state_dict()
    odd = [key for key in ours if key not in theirs or not _same(ours[key], theirs[key])]
    return f"their weights, such as {odd[0]}" if odd else ""


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else bool(one == other)


def _check(students: Mapping[str, DistillationModule]) -> None:
    """Refuse names and modules that cannot be together."""
    if not students:
        raise ValueError("students must hold at least one module, got none")
    if len({str(name).lower() for name in students}) < len(students):
        raise ValueError(
            f"the names of students must differ in more than upper and lower case, got {', '.join(map(str, students))}"
        )
    owner: dict[int, str] = {}
    first, one = next(iter(students.items()))
    for name, student in students.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"the name of a student must be made of letters, digits, _ and -, got {name!r}")
        if not isinstance(student, DistillationModule):
            raise ValueError(f"student {name} must be a DistillationModule, got {type(student).__name__}")
        if student.num_classes != one.num_classes:
            raise ValueError(
                f"all students must have the same classes, but student {first} gives {one.num_classes} logits and "
                f"student {name} {student.num_classes}"
            )
        own_way = [hook for hook in _NOT_FOR_ONE if is_overridden(hook, student)]
        if own_way or not student.automatic_optimization:
            what = f"has its own {own_way[0]}" if own_way else "optimises by hand (automatic_optimization=False)"
            raise ValueError(f"student {name} {what}, which a run with other students cannot leave to it")
        for key, parameter in student.named_parameters():
            if not key.startswith("teacher.") and (other := owner.setdefault(id(parameter), name)) != name:
                raise ValueError(
                    f"students {other} and {name} share parameters; give each its own module (copy.deepcopy)"
                )


def _versions(batch: Batch) -> list[int]:
    """How often each part of a batch has been written to; nobody counts in inference mode."""
    return [value._version for value in batch.values() if isinstance(value, Tensor) and not value.is_inference()]


def _own(value: Any, name: str) -> Any:
    """What concerns one student in an argument of a hook."""
    value = getattr(value, "_optimizer", value)  # Lightning passes some wrapped
    if isinstance(value, StudentOptimizers):
        return value.optimizers[name]
    return value["students"][name] if isinstance(value, dict) and "students" in value else value


def _tell(self: ManyStudents, hook: str, *args: Any, parent: type = L.LightningModule, **kwargs: Any) -> None:
    for name in self.going:
        if is_overridden(hook, self.students[name], parent):
            try:
                with self.turn(name) as student:
                    getattr(student, hook)(*(_own(value, name) for value in args), **kwargs)
            except NonFiniteError as error:
                if not self._may_drop(name, error):
                    raise
                self._drop(name, str(error))


def _told(hook: str) -> Any:
    def tell(self: ManyStudents, *args: Any, **kwargs: Any) -> None:
        _tell(self, hook, *args, **kwargs)

    tell.__name__, tell.__doc__ = hook, "Tell every student in its turn."
    return tell


def _told_of_batch(hook: str) -> Any:
    def tell(self: ManyStudents, *args: Any, **kwargs: Any) -> None:
        for student in self.students.values():
            student.performance.begin_step()
        _tell(self, hook, *args, parent=DistillationModule, **kwargs)  # which does no more than that

    tell.__name__, tell.__doc__ = hook, "Begin a step, and tell every student in its turn that wants to know."
    return tell


for _hook in (
    *("on_fit_start", "on_fit_end", "on_train_end", "on_train_epoch_start", "on_train_epoch_end"),
    *("on_train_batch_end", "on_before_zero_grad", "on_after_backward"),
    *("on_before_optimizer_step", "teardown"),
    *(f"on_{stage}_{what}" for stage in ("validation", "test", "predict") for what in ("start", "end")),
    *(f"on_{stage}_epoch_{what}" for stage in ("validation", "test", "predict") for what in ("start", "end")),
    *(f"on_{stage}_batch_end" for stage in ("validation", "test", "predict")),
):
    setattr(ManyStudents, _hook, _told(_hook))
for _stage in ("train", "validation", "test", "predict"):
    setattr(ManyStudents, f"on_{_stage}_batch_start", _told_of_batch(f"on_{_stage}_batch_start"))
