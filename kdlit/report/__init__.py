"""``kdlit report``: one self-contained HTML page about one run or several.

It needs no network and opens from disk: what was run and what to be wary of, the figures that were reached, curves of
everything that was logged, and from the networks themselves, rebuilt on the CPU, the worst classes, confusions,
confidence, pictures that teacher and student judge differently, and the figures of the papers. Several runs are drawn
on top of each other, and compared as by `kdlit compare`.

To rebuild the networks the code is run that the config of the run names: make reports of runs that you trust, or give
--without_networks, which only reads files.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from kdlit.report.page import report_html

__all__ = ["main", "report_html"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command ``kdlit report``.

    Args:
        arguments: what follows ``report`` on the command line.
    """
    parser = argparse.ArgumentParser(
        "kdlit report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="RUN_DIR", help="a run, or a folder that holds runs at any depth")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="by default report.html, in the folder of the run if there is one"
    )
    parser.add_argument(
        "--split",
        choices=("val", "test", "train"),
        help="pictures that the networks are looked at on; by default val where pictures were held out, else test",
    )
    parser.add_argument("--pictures", type=int, default=8, metavar="N", help="examples of each kind, by default 8")
    parser.add_argument(
        "--without_networks",
        action="store_true",
        help="read files only: no code that a config names is run, and what needs the networks is left out",
    )
    options = parser.parse_args(arguments)
    try:
        if options.pictures < 0:
            raise ValueError(f"--pictures must be >= 0, got {options.pictures}")
        path = _write(options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"kdlit: error: {error}\n")
    print(f"Report: {path}, {path.stat().st_size / 1e6:.1f} MB")


def _write(options: argparse.Namespace) -> Path:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from kdlit.runs import find_runs

    runs = find_runs(options.folders)
    path: Path = options.output or (runs[0].path if len(runs) == 1 else Path()) / "report.html"
    if path.is_dir():
        raise ValueError(f"--output: {path} is a folder; name a file in it")
    existing = next(one for one in path.absolute().parents if one.exists())
    if not existing.is_dir():
        raise ValueError(f"--output: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--output: no permission to write in {existing}")
    from kdlit.files import write_whole

    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=None)

        def step(text: str, done: int, of: int) -> None:
            progress.update(task, description=text, completed=done, total=of)

        page = report_html(
            runs,
            split=options.split,
            pictures=options.pictures,
            without_networks=options.without_networks,
            step=step,
        )
    write_whole(path, lambda file: file.write(page.encode("utf-8", "replace")))
    return path
