"""All faults, done on purpose, and how many of them a run survives: ``python -m tests.faults`` in a clone."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import kdlit.cli  # noqa: F401  what is imported here is not imported again by the processes forked from this one
from tests.faults import cost, fuzz, runs

STUDENTS = ("--students={one: {}, other: {seed: 1, set: {model.losses.dist.weight: 2.0}}}",)
OFTEN = (
    "--trainer.val_check_interval=0.5",
    "--trainer.accumulate_grad_batches=3",
    "--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau",
    "--model.lr_scheduler.monitor=val/cross_entropy",
    "--model.lr_scheduler.patience=0",
    "--model.lr_scheduler.factor=0.5",
)
EARLY = (
    "--last.every_n_steps=1000",
    "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping",
    "--trainer.callbacks.monitor=val/top1",
    "--trainer.callbacks.mode=max",
    "--trainer.callbacks.patience=1",
)
# Each gets a scratch folder and a run that was left in peace.
SCENARIOS: dict[str, Callable[[Path, Callable[..., runs.Runs]], Any]] = {
    "kills": lambda _, peace: runs.kills(peace()),
    "kills_workers": lambda _, peace: runs.kills(peace("--data.num_workers=2"), 6, 1),
    "kills_validation": lambda _, peace: runs.kills(peace(*OFTEN), 6, 2),
    "kills_early": lambda _, peace: runs.kills(peace(*EARLY), 6, 4),
    "kills_students": lambda _, peace: runs.kills(peace(*STUDENTS), 6, 3),
    "stops": lambda _, peace: runs.stops(peace()),
    "start_up": lambda _, peace: runs.start_up(peace()),
    "full_disk": lambda _, peace: runs.full_disk(peace()),
    "broken_checkpoint": lambda _, peace: runs.broken_checkpoint(peace()),
    "two_processes": lambda folder, _: runs.two_processes(folder),
    "cost": lambda folder, _: cost.measure(folder),
    "fuzz": lambda *_: fuzz.run(),
}


def main() -> None:
    """Do them, and print figures as JSON, or as lines to read."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; all by default")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if unknown := set(options.scenarios) - SCENARIOS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(SCENARIOS)}")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:

        @functools.cache
        def peace(*overrides: str) -> runs.Runs:
            return runs.Runs(Path(scratch) / f"runs{len(list(Path(scratch).iterdir()))}", overrides)

        for name in options.scenarios or SCENARIOS:
            print(f"{name} ...", file=sys.stderr, flush=True)
            start = time.monotonic()
            found[name] = SCENARIOS[name](Path(scratch) / name, peace)
            if isinstance(found[name], dict):
                found[name].pop("outcomes", None)
            print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps(found, indent=1) if options.json else report(found))


def report(found: dict[str, Any]) -> str:
    """The figures in lines to read."""
    lines = []
    compared = [one for name in found for one in _each(found[name]) if "different" in one]
    kills = [found[name] for name in found if "tried" in (found[name] if isinstance(found[name], dict) else {})]
    if kills:
        lines.append(f"kills survived / tried: {sum(k['survived'] for k in kills)} / {sum(k['tried'] for k in kills)}")
    if compared:
        same = sum(not one["different"] for one in compared)
        lines.append(f"runs that end bit for bit as those left in peace / tried: {same} / {len(compared)}")
        lines += [f"  different: {', '.join(one['different'])}" for one in compared if one["different"]]
    if "stops" in found:
        right = sum(one["status"] == one["expected"] and bool(one["message"]) for one in found["stops"])
        lines.append(f"signals answered as documented / sent: {right} / {len(found['stops'])}")
    if "full_disk" in found:
        full = found["full_disk"]
        lines.append(f"disk full: checkpoint of before untouched: {full['untouched']}; said: {full['message']}")
    if "broken_checkpoint" in found:
        taken = sum(one["taken"] for one in found["broken_checkpoint"])
        lines.append(f"broken checkpoints passed over / tried: {taken} / {len(found['broken_checkpoint'])}")
    if "fuzz" in found:
        fuzzed = found["fuzz"]
        lines.append(
            f"mutated inputs: {fuzzed['inputs']}, of which {fuzzed['refused']} ended in a clear error, "
            f"{fuzzed['taken']} were taken, {fuzzed['faults']} faults"
        )
    for name, one in found.get("cost", {}).items():
        lines.append(
            f"a checkpoint of {name} ({one['megabytes']:.0f} MB): {1000 * one['seconds']:.0f} ms, {one['percent']:.2f} % "
            f"of the time at steps of 5 ms, one in {one['minutes_between']:.1f} minutes"
        )
    return "\n".join(lines)


def _each(figures: Any) -> list[dict[str, Any]]:
    return figures if isinstance(figures, list) else [figures]


if __name__ == "__main__":
    main()
