"""Where the time of a training step goes."""

from __future__ import annotations

import time

import torch

SECTIONS = ("teacher", "student", "losses", "update")


class StepClock:
    """Adds up the time between marks, while it runs; otherwise a mark costs next to nothing.

    On an accelerator a mark waits until all that was asked for before is done, so only a step now and then is timed.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        self.timed = 0  # steps
        self._last: float | None = None
        self._device = torch.device("cpu")

    def start(self, device: torch.device) -> None:
        """Begin to time a step.

        Args:
            device: where the networks run.
        """
        self._device = device
        self.timed += 1
        self._last = self._now()

    def mark(self, section: str) -> None:
        """Count the time since the last mark, if the clock runs, to a part of the step.

        Args:
            section: one of ``teacher``, ``student`` (its forward pass), ``losses`` and ``update`` (backward pass and
                optimizer).
        """
        if self._last is not None:
            now = self._now()
            self.seconds[section] += now - self._last
            self._last = now

    def skip(self) -> None:
        """Count the time since the last mark to nothing."""
        if self._last is not None:
            self._last = self._now()

    def stop(self) -> None:
        """Time no further."""
        self._last = None

    def shares(self, data: float) -> dict[str, float]:
        """The share of each section in the time of a step, and start anew; empty if no step was timed.

        Args:
            data: seconds that a step waits for its batch.
        """
        timed, self.timed = self.timed, 0
        seconds, self.seconds = self.seconds, dict.fromkeys(SECTIONS, 0.0)
        if not timed:
            return {}
        of_step = {"data": data} | {section: spent / timed for section, spent in seconds.items()}
        return {section: spent / sum(of_step.values()) for section, spent in of_step.items()}

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()
