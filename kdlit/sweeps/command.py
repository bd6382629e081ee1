"""``kdlit sweep``: tries values of any settings, and chooses by the held-out validation pictures alone.

A sweep file names what is trained and what is tried::

    config: [../quickstart.yaml]       # as for kdlit fit --config; relative to this file
    set: {trainer.max_epochs: 60}      # further values, as on its command line, the same in every trial
    parameters:                        # what is tried, by option of kdlit fit
      model.losses.dkd.loss.beta: {low: 0.5, high: 16.0, log: true}   # or a step; whole numbers if all of these are
      model.losses.dkd.loss.temperature: {choices: [1.0, 2.0, 4.0, 8.0]}
    metric: val/top1                   # as logged, of the validation pictures
    direction: maximize                # or minimize
    choose: last                       # the epoch that counts; or mean_last_10; or best, which flatters
    trials: 20                         # in all, failed ones included; a grid has no more than its points
    seeds: [0]                         # each point is trained with each of them, and the mean counts
    sampler: tpe                       # or random; or grid, for parameters with choices or a step
    seed: 0                            # of the sampler
    final: {data.val_size: 0}          # what differs when the best point is trained in earnest

From metric to seed those are the defaults; set and final may be left out, too.

Each trial is a kdlit fit in a process of its own, its run and its log.txt in FOLDER/trial_NNN (in seed_N below that for
more than one seed). The same command again goes on: what is finished stays, and trials that were stopped or killed are
taken up from their last.ckpt. Several processes share a sweep: start the same command in as many terminals as you like,
or on machines that share FOLDER, with locks; CUDA_VISIBLE_DEVICES=1 in front of one gives it a GPU of its own. Together
they train as many trials as asked for, none twice. A trial that fails is noted in FOLDER/trials.csv with its reason,
and the sweep goes on, unless its first three fail.

The pictures to choose by are those that the data hold out of training, as by data.val_size. That a data module of your
own validates on its test pictures cannot be seen from outside: then the sweep would choose by these.
"""

from __future__ import annotations

import argparse
import shlex
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from kdlit.command_files import CommandFileError, resolved, stop
from kdlit.sweeps.file import Sweep, SweepError, options, read_sweep
from kdlit.sweeps.trials import TrialError, Trials

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_HOPELESS = 3  # trials that end a sweep if they fail before any other has ended


def sweep_on(trials: Trials, base: Mapping[str, Any]) -> None:
    """Train the trials that are left, as far as no other process does.

    Args:
        trials: of a sweep.
        base: all values that they share, as they were when it began.

    Raises:
        CommandFileError: If it makes no sense to go on.
        KeyboardInterrupt, SystemExit: If a signal told it to stop.
    """
    took, succeeded = [], 0
    while True:
        if resolved(trials.sweep.arguments) != base:
            raise SweepError("a config was changed while the sweep ran; put it back, or name another --run_dir")
        if (taken := trials.take()) is None:
            return
        (trial, lock), begun = taken, time.monotonic()
        with lock:
            try:
                values, reason = trials.train(trial, lock), ""
            except TrialError as error:
                values, reason = [], str(error)
            except SweepError as error:
                trials.end(trial.number, [], str(error))
                raise
            trials.end(trial.number, values, reason)
        took.append(time.monotonic() - begun)
        succeeded += not reason
        print(_line(trials, trial.number, took), flush=True)
        if not succeeded and len(took) == _HOPELESS:
            raise SweepError(f"the first {_HOPELESS} trials failed")


def _line(trials: Trials, number: int, took: Sequence[float]) -> str:
    """What is to be said when a trial has ended."""
    from optuna.trial import TrialState

    notes, states = trials.notes(number), [trial.state for trial in trials.all()]
    finished = sum(state.is_finished() for state in states)
    left = fmean(took) * (trials.sweep.trials - finished) / (1 + states.count(TrialState.RUNNING)) / 60
    line = f"trial {number}: failed, {notes['reason']}"
    if notes["values"]:
        best = trials.study.best_trial
        line = f"trial {number}: {trials.sweep.settings['metric']} {fmean(notes['values']):.4f}"
        line += f", best {best.value:.4f} (trial {best.number})"
    return f"{line}; {took[-1]:.0f} s; {finished} of {trials.sweep.trials} done, about {left:.0f} min left"


def print_sweep(trials: Trials) -> None:
    """Print all trials, the best first, and what to do with the best.

    Args:
        trials: of a sweep.
    """
    from optuna.trial import TrialState
    from rich.console import Console
    from rich.table import Table

    sweep, everything = trials.sweep, trials.all()
    metric, choose, seeds = (sweep.settings[key] for key in ("metric", "choose", "seeds"))
    done = [trial for trial in everything if trial.state == TrialState.COMPLETE]
    done.sort(key=lambda trial: trial.value or 0.0, reverse=sweep.settings["direction"] == "maximize")
    short = {key: key.rpartition(".")[2] for key in sweep.parameters}
    names = short.values() if len(set(short.values())) == len(short) else short
    each = ["each seed"] if len(seeds) > 1 else []
    table = Table("Trial", *names, f"{metric}, {choose}", *each, title=f"The sweep in {sweep.folder}")
    for column in table.columns:
        column.overflow = "fold"
    for trial in [*done, *(trial for trial in everything if trial not in done)]:
        notes = trials.notes(trial.number)
        tried = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in trial.params.values()]
        value = f"{trial.value:.4f}" if trial in done else notes["reason"] or "stopped, or still in training"
        table.add_row(str(trial.number), *tried, value, *each and [" ".join(f"{one:.4f}" for one in notes["values"])])
    Console().print(table)
    print(f"All trials: {sweep.folder / 'trials.csv'}")
    if done:
        print(_how_to_go_on(sweep, done))


def _how_to_go_on(sweep: Sweep, done: Sequence[FrozenTrial]) -> str:
    """What the best trial says, and the commands by which it is measured."""
    best, last = done[0], max(sweep.settings["seeds"])
    fit = shlex.join(["kdlit", "fit", *sweep.final, *options(best.params)])
    run = f"{shlex.quote(str(sweep.folder / 'final'))}/seed_$seed"
    return (
        f"\nBest: trial {best.number}, {sweep.settings['metric']} {best.value:.4f}. As the best of {len(done)} on "
        "these very validation pictures it looks better than it is.\nSeeds that the sweep has not seen and the test "
        f"pictures tell what it is worth:\n\nfor seed in {last + 1} {last + 2} {last + 3}; do\n"
        f"  {fit} --seed_everything=$seed --run_dir={run}\n"
        f"  kdlit test --config={run}/config.yaml --ckpt_path=last\ndone"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Run the command ``kdlit sweep``.

    Args:
        args: what follows ``sweep`` on the command line.
    """
    parser = argparse.ArgumentParser(
        "kdlit sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the sweep file")
    parser.add_argument("--run_dir", metavar="FOLDER", help="of the sweep; by default runs/sweeps/NAME of the file")
    parser.add_argument("--trials", type=int, metavar="N", help="how many in all, instead of what the file says")
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="database in which Optuna keeps the trials, such as sqlite:///FILE or postgresql://HOST/NAME, by default "
        "FOLDER/study.log; all processes need the same FOLDER in any case",
    )
    arguments = parser.parse_args(args)
    try:
        import optuna
    except ImportError:
        stop("kdlit sweep needs Optuna: pip install 'kdlit[sweep]'", 2)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    try:
        sweep = read_sweep(arguments.config, arguments.run_dir, arguments.trials)
        base = sweep.check()
        trials = Trials(sweep, base, arguments.storage)
    except (CommandFileError, OSError) as error:
        stop(str(error), 2)
    finished = sum(trial.state.is_finished() for trial in trials.all())
    print(f"Sweep of {sweep.trials} trials in {sweep.folder}, {finished} of them finished before", flush=True)
    try:
        sweep_on(trials, base)
    except (CommandFileError, OSError) as error:
        stop(f"{error}; the same command goes on, and what there is lies in {sweep.folder}", 1)
    print_sweep(trials)
