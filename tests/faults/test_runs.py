"""Runs that are killed, told to stop, or find no room on the disk, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCENARIOS = ("kills", "kills_validation", "kills_early", "stops", "start_up", "full_disk", "broken_checkpoint", "cost")


@pytest.fixture(scope="module")
def found():
    """Figures of the scenarios that every change must pass; ``python -m tests.faults`` has more."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--json", *SCENARIOS],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_a_run_that_is_killed_20_times_ends_bit_for_bit_as_one_left_in_peace(found):
    kills = found["kills"]
    assert kills["tried"] == kills["survived"] == 20
    assert set(kills["killed_in"]) == {"start", "training", "validation", "saving"}
    assert kills["different"] == []
    assert kills["left_over"] == []
    compared = "\n".join(kills["identical"])
    for name in ("metrics.csv", "last.ckpt: state_dict", "last.ckpt: optimizer_states", "last.ckpt: callbacks",
                 "last.ckpt: lr_schedulers", "last.ckpt: loops", "best.ckpt: state_dict", "student.pt: model"):  # fmt: skip
        assert name in compared


@pytest.mark.parametrize("name", ["kills_validation", "kills_early"])
def test_validations_within_epochs_accumulation_plateaus_and_early_stopping_go_on_exactly(found, name):
    assert found[name]["tried"] == 6
    assert found[name]["different"] == []


def test_a_signal_before_training_ends_the_run_with_the_documented_status(found):
    early = found["start_up"]
    assert early["status"] == 75
    assert "stopped by SIGTERM outside of training; the same command goes on" in early["message"]
    assert early["left_over"] == []
    assert early["different"] == []


@pytest.mark.parametrize("number", range(4))
def test_signals_save_say_so_and_end_with_the_documented_status(found, number):
    stop = found["stops"][number]
    assert stop["sent"]
    assert stop["status"] == stop["expected"]
    assert "the same command with --ckpt_path=last goes on" in stop["message"]
    assert f"step {stop['step']};" in stop["message"], "what was saved is not the step at hand"
    assert stop["different"] == []


def test_a_full_disk_costs_no_checkpoint(found):
    full = found["full_disk"]
    assert full["status"] == 2
    assert full["untouched"]
    assert full["warned"]
    assert full["left_over"] == []
    assert "cannot write full/checkpoints/last.ckpt: File too large" in full["message"]
    assert full["different"] == []


@pytest.mark.parametrize("number", range(4))
def test_a_broken_last_checkpoint_is_named_and_the_newest_whole_one_taken(found, number):
    broken = found["broken_checkpoint"][number]
    assert broken["taken"]
    assert broken["named"] or broken["way"] == "not there"
    assert broken["different"] == []


def test_checkpoints_take_no_more_than_their_share_of_the_time(found):
    assert len(found["cost"]) == 2
    assert all(0 < one["percent"] < 1.001 for one in found["cost"].values())
