"""Where the time of a training step goes."""

from __future__ import annotations

import time

import torch

SECTIONS = ("data", "teacher", "student", "losses", "update")


class StepClock:
    """Adds up the time between marks, while it runs; otherwise a mark costs next to nothing.

    On an accelerator a mark waits until all that was asked for before is done, so only a step now and then is timed.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        self._last: float | None = None
        self._device = torch.device("cpu")

    def start(self, device: torch.device) -> None:
        """Begin to time.

        Args:
            device: where the networks run.
        """
        self._device = device
        self._last = self._now()

    def mark(self, section: str) -> None:
        """Count the time since the last mark, if the clock runs, to a part of the step.

        Args:
            section: one of ``data``, ``teacher``, ``student`` (its forward pass), ``losses`` and ``update`` (backward
                pass and optimizer).
        """
        if self._last is not None:
            now = self._now()
            self.seconds[section] += now - self._last
            self._last = now

    def stop(self) -> None:
        """Time no further."""
        self._last = None

    def shares(self) -> dict[str, float]:
        """The share of each section in all time counted, and start anew; empty if none was."""
        seconds, self.seconds = self.seconds, dict.fromkeys(SECTIONS, 0.0)
        total = sum(seconds.values())
        return {section: spent / total for section, spent in seconds.items()} if total else {}

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()
