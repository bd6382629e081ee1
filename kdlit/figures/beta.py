"""DKD's beta against the teacher's logit gap (dkd tables A.1 and A.2)."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import numpy as np
import torch
from torch import nn

from kdlit.figures.outputs import PICTURES, Outputs, Students, outputs_of
from kdlit.figures.style import COLOURS, CaptionedFigure, label_points, number, quoted, shorten, styled
from kdlit.losses.dkd_auto import AutoBetaDKDLoss, logit_gap

PUBLISHED_GAPS = {  # table A.1, CIFAR-100 training set
    "resnet56": 5.36,
    "resnet110": 6.73,
    "wrn-40-2": 7.24,
    "vgg13": 8.25,
    "resnet32x4": 8.40,
    "resnet50": 8.53,
}
PUBLISHED_BETAS = {"resnet56": 2.0, "wrn-40-2": 6.0, "resnet32x4": 8.0}  # table A.2, best of 1, 2, 4, 6, 8, 10


def mean_logit_gap(outputs: Outputs) -> float:
    """Mean over the pictures of the teacher's logit of the label minus its largest other one."""
    return float(logit_gap(outputs.teacher.logits, outputs.target).double().mean())


@styled
def beta_of_gaps(gaps: Mapping[str, float], about: str = "") -> CaptionedFigure:
    """Where teachers lie on the line of :class:`~kdlit.losses.AutoBetaDKDLoss`, beside those of the paper.

    Args:
        gaps: mean logit gap of each teacher, by label.
        about: where the gaps are from, for the caption.

    Raises:
        ValueError: If there is no teacher.
    """
    if not gaps:
        raise ValueError("there is no teacher to draw; give the gap of at least one")
    rule = AutoBetaDKDLoss()
    figure = CaptionedFigure("Beta of DKD against the teacher's logit gap", 3.9)
    axis = figure.subplots()
    everything = [*gaps.values(), *PUBLISHED_GAPS.values()]
    line = np.linspace(min(*everything, 4.0) - 0.5, max(everything) + 1, 200)
    axis.plot(line, rule.beta(torch.as_tensor(line)).numpy(), color="0.5", linewidth=1, label="rule of AutoBetaDKDLoss")
    best = {name: (PUBLISHED_GAPS[name], beta) for name, beta in PUBLISHED_BETAS.items()}
    axis.plot(
        *zip(*best.values(), strict=True), "o", color=COLOURS[0], markerfacecolor="white", label="best of the paper"
    )
    betas = {name: float(rule.beta(torch.tensor(gap))) for name, gap in gaps.items()}
    axis.plot(list(gaps.values()), list(betas.values()), "D", color=COLOURS[1], label="measured teacher, by the rule")
    for gap in set(PUBLISHED_GAPS.values()) - {PUBLISHED_GAPS[name] for name in best}:
        axis.plot(gap, float(rule.beta(torch.tensor(gap))), "|", color="0.3", markersize=9)
    axis.margins(0.05, 0.14)
    axis.set(xlabel="mean logit gap, label minus largest other (no unit)", ylabel="beta (no unit)")
    axis.legend(loc="upper left", frameon=False)
    points = {**{f"{name} (paper)": at for name, at in best.items()}}
    points |= {name: (gaps[name], betas[name]) for name in gaps}
    x, y = zip(*points.values(), strict=True)
    on_line = list(zip(line, rule.beta(torch.as_tensor(line)).tolist(), strict=True))
    label_points(axis, x, y, [shorten(name) for name in points], (4.3, 3.2), [3.0] * len(points), on_line)
    found = {name: f"gap {number(gaps[name])}, beta {number(betas[name])}" for name in gaps}
    figure.set_caption(
        about,
        f"{quoted(found)}. A teacher surer of its labels asks for more weight of the other classes. Circles: the best "
        "beta that the paper found for its teachers on CIFAR-100; strokes: the gaps of its other teachers. The line "
        "was fitted to the paper's table and is no rule of the paper's own.",
    )
    return figure


def draw_beta_against_gap(outputs: Outputs) -> CaptionedFigure:
    """The teacher's gap and the beta that follows from it; the paper takes the training pictures.

    Args:
        outputs: what the networks say.
    """
    return beta_of_gaps({"teacher": mean_logit_gap(outputs)}, f"Measured on {outputs.description}.")


def beta_against_gap(
    student: Students,
    teacher: nn.Module | Mapping[str, nn.Module],
    data: L.LightningDataModule,
    *,
    split: str = "train",
    pictures: int | None = PICTURES,
) -> CaptionedFigure:
    """The gap of one teacher or several, and the beta that follows from each.

    Args:
        student: the network to train, or several by label; beta does not depend on it.
        teacher: a network that returns logits, or several by label.
        data: the pictures; see :func:`outputs_of`.
        split: which of them; the paper takes those for training.
        pictures: how many at most; None for all.

    Raises:
        ValueError: As :func:`outputs_of`, or if there is no teacher.
    """
    teachers = teacher if isinstance(teacher, Mapping) else {"teacher": teacher}
    said = {name: outputs_of(student, one, data, split=split, pictures=pictures) for name, one in teachers.items()}
    gaps = {name: mean_logit_gap(outputs) for name, outputs in said.items()}
    return beta_of_gaps(gaps, *(f"Measured on {outputs.description}." for outputs in list(said.values())[:1]))
