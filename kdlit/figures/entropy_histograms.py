"""Entropy of the outputs: histograms over the pictures (ttm figure 3)."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from kdlit.figures.outputs import Outputs, of_networks
from kdlit.figures.style import (
    CaptionedFigure,
    add_legend,
    network_styles,
    number,
    quoted,
    shorten,
    styled,
    with_legend,
)
from kdlit.losses.functional import check_logits, check_positive
from kdlit.metrics import entropy as entropy_of


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Shannon entropy of each prediction in nats: float64, shape ``(N,)``, from 0 to ``log(C)``.

    Args:
        logits: shape ``(N, C)``.
        temperature: softens the distribution, > 0.

    Raises:
        ValueError: If the logits are not finite or the temperature is not positive.
    """
    check_logits(logits)
    check_positive("temperature", temperature)
    return entropy_of((logits.double() / temperature).log_softmax(dim=-1))


@styled
def draw_entropy_histogram(outputs: Outputs, *, bins: int = 40, temperature: float = 1.0) -> CaptionedFigure:
    """Histogram of the entropy of the predictions of teacher and students.

    Args:
        outputs: what the networks say.
        bins: from 0 to ``log(C)`` or to the largest entropy there is, >= 1.
        temperature: softens the distributions, > 0; the paper has 1.

    Raises:
        ValueError: If a number is out of range.
    """
    if bins < 1:
        raise ValueError(f"bins must be >= 1, got {bins}")
    values = {name: entropy(network.logits, temperature).numpy() for name, network in outputs.networks.items()}
    means = {name: number(float(value.mean())) for name, value in values.items()}
    names = [f"{shorten(name)}: mean {mean}" for name, mean in means.items()]
    figure, axis, legend = with_legend("Entropy of the predictions", names)
    highest = math.log(len(outputs.class_names))
    edges = np.linspace(
        0, min(highest, 1.05 * max(float(value.max()) for value in values.values())) or highest, bins + 1
    )
    styles = network_styles(values)
    for name, value in values.items():
        counts, _ = np.histogram(value.clip(edges[0], edges[-1]), edges)
        share = 100 * counts / len(value)
        axis.stairs(share, edges, baseline=None, linewidth=1.4, zorder=3 if name == "teacher" else 2, **styles[name])
    axis.set(xlabel="entropy (nats)", ylabel="share of the pictures (%)", xlim=(edges[0], edges[-1]), ylim=(0, None))
    add_legend(axis, legend, names, list(axis.patches))
    figure.set_caption(
        f"{outputs.description} at temperature {temperature:g}. Left: sure predictions; right, up to log(C) = "
        f"{highest:.2f} nats: undecided ones. Matching a softened teacher at temperature 1, or smoothed labels, moves "
        "a student to the right.",
        f"Mean in nats: {quoted(means)}.",
    )
    return figure


entropy_histogram = of_networks(draw_entropy_histogram)
