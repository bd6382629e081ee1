"""The page as a whole: text and drawings put into its template."""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

if TYPE_CHECKING:
    from kdlit.report.about import Summary, Warned
    from kdlit.report.measured import Measured
    from kdlit.runs import Run

_HERE = Path(__file__).parent
_STEPS = 7  # that are told of each run


def _no_step(text: str, done: int, of: int) -> None:
    pass


def report_html(
    runs: Sequence[Run],
    *,
    split: str | None = None,
    pictures: int = 8,
    without_networks: bool = False,
    step: Callable[[str, int, int], None] = _no_step,
) -> str:
    """Return a page about some runs that needs nothing beside itself.

    The same runs give the same page but for its date. Whatever cannot be read, rebuilt or drawn is left out, and the
    page says why.

    Args:
        runs: at least one, from :func:`kdlit.runs.find_runs`.
        split: pictures that the networks are looked at on, ``val``, ``test`` or ``train``; None for ``val`` if any were
            held out, else ``test``.
        pictures: examples of each kind.
        without_networks: whether to read files only, and import nothing that a config names.
        step: is told what comes next, how many steps are done, and of how many.

    Raises:
        ValueError: If there is no run.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from kdlit.report.about import HEADS, differences, summary
    from kdlit.report.curves import groups
    from kdlit.report.svg import SERIES

    if not runs:
        raise ValueError("a report needs at least one run")
    steps = 1 + (0 if without_networks else _STEPS * len(runs))
    step("drawing what was logged", 0, steps)
    about = [summary(run, f"r{number}") for number, run in enumerate(runs)]
    curves = groups([(one.name, one.series) for one in about])
    measured: list[Measured | None] = [None] * len(runs)
    if not without_networks:
        from kdlit.report.measured import measure

        for number, run in enumerate(runs):
            done = itertools.count(1 + number * _STEPS)
            tell = functools.partial(_tell, step, run.name, done, steps)
            measured[number] = measure(run, f"r{number}", split, pictures, tell)
    script = (_HERE / "page.js").read_text(encoding="utf-8").strip()
    templates = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("page.html.j2").render(
        title=about[0].name if len(about) == 1 else f"{len(about)} runs",
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        runs=about,
        colours=len(SERIES),
        heads=HEADS,
        warnings=_merged(about, differences(runs)),
        scoreboard=_scoreboard(runs) if len(runs) > 1 else None,
        cost=_cost(measured) if len(runs) > 1 else None,
        groups=curves,
        measured=measured,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _tell(step: Callable[[str, int, int], None], name: str, done: Iterator[int], of: int, text: str) -> None:
    step(f"{name}: {text}", next(done), of)


def _merged(about: Sequence[Summary], of_all: Sequence[Warned]) -> list[tuple[Warned, list[str]]]:
    """Each warning once with the runs that it is about, notes last."""
    whose: dict[Warned, list[str]] = {warned: [run.name for run in about] for warned in of_all}
    for run in about:
        for warned in dict.fromkeys(run.warnings):
            whose.setdefault(warned, []).append(run.name)
    return sorted(whose.items(), key=lambda item: item[0].level == "note")


def _scoreboard(runs: Sequence[Run]) -> Markup:
    """The table of `kdlit compare`, in the style of this page, or why there is none."""
    from kdlit.scoreboard import compare, table_html

    try:
        html = table_html(compare([run.path for run in runs], unfinished=True))
    except Exception as error:  # runs that anybody may have edited
        return Markup('<p class="missing">There is no scoreboard: {}</p>').format(error)
    html = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    html = re.sub(r"<(/?)h2>", r"<\1h3>", html)
    box = '<div class="box" role="region" aria-label="Scoreboard" tabindex="0">'
    return Markup(html.replace('<div class="box" tabindex="0">', box))


def _cost(measured: Sequence[Measured | None]) -> tuple[str, Markup, str] | None:
    """What the runs cost and bring, if they have the same kind of accuracy."""
    if None in measured:
        return None
    from kdlit.figures import time_against_accuracy
    from kdlit.report.measured import ACCURACIES, inlaid

    for accuracy, pictures in ACCURACIES.items():
        costs = [one.costs[accuracy] for one in measured if one is not None and accuracy in one.costs]
        if len(costs) == len(measured):
            where = f"Last epoch, {pictures} pictures; times compare only where all ran on the same idle machine"
            return inlaid(time_against_accuracy(costs, where), "cost")
    return None
