"""One logit vector of teacher and student as bars, and the range of all (lskd figure 3, first row)."""

from __future__ import annotations

import numpy as np
from matplotlib.patches import Patch
from torch import Tensor

from kdlit.figures.outputs import Outputs, of_networks
from kdlit.figures.style import (
    COLOURS,
    TEACHER_COLOUR,
    CaptionedFigure,
    number,
    panels,
    quoted,
    shorten,
    styled,
    whole_numbers,
)
from kdlit.losses.lskd import standardize_logits


def logit_ranges(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Where the logits of a network lie.

    Args:
        logits: shape ``(N, C)``.
        target: labels, int64, shape ``(N,)``.

    Returns:
        ``lowest`` and ``highest`` of all; means over the pictures of the ``low``, the ``high`` and the ``target``
        logit; ``deviation``, the mean over the pictures of the standard deviation over the classes (1/C).
    """
    x = logits.double()
    return {
        "lowest": x.min().item(),
        "low": x.amin(dim=1).mean().item(),
        "target": x.gather(1, target.unsqueeze(1)).mean().item(),
        "high": x.amax(dim=1).mean().item(),
        "highest": x.max().item(),
        "deviation": x.std(dim=1, correction=0).mean().item(),
    }


def _logits(outputs: Outputs, standardize: bool) -> dict[str, Tensor]:
    given = {name: network.logits for name, network in outputs.networks.items()}
    return {name: standardize_logits(value) for name, value in given.items()} if standardize else given


@styled
def draw_logit_bars(outputs: Outputs, *, sample: int | None = None, standardize: bool = False) -> CaptionedFigure:
    """The logits of one picture, the student's over the teacher's.

    Args:
        outputs: what the networks say.
        sample: position of the picture in its part of the data; None for the first there is.
        standardize: whether to bring each network's logits to mean 0 and standard deviation 1 (1/(C-1)) first.

    Raises:
        ValueError: If the picture is not among those shown to the networks.
    """
    row = outputs.row(sample)
    logits = {name: value[row] for name, value in _logits(outputs, standardize).items()}
    teacher = logits.pop("teacher")
    label = int(outputs.target[row])
    name = outputs.class_names[label]
    edges = np.arange(len(teacher) + 1) - 0.5
    kind = "Standardised logits" if standardize else "Logits"
    figure, axes = panels(f"{kind} of one picture of class {shorten(name)}", len(logits), 1.9, columns=1)
    for axis, (student, values) in zip(axes, logits.items(), strict=True):
        axis.stairs(teacher.numpy(), edges, baseline=0, fill=True, color="0.65")
        axis.stairs(values.numpy(), edges, baseline=0, fill=True, color=COLOURS[1], alpha=0.55)
        axis.axhline(0, color="black", linewidth=0.5)
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.1 * (high - low))
        axis.plot(label, high + 0.05 * (high - low), "v", color=COLOURS[0], markersize=5)
        spread = {one: number(float(v.double().std(correction=0))) for one, v in (("t", teacher), ("s", values))}
        axis.legend(
            [Patch(color="0.65"), Patch(color=COLOURS[1], alpha=0.55)],
            [f"teacher, deviation {spread['t']}", f"{shorten(student)}, {spread['s']}"],
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=2,
            frameon=False,
            borderpad=0.2,
        )
        axis.set(xlim=(edges[0], edges[-1]), ylabel="logit (no unit)")
        axis.xaxis.set_major_locator(whole_numbers(6))
    axes[-1].set_xlabel("class (number)")
    at_label = {one: number(float(value[label])) for one, value in {"teacher": teacher, **logits}.items()}
    widths = {one: number(float(v.max() - v.min())) for one, v in {"teacher": teacher, **logits}.items()}
    figure.set_caption(
        f"Picture {int(outputs.index[row])} of {outputs.split}; the triangle marks its class, number {label}. A "
        "student may have the teacher's order of classes at another scale; deviations are over the classes (1/C).",
        f"Logit of the class: {quoted(at_label)}. Largest minus smallest logit: {quoted(widths)}.",
    )
    return figure


@styled
def draw_logit_range(outputs: Outputs, *, standardize: bool = False) -> CaptionedFigure:
    """The range of all logits of each network.

    Args:
        outputs: what the networks say.
        standardize: whether to bring each network's logits to mean 0 and standard deviation 1 (1/(C-1)) first.
    """
    logits = _logits(outputs, standardize)
    ranges = {name: logit_ranges(value, outputs.target) for name, value in logits.items()}
    kind = "standardised logits" if standardize else "logits"
    figure = CaptionedFigure(f"Range of the {kind}", 1.2 + 0.27 * len(ranges))
    axis = figure.subplots()
    for place, (name, one) in enumerate(ranges.items()):
        colour = TEACHER_COLOUR if name == "teacher" else COLOURS[0]
        axis.plot([one["lowest"], one["highest"]], [place] * 2, color=colour, linewidth=1)
        axis.plot([one["low"], one["high"]], [place] * 2, color=colour, linewidth=7, solid_capstyle="butt", alpha=0.6)
        axis.plot(one["target"], place, "D", color=COLOURS[1], markeredgecolor="white", markersize=6)
    axis.set_yticks(range(len(ranges)), [shorten(name) for name in ranges])
    axis.set(ylim=(len(ranges) - 0.4, -0.6), xlabel="logit (no unit)", ylabel="network")
    axis.axvline(0, color="black", linewidth=0.5, zorder=0)
    figure.set_caption(
        f"{outputs.description}. Thin line: from the smallest to the largest logit of all. Thick line: from the mean "
        "smallest to the mean largest logit of a picture. Diamond: mean logit of the label. Mean deviation over the "
        f"classes (1/C): {quoted({name: number(one['deviation']) for name, one in ranges.items()})}.",
    )
    return figure


logit_bars = of_networks(draw_logit_bars)
logit_range = of_networks(draw_logit_range)
