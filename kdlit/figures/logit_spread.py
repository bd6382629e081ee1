"""Mean and standard deviation of the logits of each picture, as one histogram for all networks (lskd figure 5)."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from kdlit.figures.outputs import Outputs, of_networks
from kdlit.figures.style import (
    Array,
    CaptionedFigure,
    add_legend,
    network_styles,
    number,
    quoted,
    shorten,
    styled,
    with_legend,
)
from kdlit.losses.functional import check_logits
from kdlit.losses.lskd import standardize_logits


def logit_moments(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1/C) over the classes: float64, shape ``(N,)`` each.

    Args:
        logits: shape ``(N, C)``.
    """
    check_logits(logits)
    x = logits.double()
    return x.mean(dim=1), x.std(dim=1, correction=0)


@styled
def draw_logit_moments_map(outputs: Outputs, *, bins: int = 80, standardize: bool = False) -> CaptionedFigure:
    """Histogram of the logits' mean and standard deviation over the classes, a hue for each network.

    Args:
        outputs: what the networks say.
        bins: in each direction, >= 1.
        standardize: whether to bring each network's logits to mean 0 and standard deviation 1 (1/(C-1)) first; all
            pictures then lie at 0 and sqrt((C-1)/C).

    Raises:
        ValueError: If there is no bin.
    """
    if bins < 1:
        raise ValueError(f"bins must be >= 1, got {bins}")
    moments = {}
    for name, network in outputs.networks.items():
        both = logit_moments(standardize_logits(network.logits) if standardize else network.logits)
        moments[name] = both[0].numpy(), both[1].numpy()
    edges = [_edges(np.concatenate([one[axis] for one in moments.values()]), bins) for axis in (0, 1)]
    spread = {name: number(float(deviation.mean())) for name, (_, deviation) in moments.items()}
    names = [f"{shorten(name)}: mean deviation {spread[name]}" for name in moments]
    kind = "standardised logits" if standardize else "logits"
    figure, axis, legend = with_legend(f"Mean and deviation of each picture's {kind}", names, 3.2)
    styles = network_styles(moments)
    for name, (mean, deviation) in moments.items():
        counts, *_ = np.histogram2d(mean, deviation, edges)
        colour = to_rgba(styles[name]["color"])[:3]
        hue = LinearSegmentedColormap.from_list(name, [(*colour, 0.25), (*colour, 1.0)]).with_extremes(
            under=(0, 0, 0, 0)
        )
        axis.pcolormesh(*edges, counts.T, cmap=hue, vmin=0.5, vmax=max(1.0, counts.max()), rasterized=True)
        # Two networks of one colour, and narrow clouds, are told apart by the ring around the middle.
        axis.plot(mean.mean(), deviation.mean(), "o", color=colour, markerfacecolor="white", markersize=6)
    axis.set(xlabel="mean over the classes (logit, no unit)", ylabel="standard deviation over the classes (logit)")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.ticklabel_format(useOffset=False)
    add_legend(axis, legend, names, [Patch(color=styles[name]["color"]) for name in moments])
    middles = {name: number(float(mean.mean())) for name, (mean, _) in moments.items()}
    figure.set_caption(
        f"{outputs.description}; deeper colour, more pictures; a ring marks the middle of each cloud. A student that "
        "copies its teacher's logits lies on its cloud; one that copies only their shape may lie elsewhere.",
        f"Mean standard deviation (1/C): {quoted(spread)}. Mean of the means: {quoted(middles)}.",
    )
    return figure


def _edges(values: Array, bins: int) -> Array:
    low, high = float(values.min()), float(values.max())
    least = 1e-4 * max(1.0, abs(low), abs(high))  # narrower than that is rounding
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    margin = 0.03 * (high - low)
    return np.linspace(low - margin, high + margin, bins + 1)


logit_moments_map = of_networks(draw_logit_moments_map)
