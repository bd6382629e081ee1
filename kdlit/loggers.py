"""The log that every run keeps on disk."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from kdlit.files import write_whole


class RunLogger(Logger):
    """Appends to ``metrics.csv`` in the run folder, one row an event; a resumed run goes on in the same file.

    Rows that find no room on the disk wait in memory, with a warning, until there is.

    Args:
        run_dir: folder of the run; made when the first row is written.
        student: of several students, the one whose figures are kept, without its name in front, in a folder of that
            name; by default all there is.
    """

    def __init__(self, run_dir: str, student: str = "") -> None:
        super().__init__()
        self.path = Path(run_dir) / student / "metrics.csv"
        self.prefix = f"{student}/" if student else ""
        self._waiting: list[dict[str, Any]] = []
        self._columns = self._read_header()
        self.rows = len(self._read())

    @property
    def name(self) -> str:
        """Empty: the run folder is not divided further."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the run folder is not divided further."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return self.save_dir

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder holds config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row; a metric not seen before becomes a new column."""
        figures = {name.removeprefix(self.prefix): metrics[name] for name in metrics if name.startswith(self.prefix)}
        if not figures:
            return
        row = {"step": step, **figures, **{name: metrics[name] for name in ("epoch",) if name in metrics}}
        self._waiting.append(row)
        try:
            self._write(self._waiting)
        except OSError as error:
            if len(self._waiting) == 1:
                rank_zero_warn(f"{self.path} cannot be written: {error}; its rows wait in memory until it can")

    @rank_zero_only
    def flush(self) -> str | None:
        """See to it that all rows are on the disk; return what prevents it, if something does."""
        try:
            if self._waiting:
                self._write(self._waiting)
            if self.path.exists():
                with self.path.open("rb") as file:
                    os.fsync(file.fileno())
        except OSError as error:
            return f"{len(self._waiting)} rows of {self.path} cannot be written: {error}"
        return None

    def _write(self, rows: list[dict[str, Any]]) -> None:
        columns = list(dict.fromkeys((*self._columns, *(column for row in rows for column in row))))
        if columns != self._columns:
            self._rewrite(self._read(), columns)
        text = io.StringIO(newline="")
        csv.DictWriter(text, columns).writerows(rows)
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if (written := file.write(content := text.getvalue().encode())) < len(content):
                    file.write(content[written:])  # says why there was no room for it
            except OSError:
                os.truncate(self.path, size)
                raise
        self.rows += len(rows)
        self._waiting = []

    @rank_zero_only
    def forget_from(self, step: int, rows: int | None = None) -> None:
        """Drop what a resumed run will write again: the rows of this step and later ones, and any half of a row.

        Args:
            step: of the optimizer.
            rows: how many rows there were when the checkpoint was written; later ones are dropped, too.
        """
        kept = [row for row in self._read()[:rows] if not row["step"] or int(row["step"]) < step]
        if self.path.exists():
            self._rewrite(kept, self._columns if kept else [])

    def _read_header(self) -> list[str]:
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        text = self.path.read_bytes().decode("utf-8", errors="replace")
        whole, _, _ = text.rpartition("\n")  # a process may have been killed in the middle of a row
        return [row for row in csv.DictReader(io.StringIO(whole, newline="")) if (row.get("step") or "0").isdigit()]

    def _rewrite(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        text = io.StringIO(newline="")
        if columns:
            writer = csv.DictWriter(text, columns)
            writer.writeheader()
            writer.writerows(rows)
        write_whole(self.path, lambda file: file.write(text.getvalue().encode()))
        self._columns, self.rows = columns, len(rows)
