"""No bad input of thousands may hang, crash, write elsewhere or end in an error that kdlit does not word."""

from __future__ import annotations

import pytest

from tests.faults.fuzz import COUNTS, run


@pytest.fixture(scope="module")
def figures():
    return run(seed=0)


def test_every_bad_input_is_taken_or_refused_in_one_clear_message(figures):
    faults = [one for one in figures["outcomes"] if one.end == "fault"]
    again = "python -m tests.faults.fuzz --only KIND NUMBER runs one again"
    assert not faults, f"{again}\n" + "\n".join(f"{one.kind} {one.number}: {one.title}: {one.text}" for one in faults)


def test_there_are_two_thousand_of_them_and_most_are_refused(figures):
    assert figures["inputs"] == sum(COUNTS.values()) >= 2000
    assert figures["taken"] + figures["refused"] == figures["inputs"]
    for kind, ends in figures["kinds"].items():
        assert ends["refused"] > 0.2 * COUNTS[kind], f"mutations of {kind} are too mild: {ends}"


def test_a_case_follows_from_its_number(figures):
    kind, number = "labels", 17
    (again,) = run(seed=0, counts={kind: 1}, only=(kind, number))["outcomes"]
    (first,) = (one for one in figures["outcomes"] if (one.kind, one.number) == (kind, number))
    assert (again.title, again.end) == (first.title, first.end)
