"""Students that teach each other: deep mutual learning (Zhang et al., CVPR 2018)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from kdlit.losses import CrossEntropyLoss, DistillationLoss, DMLLoss, WeightedLoss
from kdlit.metrics import is_right
from kdlit.modules.base import default_optimizer, run_loss, weighted_terms
from kdlit.modules.classification import ClassificationDistillation
from kdlit.modules.finite import NonFinite
from kdlit.modules.networks import check_image, logits_of, run_network
from kdlit.modules.performance import Performance, Preset, compile_in_place
from kdlit.types import Batch, ModelOutput


class MutualLearning(ClassificationDistillation):
    r"""Trains two or more students in one run on the same batches; each is a teacher of all others.

    The objective of student :math:`a` of :math:`n`, with its peers :math:`b` in the teacher's place, is

    .. math:: L_a = L_{\text{labels}}(a) + \frac{1}{n - 1} \sum_{b \neq a} L_{\text{mutual}}(a, b)

    The mean over peers is the paper's; for the sum of the authors' code give the loss a weight of :math:`n - 1`. They
    update the students in turn, each against peers that have moved already; here one optimizer updates all at once,
    from one forward pass of each student in train mode. A peer's output is detached, so the sum of all :math:`L_a`
    gives every student the gradient of its own :math:`L_a` alone. What an optimizer or the trainer takes over all
    parameters together, such as the norm for ``gradient_clip_val``, is taken over all students.

    The first student is :attr:`student`: the one that ``val/top1`` and so the best checkpoint are about, that predicts
    and that is exported as ``student.pt``. The others are :attr:`peers`, exported as ``student_NAME.pt``, which
    :func:`kdlit.models.from_checkpoint` reads like any other.

    Logged: ``train/loss`` (the sum), ``train/loss/NAME`` (one student's objective), ``train/loss/NAME/TERM`` and
    ``train/loss/NAME/TERM/PEER`` (without weights); ``train/NAME/top1``, ``val/NAME/top1`` and ``test/NAME/top1`` of
    every student; ``cross_entropy``, ``top1`` and ``top5`` of the first as in :class:`ClassificationDistillation`.

    Args:
        students: networks for the same classes, at least two, by name or as a list; a list names them 0, 1, ...
        losses: terms of every student's objective by name; by default the labels' cross-entropy ``ce`` and ``dml``,
            :class:`~kdlit.losses.DMLLoss`, with weight 1. Those that need a teacher are averaged over the peers. Each
            student, and each of its peers, has its own copy, so parameters and memories are not mixed.
        optimizer: makes the one optimizer from the parameters of all students and losses.
        lr_scheduler: makes the learning-rate schedule from the optimizer, stepped once an epoch.
        input_size: size of one picture, ``(C, H, W)``.
        performance: how a step is computed, as in :class:`~kdlit.modules.DistillationModule`.
        non_finite: what to do if logits or a loss are not finite, as there.

    Raises:
        ValueError: If there are fewer than two students, two share parameters or differ in their classes, a name is
            not made of letters, digits, ``_`` and ``-``, or no loss reads the labels (``needs_teacher`` is true of
            all).
    """

    def __init__(
        self,
        students: Mapping[str, nn.Module] | Sequence[nn.Module],
        losses: Mapping[str, WeightedLoss | DistillationLoss | None] | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        input_size: Sequence[int] = (3, 32, 32),
        performance: Performance | Preset = "exact",
        non_finite: NonFinite = "stop",
    ) -> None:
        named = _named(students)
        wanted = weighted_terms({"ce": CrossEntropyLoss(), "dml": DMLLoss()} if losses is None else losses)
        own = {name: copy.deepcopy(term) for name, term in wanted.items() if not term.needs_teacher}
        if not own:
            raise ValueError(
                "losses must hold one that needs no teacher, such as CrossEntropyLoss: students that learn from each "
                f"other alone learn nothing of the labels; got {', '.join(wanted)}"
            )
        first, *others = named
        super().__init__(
            named[first],
            own,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            input_size=input_size,
            performance=performance,
            non_finite=non_finite,
        )
        self.peers = nn.ModuleDict({name: named[name] for name in others})
        self.names = tuple(named)
        self._seen: tuple[dict[str, ModelOutput], Batch] | None = None  # of a step whose end is yet to come

        example = torch.zeros(1, *input_size)
        for name, student in named.items():
            if (classes := self._count_classes(f"student {name}", student, example)) != self.num_classes:
                raise ValueError(
                    f"all students must have the same classes, but student {first} gives {self.num_classes} logits and "
                    f"student {name} {classes}; set num_classes of one to that of the other"
                )

        self.losses = nn.ModuleDict()
        self._pairs: dict[str, tuple[str, str]] = {}  # key in losses: the student, and its peer or ""
        for name in named:
            for key, term in wanted.items():
                for peer in [other for other in named if other != name] if term.needs_teacher else [""]:
                    path = f"{name}/{key}/{peer}".rstrip("/")
                    self._pairs[path] = name, peer
                    self.losses[path] = copy.deepcopy(term)
                    self._terms()[path].setup(named[name], named.get(peer), example)
        self._student_tap.remove()
        self._taps = {
            name: self._tap(f"student {name}", student, example, self._layers_of(name))
            for name, student in named.items()
        }
        self._student_tap = self._taps[first]

    def _layers_of(self, name: str) -> set[str]:
        """What the losses want to see of a student, as the one that learns and as the one it learns from."""
        terms = [(self._terms()[path], *pair) for path, pair in self._pairs.items()]
        learns = {layer for term, student, _ in terms if student == name for layer in term.student_layers}
        return learns | {layer for term, _, peer in terms if peer == name for layer in term.teacher_layers}

    @property
    def students(self) -> dict[str, nn.Module]:
        """All students by name, the first one first."""
        return dict(zip(self.names, (self.student, *self.peers.values()), strict=True))

    def setup(self, stage: str) -> None:
        """Make everything ready to run."""
        super().setup(stage)
        self.performance.lay_out(self.peers)
        if "student" in self.performance.compile:
            for peer in self.peers.values():
                compile_in_place(peer, self.performance.compile_mode)

    def teardown(self, stage: str) -> None:
        """Give all students back in the usual layout."""
        super().teardown(stage)
        self.peers.to(memory_format=torch.contiguous_format)

    def trained(self) -> list[nn.Module]:
        """All students."""
        return list(self.students.values())

    def run_step(self, batch: Batch) -> dict[str, Any]:
        """Run every student once and add up all objectives."""
        self.clock.mark("update")
        check_image(batch["image"], self._channels, self.dtype)
        device, strong = batch["image"].device, self._needs_strong_view()
        with self.student_precision(device):
            outputs = {
                name: run_network(f"student {name}", student, self._taps[name], batch, strong)
                for name, student in self.students.items()
            }
        self.clock.mark("student")
        self.finite.begin(self.place(), {f"student {name}": output for name, output in outputs.items()}, batch)
        detached = {name: output.detach() for name, output in outputs.items()}
        objectives = {name: torch.zeros((), device=device) for name in self.names}
        figures = {}
        with torch.autocast(device.type, enabled=False):
            for path, term in self._terms().items():
                name, peer = self._pairs[path]
                value = run_loss(path, term, outputs[name], cast("ModelOutput", detached.get(peer)), batch)
                self.step_terms[path] = self.share_of(path) * value
                objectives[name] = objectives[name] + self.step_terms[path]
                figures[path] = self.performance.kept(value)
        self.clock.mark("losses")
        objective = torch.stack(list(objectives.values())).sum()
        self.finite.end(objective, figures)
        figures |= {name: value.detach() for name, value in objectives.items()}
        figures = {f"train/loss/{name}": value for name, value in figures.items()}
        figures["train/loss"] = objective.detach()
        if "target" in batch:
            figures |= {
                f"train/{name}/top1": is_right(output.logits, batch["target"]) for name, output in detached.items()
            }
            figures["train/top1"] = figures[f"train/{self.names[0]}/top1"]
        self.means["train"].add(figures, len(batch["image"]))
        self._seen = detached, batch
        first = detached[self.names[0]]
        more = {"students": detached, "figures": figures}
        return {"loss": objective, "batch": batch, "student": first, "teacher": None, **more}

    def share_of(self, name: str) -> float:
        """Of a term between students the mean over the peers counts."""
        return super().share_of(name) / (len(self.peers) if self._pairs[name][1] else 1)

    def _remember(self) -> None:
        """Let the losses update their memories after a step, once."""
        self.step_terms = {}
        seen, self._seen = self._seen, None
        if seen is not None:
            students, batch = seen
            for path, term in self._terms().items():
                name, peer = self._pairs[path]
                term.on_train_batch_end(students[name], cast("ModelOutput", students.get(peer)), batch)

    def measure(self, stage: str, batch: Batch, teacher: ModelOutput) -> dict[str, Tensor]:
        """Say how good every student is, and more about the first."""
        figures = super().measure(stage, batch, teacher)
        figures[f"{stage}/{self.names[0]}/top1"] = figures[f"{stage}/top1"]
        with self.student_precision(batch["image"].device):
            for name, peer in self.peers.items():
                logits = logits_of(peer(batch["image"]), f"student {name}")
                figures[f"{stage}/{name}/top1"] = is_right(logits, batch["target"])
        return figures


def _named(students: Mapping[str, nn.Module] | Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Students by name, once nothing is wrong with the names and no two share weights."""
    named = dict(students) if isinstance(students, Mapping) else {str(i): net for i, net in enumerate(students)}
    if len(named) < 2:
        raise ValueError(f"students must hold at least two networks, got {len(named)}")
    owner: dict[int, str] = {}
    for name, student in named.items():
        if not name.replace("-", "").replace("_", "").isalnum() or hasattr(nn.ModuleDict(), name):
            raise ValueError(f"the names in students must be made of letters, digits, _ and -, got {name!r}")
        for parameter in student.parameters():
            if (other := owner.setdefault(id(parameter), name)) != name:
                raise ValueError(
                    f"students {other} and {name} share parameters; give each its own network (copy.deepcopy)"
                )
    return named
