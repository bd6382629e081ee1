"""The largest logits of some classes and of one wrong prediction (rld figure 7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor

from kdlit.figures.logit_difference import class_mean_logits
from kdlit.figures.outputs import Outputs, of_networks
from kdlit.figures.style import COLOURS, CaptionedFigure, panels, shorten, styled


def telling_mistake(logits: Tensor, target: Tensor) -> int:
    """The picture whose two largest logits are both wrong by most; that which comes closest, if there is none.

    Args:
        logits: shape ``(N, C)``.
        target: labels, int64, shape ``(N,)``.

    Returns:
        Its row.
    """
    label = logits.gather(1, target.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, target.unsqueeze(1), -torch.inf).topk(min(2, logits.shape[1] - 1), dim=1).values
    return int((others[:, -1] - label).argmax())


@styled
def draw_top_classes(
    outputs: Outputs,
    *,
    network: str = "teacher",
    sample: int | None = None,
    classes: Sequence[int | str] | None = None,
    top: int = 10,
) -> CaptionedFigure:
    """The largest logits of one picture that a network gets wrong, and those of the classes that it confuses.

    Args:
        outputs: what the networks say.
        network: ``teacher`` or the label of a student.
        sample: position of the picture in its part of the data; None for one that is taken for two other classes.
        classes: numbers or names of the classes to show the mean logits of; by default the two that the picture is
            most taken for, and its own.
        top: how many logits to show.

    Raises:
        ValueError: If there is no such network, picture or class.
    """
    if network not in outputs.networks:
        raise ValueError(f"network must be one of {', '.join(outputs.networks)}, got {network!r}")
    if top < 1:
        raise ValueError(f"top must be >= 1, got {top}")
    logits = outputs.networks[network].logits
    row = telling_mistake(logits, outputs.target) if sample is None else outputs.row(sample)
    label = int(outputs.target[row])
    if classes is None:
        taken_for = [one for one in logits[row].topk(min(3, logits.shape[1])).indices.tolist() if one != label][:2]
        chosen = [*taken_for, label]
    else:
        chosen = [outputs.class_index(one) for one in classes]
    means = class_mean_logits(logits, outputs.target)
    names = outputs.class_names
    count = min(top, logits.shape[1])
    figure, axes = panels(
        f"The {count} largest logits, {shorten(network)}", len(chosen) + 1, 0.6 + 0.17 * count, columns=2
    )
    seen: dict[int, set[int]] = {}
    for axis, one in zip(axes, chosen, strict=False):
        if means[one].isnan().any():
            axis.text(0.5, 0.5, "no picture", ha="center", va="center", transform=axis.transAxes)
            axis.set(xticks=[], yticks=[])
            seen[one] = set()
        else:
            order = means[one].topk(count).indices
            seen[one] = set(order.tolist())
            _bars(axis, means[one][order], [shorten(names[place], 14) for place in order], set())
        axis.set_title(f"mean of class {shorten(names[one], 14)}", loc="right")
    order = logits[row].topk(count).indices
    from_others = set().union(*(seen[one] for one in chosen if one != label)) - seen.get(label, set())
    kept = {position for position, place in enumerate(order.tolist()) if place in from_others}
    axis = axes[len(chosen)]
    _bars(axis, logits[row][order], [shorten(names[place], 14) for place in order], kept)
    axis.set_title(f"one picture of class {shorten(names[label], 14)}", loc="right")
    best = " and ".join(shorten(names[place]) for place in order[:2].tolist())
    wrong = int(order[0]) != label
    claim = " Even a prediction that is wrong keeps neighbours of the classes it names:" if wrong else ""
    about = f"{claim} {len(kept)} of its {count} classes, in bold and colour, are among the largest of the other "
    about += "classes shown but not among those of its own."
    figure.set_caption(
        f"{outputs.description}; picture {int(outputs.index[row])} of class {shorten(names[label])} has its largest "
        f"logits for {best}.{about if kept else ''}",
    )
    return figure


def _bars(axis: Axes, values: Tensor, names: list[str], marked: set[int]) -> None:
    colours = [COLOURS[1] if place in marked else COLOURS[0] for place in range(len(values))]
    axis.barh(range(len(values)), values.tolist(), color=colours)
    axis.set_yticks(range(len(values)), names)
    for place in marked:
        axis.get_yticklabels()[place].set(color=COLOURS[1], weight="bold")
    axis.invert_yaxis()
    axis.set_xlabel("logit (no unit)")


top_classes = of_networks(draw_top_classes)
