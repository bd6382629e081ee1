"""A sweep: chosen by validation pictures alone, shared by processes, resumed, and its mistakes told beforehand."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

pytest.importorskip("optuna", reason="needs kdlit[sweep]")

import optuna
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from kdlit.command_files import close
from kdlit.sweeps import command, file, trials
from kdlit.sweeps import main as sweep_main
from kdlit.sweeps.file import DEFAULTS, Sweep, SweepError, read_sweep
from kdlit.sweeps.trials import TrialError, Trials

ROOT = Path(__file__).parents[1]
FIT = trials._fit
BETA = "model.losses.dkd.loss.beta"

OWN = '''
import os
from kdlit.losses import DKDLoss


class Killed(BaseException):
    """Ends all that stands for a process."""


class Watched(DKDLoss):
    """Writes down every epoch, and is killed where a test wants it."""

    def on_train_epoch_start(self, epoch, max_epochs):
        with open("epochs.txt", "a") as file:
            file.write(f"{self.beta:g}:{epoch} ")
        if epoch == 2 and os.path.exists("die"):
            os.remove("die")
            raise Killed
'''

CONFIG = """
trainer: {max_epochs: 4, accelerator: cpu, enable_progress_bar: false}
last: {every_n_steps: 4}
data: {class_path: tests.conftest.TinyData}
torch_threads: 1
model:
  class_path: kdlit.modules.ClassificationDistillation
  init_args:
    student: {class_path: tests.conftest.TinyNet}
    teacher: {class_path: tests.conftest.TinyNet, init_args: {width: 16}}
    input_size: [3, 8, 8]
    losses:
      ce: {loss: {class_path: CrossEntropyLoss}}
      dkd: {loss: {class_path: own.Watched}}
"""

SWEEP = """
config: [tiny.yaml]
set: {model.losses.dkd.weight: 0.5}
parameters:
  model.losses.dkd.loss.beta: {low: 0.5, high: 16.0, log: true}
  model.losses.dkd.loss.temperature: {choices: [1.0, 2.0, 4.0]}
trials: 4
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's folder, with a sweep and its config in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "sweeps" / "beta.yaml").write_text(SWEEP)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield tmp_path
    sys.modules.pop("own", None)


@pytest.fixture
def run(capsys):
    """Run ``kdlit sweep ARGUMENTS`` in this process; what it printed, and its exit status."""

    def start(*arguments):
        capsys.readouterr()
        try:
            sweep_main(["--config", "sweeps/beta.yaml", *arguments])
            status = "exit 0"
        except SystemExit as stop:
            status = f"exit {stop.code}"
        captured = capsys.readouterr()
        return captured.out + captured.err + status

    return start


@pytest.fixture
def untrained(monkeypatch):
    """Let a trial cost nothing: its value is the beta it was given, and what a test wants happens before."""

    def let(before=lambda arguments, run: None):
        def fit(arguments, run, lock):
            before(arguments, run)
            beta = next(one for one in arguments if one.startswith(f"--{BETA}=")).partition("=")[2]
            (run / "student.pt").parent.mkdir(parents=True, exist_ok=True)
            (run / "metrics.csv").write_text(f"step,epoch,train/loss,val/top1\n1,0,1.0,0.5\n2,1,1.0,{beta}\n")
            (run / "student.pt").touch()

        monkeypatch.setattr(trials, "_fit", fit)
        monkeypatch.setattr(command, "resolved", lambda arguments: {})

    let()
    return let


def read(**changes):
    """The sweep, whose file has these keys from now on."""
    text = Path("sweeps/beta.yaml").read_text()
    Path("sweeps/beta.yaml").write_text(yaml.safe_dump(yaml.safe_load(text) | changes))
    return read_sweep(Path("sweeps/beta.yaml"), "sweep")


def joined(**changes):
    """The trials of the sweep, as a process of its own sees them; of a config that is not looked at."""
    return Trials(read(**changes), {})


def points(of):
    return [trial.params for trial in of.all()]


def table(folder="sweep"):
    with Path(folder, "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_trial_that_is_killed_goes_on_and_the_best_is_named(project, run, kdlit_cli, monkeypatch):
    def here(given, stdout, **kwargs):
        """Stands for a process that runs the command."""
        assert given[:3] == [sys.executable, "-m", "kdlit"]
        try:
            status = int("error" in kdlit_cli(*given[3:]))
        except sys.modules["own"].Killed:
            status = -signal.SIGKILL
        return SimpleNamespace(wait=lambda: status, send_signal=None)

    monkeypatch.setattr(trials, "subprocess", SimpleNamespace(Popen=here, DEVNULL=None))
    (project / "die").touch()
    changed = SWEEP.replace("{low: 0.5, high: 16.0, log: true}", "{choices: [2.0]}").replace("trials: 4", "trials: 1")
    changed = changed.replace("[1.0, 2.0, 4.0]", "[3.0]")
    (project / "sweeps" / "beta.yaml").write_text(f"{changed}\nseeds: [3]\nfinal: {{trainer.max_epochs: 9}}\n")
    out = run("--run_dir=here")
    assert out.endswith("exit 0"), out
    assert (project / "epochs.txt").read_text().split() == ["2:0", "2:1", "2:2", "2:2", "2:3"]
    trial = project / "here" / "trial_000"
    assert {"config.yaml", "metrics.csv", "student.pt", "log.txt"} <= {path.name for path in trial.iterdir()}
    config = yaml.safe_load((trial / "config.yaml").read_text())
    losses = config["model"]["init_args"]["losses"]
    assert config["seed_everything"] == 3
    assert losses["dkd"]["init_args"]["weight"] == 0.5
    with (trial / "metrics.csv").open(newline="") as file:
        reached = [float(row["val/top1"]) for row in csv.DictReader(file) if row["val/top1"]]
    assert len(reached) == 4
    (row,) = table("here")
    assert (row["state"], float(row["val/top1"]), float(row["seed_3"])) == ("complete", reached[-1], reached[-1])
    assert (float(row[BETA]), row["reason"]) == (2.0, "")
    assert losses["dkd"]["init_args"]["loss"]["init_args"]["temperature"] == float(
        row["model.losses.dkd.loss.temperature"]
    )
    assert f"trial 0: val/top1 {reached[-1]:.4f}" in out
    assert "As the best of 1 on these very validation pictures it looks better than it is" in out
    assert "for seed in 4 5 6; do\n  kdlit fit --config=sweeps/tiny.yaml --model.losses.dkd.weight=0.5" in out
    assert f"--trainer.max_epochs=9 --{BETA}=2.0" in out
    assert "--seed_everything=$seed --run_dir=here/final/seed_$seed\n  kdlit test --config=here/final/" in out


def test_other_settings_need_another_folder(project, untrained):
    mine = joined()
    with pytest.raises(SweepError, match=re.escape(
        "sweep was begun with other settings: choose was 'last', is now 'best'; name another --run_dir, or delete it"
    )):  # fmt: skip
        joined(choose="best")
    with pytest.raises(SweepError, match=re.escape("values.data.val_size was 'absent', is now 5")):
        Trials(mine.sweep, {"data": {"val_size": 5}})
    record = Path("sweep/sweep.yaml")
    record.write_text("[")
    with pytest.raises(SweepError, match="sweep cannot be used: ParserError"):
        joined(choose="last")
    record.write_text("[1]")
    with pytest.raises(SweepError, match=r"sweep/sweep.yaml is not what a sweep writes there; name another --run_dir"):
        joined()


@pytest.mark.parametrize("lost", [["sweep.yaml", "study.log"], ["sweep.yaml"], ["study.log"]])
def test_trials_of_a_sweep_that_is_lost_are_not_taken_for_others(lost, project, untrained):
    command.sweep_on(joined(trials=1), {})
    for name in lost:
        Path("sweep", name).unlink()
    with pytest.raises(SweepError, match="sweep/trial_000 is there, but no sweep/sweep.yaml|not in this storage"):
        joined()


def test_a_file_in_place_of_a_trial_is_named(project, untrained):
    mine = joined()
    Path("sweep/trial_000").touch()
    with pytest.raises(SweepError, match="sweep/trial_000 is a file, where the folder of a trial should be"):
        mine.take()


def test_a_config_that_changes_under_way_ends_the_sweep(project, untrained, monkeypatch):
    monkeypatch.setattr(command, "resolved", lambda arguments: {"a": len(list(Path("sweep").glob("*/student.pt"))) > 1})
    with pytest.raises(SweepError, match="a config was changed while the sweep ran"):
        command.sweep_on(joined(), {"a": False})
    assert len(table()) == 2


def test_what_was_stopped_is_taken_up_as_it_was_and_points_do_not_depend_on_stops(project, untrained):
    whole = joined(trials=14)
    command.sweep_on(whole, {})
    expected = points(whole)
    assert len(expected) == 14
    assert len({point[BETA] for point in expected}) == 14
    assert all(0.5 <= point[BETA] <= 16 for point in expected)
    (project / "sweep").rename(project / "other")

    begun = []

    def stop(arguments, run):
        begun.append(run.name)
        if begun.count(run.name) == 1:  # every trial is stopped once
            raise SystemExit(75)

    untrained(stop)
    for _ in range(14):
        with pytest.raises(SystemExit):
            command.sweep_on(joined(), {})
    again = joined()
    command.sweep_on(again, {})
    assert points(again) == expected
    assert begun == [f"trial_{number:03d}" for number in range(14) for _ in "ab"]

    untrained()
    command.sweep_on(joined(trials=15), {})  # more may be asked for later
    assert points(again)[:14] == expected
    assert len(points(again)) == 15
    (project / "sweep").rename(project / "third")
    assert joined(seed=1).take()[0].params != expected[0]


@pytest.mark.parametrize("storage", [None, "sqlite:///trials.db"])
def test_processes_share_a_sweep_and_train_nothing_twice(storage, project, untrained):
    runs, together = [], threading.Barrier(2)

    def begin(arguments, run):
        runs.append(run.name)
        if run.name in ("trial_000", "trial_001"):
            together.wait(60)

    untrained(begin)
    sweep = read_sweep(Path("sweeps/beta.yaml"), "sweep", trials=5)
    processes = [Trials(sweep, {}, storage) for _ in "ab"]
    threads = [threading.Thread(target=command.sweep_on, args=(one, {})) for one in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(runs) == [f"trial_{number:03d}" for number in range(5)]
    assert [row["state"] for row in table()] == ["complete"] * 5
    assert processes[0].study.best_value == max(float(row[BETA]) for row in table())
    if storage:
        with pytest.raises(SweepError, match="are not in this storage; give the --storage it began with"):
            Trials(sweep, {})


def test_a_trial_is_kept_while_its_process_lives_even_if_the_sweep_is_killed(project, monkeypatch):
    start, children = subprocess.Popen, []

    def sleeping(given, **kwargs):
        children.append(start([sys.executable, "-S", "-c", "print('ready', flush=True); input()"],
                              **(kwargs | {"stdin": subprocess.PIPE})))  # fmt: skip
        raise KeyboardInterrupt  # and this process never sees its end

    monkeypatch.setattr(trials.subprocess, "Popen", sleeping)
    mine, other = joined(trials=2), joined()
    trial, lock = mine.take()
    with pytest.raises(KeyboardInterrupt):
        mine.train(trial, lock)
    lock.close()
    second, kept = other.take()
    assert second.number == 1
    assert other.take() is None
    (child,) = children
    child.communicate(b"\n")
    first, _ = other.take()
    assert first.number == 0
    kept.close()


def test_a_grid_has_every_point_once(project, untrained):
    tried = {BETA: {"low": 1, "high": 5, "step": 2}, "model.losses.dkd.loss.temperature": {"choices": [4.0, 8]},
             "model.losses.dkd.warmup_epochs": {"low": 0.0, "high": 0.3, "step": 0.1}}  # fmt: skip
    grid = joined(sampler="grid", trials=100, parameters=tried)
    assert grid.sweep.trials == 24
    command.sweep_on(grid, {})
    found = [tuple(point.values()) for point in points(grid)]
    assert found == [(a, b, c) for a in (1, 3, 5) for b in (4.0, 8) for c in (0.0, 0.1, 0.2, 0.3)]


def test_long_ranges_are_not_listed(project):
    tried = {BETA: {"low": 1, "high": 10**12}, "model.losses.dkd.weight": {"low": 0.0, "high": 1e9, "step": 1e-3}}
    ends = [tuple(point.values()) for point in read(set={}, parameters=tried)._extremes()]
    assert ends == [(1, 0.0), (10**12, 1e9)]
    with pytest.raises(SweepError, match="parameters: a grid of 1,000,000,000,001,000,000,000,000 points, but it may"):
        read(sampler="grid")
    grid = read(parameters={BETA: {"low": 1, "high": 100_000}}, trials=10**6)
    assert grid.trials == 100_000
    assert grid.grid[-1] == {BETA: 100_000}


@pytest.mark.parametrize("key", file._SAME_PICTURES)
def test_all_trials_are_compared_on_the_same_pictures(key, project, monkeypatch):
    def config(arguments):
        text = {
            "trainer": {"limit_val_batches": None},
            "data": {"class_path": "own.Data", "init_args": {"val_size": 9}},
        }
        value = next((one for one in arguments if one.startswith(f"--{key}=")), "=").partition("=")[2]
        inner = text["data"] if key == "data.class_path" else text["data"]["init_args"]
        (inner if key.startswith("data.") else text["trainer"])[key.partition(".")[2]] = value
        return text

    monkeypatch.setattr(file, "resolved", config)
    sweep = read(parameters={key: {"choices": ["", "a"]}})
    with pytest.raises(
        SweepError, match=f"parameters: {key} would be 'a' where the config has '', so that trials would"
    ):
        sweep.check()


def test_whole_numbers_stay_whole(project, untrained):
    tried = {BETA: {"low": 1, "high": 100, "log": True}, "data.batch_size": {"choices": [[1, 2], None, True, "a"]}}
    of = joined(parameters=tried, sampler="random", trials=8)
    command.sweep_on(of, {})
    assert all(isinstance(point[BETA], int) for point in points(of))
    assert {point["data.batch_size"] for point in points(of)} <= {"[1, 2]", None, True, "a"}


@pytest.mark.parametrize(
    ("choose", "direction", "expected"),
    [
        ("last", "maximize", 0.2),
        ("best", "maximize", 0.9),
        ("best", "minimize", 0.1),
        ("mean_last_10", "maximize", 0.25),
    ],
)
def test_the_epoch_that_counts(project, choose, direction, expected):
    of = joined(choose=choose, direction=direction)
    (project / "metrics.csv").write_text(
        "step,epoch,train/loss,val/top1\n1,0,1.0,0.9\n5,2,1.0,0.1\n6,3,1.0,0.3\n7,12,1.0,\n8,12,,0.2\n"
    )
    assert of._value(project) == pytest.approx(expected)


def test_a_value_that_is_no_number_or_not_there(project):
    of = joined(metric="val/kl")
    log = project / "metrics.csv"
    log.write_text("step,epoch,train/loss,val/kl\n1,0,1.0,nan\n2,1,1.0,0.5\n")
    with pytest.raises(TrialError, match="val/kl is nan"):
        of._value(project)
    log.write_text("step,epoch,train/loss,val/top1\n1,0,1.0,0.1\n")
    with pytest.raises(SweepError, match="logged no val/kl, by which the sweep is to choose, but val/top1"):
        of._value(project)
    log.write_text("step,epoch,train/loss\n1,0,1.0\n")
    with pytest.raises(SweepError, match="its data holds none out"):
        of._value(project)


def test_several_seeds_count_by_their_mean(project, untrained):
    seen = []

    def note(arguments, run):
        seen.append((run.relative_to("sweep").as_posix(), *(one for one in arguments if "seed" in one)))

    untrained(note)
    of = joined(seeds=[4, 7], trials=1)
    command.sweep_on(of, {})
    run = "sweep/trial_000/seed_"
    assert [one[:2] for one in seen] == [(f"trial_000/seed_{s}", f"--seed_everything={s}") for s in (4, 7)]
    assert of.notes(0)["values"] == [of.all()[0].params[BETA]] * 2
    (row,) = table()
    assert row["seed_4"] == row["seed_7"] == row["val/top1"]
    assert Path(f"{run}4").is_dir()


CHILD = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path("ready").touch()
time.sleep(60)
"""


@pytest.fixture
def instead(monkeypatch):
    """Let another program run in place of ``kdlit fit``."""
    start = subprocess.Popen

    def run(program, then=lambda: None):
        def started(given, **kwargs):
            assert given[1:4] == ["-m", "kdlit", "fit"]
            assert "--ckpt_path=last" in given
            process = start([sys.executable, "-S", "-c", program], **kwargs)
            threading.Thread(target=then, daemon=True).start()
            return process

        monkeypatch.setattr(trials.subprocess, "Popen", started)

    return run


def test_signals_are_passed_on_and_the_trial_waits(project, untrained, instead, monkeypatch, capsys):
    monkeypatch.setattr(trials, "_fit", FIT)

    def stop():
        while not Path("ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    instead(CHILD, stop)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="75"):
        command.sweep_on(joined(), {})
    out = capsys.readouterr().err
    assert "kdlit: sweep/trial_000 was stopped; kdlit sweep with the same arguments goes on" in out
    assert signal.getsignal(signal.SIGTERM) == before
    assert not Path("sweep/trials.csv").exists()
    assert [trial.state.name for trial in joined().all()] == ["RUNNING"]


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize("ended", ["os.kill(os.getpid(), signal.SIGINT)", "sys.exit(1)", "pass"])
def test_ctrl_c_ends_the_sweep_however_its_trial_ends(ended, project, untrained, instead, monkeypatch):
    monkeypatch.setattr(trials, "_fit", FIT)
    instead(f"import os, signal, sys; print('began', flush=True); os.kill(os.getppid(), signal.SIGINT); {ended}")
    with pytest.raises(KeyboardInterrupt):
        command.sweep_on(joined(), {})
    assert Path("sweep/trial_000/log.txt").read_text().count("began") == 1
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert [trial.state.name for trial in joined().all()] == ["RUNNING"]


@pytest.mark.parametrize(
    ("number", "ended", "status", "word"),
    [
        ("SIGINT", "sys.exit(130)", 130, "kdlit: t was stopped; kdlit sweep with the same arguments goes on"),
        ("SIGTERM", "time.sleep(60)", 75, "kdlit: stopped by SIGTERM; the same command goes on"),  # not yet listening
    ],
)
def test_the_status_tells_which_signal_stopped_the_sweep(number, ended, status, word, project, instead, capsys):
    instead(f"import os, signal, sys, time; os.kill(os.getppid(), signal.{number}); {ended}")
    with pytest.raises(SystemExit, match=f"^{status}$"):
        trials._fit(["--ckpt_path=last"], Path("t"), trials._kept(Path("t")))
    assert capsys.readouterr().err == f"{word}\n"


def test_ctrl_c_while_configs_are_read_is_no_mistake_in_them(project, kdlit_cli, monkeypatch):
    def pressed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("kdlit.cli.KdlitCLI", pressed)
    out = kdlit_cli("sweep", "--config", "sweeps/beta.yaml")
    assert out == "kdlit: stopped by Ctrl-C; kdlit sweep with the same arguments goes on\nexit 130"


def test_trials_that_fail_are_noted_and_three_at_the_start_end_the_sweep(project, untrained):
    fails = {"trial_001"}

    def sometimes(arguments, run):
        if run.name in fails:
            raise TrialError("exit status 2: no room")

    untrained(sometimes)
    command.sweep_on(joined(), {})
    assert [row["state"] for row in table()] == ["complete", "fail", "complete", "complete"]
    assert [row["reason"] for row in table()] == ["", "exit status 2: no room", "", ""]
    assert [row["val/top1"] == "" for row in table()] == [False, True, False, False]

    fails |= {"trial_004", "trial_005", "trial_006"}
    with pytest.raises(SweepError, match="the first 3 trials failed"):
        command.sweep_on(joined(trials=9), {})
    assert len(table()) == 7


def test_the_reason_of_a_failure_is_the_last_error_in_its_log(project, instead):
    lock = trials._kept(Path("t"))
    arguments = ["--ckpt_path=last"]
    instead("import sys; print('Epoch 1'); sys.exit('kdlit: error: no room')")
    with pytest.raises(TrialError, match=re.escape("exit status 1: no room; see t/log.txt")):
        trials._fit(arguments, Path("t"), lock)
    instead("print('the end')")  # without a student
    with pytest.raises(TrialError, match="exit status 0: no room"):
        trials._fit(arguments, Path("t"), lock)
    Path("t/log.txt").unlink()
    instead("import os, signal; print('so far', flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(TrialError, match="killed by SIGKILL: so far"):
        trials._fit(arguments, Path("t"), lock)
    assert Path("t/log.txt").read_text() == "so far\n" * 3


MISTAKES = {
    "metric of the test pictures": ("trials: 4", "metric: test/top1", ["metric must be one of the validation pictures"]),
    "metric of the training pictures": ("trials: 4", "metric: train/loss", ["got 'train/loss'"]),
    "nothing held out": (
        "trials: 4", "set: {data: kdlit.data.DigitPairs, data.val_size: 0}", ["data.val_size is 0", "hold training"]),
    "no validation": ("trials: 4", "set: {trainer.limit_val_batches: 0}", ["trainer.limit_val_batches is 0"]),
    "unknown key": ("trials:", "trails:", ["beta.yaml: unknown key 'trails'; did you mean 'trials'"]),
    "unknown direction": ("trials: 4", "direction: up", ["direction must be one of maximize, minimize, got 'up'"]),
    "unknown epoch": ("trials: 4", "choose: first", ["choose must be one of last, mean_last_10, best"]),
    "unknown sampler": ("trials: 4", "sampler: cmaes", ["sampler must be one of tpe, random, grid"]),
    "no trials": ("trials: 4", "trials: 0", ["trials must be a whole number >= 1, got 0"]),
    "trials in words": ("trials: 4", "trials: many", ["trials must be a whole number >= 1, got 'many'"]),
    "seeds twice": ("trials: 4", "seeds: [0, 0]", ["seeds must be a list of different whole numbers"]),
    "no parameters": ("trials: 4", "parameters: {}", ["parameters must map options to what is tried, got {}"]),
    "parameter that the config lacks": ("dkd.loss.beta", "kd.loss.beta", ["no 'model.losses.kd.loss.beta'; did you mean 'model.losses.dkd.loss.beta'"]),
    "misspelled parameter": ("loss.beta", "loss.betta", ["the config has no 'model.losses.dkd.loss.betta'", "dkd.loss.beta'"]),
    "nothing like it": ("model.losses.dkd.loss.beta", "1", ["parameters: the config has no '1'\n"]),
    "parameter of another type": ("[1.0, 2.0, 4.0]", "[1.0, warm]", ["Expected a <class 'float'>", "warm"]),
    "range upside down": ("high: 16.0", "high: 0.1", ["low must be below high, got 0.5 and 0.1"]),
    "logarithm of zero": ("low: 0.5", "low: 0", ["log needs low above 0, and no step"]),
    "range without end": (", high: 16.0", "", ["must have the numbers low and high (and log or step), or choices"]),
    "range and choices": (", high: 16.0", ", choices: [1]", ["choices must be a list of at least one value, and stand alone"]),
    "no choices": ("[1.0, 2.0, 4.0]", "[]", ["choices must be a list of at least one value"]),
    "unknown key of a parameter": ("high:", "hihg:", ["unknown key 'hihg'; did you mean 'high'?"]),
    "step beyond the range": ("log: true", "step: 20", ["step must be > 0 and at most high - low"]),
    "endless grid": ("trials: 4", "sampler: grid", ["model.losses.dkd.loss.beta: a grid needs choices or a step"]),
    "seed as a parameter": ("model.losses.dkd.loss.beta", "seed_everything", ["the best of many seeds is luck"]),
    "validation pictures as a parameter": (
        "model.losses.dkd.loss.beta: {low: 0.5, high: 16.0, log: true}",
        "data: {choices: [{class_path: tests.conftest.TinyData, init_args: {val_size: 16}}]}",
        ["data.val_size would be 16.0 where the config has 32.0", "compared on different pictures"]),
    "date as a choice": ("[1.0,", "[2020-01-01,", ["temperature: datetime.date(2020, 1, 1) is a date or the like"]),
    "date as a value": ("0.5}", "2020-01-01}", ["set.model.losses.dkd.weight: datetime.date(2020, 1, 1) is a date"]),
    "folder as a value": ("set: {", "set: {run_dir: x, ", ["set.run_dir: the sweep itself sets it; leave it out"]),
    "fixed and tried": ("set: {", "set: {model.losses.dkd.loss.beta: 1, ", ["stands in set and in parameters"]),
    "misspelled fixed value": ("dkd.weight", "dkd.wieght", ["wieght", "weight"]),
    "missing config": ("tiny.yaml", "tony.yaml", ["config: there is no file 'tony.yaml' in", "/sweeps"]),
    "no YAML": ("trials: 4", "trials: [", ["beta.yaml: is not YAML"]),
    "misspelled final value": ("trials: 4", "final: {trainer.max_epoch: 3}", ["max_epoch"]),
    "several students": ("trials: 4", "set: {students: {a: {}, b: {}}}", ["a sweep trains one student at a time"]),
    "config of several students": (
        "[tiny.yaml]", "[tiny.yaml, many.yaml]", ["config: many.yaml has several students"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_message_before_anything_is_made(project, run, mistake):
    old, new, expected = MISTAKES[mistake]
    assert old in SWEEP
    text = SWEEP.replace(old, new, 1)
    for key in ("parameters", "set"):
        if new.startswith(f"{key}:") and new.endswith("}"):
            text = yaml.safe_dump(yaml.safe_load(SWEEP) | yaml.safe_load(new))
    (project / "sweeps" / "beta.yaml").write_text(text)
    (project / "sweeps" / "many.yaml").write_text("students: {a: {}, b: {}}")
    out = run()
    assert out.startswith("kdlit: error: ")
    assert out.endswith("exit 2")
    assert len(out.splitlines()) == 2, out
    for part in expected:
        assert part in out, out
    assert not (project / "runs").exists()


def test_a_missing_file_database_or_package_is_named(project, run, monkeypatch):
    sweep = read_sweep(Path("sweeps/beta.yaml"))
    with pytest.raises(SweepError, match="--storage oracle9://nowhere: NoSuchModuleError: "):
        Trials(sweep, {}, "oracle9://nowhere")
    (project / "sweeps" / "beta.yaml").unlink()
    assert run() == "kdlit: error: sweeps/beta.yaml: cannot be read: No such file or directory\nexit 2"
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert run() == "kdlit: error: kdlit sweep needs Optuna: pip install 'kdlit[sweep]'\nexit 2"


def test_known_names_are_listed_only_if_they_are_near_or_few():
    many = [f"number_{number}" for number in range(13)]
    assert close("nunber_12", many).startswith("; did you mean 'number_12'")
    assert close("xyz", many) == ""
    assert close("xyz", many[:2]) == "; did you mean 'number_0' or 'number_1'?"


def test_help_shows_a_sweep_file_without_loading_torch_or_optuna():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "from kdlit.sweeps import main; main(['--help'])"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert "choices: [1.0, 2.0, 4.0, 8.0]" in done.stdout
    assert not re.search(r"\| +(torch|optuna|rich)\b", done.stderr)
    example = done.stdout.split("::\n\n")[1].split("\n\n")[0]
    assert set(yaml.safe_load(example)) == {"config", "set", "parameters", "final", *DEFAULTS}


@pytest.mark.parametrize("name", ["dkd", "dkd_cifar100"])
def test_the_shipped_sweeps_resolve(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = read_sweep(Path(f"configs/sweeps/{name}.yaml"))
    monkeypatch.setattr(Sweep, "_extremes", lambda self: [{BETA: 0.5, "model.losses.dkd.loss.temperature": 8.0}])
    assert sweep.check()["data"]["init_args"]["val_size"] > 0
    assert sweep.folder == Path(f"runs/sweeps/{name}")
    assert set(sweep.parameters) == {BETA, "model.losses.dkd.loss.temperature"}


def test_the_sweep_of_wandb_drives_the_command_line(kdlit_cli, monkeypatch):
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load((ROOT / "configs/sweeps/wandb_dkd.yaml").read_text())
    assert content["metric"] == {"name": "val/top1", "goal": "maximize"}
    drawn = {name: {"value": one["values"][0] if "values" in one else one["max"]}
             for name, one in content["parameters"].items()}  # fmt: skip
    agent = create_sweep_command_args({"args": drawn}) | {"env": ["/usr/bin/env"]}  # as the agent fills it in
    words = []
    for word in create_sweep_command(content["command"]):
        words += agent[word[2:-1]] if word.startswith("${") else [word]
    assert words[:3] == ["/usr/bin/env", "kdlit", "fit"]
    printed = kdlit_cli(*words[2:], "--print_config")
    config = yaml.safe_load(printed.removesuffix("exit 0"))
    assert config["model"]["init_args"]["losses"]["dkd"]["init_args"]["loss"]["init_args"] == {
        "alpha": 1.0, "beta": 16.0, "temperature": 1.0,
    }  # fmt: skip
    assert config["trainer"]["logger"]["init_args"]["offline"] is False
    assert config["data"]["init_args"]["val_size"] > 0
