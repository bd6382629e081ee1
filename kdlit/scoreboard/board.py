"""Runs gathered into rows, rows into sections, and each row held against plain KD and against what is published."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdlit.scoreboard import settings as names
from kdlit.scoreboard.entries import CHOSEN_TEST, FIGURES, LAST_TEST, Entry, Figure
from kdlit.scoreboard.published import Verdict, find_published, verdict
from kdlit.scoreboard.statistics import Difference, Sample, holm, paired

AGAINST = "KD"  # the method that all others are held against
REFERENCE = "what the others are held against"


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone.

    Attributes:
        method: as ``KD + LS``.
        telling: settings that tell it from other rows of the same method.
        teacher: name of its teacher; empty if it has none.
        entries: its runs, one a seed.
        figures: what they measured.
        compared: the figure that is held against plain KD, or would be; None if there is none that may be.
        difference: to plain KD.
        reference: label of the row that it is the difference to.
        no_difference: why there is none.
        verdicts: against each published value of this cell.
    """

    method: str
    telling: str
    teacher: str
    entries: tuple[Entry, ...]
    figures: dict[Figure, Sample]
    compared: Figure | None = None
    difference: Difference | None = None
    reference: str = ""
    no_difference: str = ""
    verdicts: tuple[Verdict, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Those of its runs."""
        return self.entries[0].settings

    @property
    def label(self) -> str:
        """The method with what tells it from other rows."""
        return f"{self.method}, {self.telling}" if self.telling else self.method

    @property
    def unfinished(self) -> str:
        """Which of its runs are unfinished, as ``seed 1: 12 of 240 epochs``; empty if none."""
        going = [one for one in self.entries if not one.finished]
        return "; ".join(f"seed {one.seed}: {one.epochs} of {one.planned or '?'} epochs" for one in going)


@dataclass(frozen=True)
class Section:
    """All rows of one pair of networks on the same data.

    Attributes:
        data: class of the data module.
        teacher: name of the network; empty if there is none.
        student: likewise.
        rows: best first among those with the same figure.
    """

    data: str
    teacher: str
    student: str
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """As ``CIFAR100: resnet32x4 → resnet8x4``."""
        return f"{self.data}: {self.teacher} → {self.student}" if self.teacher else f"{self.data}: {self.student}"

    @property
    def figures(self) -> list[Figure]:
        """Those that any row has, in the order of the columns."""
        return [kind for kind in FIGURES if any(kind in row.figures for row in self.rows)]


@dataclass(frozen=True)
class Scoreboard:
    """The whole table.

    Attributes:
        sections: sorted by data and networks.
        against: the method that the others are held against.
        notes: what a reader has to know, and which runs were left out.
    """

    sections: tuple[Section, ...]
    against: str
    notes: tuple[str, ...]


def gather(
    entries: Sequence[Entry], problems: Sequence[str] = (), *, unfinished: bool = False, against: str = AGAINST
) -> Scoreboard:
    """Make the scoreboard of some runs; their order does not matter.

    Args:
        entries: the runs.
        problems: what is wrong with others that could not be read.
        unfinished: whether runs that have not ended as planned count, too.
        against: the method that the others are held against, with its telling settings if there are several of it.

    Raises:
        ValueError: If no run is left, or no row is named as ``against`` says, unless that is the default.
    """
    about: dict[str, list[str]] = defaultdict(list)  # runs by what there is to know about them
    for entry in entries:
        for note in dict.fromkeys(entry.notes):
            about[note].append(entry.name)
    notes = [f"{', '.join(sorted(whose))}: {note}" for note, whose in about.items()]
    counted = [entry for entry in entries if entry.finished or unfinished]
    if left := [entry.name for entry in entries if entry not in counted]:
        notes.append(f"not counted, as unfinished (--unfinished counts them): {', '.join(sorted(left))}")
    if not counted:
        raise ValueError("no run is left to compare: " + "; ".join([*sorted(problems), *sorted(notes)]))
    sections: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for group in _groups(counted):
        kept, told = _one_of_each_seed(group)
        row = _row(kept)
        notes += told + _about(row)
        sections[kept[0].data, kept[0].teacher, kept[0].student].append(row)
    # A student alone belongs to every pair that it is the student of.
    for place in [place for place in sections if not place[1]]:
        pairs = [other for other in sections if other[1] and (other[0], other[2]) == (place[0], place[2])]
        for other in pairs:
            sections[other] += sections[place]
        if pairs:
            del sections[place]
    done = [_section(*place, rows, against) for place, rows in sorted(sections.items())]
    rows = [row for section in done for row in section.rows]
    if against != AGAINST and not any(against in (row.label, row.method) for row in rows):
        raise ValueError(f"--against: there is no {against!r} here, but {'; '.join(sorted({r.label for r in rows}))}")
    return Scoreboard(tuple(done), against, tuple(sorted(map(names.printable, {*notes, *problems}))))


def _groups(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Runs that differ in their seed alone."""
    groups: list[list[Entry]] = []
    for entry in sorted(entries, key=lambda one: one.name):
        for group in groups:
            if group[0].settings == entry.settings:
                group.append(entry)
                break
        else:
            groups.append([entry])
    return groups


def _one_of_each_seed(group: Sequence[Entry]) -> tuple[tuple[Entry, ...], list[str]]:
    """The newest run of each seed, of those that got furthest, and which others are left out."""
    kept: dict[str, Entry] = {}
    told = []
    for entry in sorted(group, key=lambda one: (one.finished, LAST_TEST in one.figures, one.started, one.name)):
        if (other := kept.get(entry.seed)) is not None:
            why = "newer" if other.started <= entry.started else "tested" if other.finished else "finished"
            why = f"is a {why} run with the same settings and seed {entry.seed}"
            told.append(f"{other.name}: not counted: {entry.name} {why}")
        kept[entry.seed] = entry
    return tuple(sorted(kept.values(), key=lambda one: (len(one.seed), one.seed))), told


def _row(entries: tuple[Entry, ...]) -> Row:
    figures = {
        kind: Sample({one.seed: one.figures[kind] for one in entries if kind in one.figures})
        for kind in FIGURES
        if any(kind in one.figures for one in entries)
    }
    first = entries[0]
    return Row(first.method, "", first.teacher, entries, figures, _best_known(figures))


def _best_known(figures: dict[Figure, Sample]) -> Figure | None:
    """The figure to compare by: that of most seeds, and of these the first by preference; none that is biased."""
    allowed = [kind for kind in FIGURES if kind in figures and not kind.is_biased]
    return max(allowed, key=lambda kind: len(figures[kind].values), default=None)


def _about(row: Row) -> list[str]:
    notes = []
    whose = f"{row.method} ({', '.join(one.name for one in row.entries)})"
    if len(row.entries) > 1 and len({one.shared_order for one in row.entries} - {None}) == 1:
        notes.append(
            f"{whose}: all seeds see the pictures in the same order (data.seed), so they vary less than separate runs"
        )
    if len(versions := {one.version for one in row.entries}) > 1:
        notes.append(f"{whose}: made by different versions of kdlit: {', '.join(sorted(versions))}")
    if row.unfinished:
        notes.append(f"{whose}: unfinished runs count, as asked: {row.unfinished}")
    return notes


def _section(data: str, teacher: str, student: str, rows: list[Row], against: str) -> Section:
    told = []
    for row in rows:
        others = [one for one in rows if one.method == row.method]
        keys = names.differing([one.settings for one in others])
        telling = names.told(row.settings, keys) if len(others) > 1 else ""
        twins: list[Mapping[str, Any]] = [
            one.settings for one in others if telling and names.told(one.settings, keys) == telling
        ]
        if len(twins) > 1:  # they differ in what is told last, such as the pictures
            telling += ", " + names.told(row.settings, names.differing(twins))
        told.append(replace(row, telling=telling))
    references = [row for row in told if against in (row.label, row.method)]
    compared = [_against(row, references, against) for row in told]
    families: dict[int, list[int]] = defaultdict(list)  # the tests against one reference, by its place
    for place, (row, reference) in enumerate(compared):
        if row.difference is not None and row.difference.p is not None and reference is not None:
            families[references.index(reference)].append(place)
    done = [row for row, _ in compared]
    for places in families.values():
        adjusted = holm([done[place].difference.p or 0.0 for place in places])  # type: ignore[union-attr]
        for place, value in zip(places, adjusted, strict=True):
            difference = done[place].difference
            assert difference is not None
            done[place] = replace(done[place], difference=replace(difference, adjusted=value))
    done = [replace(row, verdicts=_verdicts(row, data, teacher, student)) for row in done]
    order = {kind: place for place, kind in enumerate(FIGURES)}

    def rank(row: Row) -> tuple[int, float, str, str]:
        if row.compared is None:
            return len(order), 0.0, row.label, row.entries[0].name
        return order[row.compared], -row.figures[row.compared].mean, row.label, row.entries[0].name

    return Section(data, teacher, student, tuple(sorted(done, key=rank)))


def _against(row: Row, references: list[Row], against: str) -> tuple[Row, Row | None]:
    """A row with its difference to the reference that was trained under the same conditions, and that one."""
    if any(row is one for one in references) and len(references) == 1:
        return replace(row, no_difference=REFERENCE), None
    if not references:
        return replace(row, no_difference=f"no {against} here"), None

    def both(other: Row) -> tuple[dict[str, Any], dict[str, Any]]:
        """The conditions of the row and of another, with the teacher where it is the same question for both."""
        of_teacher = all(one.teacher and one.method not in (names.ALONE, names.CHAIN) for one in (row, other))
        return names.conditions(row.settings, of_teacher), names.conditions(other.settings, of_teacher)

    pairs = [(one, *both(one)) for one in references]
    fitting = [one for one, ours, theirs in pairs if ours == theirs]
    if any(row is one for one in fitting):
        rest = ", ".join(one.label for one in fitting if one is not row)
        text = f"one of several {against}: name one by --against ({rest})" if rest else REFERENCE
        return replace(row, no_difference=text), None
    if not fitting:
        others = [(names.differing([ours, theirs]), theirs) for _, ours, theirs in pairs]
        keys, nearest = min(others, key=lambda one: (len(one[0]), str(sorted(one[1].items()))))
        return replace(row, no_difference=f"{against} was trained otherwise: {names.told(nearest, keys, 3)}"), None
    if len(fitting) > 1:
        labels = "; ".join(sorted(one.label for one in fitting))
        return replace(row, no_difference=f"several {against}: name one by --against: {labels}"), None
    reference = fitting[0]
    if row.unfinished or reference.unfinished:
        return replace(row, no_difference="unfinished runs are not compared"), None
    shared = {
        kind: difference
        for kind in FIGURES
        if kind in row.figures
        and kind in reference.figures
        and not kind.is_biased
        and (difference := paired(row.figures[kind].values, reference.figures[kind].values)) is not None
    }
    if not shared:
        return replace(row, no_difference=f"no seed has the same figure here and for {against}"), None
    kind = max(shared, key=lambda one: shared[one].n)
    return replace(row, compared=kind, difference=shared[kind], reference=reference.label), reference


def _verdicts(row: Row, data: str, teacher: str, student: str) -> tuple[Verdict, ...]:
    lacking = "unfinished runs" if row.unfinished else ""
    if not lacking and LAST_TEST not in row.figures and CHOSEN_TEST in row.figures:
        lacking = "only the epoch chosen on val was tested"
    tops = [one.teacher_top1 for one in row.entries if one.teacher_top1 is not None]
    return tuple(
        verdict(one, row.figures.get(LAST_TEST), row.settings, tops[0] if tops else None, lacking)
        for one in find_published(data, teacher, student, row.method)
    )
