"""Point-wise mappings of probabilities (ttm figure 4).

A mapping of [0, 1] onto itself, applied to each probability and normalised, transforms a distribution. The power
function gives what a temperature gives. The paper draws further mappings without naming them; those here are its
author's free choice with the properties that appendix A.2 asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from kdlit.figures.style import Array, CaptionedFigure, line_style, panels, shorten, styled
from kdlit.losses.functional import check_positive

Mapped = Callable[[Array], Array]

MAPPINGS: Mapping[str, Mapped] = {
    "sin(πt/2)": lambda t: np.sin(np.pi * t / 2),
    "1 - (1 - t)²": lambda t: 1 - (1 - t) ** 2,
    "log(1 + 9t) / log 10": lambda t: np.log1p(9 * t) / np.log(10),
    "√(1 - (1 - t)²)": lambda t: np.sqrt(1 - (1 - t) ** 2),
}


def check_point_wise(name: str, mapping: Mapped) -> None:
    """Raise ValueError unless a mapping smooths distributions: f(0)=0, f(1)=1, non-decreasing, nowhere below identity.

    Args:
        name: for the message.
        mapping: takes and returns an array, elementwise.
    """
    t = np.linspace(0, 1, 501)
    f = np.asarray(mapping(t), float)
    rules = {
        "keep 0": f.shape == t.shape and abs(f.flat[0]) < 1e-9,
        "keep 1": f.shape == t.shape and abs(f.flat[-1] - 1) < 1e-9,
        "not decrease": f.shape == t.shape and bool((np.diff(f) >= -1e-9).all()),
        "lie nowhere below the identity": f.shape == t.shape and bool((f - t >= -1e-9).all()),
    }
    if broken := [rule for rule, holds in rules.items() if not holds]:
        raise ValueError(f"a transform of probabilities must {', '.join(broken)}; {name!r} does not")


def _power(t: Array, exponent: float) -> Array:
    return np.asarray(t**exponent)


@styled
def point_wise_transforms(
    exponents: Sequence[float] = (0.1, 0.25, 0.5, 0.75), mappings: Mapping[str, Mapped] = MAPPINGS
) -> CaptionedFigure:
    """Mappings of probabilities: any that smooth a distribution, and the power function for some exponents.

    Args:
        exponents: of the power function, in (0, 1]; the inverses of temperatures.
        mappings: of [0, 1] onto itself, on arrays, by name.

    Raises:
        ValueError: If an exponent is out of range or a mapping lacks a property; see :func:`check_point_wise`.
    """
    for exponent in exponents:
        if check_positive("exponent", exponent) > 1:
            raise ValueError(f"exponents must lie in (0, 1], got {exponent!r}: above 1 they sharpen")
    for name, mapping in mappings.items():
        check_point_wise(name, mapping)
    powers: dict[str, Mapped] = {f"exponent {g:g} (T = {1 / g:.3g})": partial(_power, exponent=g) for g in exponents}
    figure, axes = panels("Point-wise transforms of probabilities", 2, 3.4, columns=2)
    t = np.linspace(0, 1, 401)
    for axis, title, curves in zip(axes, ("(a) mappings f", "(b) power function"), (mappings, powers), strict=True):
        for position, (name, mapping) in enumerate(curves.items()):
            axis.plot(t, mapping(t), label=shorten(name, 24), **line_style(position))
        axis.plot(t, t, color="0.5", linewidth=0.8, label="identity")
        axis.set(title=title, xlabel="probability t", ylabel="f(t), before normalising", xlim=(0, 1), ylim=(0, 1.02))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.27), frameon=False, labelspacing=0.3)
    figure.set_caption(
        "All curves keep 0 and 1, never decrease and lie above the identity: after normalising, small probabilities "
        "have grown and large ones shrunk. The power function with exponent g is the same as the temperature T = 1/g.",
    )
    return figure
