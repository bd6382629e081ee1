"""The scoreboard as text for a terminal, Markdown, CSV and HTML."""

from __future__ import annotations

import csv
import io
import re
from html import escape
from typing import TYPE_CHECKING

from kdlit.scoreboard.board import REFERENCE, Row, Scoreboard, Section
from kdlit.scoreboard.entries import BEST_TEST, FIGURES, Figure
from kdlit.scoreboard.published import Verdict
from kdlit.scoreboard.statistics import Difference

if TYPE_CHECKING:
    from rich.console import Console

TITLE = "Scoreboard"
HOW_TO_READ = (
    "Accuracies are top-1 in per cent: mean ± standard deviation over seeds (n - 1). The head of each column says "
    "which epoch's student was measured on which pictures. An epoch that was chosen by the pictures it is measured on "
    "makes a figure too good; these are marked in every cell and never compared.",
    "Difference: mean of the differences seed by seed, in points, with the 95 % interval and p of the paired t test, "
    "and p after Holm's correction for all methods held against the same one. Few seeds give wide intervals.",
    "Published: the last epoch on the test pictures alone is held against a published value, and there is a verdict "
    "only if the settings are those behind it. Both agree within twice the standard error of their difference, with a "
    "standard deviation of at least 0.25 points. The best epoch on test, which the code of most papers reports, tends "
    "to lie 0.1 to 0.9 points above the last.",
)


def figure_text(row: Row, kind: Figure, digits: int = 2) -> str:
    """A cell: ``75.30 ± 0.21 (n=3)``, with a suffix where the epoch was chosen; empty if nothing was measured.

    Args:
        row: of the scoreboard.
        kind: which figure.
        digits: after the point.
    """
    if kind not in row.figures:
        return ""
    sample = row.figures[kind]
    spread = "" if sample.std is None else f" ± {sample.std:.{digits}f}"
    return f"{sample.mean:.{digits}f}{spread} (n={len(sample.values)}){_suffix(row, kind)}"


def _suffix(row: Row, kind: Figure) -> str:
    doubt = "?" if kind == BEST_TEST and any(one.pictures == "unknown" for one in row.entries) else ""
    return f" {kind.suffix}{doubt}" if kind.suffix else ""


def difference_text(row: Row) -> str:
    """The difference to the reference, by which figure, and its test; or why there is none.

    Args:
        row: of the scoreboard.
    """
    if row.difference is None or row.compared is None:
        return row.no_difference if row.no_difference == REFERENCE else f"none: {row.no_difference}"
    whom = f" over {row.reference}" if "," in row.reference else ""
    return f"{row.difference.mean:+.2f}{whom} by {row.compared.title} ({_test_text(row.difference)})"


def _test_text(difference: Difference) -> str:
    if difference.interval is None or difference.p is None:
        return difference.why
    low, high = difference.interval
    corrected = "" if difference.adjusted is None else f", Holm {_p(difference.adjusted)}"
    return f"{low:+.2f} to {high:+.2f}, p {_p(difference.p)}{corrected}, n={difference.n}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def verdict_text(verdict: Verdict) -> str:
    """A published value, how its epoch was chosen, and how our last epoch on test compares.

    Args:
        verdict: of a row.
    """
    one = verdict.published
    std = "" if one.std is None else f" ± {one.std:.2f}"
    theirs = f"{one.top1:.2f}{std} ({'epoch ' if one.checkpoint == 'not stated' else ''}{one.checkpoint})"
    points = "" if verdict.difference is None else f", {verdict.difference:+.2f}"
    limit = "" if verdict.tolerance is None else f", tolerance {verdict.tolerance:.2f}"
    return f"{theirs}: {verdict.word}{points}{limit}"


def section_notes(section: Section) -> list[str]:
    """Where the published values of a section stand, and why some are not comparable.

    Args:
        section: of the scoreboard.
    """
    notes = []
    for row in section.rows:
        for verdict in row.verdicts:
            one = verdict.published
            text = [f"{row.label}: {one.top1:.2f} is from {one.source}"]
            text += [f"not comparable: {verdict.why}"] if verdict.why else []
            if not verdict.why and one.checkpoint == "best on test":
                text.append("ours is a last epoch, theirs a best epoch on test by the code that was released")
            text += ["its settings are in part guessed"] if one.guessed and not verdict.why else []
            notes.append("; ".join(text))
    return notes


def seeds_text(row: Row) -> str:
    """How many seeds, which, and which of them are unfinished.

    Args:
        row: of the scoreboard.
    """
    unfinished = f"; UNFINISHED: {row.unfinished}" if row.unfinished else ""
    return f"{len(row.entries)} ({', '.join(one.seed for one in row.entries)}{unfinished})"


def _table(board: Scoreboard, section: Section) -> tuple[list[str], list[list[str]]]:
    """Heads and cells; a column that is empty throughout the section is left out."""
    published = any(row.verdicts for row in section.rows)
    heads = ["Method", "Seeds", *(kind.title for kind in section.figures), f"Difference to {board.against}"]
    rows = [
        [
            row.label,
            seeds_text(row),
            *(figure_text(row, kind) for kind in section.figures),
            difference_text(row),
            *(["; ".join(map(verdict_text, row.verdicts)) or "nothing published"] if published else []),
        ]
        for row in section.rows
    ]
    return [*heads, *(["Published, against our last epoch on test"] if published else [])], rows


def markdown(board: Scoreboard) -> str:
    """The scoreboard in Markdown, a table for each pair of networks.

    Args:
        board: the scoreboard.
    """
    lines = []
    for section in board.sections:
        heads, rows = _table(board, section)
        lines += [f"### {_plain(section.title)}", ""]
        lines += [f"| {' | '.join(map(_plain, heads))} |"]
        lines += [f"|{'|'.join(' --- ' for _ in heads)}|"]
        lines += [f"| {' | '.join(map(_plain, row))} |" for row in rows]
        lines += ["", *(f"- {_plain(note)}" for note in section_notes(section)), ""]
    lines += [f"{text}\n" for text in HOW_TO_READ]
    lines += [f"- {_plain(note)}" for note in board.notes]
    return "\n".join(lines).rstrip() + "\n"


def _plain(text: str) -> str:
    """A text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~!&])", r"\\\1", " ".join(text.split()))


COLUMNS = (
    *("data", "teacher", "student", "method", "settings", "runs", "seeds", "epochs", "unfinished"),
    *("figure", "split", "epoch_choice", "chosen_on", "n", "top1_percent", "best_val_epoch_biased_percent"),
    *("BEST_ON_TEST_biased_percent", "std_points", "compared_with", "difference_points", "low_95", "high_95", "p"),
    *("p_holm", "difference_n", "no_difference"),
    *("published_percent", "published_std", "published_epoch", "published_source", "verdict", "verdict_points"),
    *("verdict_tolerance", "verdict_why"),
)


def table_csv(board: Scoreboard) -> str:
    """The scoreboard as CSV: one line for each figure of each row, so that none goes without its choice of epoch.

    A figure whose epoch was chosen by the pictures it is measured on stands in a column of its own and carries that
    word in the cell, which no program takes for a number.

    Args:
        board: the scoreboard.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for section in board.sections:
        for row in section.rows:
            for kind in FIGURES:
                if kind in row.figures:
                    writer.writerow({key: _inert(value) for key, value in _line(board, section, row, kind).items()})
    return text.getvalue()


def _line(board: Scoreboard, section: Section, row: Row, kind: Figure) -> dict[str, object]:
    sample = row.figures[kind]
    value = f"{sample.mean:.4f}{_suffix(row, kind) if kind.is_biased else ''}"
    column = "top1_percent"
    if kind.is_biased:
        column = "BEST_ON_TEST_biased_percent" if kind == BEST_TEST else "best_val_epoch_biased_percent"
    line: dict[str, object] = {
        "data": section.data,
        "teacher": section.teacher,
        "student": section.student,
        "method": row.method,
        "settings": row.telling,
        "runs": " ".join(one.name for one in row.entries),
        "seeds": " ".join(sample.values),
        "epochs": " ".join(str(count) for count in sorted({one.epochs for one in row.entries})),
        "unfinished": row.unfinished,
        "figure": kind.key,
        "split": "val or test" if "?" in _suffix(row, kind) else kind.split,
        "epoch_choice": kind.epoch_choice,
        "chosen_on": "val or test" if "?" in _suffix(row, kind) else kind.chosen_on,
        "n": len(sample.values),
        column: value,
        "std_points": "" if sample.std is None else f"{sample.std:.4f}{_suffix(row, kind) if kind.is_biased else ''}",
    }
    if kind == row.compared or (row.compared is None and kind == next(iter(row.figures))):
        line["no_difference"] = row.no_difference
        if row.difference is not None:
            low, high = row.difference.interval or (None, None)
            one = row.difference
            numbers = {"difference_points": one.mean, "low_95": low, "high_95": high}
            numbers |= {"p": one.p, "p_holm": one.adjusted}
            line |= {key: f"{number:.4g}" for key, number in numbers.items() if number is not None}
            line |= {"compared_with": row.reference, "difference_n": one.n, "no_difference": one.why}
    if row.verdicts and kind.key == "last_epoch_test":
        first = row.verdicts[0]
        line |= {
            "published_percent": f"{first.published.top1:.2f}",
            "published_std": "" if first.published.std is None else f"{first.published.std:.2f}",
            "published_epoch": first.published.checkpoint,
            "published_source": first.published.source,
            "verdict": first.word,
            "verdict_points": "" if first.difference is None else f"{first.difference:.4f}",
            "verdict_tolerance": "" if first.tolerance is None else f"{first.tolerance:.4f}",
            "verdict_why": first.why,
        }
    return line


def _inert(value: object) -> str:
    """A cell that no spreadsheet takes for a formula."""
    text = str(value)
    is_number = re.fullmatch(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", text)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") and not is_number else text


_STYLE = """
.kdlit-board{--ink:#1b1f24;--faint:#59636e;--line:#d1d9e0;--warn:#8a4b00;--sheet:#fff;color:var(--ink);
font:15px/1.45 system-ui,sans-serif}
@media(prefers-color-scheme:dark){.kdlit-board{--ink:#e6edf3;--faint:#9198a1;--line:#3d444d;--warn:#f0b35a;
--sheet:#0d1117}}
.kdlit-board .box{overflow-x:auto;border:1px solid var(--line);border-radius:6px;margin:0 0 1.2em}
.kdlit-board table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
.kdlit-board th,.kdlit-board td{padding:.45em .7em;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line);min-width:6.5em;max-width:22em;overflow-wrap:break-word}
.kdlit-board tbody tr:last-child>*{border-bottom:0}
.kdlit-board thead th{font-weight:600;color:var(--faint);font-size:.85em}
.kdlit-board tbody th{font-weight:600;position:sticky;left:0;background:var(--sheet);min-width:8em;max-width:11em}
.kdlit-board .figure{min-width:7.5em}
.kdlit-board .wide{min-width:15em;font-size:.9em}
.kdlit-board .biased{color:var(--warn);font-style:italic}
.kdlit-board h2{font-size:1.1em;margin:1em 0 .4em;overflow-wrap:anywhere}
.kdlit-board .notes{color:var(--faint);font-size:.9em;overflow-wrap:anywhere}
"""


def table_html(board: Scoreboard) -> str:
    """The scoreboard as a piece of HTML with its own style, for any page: light and dark, each table in its own box.

    Args:
        board: the scoreboard.
    """
    parts = [f'<div class="kdlit-board"><style>{_STYLE}</style>']
    for section in board.sections:
        heads, rows = _table(board, section)
        looks = ["", "", *("figure biased" if kind.is_biased else "figure" for kind in section.figures), "wide", "wide"]
        suffixes = ["", "", *(kind.suffix for kind in section.figures), "", ""]
        parts.append(f'<h2>{escape(section.title)}</h2>\n<div class="box" tabindex="0"><table><thead><tr>')
        for head, look in zip(heads, looks, strict=False):
            parts.append(f'<th scope="col" class="{look}">{escape(head)}</th>')
        parts.append("</tr></thead><tbody>")
        for cells in rows:
            parts.append(f'<tr><th scope="row">{escape(cells[0])}</th>')
            for cell, look, suffix in list(zip(cells, looks, suffixes, strict=False))[1:]:
                shown = escape(cell)
                if suffix:
                    shown = re.sub(rf"({suffix}[?]?)$", r"<strong>\1</strong>", shown)
                parts.append(f'<td class="{look}">{shown}</td>')
            parts.append("</tr>")
        parts.append("</tbody></table></div>")
        if notes := section_notes(section):
            parts.append(f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>')
    parts.append('<div class="notes">')
    parts += [f"<p>{escape(text)}</p>" for text in HOW_TO_READ]
    if board.notes:
        parts.append(f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in board.notes)}</ul>")
    return "\n".join([*parts, "</div></div>"])


def page_html(board: Scoreboard) -> str:
    """The scoreboard as one page that needs nothing else.

    Args:
        board: the scoreboard.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{TITLE}</title>'
        "<style>body{margin:1rem;background:#fff}@media(prefers-color-scheme:dark){body{background:#0d1117}}</style>"
        f"</head><body>\n{table_html(board)}\n</body></html>\n"
    )


def print_board(board: Scoreboard, console: Console) -> None:
    """Print the scoreboard, each row as a few lines of a table.

    Args:
        board: the scoreboard.
        console: where to.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for section in board.sections:
        heads, rows = _table(board, section)
        looks = ["bold", "", *("yellow" if kind.is_biased else "" for kind in section.figures), "", ""]
        title = Text(section.title, style="bold")
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", show_lines=True)
        for head, look in zip(heads, looks, strict=False):
            table.add_column(Text(head), style=look, overflow="fold")
        for cells in rows:
            table.add_row(*map(Text, cells))
        console.print(table)
        for note in section_notes(section):
            console.print(Text(f"- {note}"))
        console.print()
    for text in (*HOW_TO_READ, *(f"- {note}" for note in board.notes)):
        console.print(Text(text))
