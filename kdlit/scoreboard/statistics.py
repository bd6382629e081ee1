"""Means over seeds, and whether two methods differ over the seeds that both were run with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """The values of one figure, a share each, by seed."""

    values: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Their mean, in per cent."""
        return 100 * math.fsum(self.values.values()) / len(self.values)

    @property
    def std(self) -> float | None:
        """Their standard deviation over ``n - 1``, in points; None for one value."""
        if len(self.values) < 2:
            return None
        squares = math.fsum((100 * value - self.mean) ** 2 for value in self.values.values())
        return math.sqrt(squares / (len(self.values) - 1))


@dataclass(frozen=True)
class Difference:
    """What a method is better by than another, over the seeds that both have.

    Attributes:
        mean: of the differences, in points.
        n: number of seeds.
        interval: 95 % confidence interval of the mean, in points; None without a test.
        p: of the paired t test, two-sided; None without a test.
        adjusted: that after Holm's correction; None without a test.
        why: what stands in the way of a test; empty if nothing.
    """

    mean: float
    n: int
    interval: tuple[float, float] | None = None
    p: float | None = None
    adjusted: float | None = None
    why: str = ""


SAME = 1e-4  # points; shares are kept as float32, which rounds them by less


def paired(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Difference | None:
    """Compare two methods seed by seed with Student's paired t test.

    The test takes the differences for normally distributed, which a handful of seeds can neither show nor refute. It
    is used all the same because one that assumes nothing (sign flips, Wilcoxon) has no p below ``2 ** (1 - n)``, 0.06
    for five seeds. What few seeds are worth shows in the interval, which is very wide for two or three.

    Args:
        ours: shares by seed.
        theirs: likewise.

    Returns:
        The difference; None if no seed is in both.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = [100 * (ours[seed] - theirs[seed]) for seed in seeds]
    n, mean = len(differences), math.fsum(differences) / len(differences)
    if n < 2:
        return Difference(mean, n, why="no test, n=1")
    if max(differences) - min(differences) < SAME:
        return Difference(mean, n, why=f"no test, the same with each of n={n} seeds")
    from scipy.stats import ttest_rel  # takes a second

    result = ttest_rel([100 * ours[seed] for seed in seeds], [100 * theirs[seed] for seed in seeds])
    low, high = result.confidence_interval(0.95)
    return Difference(mean, n, (float(low), float(high)), float(result.pvalue))


def holm(values: Sequence[float]) -> list[float]:
    """Correct the p values of several tests as Holm (1979) does, in their order.

    Args:
        values: of all tests that are looked at together.
    """
    adjusted = [0.0] * len(values)
    highest = 0.0
    for rank, position in enumerate(sorted(range(len(values)), key=lambda place: values[place])):
        highest = max(highest, min(1.0, (len(values) - rank) * values[position]))
        adjusted[position] = highest
    return adjusted
