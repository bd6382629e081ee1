"""``kdlit compare``: runs in one table, each accuracy with what it stands for, against plain KD and what is published.

A row is a method: runs whose settings are the same but for the seed. Columns:

  last epoch, test           the student of the last epoch on the test pictures, from `kdlit test --ckpt_path=last`
  epoch chosen on val, test  likewise of best.ckpt, whose epoch was chosen on held-out training pictures
  last epoch, val            the last epoch on validation pictures that were held out of the training pictures
  mean of last 10 epochs     over these epochs, if all ten were measured, on those pictures
  best epoch, val            the best of all epochs on those pictures, which chose it: too good
  BEST EPOCH ON TEST         likewise where the validation pictures are the test pictures, or are not known not to be;
                             every cell says so as well, and none is ever compared with anything
  Difference to KD           seed by seed to the row of plain KD that was trained under the same conditions, by a figure
                             that both have: mean, 95 % interval and p of the paired t test, p after Holm's correction
  Published                  values of this cell, which epoch they are of, and whether the last epoch on the test
                             pictures agrees with them; no verdict where the settings or the teacher are others

Each accuracy is top-1 in per cent: mean, standard deviation over seeds and their number. Of copies with the same
settings and seed the newest counts, but first one that is finished and tested; unfinished runs do not. Figures of part
of the test pictures do not count, nor those of data other than in training. What was left out is listed beneath.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from kdlit.scoreboard.board import AGAINST, Row, Scoreboard, Section, gather
from kdlit.scoreboard.entries import Entry, Figure, read_entries
from kdlit.scoreboard.render import markdown, page_html, print_board, table_csv, table_html

__all__ = [
    "Entry",
    "Figure",
    "Row",
    "Scoreboard",
    "Section",
    "compare",
    "main",
    "markdown",
    "page_html",
    "print_board",
    "table_csv",
    "table_html",
]

_FORMATS = {"markdown": markdown, "csv": table_csv, "html": page_html}
_ENDINGS = {".md": "markdown", ".markdown": "markdown", ".csv": "csv", ".html": "html", ".htm": "html"}


def compare(folders: Iterable[str | Path], *, unfinished: bool = False, against: str = AGAINST) -> Scoreboard:
    """Make the scoreboard of the runs in some folders.

    Args:
        folders: runs, or folders that hold runs at any depth; their order does not matter.
        unfinished: whether runs that have not ended as planned count, too.
        against: the method that the others are held against, as it is named in the table.

    Raises:
        ValueError: If there is no run to compare.
    """
    entries, problems = read_entries(folders)
    return gather(entries, problems, unfinished=unfinished, against=against)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command ``kdlit compare``.

    Args:
        arguments: what follows ``compare`` on the command line.
    """
    parser = argparse.ArgumentParser(
        "kdlit compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="RUN_DIR", help="a run, or a folder that holds runs at any depth")
    parser.add_argument("--format", choices=("text", *_FORMATS), help="by default that of the file's ending, or text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write to a file instead: .md, .csv or .html")
    parser.add_argument("--unfinished", action="store_true", help="count runs that have not ended, marked as such")
    parser.add_argument(
        "--against",
        default=AGAINST,
        metavar="METHOD",
        help='the method that the others are held against, as the table names it: "student alone", "KD, beta=2"; by '
        "default KD",
    )
    options = parser.parse_args(arguments)
    form = options.format or ("text" if options.output is None else _ENDINGS.get(options.output.suffix.lower()))
    if form is None:
        parser.exit(
            2, f"kdlit: error: --output: {options.output} ends in none of {', '.join(_ENDINGS)}; add --format\n"
        )
    try:
        board = compare(options.folders, unfinished=options.unfinished, against=options.against)
        if form == "text":
            _print(board, options.output)
        elif options.output is None:
            sys.stdout.write(_FORMATS[form](board))
        else:
            _write(options.output, _FORMATS[form](board))
    except (ValueError, OSError) as error:
        parser.exit(2, f"kdlit: error: {error}\n")
    if options.output is not None or form == "csv":  # which have no place for them, or none that is seen
        for note in board.notes:
            print(f"kdlit: note: {note}", file=sys.stderr)


def _print(board: Scoreboard, output: Path | None) -> None:
    import io

    from rich.console import Console

    if output is None:  # into a pipe no cell is to be cut or wrapped, however long
        print_board(board, Console(width=None if sys.stdout.isatty() else 1_000))
        return
    text = io.StringIO()
    print_board(board, Console(file=text, width=1_000))
    _write(output, text.getvalue())


def _write(path: Path, text: str) -> None:
    from kdlit.files import write_whole

    write_whole(path, lambda file: file.write(text.encode()))
    print(f"Scoreboard: {path}")
