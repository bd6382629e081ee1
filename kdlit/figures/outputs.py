"""What student and teacher say of the same pictures, found once and drawn many times."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import lightning as L
import torch
from torch import Tensor, nn

from kdlit.data.base import SplitDataModule, hold_out
from kdlit.figures.style import CaptionedFigure
from kdlit.losses.functional import check_logits, check_target, widened
from kdlit.models.features import FeatureTap, dry_run, eval_mode
from kdlit.models.layers import feature_layers
from kdlit.modules.base import as_given
from kdlit.modules.networks import logits_of
from kdlit.types import Batch

Students: TypeAlias = nn.Module | Mapping[str, nn.Module]

PICTURES = 10_000
_STAGES = {"train": "fit", "val": "fit", "test": "test", "predict": "predict"}


@dataclass(frozen=True)
class NetworkOutputs:
    """What one network says of some pictures.

    Attributes:
        logits: float, shape ``(N, C)``, on the CPU.
        features: what its classifier is given, float, shape ``(N, D)``; None if that layer is not known.
    """

    logits: Tensor
    features: Tensor | None = None


@dataclass(frozen=True)
class Outputs:
    """What some students and their teacher say of the same pictures.

    Attributes:
        students: by label.
        teacher: the teacher.
        target: labels, int64, shape ``(N,)``.
        class_names: one for each logit.
        split: which pictures, such as ``test``.
        index: their positions in that part of the data, int64, shape ``(N,)``.
        available: how many pictures that part holds; None if that is not known.

    Raises:
        ValueError: If there is no student or no picture, shapes or class counts differ, a label is out of range or a
            logit is not finite.
    """

    students: Mapping[str, NetworkOutputs]
    teacher: NetworkOutputs
    target: Tensor
    class_names: Sequence[str]
    split: str
    index: Tensor
    available: int | None = None

    def __post_init__(self) -> None:
        _check_labels(self.students)
        if not len(self.target):
            raise ValueError(f"there is no {self.split} picture to draw from")
        classes = self.teacher.logits.shape[1]
        for label, network in self.networks.items():
            if network.logits.shape[1] != classes:
                raise ValueError(
                    f"student {label!r} gives {network.logits.shape[1]} logits, but its teacher {classes}; compare "
                    "networks of the same classes"
                )
            try:
                check_logits(network.logits)
            except ValueError as error:
                raise ValueError(f"network {label!r}: {str(error).replace('student_logits', 'logits')}") from None
            check_target(self.target, network.logits)
            if network.features is not None and not network.features.isfinite().all():
                raise ValueError(f"network {label!r} gives features that are not finite")
        if len(self.class_names) != classes:
            raise ValueError(f"class_names must name {classes} classes, got {len(self.class_names)}")
        if self.index.shape != self.target.shape:
            raise ValueError(
                f"index must have the shape of target, {tuple(self.target.shape)}, got {tuple(self.index.shape)}"
            )

    def __len__(self) -> int:
        return len(self.target)

    @property
    def networks(self) -> dict[str, NetworkOutputs]:
        """The teacher, as ``teacher``, and the students by label."""
        return {"teacher": self.teacher, **self.students}

    @property
    def description(self) -> str:
        """Which pictures they are, for captions."""
        some = self.available is not None and len(self) < self.available
        of_all = f" of {self.available:,}" if some else ""
        return f"{len(self):,}{of_all} {self.split} picture{'s' * (len(self) > 1 or some)}"

    def row(self, sample: int | None) -> int:
        """Where a picture is, given its position in the data; None for the first.

        Raises:
            ValueError: If it is not among the pictures.
        """
        if sample is None:
            return 0
        found = (self.index == sample).nonzero().flatten()
        if not len(found):
            raise ValueError(
                f"sample {sample} is not among the {self.description}, which lie at {int(self.index.min())} to "
                f"{int(self.index.max())}; name another, or take more pictures"
            )
        return int(found[0])

    def class_index(self, name: int | str) -> int:
        """Number of a class, given that or its name.

        Raises:
            ValueError: If there is no such class.
        """
        number = name if isinstance(name, int) else next((i for i, n in enumerate(self.class_names) if n == name), -1)
        if not 0 <= number < len(self.class_names):
            raise ValueError(
                f"there is no class {name!r}; the {len(self.class_names)} classes are {', '.join(self.class_names[:5])}"
                f"{', ...' * (len(self.class_names) > 5)}"
            )
        return number

    def only(self, rows: Tensor) -> Outputs:
        """The same of fewer pictures, given their rows."""

        def of(network: NetworkOutputs) -> NetworkOutputs:
            return NetworkOutputs(network.logits[rows], None if network.features is None else network.features[rows])

        students = {label: of(network) for label, network in self.students.items()}
        return replace(
            self, students=students, teacher=of(self.teacher), target=self.target[rows], index=self.index[rows]
        )

    def some(self, count: int) -> Outputs:
        """The same of at most ``count`` pictures, evenly over the classes.

        Raises:
            ValueError: If the count is below 1.
        """
        if count < 1:
            raise ValueError(f"at least 1 picture must be taken, got {count}")
        if count >= len(self):
            return self
        return self.only(hold_out(self.target, count, seed=0).nonzero().flatten())


def _check_labels(students: Mapping[str, object]) -> None:
    if not students:
        raise ValueError("there is no student to compare")
    if "teacher" in students:
        raise ValueError("no student may be labelled 'teacher', which stands for the teacher; rename it")


def outputs_of(
    student: Students,
    teacher: nn.Module,
    data: L.LightningDataModule,
    *,
    split: str = "test",
    pictures: int | None = PICTURES,
) -> Outputs:
    """Show the same pictures to student and teacher, once.

    The networks run in eval mode, without a graph, where they are and in their own precision; afterwards they are in
    the mode they were in. The teacher gets its own form of the pictures, ``image_teacher``, where the data has one.

    Pictures of kdlit's data modules that know their pictures one by one are never augmented, not even those for
    training. From any other data module come what its loaders give: of ``train`` most likely augmented pictures.

    Args:
        student: a network that returns logits, or several by label.
        teacher: the same for the teacher.
        data: its batches are ``(image, target)``, ``(image, target, index)`` or dictionaries; it is prepared and set up
            here.
        split: ``train``, ``val``, ``test`` or ``predict``.
        pictures: how many at most, always the same ones, drawn from all, and evenly over the classes where labels are
            known beforehand; None takes all. Logits and features of these are kept in memory. Of a data set without a
            length the first are taken.

    Raises:
        ValueError: If there is no such split or no picture in it, a label is missing or out of range, class counts
            differ, or logits are not finite.
        TypeError: If a network returns no logits.
    """
    students = dict(student) if isinstance(student, Mapping) else {"student": student}
    _check_labels(students)
    if not isinstance(teacher, nn.Module):
        raise ValueError(f"a teacher is needed to compare with, got {teacher!r}")
    if split not in _STAGES:
        raise ValueError(f"split must be one of {', '.join(_STAGES)}, got {split!r}")
    if pictures is not None and pictures < 1:
        raise ValueError(f"pictures must be at least 1 or None, got {pictures!r}")
    data.prepare_data()
    data.setup(_STAGES[split])
    available, batches = _plain(data, split, pictures) or _loaded(data, split, pictures)
    watched: dict[str, _Watched] = {}
    target: list[Tensor] = []
    index: list[Tensor] = []
    with ExitStack() as stack, torch.no_grad(), torch.random.fork_rng(devices=[]):
        for label, network in {"teacher": teacher, **students}.items():
            stack.enter_context(eval_mode(network))
            watched[label] = stack.enter_context(_Watched(label, network))
        for batch in batches:
            if "target" not in batch:
                raise ValueError(f"the {split} pictures have no labels; take another split")
            image = batch["image"]
            for label, one in watched.items():
                one.run(batch.get("image_teacher", image) if label == "teacher" else image)
            target.append(batch["target"].cpu().long())
            index.append(batch["index"].cpu())
    if not target:
        raise ValueError(f"{type(data).__name__} has no {split} pictures; take another split")
    said = {label: one.outputs() for label, one in watched.items()}
    classes = said["teacher"].logits.shape[1]
    # A folder may have any bytes for a name; what is no text cannot be drawn.
    names = tuple(str(name).encode("utf-8", "replace").decode() for name in getattr(data, "class_names", None) or ())
    return Outputs(
        teacher=said.pop("teacher"),
        students=said,
        target=torch.cat(target),
        class_names=names if len(names) == classes else tuple(map(str, range(classes))),
        split=split,
        index=torch.cat(index),
        available=available,
    )


class _Watched:
    """A network whose logits and pooled features are gathered; hooked while it is a context."""

    def __init__(self, label: str, network: nn.Module) -> None:
        self.label = label
        self.network = network
        self.like = next(network.parameters(), torch.zeros(()))
        self.tap: FeatureTap | None = None
        self.logits: list[Tensor] = []
        self.features: list[Tensor] = []

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        if self.tap is not None:
            self.tap.remove()

    def run(self, image: Tensor) -> None:
        image = image.to(self.like.device, self.like.dtype)
        if self.tap is None:
            pool = feature_layers(self.network, image[:1]).pool
            self.tap = FeatureTap(self.network, [pool] if pool else [])
            dry_run(self.network, image[:1])  # the first pass shows whether the feature is overwritten in place
            self.tap.take()
        self.logits.append(widened(logits_of(self.network(image), self.label)).cpu())
        self.features += [widened(value).flatten(1).cpu() for value in self.tap.take().values()]

    def outputs(self) -> NetworkOutputs:
        return NetworkOutputs(torch.cat(self.logits), torch.cat(self.features) if self.features else None)


def _plain(data: L.LightningDataModule, split: str, pictures: int | None) -> tuple[int, Iterable[Batch]] | None:
    """Pictures of a module that knows them one by one, without augmentation; None if it is not such a module."""
    if not isinstance(data, SplitDataModule):
        return None
    if split == "train":
        labels = data.train_target  # also settles which pictures a subset by score holds
    dataset = copy.copy(data.datasets["test" if split == "predict" else split])
    dataset.augmented, dataset.teacher_logits = False, None
    labels = dataset.labels.cpu()
    rows = torch.arange(len(dataset))
    if pictures is not None and pictures < len(dataset):
        rows = hold_out(labels, pictures, seed=0).nonzero().flatten()
    keys = [part.tolist() for part in torch.split(rows, data.eval_batch_size)] if len(rows) else []
    return len(dataset), data.in_order(dataset, keys)


def _loaded(data: L.LightningDataModule, split: str, pictures: int | None) -> tuple[int | None, Iterable[Batch]]:
    """What the loaders of any data module give; only the rows that are wanted go on to the networks."""
    loaders = getattr(data, f"{split}_dataloader")()
    loaders = list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]
    sizes = [_size(loader) for loader in loaders]
    available = None if None in sizes else sum(filter(None, sizes))
    wanted: Tensor | None = None
    if pictures is not None and available is not None and pictures < available:
        draw = torch.Generator().manual_seed(0)
        wanted = torch.zeros(available, dtype=torch.bool)
        wanted[torch.randperm(available, generator=draw)[:pictures]] = True
    return available, _chosen((as_given(data, batch) for loader in loaders for batch in loader), wanted, pictures)


def _size(loader: Any) -> int | None:
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return None


def _chosen(batches: Iterator[Batch], wanted: Tensor | None, pictures: int | None) -> Iterator[Batch]:
    first, taken = 0, 0
    for batch in batches:
        size = len(batch["image"])
        rows = torch.arange(size)
        if wanted is not None:
            rows = wanted[first : first + size].nonzero().flatten()
        if pictures is not None:
            rows = rows[: pictures - taken]
        positions = first + rows
        first, taken = first + size, taken + len(rows)
        if len(rows):
            parts: Any = {
                name: value[rows.to(value.device)]
                for name, value in batch.items()
                if name in ("image", "image_teacher", "target") and isinstance(value, Tensor)
            }
            parts["index"] = batch["index"].cpu()[rows] if "index" in batch else positions
            yield parts
        if taken == pictures:
            return


class FigureOfNetworks(Protocol):
    """A figure of student and teacher on pictures of a data module."""

    def __call__(
        self,
        student: Students,
        teacher: nn.Module,
        data: L.LightningDataModule,
        *,
        split: str = "test",
        pictures: int | None = PICTURES,
        **options: Any,
    ) -> CaptionedFigure:
        """Draw it."""


_OUTPUTS_LINE = "        outputs: what the networks say.\n"
_NETWORKS_LINES = """        student: a network that returns logits, or several by label.
        teacher: the network it is compared with.
        data: the pictures; see :func:`outputs_of`.
        split: which of them: ``train``, ``val``, ``test`` or ``predict``.
        pictures: how many at most; None for all.
"""


def of_networks(draw: Callable[..., CaptionedFigure]) -> FigureOfNetworks:
    """Turn a function that draws :class:`Outputs` into one that takes student, teacher and a data module.

    Args:
        draw: its name starts with ``draw_``, its first argument are the outputs, all others are options.
    """
    signature = inspect.signature(draw)

    def drawn(
        student: Students,
        teacher: nn.Module,
        data: L.LightningDataModule,
        *,
        split: str = "test",
        pictures: int | None = PICTURES,
        **options: Any,
    ) -> CaptionedFigure:
        signature.bind(None, **options)  # an unknown option fails before the networks run
        return draw(outputs_of(student, teacher, data, split=split, pictures=pictures), **options)

    own = [one for one in inspect.signature(drawn).parameters.values() if one.name != "options"]
    options = [one.replace(kind=one.KEYWORD_ONLY) for one in list(signature.parameters.values())[1:]]
    drawn.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    drawn.__name__ = drawn.__qualname__ = draw.__name__.removeprefix("draw_")
    drawn.__module__ = draw.__module__
    drawn.__doc__ = (draw.__doc__ or "").replace(_OUTPUTS_LINE, _NETWORKS_LINES)
    return drawn
