"""The scoreboard: what each number stands for, which runs share a row, and what they are held against."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from kdlit import scoreboard
from kdlit.scoreboard import compare, markdown, page_html, table_csv, table_html
from kdlit.scoreboard.entries import (
    BEST_TEST,
    BEST_VAL,
    CHOSEN_TEST,
    FIGURES,
    LAST_TEST,
    LAST_VAL,
    MEAN_VAL,
    read_entries,
)
from kdlit.scoreboard.render import COLUMNS
from kdlit.scoreboard.settings import method_name, network_name, settings_of, student_and_teacher

KD = {
    "ce": {"loss": {"class_path": "kdlit.losses.CrossEntropyLoss"}, "weight": 0.1},
    "kd": {"loss": {"class_path": "kdlit.losses.KDLoss", "init_args": {"temperature": 4.0}}, "weight": 0.9},
}
DKD = {
    "ce": {"loss": {"class_path": "kdlit.losses.CrossEntropyLoss"}, "weight": 1.0},
    "dkd": {"loss": {"class_path": "kdlit.losses.DKDLoss", "init_args": {"beta": 8.0}}, "weight": 1.0},
}
RISING = {epoch: 0.5 + epoch / 100 for epoch in range(12)}  # ends at 0.61; the last ten have a mean of 0.565


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Writes the folder of a run of 12 epochs; returns it."""
    monkeypatch.chdir(tmp_path)

    def write(
        name,
        losses=KD,
        seed=0,
        val=None,
        test=None,
        epochs=12,
        checkpoint="last.ckpt",
        held_out=True,
        at=None,
        cross_entropy=None,
        top5=None,
        done=True,
        data=None,
        **trainer,
    ):
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        config = {
            "seed_everything": seed,
            "trainer": {"max_epochs": 12, **trainer},
            "data": {"class_path": "kdlit.data.CIFAR100", "init_args": {"batch_size": 64, "root": f"here/{name}", **(data or {})}},
            "model": {
                "class_path": "kdlit.modules.ClassificationDistillation",
                "init_args": {
                    "student": {"class_path": "kdlit.models.resnet8x4", "init_args": {"num_classes": 100}},
                    "teacher": {"class_path": "kdlit.models.from_checkpoint", "init_args": {"model": {"class_path": "kdlit.models.resnet32x4"}, "path": "t.pth"}},
                    "losses": losses,
                },
            },
            "checkpoint": {"filename": "best", "monitor": "val/top1"},
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        parts = {"val": {"size": 10, "pictures": "v"}} if val and held_out else {}
        start = {"time": at or "2026-01-01", "seed": seed, "processes": 1, "versions": {"kdlit": "1"}}
        (folder / "run.json").write_text(json.dumps({"starts": [start], "data": {"class": "D", **parts}}))
        rows = [
            {
                "step": epoch,
                "epoch": epoch,
                "train/loss": 1.0,
                "val/top1": (val or {}).get(epoch),
                "val/top5": (top5 or {}).get(epoch),
                "val/cross_entropy": (cross_entropy or {}).get(epoch),
            }
            for epoch in range(epochs)
        ]
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        if epochs == 12 and done:
            (folder / "student.pt").touch()
        if test is not None:
            figures = test if isinstance(test, dict) else {"test/top1": test}
            content = {"checkpoint": f"runs/{name}/checkpoints/{checkpoint}", "epochs": epochs, **figures}
            (folder / "test.json").write_text(json.dumps(content))
        return folder

    return write


def rows_of(*folders, **options):
    return {row.label: row for section in compare(folders, **options).sections for row in section.rows}


def figures_of(folder):
    (entry,) = read_entries([folder])[0]
    return {kind: round(value, 6) for kind, value in entry.figures.items()}


def notes_of(*folders, **options):
    return "\n".join(compare(folders, **options).notes)


# What a number stands for


def test_a_validation_curve_gives_its_last_epoch_the_mean_of_ten_and_its_best(run):
    folder = run("a", val=RISING | {4: 0.9})
    ten = (sum(RISING[epoch] for epoch in range(2, 12)) - RISING[4] + 0.9) / 10
    assert figures_of(folder) == {LAST_VAL: 0.61, MEAN_VAL: round(ten, 6), BEST_VAL: 0.9}


def test_a_mean_of_ten_needs_all_ten_and_a_last_epoch_the_last(run):
    every_other = {epoch: value for epoch, value in RISING.items() if epoch % 2}
    assert set(figures_of(run("a", val=every_other))) == {LAST_VAL, BEST_VAL}
    before = {epoch: value for epoch, value in RISING.items() if epoch < 11}
    assert set(figures_of(run("b", val=before))) == {BEST_VAL}


def test_a_value_that_is_no_number_does_not_count(run):
    assert set(figures_of(run("a", val=RISING | {11: float("nan")}))) == {BEST_VAL}


def test_the_test_figure_of_the_last_checkpoint_is_that_of_the_last_epoch(run):
    assert figures_of(run("a", test=0.7)) == {LAST_TEST: 0.7}


def test_the_test_figure_of_the_best_checkpoint_is_never_that_of_a_last_epoch(run):
    folder = run("a", val=RISING, test=0.7, checkpoint="best.ckpt")  # although the best epoch is the last
    assert figures_of(folder)[CHOSEN_TEST] == 0.7
    assert LAST_TEST not in figures_of(folder)
    (row,) = rows_of(folder).values()
    assert "70.00 (n=1) epoch chosen on val" in markdown(compare([folder]))
    assert row.compared == CHOSEN_TEST


def test_the_best_checkpoint_chosen_on_pictures_of_unknown_origin_is_called_best_on_test(run):
    folder = run("a", val=RISING, test=0.7, checkpoint="best.ckpt", held_out=False)
    assert figures_of(folder)[BEST_TEST] == 0.7
    assert "they may be the test pictures" in notes_of(folder)
    assert "70.00 (n=1) best on TEST?" in markdown(compare([folder]))


def test_a_checkpoint_that_was_chosen_by_no_figure_is_the_epoch_it_is_of(run):
    folder = run("a", test=0.7, checkpoint="best.ckpt")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["checkpoint"]["monitor"] = None
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert figures_of(folder) == {LAST_TEST: 0.7}


def test_the_test_figure_of_half_a_training_does_not_count(run):
    folder = run("a", val=RISING, test=0.7)
    content = json.loads((folder / "test.json").read_text())
    (folder / "test.json").write_text(json.dumps(content | {"epochs": 6}))
    assert set(figures_of(folder)) == {LAST_VAL, MEAN_VAL, BEST_VAL}
    assert "test.json does not count: it is of epoch 6, not 12" in notes_of(folder)
    (folder / "test.json").write_text(json.dumps(content | {"epochs": None, "checkpoint": None}))
    assert "it names no checkpoint" in notes_of(folder)


def measured_alike(run, name, top1=RISING[11], other=2.5, **options):
    """A run whose figures of validation and test are the same, but for the cross-entropy on test if that is given."""
    same = {"test/top1": top1, "test/top5": 0.9, "test/cross_entropy": other}
    options = {"val": RISING | {11: top1}, "held_out": False} | options
    return run(name, test=same, cross_entropy={11: 2.5}, top5={11: 0.9}, **options)


def pictures_of(*folders):
    return [entry.pictures for entry in read_entries(folders)[0]]


def test_validation_pictures_that_look_like_the_test_pictures_are_trusted_less_and_never_more(run):
    measured_alike(run, "a")
    run("b", val=RISING, seed=1, held_out=False)  # on the same data, without a test of its own
    run("c", val=RISING, seed=2)  # whose record knows better
    a, b, c = read_entries(["runs"])[0]
    assert set(a.figures) == {LAST_TEST, LAST_VAL, MEAN_VAL, BEST_TEST}
    assert set(b.figures) == {LAST_VAL, MEAN_VAL, BEST_TEST}
    assert set(c.figures) == {LAST_VAL, MEAN_VAL, BEST_VAL}
    assert [one.pictures for one in (a, b, c)] == ["test", "test", "held out"]
    assert "both give the same figures" in notes_of("runs")


def test_no_run_shows_its_pictures_to_be_the_test_pictures_by_a_guess_or_by_few_figures(run):
    assert pictures_of(measured_alike(run, "alike")) == ["test"]
    assert pictures_of(measured_alike(run, "guess", top1=0.01)) == ["unknown"]  # as good as 1 of 100 classes at random
    assert pictures_of(measured_alike(run, "other", other=2.4)) == ["unknown"]
    assert pictures_of(run("few", val=RISING, test=RISING[11], held_out=False)) == ["unknown"]
    assert pictures_of(measured_alike(run, "held_out", held_out=True)) == ["held out"]


@pytest.mark.parametrize(
    ("said", "limit", "counts"),
    [
        ({}, None, True),
        ({"limit_batches": None, "otherwise": ""}, 1, True),  # the test is what counts
        ({"limit_batches": 1.0}, None, True),
        ({"limit_batches": 1}, None, False),  # batch
        ({"limit_batches": 0.5}, None, False),
        ({}, 2, False),
        ({"otherwise": "data.size 32 -> 64"}, None, False),
    ],
)
def test_a_figure_of_part_of_the_test_pictures_or_of_others_does_not_count(run, said, limit, counts):
    folder = run("a", val=RISING, test={"test/top1": 0.7, "test/teacher_top1": 0.8, **said}, limit_test_batches=limit)
    assert (LAST_TEST in figures_of(folder)) == counts
    assert ("test.json does not count: " in notes_of(folder)) != counts
    assert (read_entries([folder])[0][0].teacher_top1 is not None) == counts


def test_of_validation_pictures_that_nobody_vouches_for_the_best_is_best_on_test(run):
    assert set(figures_of(run("a", val=RISING, held_out=False))) == {LAST_VAL, MEAN_VAL, BEST_TEST}


@pytest.mark.parametrize("origin", ["held out", "unknown", "test"])
def test_no_format_shows_a_best_epoch_without_saying_so_in_head_and_cell(run, origin):
    write = functools.partial(measured_alike, run) if origin == "test" else run
    folder = write("a", val={**RISING, 3: 0.8765}, held_out=origin == "held out")
    board = compare([folder])
    kind = BEST_VAL if origin == "held out" else BEST_TEST
    word = {"held out": "best on val", "unknown": "best on TEST?", "test": "best on TEST"}[origin]
    for line in markdown(board).splitlines():
        assert ("87.65" in line) == (f"87.65 (n=1) {word} |" in line)
    heads, _, *cells = [line.split(" | ") for line in markdown(board).splitlines() if line.startswith("|")]
    assert cells[0][heads.index(kind.title)] == f"87.65 (n=1) {word}"
    html = table_html(board)
    assert html.count("87.65") == html.count(f"87.65 (n=1) <strong>{word}</strong>") == 1
    (line,) = [
        line for line in csv.DictReader(io.StringIO(table_csv(board))) if any("87.65" in cell for cell in line.values())
    ]
    column = "best_val_epoch_biased_percent" if origin == "held out" else "BEST_ON_TEST_biased_percent"
    assert {key: cell for key, cell in line.items() if "87.65" in cell} == {column: f"87.6500 {word}"}
    assert line["epoch_choice"].startswith("best")
    assert line["chosen_on"] == {"held out": "val", "unknown": "val or test", "test": "test"}[origin]
    terminal = io.StringIO()
    scoreboard.print_board(board, Console(file=terminal, width=400))
    assert terminal.getvalue().count("87.65") == terminal.getvalue().count(f"87.65 (n=1) {word}") == 1
    assert kind.title in terminal.getvalue()


def test_every_head_names_pictures_and_choice_of_epoch_and_biased_ones_their_bias():
    for kind in FIGURES:
        assert kind.split in kind.title.lower()
        assert any(word in kind.title.lower() for word in ("last", "best", "chosen"))
        assert kind.is_biased == ("biased up" in kind.title) == ("best" in kind.suffix)
        assert ("best" in kind.title.lower() and "test" in kind.title.lower()) == (kind == BEST_TEST)
    assert BEST_TEST.title.startswith("BEST EPOCH ON TEST")


# Which runs count, and in which row


def test_runs_that_differ_in_seed_folder_and_logging_share_a_row(run):
    run("a", test=0.70)
    run(
        "b",
        test=0.72,
        seed=1,
        log_every_n_steps=7,
        callbacks=[{"class_path": "kdlit.callbacks.TeacherCheck"}],
        data={"num_workers": 3},
    )
    (row,) = rows_of("runs").values()
    sample = row.figures[LAST_TEST]
    assert dict(sample.values) == {"0": 0.70, "1": 0.72}
    assert sample.mean == pytest.approx(71)
    assert sample.std == pytest.approx(2**0.5)
    assert "71.00 ± 1.41 (n=2)" in markdown(compare(["runs"]))


@pytest.mark.parametrize(
    "change",
    [
        {"max_steps": 100},
        {"callbacks": [{"class_path": "lightning.pytorch.callbacks.EarlyStopping"}]},
        {"data": {"batch_size": 32}},
        {"limit_train_batches": 1},  # which is not 1.0
        {"data": {"verify": False, "root": "elsewhere"}},  # own pictures in the layout of published ones
    ],
)
def test_runs_that_compute_something_else_do_not(run, change):
    run("a", test=0.70, limit_train_batches=1.0)
    run("b", test=0.72, seed=1, **{"limit_train_batches": 1.0} | change)
    assert len(rows_of("runs")) == 2


@pytest.mark.parametrize(
    ("where", "arguments", "pictures", "free"),
    [
        ("kdlit.data.CIFAR100", {"root": "b", "seed": 3, "download": True, "broken": "skip"}, None, True),
        ("kdlit.data.ImageFolder", {"root": "b"}, None, False),
        ("kdlit.data.ImageFolder", {"root": "b"}, "fingerprint", True),
        ("mylab.Pets", {"root": "b"}, None, False),
        ("mylab.Pets", {"seed": 3}, None, False),
        ("mylab.Pets", {"num_workers": 3}, None, True),
    ],
)
def test_only_for_data_of_kdlit_it_is_known_which_arguments_change_nothing(where, arguments, pictures, free):
    record = {"data": {"train": {"pictures": pictures}}}
    one, other = (
        settings_of({"data": {"class_path": where, "init_args": {"root": "a"} | more}}, record)
        for more in ({}, arguments)
    )
    assert (one == other) == free


def test_rows_of_one_method_say_in_what_they_differ(run):
    run("a", DKD, test=0.7)
    other = json.loads(json.dumps(DKD))
    other["dkd"]["loss"]["init_args"]["beta"] = 2.0
    run("b", other, test=0.7)
    assert set(rows_of("runs")) == {"DKD, beta=8.0", "DKD, beta=2.0"}


def test_rows_that_differ_in_their_pictures_alone_say_so_among_others(run):
    other = json.loads(json.dumps(DKD))
    other["dkd"]["loss"]["init_args"]["beta"] = 2.0
    for name, losses, pictures in (("a", DKD, "a"), ("b", DKD, "b"), ("c", other, "a")):
        path = run(name, losses, test=0.7) / "run.json"
        record = json.loads(path.read_text())
        record["data"]["train"] = {"pictures": 64 * pictures}
        path.write_text(json.dumps(record))
    several = {f"DKD, beta=8.0, train pictures={8 * pictures}" for pictures in "ab"}
    assert set(rows_of("runs")) == {*several, "DKD, beta=2.0"}


def test_what_holds_for_several_runs_is_said_once(run):
    for seed in (0, 1):
        run(f"a{seed}", val=RISING, seed=seed, held_out=False)
    notes = notes_of("runs")
    assert notes.count("may be the test pictures") == 1
    assert "runs/a0, runs/a1: " in notes


def test_of_copies_with_one_seed_the_newest_counts_alone_and_this_is_said(run):
    run("a", test=0.70, at="2026-01-02")
    run("b", test=0.60, at="2026-01-01")
    (row,) = rows_of("runs").values()
    assert dict(row.figures[LAST_TEST].values) == {"0": 0.70}
    assert "runs/b: not counted: runs/a is a newer run with the same settings and seed 0" in notes_of("runs")


def test_a_copy_that_got_less_far_displaces_none(run):
    run("a", val=RISING, test=0.70)
    run("b", val=RISING, at="2026-02-01")
    run("c", val=RISING, at="2026-03-01", epochs=2)
    (row,) = rows_of("runs", unfinished=True).values()
    assert [one.name for one in row.entries] == ["runs/a"]
    assert "runs/b: not counted: runs/a is a tested run with" in notes_of("runs", unfinished=True)
    assert "runs/c: not counted: runs/b is a finished run with" in notes_of("runs", unfinished=True)


@pytest.mark.parametrize("seed", [True, False, None])
def test_runs_without_a_seed_are_no_copies_unless_they_are(run, seed):
    folder = run("a", test=0.70, seed=seed)
    run("b", test=0.60, seed=seed, at="2026-01-02")
    shutil.copytree(folder, "runs/backup")
    (row,) = rows_of("runs").values()
    assert sorted(row.figures[LAST_TEST].values.values()) == [0.60, 0.70]
    assert "runs/a: not counted: runs/backup is a newer run with the same settings" in notes_of("runs")


def test_a_run_named_twice_is_no_copy(run):
    folder = run("a", test=0.70)
    assert notes_of(folder, "runs", folder.resolve()) == ""


def test_unfinished_runs_count_only_when_asked_for_and_are_marked(run):
    run("a", val=RISING)
    run("b", val=RISING, seed=1, epochs=6)
    run("c", val=RISING, seed=2, done=False)  # in its last epoch, for all the log tells
    (row,) = rows_of("runs").values()
    assert list(row.figures[LAST_VAL].values) == ["0"]
    assert "runs/b: unfinished: 6 of 12 epochs" in notes_of("runs")
    assert "unfinished (--unfinished counts them): runs/b, runs/c" in notes_of("runs")
    (row,) = rows_of("runs", unfinished=True).values()
    assert dict(row.figures[LAST_VAL].values) == {"0": 0.61, "1": RISING[5], "2": 0.61}
    assert "UNFINISHED: seed 1: 6 of 12 epochs; seed 2: 12 of 12" in markdown(compare(["runs"], unfinished=True))


def test_a_log_with_gaps_does_not_make_a_finished_run_unfinished(run):
    folder = run("a", test=None, val={4: 0.5})
    lines = (folder / "metrics.csv").read_text().splitlines()
    (folder / "metrics.csv").write_text("\n".join([lines[0], lines[5], lines[10]]) + "\n")  # epochs 4 and 9 of 0 to 11
    (entry,) = read_entries([folder])[0]
    assert entry.finished
    assert set(entry.figures) == {BEST_VAL}  # but nothing is known of its last epoch
    (folder / "student.pt").unlink()
    assert not read_entries([folder])[0][0].finished


def test_a_run_that_ends_by_its_number_of_steps_is_finished(run):
    run("a", test=0.7, epochs=5, max_steps=5)
    run("b", test=0.7, epochs=5, max_steps=6, seed=1)
    for name in "ab":
        (Path("runs") / name / "student.pt").touch()
    a, b = read_entries(["runs"])[0]
    assert (a.finished, a.epochs, set(a.figures)) == (True, 5, {LAST_TEST})
    assert not b.finished


def test_what_cannot_be_read_is_named_and_the_others_go_on(run):
    run("good", test=0.7)
    (run("no_accuracy", seed=1) / "student.pt").touch()
    (run("bad/log", seed=2, val=RISING) / "metrics.csv").write_text("step,epoch,train/loss,val/top1\n1,0,1,much\n")
    (run("bad/config", seed=3) / "config.yaml").write_text("a: [")
    (run("bad/test", seed=4, test=0.7) / "test.json").write_text("{")
    (run("bad/loop", seed=6, test=0.7) / "config.yaml").write_text("model: &a\n  x: *a\n")
    (run("bad/students", seed=7) / "config.yaml").write_text(
        "model: {class_path: kdlit.modules.MutualLearning, init_args: {students: 3}}"
    )
    (Path("runs/good") / "validate.json").write_text("{")  # which nothing here asks for
    run("per_cent", seed=5, test=71.2)
    notes = notes_of("runs", "nowhere")
    for name in ("no_accuracy", "bad/log", "bad/config", "bad/test", "bad/loop", "bad/students", "per_cent", "nowhere"):
        assert name in notes
    assert "test/top1 must be a share from 0 to 1, got 71.2" in notes
    assert [one.name for row in rows_of("runs").values() for one in row.entries] == ["runs/good"]


def test_the_order_of_the_arguments_does_not_matter(run):
    folders = [
        run("a", test=0.7, val=RISING),
        run("b", DKD, test=0.72),
        run("c", DKD, seed=1, test=0.71),
        run("d", seed=1, test=0.7, val=RISING),
        run("e", test=0.1),
    ]
    texts = {
        (markdown(board), table_csv(board))
        for order in (folders, folders[::-1], folders[2:] + folders[:2])
        for board in [compare(order)]
    }
    assert len(texts) == 1


def test_one_order_of_pictures_for_all_seeds_is_said(run):
    run("a", test=0.7, data={"seed": 0})
    run("b", test=0.7, seed=1, data={"seed": 0})
    assert "all seeds see the pictures in the same order" in notes_of("runs")
    assert [one.seed for row in rows_of("runs").values() for one in row.entries] == ["0", "1 (pictures 0)"]


# Differences


def test_the_difference_to_kd_is_taken_seed_by_seed_and_tested(run):
    for seed, (kd, dkd) in enumerate([(0.70, 0.71), (0.72, 0.74), (0.69, 0.72)]):
        run(f"kd{seed}", test=kd, seed=seed)
        run(f"dkd{seed}", DKD, test=dkd, seed=seed)
    run("dkd9", DKD, test=0.1, seed=9)  # which KD has not
    difference = rows_of("runs")["DKD"].difference
    assert (difference.mean, difference.n) == (pytest.approx(2), 3)
    # differences 1, 2, 3: standard error 1/sqrt(3), t = 3.4641 with 2 degrees of freedom, quantile 4.3027
    assert difference.p == pytest.approx(0.0742, abs=1e-4)
    assert difference.interval == (
        pytest.approx(2 - 4.3027 / 3**0.5, abs=1e-3),
        pytest.approx(2 + 4.3027 / 3**0.5, abs=1e-3),
    )
    assert rows_of("runs")["KD"].difference is None
    assert "+2.00 by last epoch, test (-0.48 to +4.48, p 0.074, Holm 0.074, n=3)" in markdown(compare(["runs"]))


def test_one_seed_and_equal_differences_are_not_tested(run):
    run("kd", test=0.70)
    run("dkd", DKD, test=0.71)
    assert "+1.00 by last epoch, test (no test, n=1)" in markdown(compare(["runs"]))
    run("kd1", test=0.70, seed=1)
    run("dkd1", DKD, test=0.71, seed=1)
    assert "(no test, the same with each of n=2 seeds)" in markdown(compare(["runs"]))


def test_no_best_epoch_is_ever_compared(run):
    run("kd", val={3: 0.5}, held_out=True)
    run("dkd", DKD, val={3: 0.6}, held_out=True)
    row = rows_of("runs")["DKD"]
    assert set(row.figures) == {BEST_VAL}
    assert (row.difference, row.compared) == (None, None)


def test_only_the_same_figure_is_compared(run):
    run("kd", val=RISING)
    run("dkd", DKD, val=RISING | {11: 0.63}, test=0.9)
    row = rows_of("runs")["DKD"]
    assert row.compared == LAST_VAL
    assert row.difference.mean == pytest.approx(2)


def test_kd_under_other_conditions_is_no_reference(run):
    run("kd", test=0.7)
    run("dkd", DKD, test=0.72, data={"batch_size": 32})
    row = rows_of("runs")["DKD"]
    assert row.difference is None
    assert row.no_difference == "KD was trained otherwise: batch_size=64"


def test_another_reference_can_be_named(run):
    run("kd", test=0.7)
    run("dkd", DKD, test=0.72)
    assert rows_of("runs", against="DKD")["KD"].difference.mean == pytest.approx(-2)
    with pytest.raises(ValueError, match="there is no 'WTTM' here, but DKD; KD$"):
        compare(["runs"], against="WTTM")


def test_several_references_have_to_be_told_apart(run):
    run("kd", test=0.7)
    hot = json.loads(json.dumps(KD))
    hot["kd"]["loss"]["init_args"]["temperature"] = 9.0
    run("hot", hot, test=0.71)
    run("dkd", DKD, test=0.72)
    assert rows_of("runs")["DKD"].difference is None
    assert rows_of("runs", against="KD, temperature=4.0")["DKD"].difference.mean == pytest.approx(2)


def without_teacher(folder):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["init_args"]["teacher"] = None
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def test_a_student_alone_stands_in_every_section_of_its_pairs(run):
    alone = {"ce": {"class_path": "kdlit.losses.CrossEntropyLoss"}}
    without_teacher(run("alone", alone, test=0.68))
    (section,) = compare(["runs"]).sections
    assert section.title == "CIFAR100: resnet8x4"
    run("kd", test=0.7)
    (section,) = compare(["runs"]).sections
    assert section.title == "CIFAR100: resnet32x4 → resnet8x4"
    row = rows_of("runs")["student alone"]
    assert row.difference.mean == pytest.approx(-2)
    assert row.verdicts[0].published.top1 == 72.5
    assert rows_of("runs", against="student alone")["KD"].difference.mean == pytest.approx(2)


def test_differences_that_float32_rounds_are_the_same():
    from kdlit.scoreboard.statistics import paired

    kd = {"0": 0.7511000037193298, "1": 0.7523000240325928, "2": 0.7479000091552734}
    dkd = {"0": 0.7530999779701233, "1": 0.7542999982833862, "2": 0.7498999834060669}
    assert paired(dkd, kd).why == "no test, the same with each of n=3 seeds"
    assert paired(dkd | {"2": 0.75}, kd).p is not None  # by one picture of 10,000


def taught_by(folder, path, student=None, link=False):
    """Name another teacher's weights, and another student."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    networks = config["model"]["init_args"]
    if student:
        networks["student"] = {"class_path": f"kdlit.models.{student}"}
    networks["teacher"]["init_args"]["path"] = path
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"teacher": {"weights": f"those of {path}"}}))
    if link:
        (folder / "link.yaml").touch()


def test_the_last_link_of_a_chain_is_takd_whose_seeds_have_assistants_of_their_own(run):
    for seed in (0, 1):
        run(f"kd{seed}", test=0.70 + seed / 100, seed=seed)
        taught_by(run(f"chain{seed}/assistant", test=0.75, seed=seed), "t.pth", "resnet14x4", link=True)
        path = f"elsewhere/chain{seed}/assistant/student.pt"
        taught_by(run(f"chain{seed}/student", test=0.71 + seed / 100, seed=seed), path, link=True)
    row = rows_of("runs")["TAKD"]
    assert [one.seed for one in row.entries] == ["0", "1"]
    assert row.teacher == "resnet32x4"
    assert row.difference.mean == pytest.approx(1)
    assert row.verdicts[0].published.top1 == 73.81
    assert "runs/chain0/student: its teacher is the student of runs/chain0/assistant" in notes_of("runs")
    taught_by(run("other/assistant", test=0.75, seed=2, data={"batch_size": 32}), "t.pth", "resnet14x4", link=True)
    taught_by(run("other/student", test=0.7, seed=2), "other/assistant/student.pt", link=True)
    assert {"TAKD, batch_size=64", "TAKD, batch_size=32"} < set(rows_of("runs"))


def test_a_teacher_that_a_run_trained_is_said(run):
    taught_by(run("a", test=0.7), "runs/t/student.pt")
    assert set(rows_of("runs")) == {"KD"}
    assert "runs/a: its teacher is the student of a run, runs/t/student.pt: only runs with" in notes_of("runs")


def test_versions_and_foreign_checkpoints_are_said(run):
    run("a", test=0.7)
    other = run("b", test=0.7, seed=1)
    (other / "run.json").write_text((other / "run.json").read_text().replace('"1"', '"2"'))
    (other / "test.json").write_text((other / "test.json").read_text().replace("runs/b", "elsewhere/c"))
    notes = notes_of("runs")
    assert "made by different versions of kdlit: 1, 2" in notes
    assert (
        "runs/b: test.json names a checkpoint of a folder of another name: elsewhere/c/checkpoints/last.ckpt" in notes
    )


def test_holms_correction_is_by_hand():
    from kdlit.scoreboard.statistics import holm

    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


# Names


@pytest.mark.parametrize(
    ("losses", "name"),
    [
        ({"ce": {"class_path": "kdlit.losses.CrossEntropyLoss"}}, "student alone"),
        ({"ce": {"class_path": "CrossEntropyLoss"}, "kd": {"loss": {"class_path": "KDLoss"}, "weight": 0}}, "student alone"),
        (KD, "KD"),
        ({"kd": {"class_path": "kdlit.losses.WeightedLoss", "init_args": {"loss": {"class_path": "KDLoss"}, "weight": 1.0}}}, "KD"),
        ({"kd": {"class_path": "LogitStandardization", "init_args": {"loss": {"class_path": "DKDLoss"}}}}, "DKD + LS"),
        ({"ce": {"class_path": "OnHead", "init_args": {"loss": {"class_path": "CrossEntropyLoss"}}}, "kd": {"class_path": "OnHead", "init_args": {"loss": {"class_path": "KDLoss"}}}}, "KD"),
        ({"a": {"class_path": "CRDLoss"}, "b": {"class_path": "WTTMLoss"}}, "CRD + WTTM"),
        ({"kd": {"class_path": "mylab.KDLoss"}}, "mylab.KD"),
        ({"kd": {"class_path": "mylab.Twice", "init_args": {"loss": {"class_path": "KDLoss"}}}}, "KD + mylab.Twice"),
    ],
)  # fmt: skip
def test_a_method_is_named_by_its_losses(losses, name):
    assert (
        method_name(
            {"model": {"class_path": "kdlit.modules.ClassificationDistillation", "init_args": {"losses": losses}}}
        )
        == name
    )


def test_other_modules_are_named_as_far_as_their_config_goes():
    assert method_name({}) == "unknown module"
    assert method_name({"model": {"class_path": "mylab.Mine", "init_args": {"losses": KD}}}) == "mylab.Mine: KD"
    assert method_name({"model": {"class_path": "kdlit.modules.LinearProbe"}}) == "LinearProbe"
    mutual = {"model": {"class_path": "kdlit.modules.MutualLearning", "init_args": {"students": {"student": {"class_path": "kdlit.models.vgg8"}, "peer": {"class_path": "kdlit.models.vgg13"}}}}}  # fmt: skip
    assert (method_name(mutual), student_and_teacher(mutual)) == ("DML", ("vgg8", "vgg13"))


def test_a_network_is_named_with_the_values_that_make_it():
    assert network_name({"class_path": "torchvision.models.resnet18", "init_args": {"groups": 1}}) == "resnet18"
    assert (
        network_name({"class_path": "kdlit.models.ResNet", "init_args": {"depth": 8, "num_classes": 9}})
        == "ResNet(depth=8)"
    )
    assert network_name({"class_path": "mylab.Net", "init_args": {"wide": None}}) == "mylab.Net"
    assert network_name(None) == ""


def test_a_teacher_is_known_by_its_weights_and_a_batch_by_all_processes():
    config = {"data": {"init_args": {"batch_size": 8}}, "model": {"init_args": {"teacher": {"class_path": "T", "init_args": {"path": "here"}}}}}  # fmt: skip
    elsewhere = json.loads(json.dumps(config).replace("here", "there"))
    record = {"teacher": {"weights": "w"}, "starts": [{"processes": 4}]}
    assert settings_of(config, record) == settings_of(elsewhere, record)
    assert settings_of(config) != settings_of(elsewhere)
    assert settings_of(config, record)["data.batch_size"] == 32


# Formats and the command


def test_a_whole_markdown_table(run):
    run("kd", test=0.70, val=RISING)
    run("dkd", DKD, test=0.715, val=RISING)
    lines = markdown(compare(["runs"])).splitlines()
    assert lines[0] == "### CIFAR100: resnet32x4 → resnet8x4"
    assert lines[2].split(" | ")[2:5] == ["last epoch, test", "last epoch, val", "mean of last 10 epochs, val"]
    assert lines[4].startswith("| DKD | 1 (0) | 71.50 (n=1) | 61.00 (n=1) | 56.50 (n=1) | 61.00 (n=1) best on val | +1.50 by last epoch, test (no test, n=1) | 76.32 (best on test): not comparable, -4.82 |")  # fmt: skip
    assert lines[5].startswith("| KD | 1 (0) | 70.00 (n=1) |")
    assert "not comparable: other recipe: " in markdown(compare(["runs"]))


def test_a_whole_csv(run):
    run("kd", test=0.70, val=RISING)
    run("dkd", DKD, test=0.715, val={3: 0.4})
    lines = list(csv.DictReader(io.StringIO(table_csv(compare(["runs"])))))
    assert list(lines[0]) == list(COLUMNS)
    assert [(line["method"], line["figure"], line["top1_percent"]) for line in lines] == [
        ("DKD", "last_epoch_test", "71.5000"),
        ("DKD", "best_epoch_val", ""),
        ("KD", "last_epoch_test", "70.0000"),
        ("KD", "last_epoch_val", "61.0000"),
        ("KD", "mean_of_last_10_epochs_val", "56.5000"),
        ("KD", "best_epoch_val", ""),
    ]
    assert (lines[0]["compared_with"], lines[0]["difference_points"], lines[0]["p"]) == ("KD", "1.5", "")
    assert (lines[0]["split"], lines[0]["epoch_choice"], lines[0]["chosen_on"]) == ("test", "last", "nothing")


def test_names_cannot_break_out_of_any_format(run):
    evil = "<script>|`*"
    run(f"{evil}/=1+1", {"a": {"class_path": "=cmd.<b>Loss"}}, test=0.7, epochs=12)
    run(f"{evil}/half", test=0.7, epochs=3)
    board = compare(["runs"])
    assert "<script>" not in page_html(board)
    assert "&lt;b&gt;" in page_html(board)
    (line,) = csv.DictReader(io.StringIO(table_csv(board)))
    assert line["method"] == "'=cmd.<b>"
    text = markdown(board)
    assert r"\<script\>\|\`\*" in text
    widths = {line.replace(r"\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_line_ends_and_control_characters_of_names_are_written_out(run):
    run("a\n# b\x1b[31m", {"a": {"class_path": "own.KD\nx"}}, test=0.7)
    run("half\n", test=0.7, epochs=3)
    os.rename(run("latin", test=0.7, seed=1), b"runs/latin\xff")
    board = compare(["runs"])
    terminal = io.StringIO()
    scoreboard.print_board(board, Console(file=terminal, width=400))
    for text in (markdown(board), table_csv(board), page_html(board), terminal.getvalue()):
        assert "\x1b" not in text
        assert "KD\nx" not in text
        assert text.encode()
    assert [line["method"] for line in csv.DictReader(io.StringIO(table_csv(board)))] == ["KD", "own.KD\\nx"]
    assert "runs/half\\n" in markdown(board).replace("\\\\", "\\")


def test_the_page_needs_nothing_else_and_has_a_dark_side(run):
    page = page_html(compare([run("a", test=0.7)]))
    assert "http" not in page
    assert "<script" not in page
    assert "prefers-color-scheme:dark" in page
    assert "overflow-x:auto" in page
    assert '<meta name="viewport"' in page


def ask(capsys, *arguments):
    try:
        scoreboard.main([str(one) for one in arguments])
        code = 0
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(("name", "start"), [("a.md", "### CIFAR100"), ("a.csv", "data,teacher"), ("a.html", "<!doctype html>"), ("a.txt", None)])  # fmt: skip
def test_the_ending_of_the_file_names_the_format(run, capsys, name, start):
    run("a", test=0.7)
    code, out, err = ask(capsys, "runs", "--output", f"new/{name}")
    if start is None:
        assert code == 2
        assert err.startswith("kdlit: error: --output: new/a.txt ends in none of .md")
        return
    assert (code, out) == (0, f"Scoreboard: new/{name}\n")
    assert (Path("new") / name).read_text().startswith(start)


def test_the_command_prints_what_a_pipe_can_take(run, capsys):
    run("a", test=0.7)
    run("b", test=0.7, seed=1, epochs=3)
    code, out, err = ask(capsys, "runs")
    assert code == 0
    assert "70.00 (n=1)" in out
    assert "- runs/b: unfinished: 3 of 12 epochs" in out
    assert ask(capsys, "runs", "--format=text", "--output=a.txt")[0] == 0
    assert Path("a.txt").read_text().splitlines() == out.splitlines()
    code, out, err = ask(capsys, "runs", "--format=csv")
    assert out.startswith("data,teacher")
    assert "kdlit: note: runs/b: unfinished" in err  # and not within the table


def test_nothing_left_to_compare_is_an_error_in_one_line(run, capsys):
    run("a", test=0.7, epochs=3)
    for folder, reason in (("runs", "runs/a: unfinished: 3 of 12 epochs"), ("nowhere", "there is no folder nowhere")):
        code, out, err = ask(capsys, folder)
        assert (code, out) == (2, "")
        assert err.startswith("kdlit: error: no run is left to compare: ")
        assert reason in err
        assert err.count("\n") == 1


def test_help_and_tables_are_there_without_torch(run):
    run("a", test=0.7)
    program = "import sys; from kdlit.scoreboard import main; main(['runs']); assert 'torch' not in sys.modules, 'torch'; main(['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    for kind in ("last epoch, test", "epoch chosen on val, test", "BEST EPOCH ON TEST", "Published"):
        assert kind in done.stdout
