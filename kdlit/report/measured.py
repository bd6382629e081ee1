"""What the networks of a run say about one part of its pictures: classes, confusions, confidence, examples, figures."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from kdlit.report.about import Cell, shown
from kdlit.report.curves import Drawn, Key
from kdlit.report.svg import INK, MUTED, SERIES, as_html, drawing, new_figure, picture
from kdlit.runs import Run

if TYPE_CHECKING:
    import lightning as L
    import numpy as np
    from torch import Tensor

    from kdlit.figures import CaptionedFigure, Cost, Outputs

ROWS = 15  # of the tables of classes and confusions
BINS = 15  # of confidence, as in the calibration error that is logged
PARTS = {"val": "validation", "test": "test", "train": "training"}
_SMALL, _LARGEST = 96, 192  # sides of pictures, in pixels
_FOR_GAP = 2000  # training pictures that the teacher's logit gap is measured on
ACCURACIES = {"test/top1": "test", "val/top1": "validation"}  # by preference, in the figure of what runs cost
_ON_WHITE = ("logit_moments",)  # whose clouds fade to white


@dataclass(frozen=True)
class ClassRow:
    """How good the networks are on one class.

    Attributes:
        name: of the class.
        count: its pictures.
        student: share of them on which the student is right.
        teacher: likewise.
        taken_for: what the student names most often instead, with the number of pictures.
    """

    name: str
    count: int
    student: Cell
    teacher: Cell
    taken_for: str


@dataclass(frozen=True)
class Confusion:
    """A mistake that the student makes often.

    Attributes:
        target: the true class.
        said: what the student names.
        count: on how many pictures.
        share: of those of the true class.
        teacher_right: share of these pictures on which the teacher is right.
        teacher_same: share on which the teacher makes the same mistake.
    """

    target: str
    said: str
    count: int
    share: Cell
    teacher_right: Cell
    teacher_same: Cell


@dataclass(frozen=True)
class Example:
    """One picture and what is said about it.

    Attributes:
        image: the picture.
        target: its class.
        student: class that the student names, and its probability.
        teacher: likewise.
        student_right: whether that is the true class.
        teacher_right: likewise.
        kl: KL(teacher || student), in nats.
    """

    image: Markup
    target: str
    student: tuple[str, str]
    teacher: tuple[str, str]
    student_right: bool
    teacher_right: bool
    kl: str


@dataclass
class Measured:
    """Everything about the networks of one run.

    Attributes:
        pictures: which pictures, in words.
        checkpoint: which one the student is from, and after which epoch, in words.
        missing: why there is nothing, or what is missing.
        classes: the worst ones.
        all_classes: how many classes have pictures.
        confusions: the most frequent ones.
        panels: drawings about confidence and classes.
        examples: kinds of disagreement: title, number of such pictures, some of them.
        figures: those of the papers: title, drawing, caption.
        has_teacher: whether there is a teacher.
        costs: time of a step and extra parameters, with the accuracy of each kind that the run has.
    """

    pictures: str = ""
    checkpoint: str = ""
    missing: list[str] = field(default_factory=list)
    classes: list[ClassRow] = field(default_factory=list)
    all_classes: int = 0
    confusions: list[Confusion] = field(default_factory=list)
    panels: list[Drawn] = field(default_factory=list)
    examples: list[tuple[str, int, list[Example]]] = field(default_factory=list)
    figures: list[tuple[str, Markup, str]] = field(default_factory=list)
    has_teacher: bool = False
    costs: dict[str, Cost] = field(default_factory=dict)


def measure(run: Run, key: str, split: str | None, examples: int, step: Callable[[str], None]) -> Measured:
    """Rebuild the networks of a run and look at what they say; whatever fails is told in ``missing``.

    Args:
        run: its config names code, which is imported and called.
        key: makes ids on the page.
        split: ``val``, ``test`` or ``train``; None for ``val`` if pictures were held out, else ``test``.
        examples: how many pictures of each kind.
        step: is told what comes next.
    """
    found = Measured()
    said = io.StringIO()
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)  # it would tear the progress bar
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            step("rebuilding the networks")
            module, data = run.rebuild()
            found.checkpoint = _checkpoint(run)
            step("showing them the pictures")
            outputs = _outputs(module, data, split)
    except Exception as error:  # whatever a config that anybody wrote can bring about
        found.missing.append(f"The networks could not be used: {_why(error, said.getvalue())}")
        return found
    found.missing += dict.fromkeys(re.findall(r"^kdlit: warning: (.+)$", said.getvalue(), re.MULTILINE))
    found.costs = _costs(run, module, data)
    found.has_teacher = module.teacher is not None
    found.pictures = outputs.description.replace(outputs.split, PARTS.get(outputs.split, outputs.split))
    parts: dict[str, Callable[[], None]] = {
        "classes": lambda: _classes(found, outputs, key),
        "confidence": lambda: _confidence(found, outputs, key),
        "example pictures": lambda: _examples(found, outputs, data, examples),
        "figures": lambda: _figures(found, outputs, key),
        "beta": lambda: _beta(found, module, data, key),
    }
    if not examples:
        del parts["example pictures"]
    if not found.has_teacher:
        parts.pop("example pictures", None)
        del parts["figures"], parts["beta"]
        found.missing.append("The run has no teacher, so there is nothing to compare the student with.")
    for name, part in parts.items():
        step(f"drawing {name}")
        try:
            part()
        except Exception as error:
            found.missing.append(f"The part on {name} is missing: {_why(error)}")
    return found


def _checkpoint(run: Run) -> str:
    from kdlit.cli import epochs_of, whole_one

    try:
        path = whole_one(run.path / "checkpoints")
        return f"{path.name}, epoch {epochs_of(str(path))}"
    except (ValueError, KeyError):
        return "the last checkpoint"


def _why(error: Exception, said: str = "") -> str:
    """What went wrong, in a few lines; a parser's own words go before ours."""
    told = [line.strip() for line in said.splitlines() if "error" in line.lower()]
    return " ".join([*told[-2:], f"{type(error).__name__}: {str(error).strip()[:600]}"])


def _outputs(module: Any, data: L.LightningDataModule, split: str | None) -> Outputs:
    from kdlit.figures import outputs_of

    # The student stands in for a teacher that is not there: what it says is then left out.
    networks = (module.student, module.teacher or module.student)
    if split is not None:
        return outputs_of(*networks, data, split=split)
    try:
        return outputs_of(*networks, data, split="val")
    except Exception:  # no picture held out, no such loader: each data module says so in its own way
        return outputs_of(*networks, data, split="test")


def _said(outputs: Outputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities of student and teacher, and the classes that they name."""
    student, teacher = outputs.students["student"].logits.float(), outputs.teacher.logits.float()
    return student.softmax(1), teacher.softmax(1), student.argmax(1), teacher.argmax(1)


def _classes(found: Measured, outputs: Outputs, key: str) -> None:
    import torch

    _, _, student, teacher = _said(outputs)
    target, names = outputs.target, outputs.class_names
    classes = len(names)
    counts = target.bincount(minlength=classes)
    right = target[student == target].bincount(minlength=classes) / counts
    teacher_right = target[teacher == target].bincount(minlength=classes) / counts
    confused = torch.stack([target, student])[:, student != target]
    pairs, times = torch.unique(confused, dim=1, return_counts=True)
    order = times.argsort(descending=True, stable=True)
    for place in order[:ROWS].tolist():
        true, said, count = int(pairs[0, place]), int(pairs[1, place]), int(times[place])
        those = teacher[(target == true) & (student == said)]
        found.confusions.append(
            Confusion(
                names[true],
                names[said],
                count,
                shown(count / int(counts[true])),
                shown(float((those == true).float().mean()) if found.has_teacher else None),
                shown(float((those == said).float().mean()) if found.has_teacher else None),
            )
        )
    instead: dict[int, str] = {}
    for place in order.tolist():
        instead.setdefault(int(pairs[0, place]), f"{names[int(pairs[1, place])]} ({int(times[place])})")
    present = counts.nonzero().flatten()
    found.all_classes = len(present)
    by_accuracy = present[right[present].argsort(stable=True)]
    for one in by_accuracy[:ROWS].tolist():
        found.classes.append(
            ClassRow(
                names[one],
                int(counts[one]),
                shown(float(right[one])),
                shown(float(teacher_right[one]) if found.has_teacher else None),
                instead.get(one, ""),
            )
        )
    _draw_classes(found, (100 * right[by_accuracy]).numpy(), (100 * teacher_right[by_accuracy]).numpy(), key)


def _draw_classes(found: Measured, student: np.ndarray[Any, Any], teacher: np.ndarray[Any, Any], key: str) -> None:
    from matplotlib.ticker import MaxNLocator

    with drawing():
        figure = new_figure()
        axes = figure.add_subplot()
        at = range(1, len(student) + 1)
        keys = [Key("student", 1, last=f"{student.min():.0f} to {student.max():.0f} %")]
        if found.has_teacher:
            axes.plot(at, teacher, "o", color=SERIES[1], markersize=2.5)
            keys.append(Key("teacher", 2, last=f"{teacher.min():.0f} to {teacher.max():.0f} %"))
        axes.plot(at, student, color=SERIES[0], drawstyle="steps-mid")
        axes.set_xlabel("classes, worst of the student first")
        axes.set_ylim(-3, 103)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        label = "Accuracy of each class: " + ", ".join(f"{one.label} {one.last}" for one in keys)
        found.panels.append(Drawn("Accuracy of each class, %", "", as_html(figure, f"{key}-classes", label), keys))


def _confidence(found: Measured, outputs: Outputs, key: str) -> None:
    import torch

    from kdlit.metrics import CalibrationError

    p, p_teacher, student, teacher = _said(outputs)
    networks = {"student": (p, student, outputs.students["student"].logits)}
    if found.has_teacher:
        networks["teacher"] = (p_teacher, teacher, outputs.teacher.logits)
    with drawing():
        figure = new_figure()
        axes = figure.add_subplot()
        axes.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        keys = []
        for number, (name, (probabilities, said, logits)) in enumerate(networks.items()):
            confidence, right = probabilities.amax(1), (said == outputs.target).float()
            place = (confidence * BINS).long().clamp(0, BINS - 1)
            counts = place.bincount(minlength=BINS)
            full = counts > 0
            sums = [
                torch.zeros(BINS).index_add_(0, place, values)[full] / counts[full] for values in (confidence, right)
            ]
            axes.plot(*(100 * one.numpy() for one in sums), "o-", color=SERIES[number])
            error = CalibrationError(BINS)
            error.add(logits, outputs.target)
            ece = float(error.take(lambda sums: sums) or 0.0)
            keys.append(Key(name, number + 1, last=f"ECE {100 * ece:.2f} %"))
        axes.set_xlabel("mean confidence of a bin, %")
        axes.set(xlim=(-3, 103), ylim=(-3, 103))
        keys.append(Key("confidence equals accuracy", 0, "4 3"))
        label = "Reliability: accuracy by confidence; " + ", ".join(f"{one.label} {one.last}" for one in keys[:-1])
        note = "Below the dashed line a network is too sure of itself."
        found.panels.append(Drawn("Reliability: accuracy, %", note, as_html(figure, f"{key}-reliability", label), keys))
    with drawing():
        figure = new_figure()
        axes = figure.add_subplot()
        right = student == outputs.target
        edges = [100 * i / BINS for i in range(BINS + 1)]
        confidence = 100 * p.amax(1)
        bars = [(confidence[~right], 2), (confidence[right], 1)]
        axes.hist([one.numpy() for one, _ in bars], edges, stacked=True, color=[SERIES[n - 1] for _, n in bars])
        if found.has_teacher:
            axes.hist((100 * p_teacher.amax(1)).numpy(), edges, histtype="step", color=INK, linewidth=1.2)
        axes.set_xlabel("confidence, %")
        keys = [
            Key("student right", 1, last=f"{int(right.sum()):,}", is_area=True),
            Key("student wrong", 2, last=f"{int((~right).sum()):,}", is_area=True),
            *([Key("teacher, all pictures", 0)] if found.has_teacher else []),
        ]
        label = f"Histogram of confidence: student right on {keys[0].last}, wrong on {keys[1].last} pictures"
        note = "Probability of the class that is named."
        found.panels.append(Drawn("Confidence, pictures", note, as_html(figure, f"{key}-confidence", label), keys))


def _examples(found: Measured, outputs: Outputs, data: L.LightningDataModule, most: int) -> None:
    import torch

    from kdlit.metrics import divergence

    p, p_teacher, student, teacher = _said(outputs)
    target = outputs.target
    kl = divergence(p_teacher.log(), outputs.students["student"].logits.float().log_softmax(1))
    of_student, of_teacher = p.amax(1), p_teacher.amax(1)
    kinds = (
        ("Teacher right, student wrong", (teacher == target) & (student != target), of_student),
        ("Student right, teacher wrong", (teacher != target) & (student == target), of_student),
        (
            "Both wrong, each in its own way",
            (teacher != target) & (student != target) & (student != teacher),
            torch.minimum(of_student, of_teacher),
        ),
        ("Most different, by KL(teacher ‖ student)", torch.ones_like(target, dtype=torch.bool), kl),
    )
    rows: list[list[int]] = []
    for _, those, score in kinds:
        order = score.masked_fill(~those, -math.inf).argsort(descending=True, stable=True)
        rows.append(order[: min(most, int(those.sum()))].tolist())
    wanted = sorted({row for some in rows for row in some})
    images = _images(data, outputs, wanted)
    names = outputs.class_names
    for (title, those, _), some in zip(kinds, rows, strict=True):
        shown_ones = [
            Example(
                images[row],
                names[int(target[row])],
                (names[int(student[row])], f"{100 * float(of_student[row]):.0f} %"),
                (names[int(teacher[row])], f"{100 * float(of_teacher[row]):.0f} %"),
                bool(student[row] == target[row]),
                bool(teacher[row] == target[row]),
                f"{float(kl[row]):.2f}",
            )
            for row in some
        ]
        found.examples.append((title, int(those.sum()), shown_ones))


def _images(data: L.LightningDataModule, outputs: Outputs, rows: list[int]) -> dict[int, Markup]:
    """The pictures of some rows as the student saw them, fetched in a second pass."""
    from kdlit.data import SplitDataModule
    from kdlit.modules.base import as_given

    index = outputs.index[rows].tolist()
    pictures: dict[int, Any] = {}  # by position in the data
    if isinstance(data, SplitDataModule):
        import copy

        dataset = copy.copy(data.datasets[outputs.split])
        dataset.augmented, dataset.teacher_logits = False, None
        order = sorted(index)
        keys = [order[at : at + 64] for at in range(0, len(order), 64)]
        for part, batch in zip(keys, data.in_order(dataset, keys), strict=True):
            pictures |= zip(part, batch["image"].cpu(), strict=True)
    else:
        if outputs.split == "train":
            raise ValueError("the data module shuffles its training pictures, so they cannot be found again")
        loaders = getattr(data, f"{outputs.split}_dataloader")()
        at, wanted = 0, dict(zip(index, outputs.target[rows].tolist(), strict=True))
        for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
            for given in loader:
                batch = as_given(data, given)
                places = batch["index"].tolist() if "index" in batch else range(at, at + len(batch["image"]))
                for place, image, target in zip(places, batch["image"], batch["target"].tolist(), strict=True):
                    if wanted.get(place, target) != target:
                        raise ValueError("the data module gives its pictures in another order each time")
                    if place in wanted:
                        pictures[place] = image.cpu()
                at += len(batch["image"])
                if len(pictures) == len(wanted):
                    break
    views = getattr(data, "views", None)
    return {
        row: _image(pictures[place], getattr(views, "student", None), outputs.class_names[int(outputs.target[row])])
        for row, place in zip(rows, index, strict=True)
    }


def _image(image: Tensor, statistics: Any, target: str) -> Markup:
    """One picture, float ``(C, H, W)``, without its normalisation; with unknown statistics from black to white."""
    import torch
    from PIL import Image

    image = image.float()
    if statistics is not None:
        mean, std = (torch.tensor(value)[:, None, None] for value in (statistics.mean, statistics.std))
        image = image * std + mean
    else:
        low, high = image.min(), image.max()
        image = (image - low) / (high - low).clamp_min(1e-9)
    pixels = image.nan_to_num().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    pixels = pixels[:, :, 0] if pixels.shape[2] not in (3, 4) else pixels[:, :, :3]
    made = Image.fromarray(pixels)
    is_small = max(made.size) <= _SMALL
    made.thumbnail((_LARGEST, _LARGEST))
    content = io.BytesIO()
    kind = "png" if is_small else "jpeg"
    made.save(content, kind, **({"optimize": True} if is_small else {"quality": 82}))
    return picture(
        content.getvalue(),
        kind,
        f"a picture of class {target}",
        "crisp" if is_small else "smooth",
        width=made.width,
        height=made.height,
    )


def _figures(found: Measured, outputs: Outputs, key: str) -> None:
    from kdlit.figures import all_figures

    found.figures += [
        inlaid(figure, f"{key}-{name}", name in _ON_WHITE) for name, figure in all_figures(outputs).items()
    ]


def _beta(found: Measured, module: Any, data: L.LightningDataModule, key: str) -> None:
    """The teacher's logit gap on training pictures, and the beta of DKD that follows from it."""
    from kdlit.figures import beta_against_gap

    figure = beta_against_gap(module.student, module.teacher, data, pictures=_FOR_GAP)
    found.figures.append(inlaid(figure, f"{key}-beta"))


def _costs(run: Run, module: Any, data: L.LightningDataModule) -> dict[str, Cost]:
    from kdlit.figures import cost_of_run

    costs = {}
    for accuracy in ACCURACIES:
        with contextlib.suppress(ValueError):  # one that the run does not have
            costs[accuracy] = cost_of_run(run, module, data, accuracy)
    return costs


def inlaid(figure: CaptionedFigure, key: str, on_white: bool = False) -> tuple[str, Markup, str]:
    """A figure as the page has it: title, drawing and caption.

    Args:
        figure: with both.
        key: makes ids on the page.
        on_white: whether it needs a white ground in the dark, too.
    """
    caption, title = figure.caption, " ".join(figure.get_suptitle().split()) or key
    figure.without_caption().suptitle("")
    label = f"{title}. {caption.partition('. ')[0]}."
    return title, as_html(figure, key, label, on_white=on_white), caption
