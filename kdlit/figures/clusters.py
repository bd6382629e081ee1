"""Feature space: t-SNE of pooled features (dkd figure 3, lskd figure 4, rld figure 4), and what it shows in numbers.

The papers show pictures only. How well classes are separated is measured here by the silhouette score and by the ratio
of between- to within-class scatter, both of the features themselves.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from torch import Tensor

from kdlit.figures.outputs import Outputs, of_networks
from kdlit.figures.style import COLOURS, Array, CaptionedFigure, number, panel_title, panels, quoted, styled

_MARKERS = "osD^vP"


def scatter_ratio(features: Tensor, target: Tensor) -> float:
    r"""Between-class over within-class scatter, :math:`\sum_i \|m_{y_i} - m\|^2 / \sum_i \|x_i - m_{y_i}\|^2`.

    Args:
        features: :math:`x`, shape ``(N, D)``.
        target: labels, int64, shape ``(N,)``.

    Returns:
        At least 0; the higher, the better are classes separated. NaN if no class has any scatter.
    """
    x = features.double()
    _, own = torch.unique(target, return_inverse=True)
    means = torch.zeros(int(own.max()) + 1, x.shape[1], dtype=x.dtype).index_add_(0, own, x)
    means /= own.bincount().unsqueeze(1)
    within = (x - means[own]).square().sum()
    between = (means[own] - x.mean(dim=0)).square().sum()
    return float(between / within) if within > 0 else float("nan")


def silhouette(features: Tensor, target: Tensor) -> float:
    """Mean silhouette score, from -1 to 1, of at most 2,000 pictures; NaN unless classes outnumber 1 and pictures them.

    Args:
        features: shape ``(N, D)``.
        target: labels, int64, shape ``(N,)``.
    """
    if not 1 < len(torch.unique(target)) < len(target):
        return float("nan")
    size = min(len(target), 2000)
    try:
        return float(silhouette_score(features.numpy(), target.numpy(), sample_size=size, random_state=0))
    except ValueError:  # the sample may hold too few classes
        return float("nan")


def tsne_positions(features: Tensor) -> Array:
    """Two-dimensional t-SNE with scikit-learn's settings, always from the same random state.

    Args:
        features: shape ``(N, D)``; with few pictures the perplexity is lowered from 30 to ``(N - 1) / 3``.

    Returns:
        Shape ``(N, 2)``, no unit.
    """
    x = features.float().numpy()
    if len(x) < 3 or not x.std(axis=0).any():
        return np.zeros((len(x), 2), x.dtype)
    start = "pca" if x.shape[1] > 1 else "random"
    tsne = TSNE(random_state=0, perplexity=min(30.0, (len(x) - 1) / 3), init=start)
    return np.asarray(tsne.fit_transform(x))


@styled
def draw_tsne(outputs: Outputs, *, points: int = 500) -> CaptionedFigure:
    """t-SNE of the pooled features of teacher and students, and how well they separate the classes.

    Args:
        outputs: what the networks say.
        points: how many pictures to draw at most; the time grows faster than their number, 500 take some seconds for
            each network. The numbers in the caption are of all pictures.

    Raises:
        ValueError: If the layer before the classifier is not known of a network.
    """
    for name, network in outputs.networks.items():
        if network.features is None:
            raise ValueError(
                f"the pooled feature of network {name!r} is not known; give it a property feature_layers "
                "(kdlit.models.FeatureLayers) with pool set"
            )
    shown = outputs.some(points)
    figure, axes = panels("Features before the classifier (t-SNE)", len(outputs.networks))
    scores, ratios = {}, {}
    for axis, (name, network), few in zip(axes, outputs.networks.items(), shown.networks.values(), strict=True):
        assert network.features is not None
        assert few.features is not None
        place = tsne_positions(few.features)
        target = shown.target.numpy()
        for turn, marker in enumerate(_MARKERS):
            mine = (target + target // len(COLOURS)) % len(_MARKERS) == turn  # neighbours differ in both
            tints = [COLOURS[label % len(COLOURS)] for label in target[mine]]
            size = 9 if len(target) > 200 else 22
            axis.scatter(place[mine, 0], place[mine, 1], s=size, c=tints, marker=marker, alpha=0.55, linewidths=0)
        score, ratio = silhouette(network.features, outputs.target), scatter_ratio(network.features, outputs.target)
        scores[name], ratios[name] = number(score), number(ratio)
        panel_title(axis, name, f"silhouette {number(score)}", len(axes))
        axis.set(xticks=[], yticks=[], xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)")
    repeat = len(COLOURS) * len(_MARKERS)
    colours = f", repeated every {repeat} classes" if len(outputs.class_names) > repeat else ""
    figure.set_caption(
        f"{shown.description}; a colour and shape for each class{colours}. Tighter clusters "
        "further apart are better; distances between clusters mean little. Of the features themselves:",
        f"silhouette score (-1 to 1, higher is better) {quoted(scores)};",
        f"between- over within-class scatter {quoted(ratios)}.",
    )
    return figure


tsne = of_networks(draw_tsne)
