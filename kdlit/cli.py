"""The command line: LightningCLI over the modules and data modules of kdlit, and a folder for each run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import string
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

import kdlit.data  # noqa: F401  classes are known by their short names once imported
from kdlit import config_errors
from kdlit.callbacks import (
    LastCheckpoint,
    PredictionTable,
    Progress,
    RandomState,
    StudentExport,
    StudentSummary,
    TeacherCheck,
    Throughput,
    print_result,
)
from kdlit.callbacks.last_checkpoint import INTERRUPTED, PREEMPTED, Stopped, stopping_at_once
from kdlit.dashboards import PatientWandbLogger
from kdlit.files import WholeCheckpointIO, WriteError, alone_in, load_whole, remove_scratch
from kdlit.loggers import RunLogger
from kdlit.modules import DistillationModule
from kdlit.modules.many_students import own_values
from kdlit.run_record import RunRecord, seen_otherwise, write_text
from kdlit.students import LastOfStudents, LearningRates, Student, Students, check_callbacks, read_students

# Warnings of the libraries beneath that tell a user of the command line nothing to act on.
_NOISE = (
    "isinstance.treespec",
    "The number of training batches",
    "Found .* module.s. in eval mode",  # the teacher is meant to be
    "could not find the monitored key",  # there is no validation, or not yet
    "Total length of .* across ranks is zero",  # likewise
    "does not have many workers",  # batches are prepared whole, faster than workers could hand them over
)


class _Parser(LightningArgumentParser):
    """Says what is wrong with a config in one or two lines instead of the parser's nested report."""

    student = ""  # whose config it reads, for the message

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # a misspelled option is a mistake on the command line as it is in a file

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # an inner parser, whose complaint becomes part of the outer one's
            super().error(message, ex)
        said = self.args if self.student else sys.argv[1:]
        self.exit(2, f"kdlit: error: {self.student}{config_errors.explain(message, self, said)}\n")


class KdlitCLI(LightningCLI):
    """``kdlit fit | validate | test | predict``: every run has a folder that holds all it leaves behind."""

    run_dir: str
    students: Students | None = None
    files: WholeCheckpointIO
    _otherwise = ""  # in what a student is measured otherwise than it was trained

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            model_class=DistillationModule,
            datamodule_class=L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=_Parser,
            parser_kwargs={"prog": "kdlit", "description": __doc__},
            save_config_callback=RunRecord,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run folder and the checkpoint settings."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of the run: config.yaml, run.json, metrics.csv, checkpoints/, student.pt, predictions.csv. By "
            "default where --ckpt_path lies, or else runs/NAME/version_N, NAME being that of the config files.",
        )
        parser.add_argument(
            "--torch_threads",
            type=int | None,
            default=None,
            help="CPU threads of each process; 1 is fastest for networks as small as those of the quickstart.",
        )
        parser.add_argument(
            "--students",
            type=dict[str, Student | None] | None,
            default=None,
            help="Several students by name, trained at once on the same batches with one pass of their teacher: each "
            "is this command line with further config files, values (set) and a seed.",
        )
        parser.add_argument(
            "--accept_changes",
            type=bool,
            default=False,
            help="Whether a run may go on with other settings, data or teacher than its checkpoint was made with.",
        )
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        best = {"filename": "best", "monitor": "val/top1", "mode": "max", "auto_insert_metric_name": False}
        best |= {"enable_version_counter": False}  # a run that was killed finds its file, and writes it anew
        parser.set_defaults({f"checkpoint.{name}": value for name, value in best.items()})
        parser.set_defaults({"trainer.enable_model_summary": False, "trainer.log_every_n_steps": 100})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the config, or those of several students."""
        self.students = read_students(parser, sys.argv[1:] if args is None else args)
        if self.students is None:
            super().parse_arguments(parser, args)
            return
        self.config = self.students.run_config
        self.save_config_kwargs["students"] = self.students

    def _parse_ckpt_path(self) -> None:
        """Leave the config as given: LightningCLI would let the checkpoint's hyper-parameters override it."""

    def before_instantiate_classes(self) -> None:
        """Settle where the run lives and which checkpoint it starts from."""
        config = self.config[self.subcommand]
        configs = [Path(str(path)) for path in config.config or []]
        goes_on = config.ckpt_path == "last"
        if goes_on:
            config.ckpt_path = self._newest_last(Path(config.run_dir) if config.run_dir else _runs_of(configs, "last"))
        checkpoint = Path(config.ckpt_path).absolute() if config.ckpt_path else None
        if checkpoint is not None:
            content = _checked(checkpoint)
            if self.subcommand != "fit":
                self._compare(content)
        elif self.subcommand != "fit":
            print(
                f"kdlit: warning: no --ckpt_path: {self.subcommand} takes the student as its config makes it, "
                "untrained unless that loads weights",
                file=sys.stderr,
            )
        if config.run_dir:
            _check_folder(Path(config.run_dir))
            self.run_dir = config.run_dir
            holds_a_run = (Path(self.run_dir) / "metrics.csv").exists()
            if self.subcommand == "fit" and checkpoint is None and holds_a_run and not goes_on:
                raise FileExistsError(
                    f"--run_dir: {self.run_dir} already holds a run; go on with it by --ckpt_path=last, or name another"
                )
        elif checkpoint is not None and self._belongs_to_a_run(checkpoint):
            self.run_dir = os.path.relpath(checkpoint.parent.parent)
        else:
            self.run_dir = _new_run_dir(_runs_of(configs, "new"))
        _check_numbers(config)
        if config.torch_threads:
            torch.set_num_threads(config.torch_threads)
        config.checkpoint.dirpath = config.last.dirpath = f"{self.run_dir}/checkpoints"
        config.trainer.default_root_dir = self.run_dir

    def _compare(self, content: dict[str, Any]) -> None:
        """Say in what a checkpoint is measured otherwise than it was trained."""
        record = RunRecord(self._parser(self.subcommand), self.config[self.subcommand], students=self.students)
        self._otherwise = seen_otherwise(content, record.configs())
        if self._otherwise:
            said = f"kdlit: warning: the student was trained otherwise: {self._otherwise}"
            rank_zero_only(print)(said, file=sys.stderr)

    def _belongs_to_a_run(self, checkpoint: Path) -> bool:
        """Whether results go where a checkpoint came from; a fit from an earlier point than the last is a new run."""
        in_run = (checkpoint.parent.parent / "config.yaml").exists()
        return in_run and (self.subcommand != "fit" or checkpoint.name == "last.ckpt")

    def _newest_last(self, folder: Path) -> str | None:
        """The newest ``last.ckpt`` at or below a folder; None, after saying so, where a fit has yet to begin."""
        kept = sorted(folder.glob("**/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
        runs = {path.parents[1]: path.stat().st_mtime for path in kept}  # with the time of its newest
        # Within the folder of a run lie those of its students.
        runs = {run: at for run, at in runs.items() if run == folder or not (run.parent / "config.yaml").exists()}
        if runs:
            found = whole_one(max(runs, key=lambda run: runs[run]) / "checkpoints")
            rank_zero_only(print)(f"--ckpt_path=last: {found}")
            return str(found)
        if self.subcommand != "fit":
            raise FileNotFoundError(f"--ckpt_path=last: no run in {folder.absolute()} has a checkpoint yet")
        rank_zero_only(print)(f"--ckpt_path=last: no checkpoint in {folder} yet, starting afresh")
        return None

    def instantiate_classes(self) -> None:
        """Build networks, data and trainer."""
        many = self.students.build(self) if self.students else None
        super().instantiate_classes()
        self.model = many or self.model

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add what every run has to what the config asks for."""
        trainer = self.config_init[self.subcommand].trainer
        self.files = WholeCheckpointIO()
        loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
        loggers = [logger for logger in loggers if not isinstance(logger, bool) and logger is not None]
        for logger in loggers:
            if type(logger) is WandbLogger:
                logger.__class__ = PatientWandbLogger  # needs no state of its own
        plugins = trainer.plugins if isinstance(trainer.plugins, list) else [trainer.plugins]
        callbacks: list[L.Callback] = [
            StudentSummary(),
            RandomState(),
            StudentExport(f"{self.run_dir}/student.pt"),
            PredictionTable(f"{self.run_dir}/predictions.csv"),
        ]
        given = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
        callbacks += [one() for one in (TeacherCheck, Throughput) if not any(isinstance(two, one) for two in given)]
        if trainer.enable_progress_bar is not False and not any(isinstance(one, ProgressBar) for one in given):
            callbacks.append(Progress())
        names = self.students.names if self.students else []
        if self.subcommand == "fit" and trainer.logger is not False and not trainer.fast_dev_run:
            loggers[:0] = [RunLogger(self.run_dir, name) for name in ("", *names)]
            callbacks.append(LearningRates() if names else LearningRateMonitor("epoch"))
        if self.students:
            check_callbacks(trainer.callbacks, names)
            settings = self.config[self.subcommand]
            one, *others = self.students.checkpoints(self.run_dir, settings.checkpoint)
            self.config_init[self.subcommand].checkpoint = one
            self.config_init[self.subcommand].last = LastOfStudents(self.run_dir, **settings.last.as_dict())
            callbacks += others
        for best in (self.config_init[self.subcommand].checkpoint, *callbacks):
            if isinstance(best, ModelCheckpoint) and (best.monitor or "").rpartition("val/")[1]:
                # When the validation ends, and not only after the epoch's end, a run goes on exactly.
                best._save_on_train_epoch_end = best._save_on_train_epoch_end or False
        self.trainer_defaults = {"callbacks": callbacks}
        return super().instantiate_trainer(
            logger=loggers or False,
            plugins=[plugin for plugin in plugins if plugin is not None] + [self.files],
            **kwargs,
        )

    def fit(self, **kwargs: Any) -> None:
        """Train; a run that fails before its first checkpoint leaves no folder behind."""
        run = Path(self.run_dir)
        folders = [*(run / name for name in (self.students.names if self.students else [])), run]
        made = [*(place for folder in folders for place in (folder / "checkpoints", folder)), *run.parents]
        made = [folder for folder in made if not folder.exists()]
        try:
            with alone_in(run) if self.trainer.is_global_zero else contextlib.nullcontext():
                if self.trainer.is_global_zero:
                    for folder in folders:
                        remove_scratch(folder)
                        remove_scratch(folder / "checkpoints")
                self.trainer.fit(**kwargs)
        except BaseException as error:
            last = next((one for one in self.trainer.checkpoint_callbacks if isinstance(one, LastCheckpoint)), None)
            if isinstance(error, Exception) and last is not None and last.signal is not None:
                # The processes that load data got the signal, too, and did not live to see the end of the step.
                print(f"kdlit: stopped by a signal, without saving: {error}", file=sys.stderr)
                raise Stopped(INTERRUPTED if last.signal == signal.SIGINT else PREEMPTED) from error
            if run in made and self.trainer.is_global_zero and not list(run.glob("checkpoints/*")):
                for folder in folders:
                    for name in ("config.yaml", "run.json", "metrics.csv"):
                        (folder / name).unlink(missing_ok=True)
                for folder in made:
                    with contextlib.suppress(OSError):  # it holds something else by now, or was never made
                        folder.rmdir()
            raise
        rows = [logger.flush() for logger in self.trainer.loggers if isinstance(logger, RunLogger)]
        if problems := [*self.files.failed.values(), *(problem for problem in rows if problem)]:
            raise WriteError("; ".join(problems))

    def after_fit(self) -> None:
        """Measure the last epoch if its validation was skipped; show what was reached once the progress bar is gone."""
        every = self.trainer.check_val_every_n_epoch or 1
        figures = [f"{name}/val/top1" for name in self.students.names] if self.students else ["val/top1"]
        known = any(figure in self.trainer.callback_metrics for figure in figures)
        measured = known and self.trainer.current_epoch % every == 0
        if not measured and self._has_validation_data():
            self.trainer.validate(self.model, self.datamodule, verbose=False)
        rank_zero_only(print_result)(self.trainer, self.run_dir)

    def _has_validation_data(self) -> bool:
        if self.config_init[self.subcommand].trainer.fast_dev_run or self.datamodule is None:
            return False
        try:
            return bool(self.datamodule.val_dataloader())
        except MisconfigurationException:  # a data module without that method
            return False

    def after_validate(self) -> None:
        """Keep the figures, with what they were measured on."""
        self._save_figures()

    def after_test(self) -> None:
        """Keep the figures, with what they were measured on."""
        self._save_figures()

    @rank_zero_only
    def _save_figures(self) -> None:
        figures = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        checkpoint = self.config[self.subcommand].ckpt_path
        epochs = epochs_of(checkpoint) if checkpoint else None
        batches = "limit_test_batches" if self.subcommand == "test" else "limit_val_batches"
        about = {"checkpoint": checkpoint, "epochs": epochs, "otherwise": self._otherwise}
        about["limit_batches"] = self.config[self.subcommand].trainer[batches]
        names = self.students.names if self.students else []
        for folder, own in [("", figures), *((name, own_values(figures, name)) for name in names)]:
            path = Path(self.run_dir) / folder / f"{self.subcommand}.json"
            write_text(path, f"{json.dumps(about | own, indent=2)}\n")
            print(f"Figures: {path}")


class _Rebuilder(KdlitCLI):
    """Builds what a config names, and runs nothing."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """None is needed."""
        return cast("L.Trainer", None)

    def _run_subcommand(self, subcommand: str) -> None: ...


def rebuilt(run_dir: Path, more: Sequence[str] = ()) -> tuple[DistillationModule, L.LightningDataModule]:
    """Build module and data of a run again, the student as its last checkpoint has it.

    Args:
        run_dir: folder of the run, or of one student of several.
        more: other settings than those of the run, as on the command line.

    Raises:
        FileNotFoundError: If it has no checkpoint.
        ValueError: If its config or its checkpoint cannot be used.
    """
    kept = run_dir / "checkpoints"
    if not list(kept.glob("*.ckpt")):
        raise FileNotFoundError(f"{run_dir} has no checkpoint in checkpoints/; train it first")
    checkpoint = whole_one(kept)
    _find_code_in([Path.cwd(), run_dir.absolute()])
    unneeded = {"logger": "false", "callbacks": "null", "plugins": "null", "profiler": "null", "strategy": "auto"}
    settings = [f"--trainer.{name}={value}" for name, value in unneeded.items()]
    files = [f"--config={run_dir / 'config.yaml'}", f"--run_dir={run_dir}"]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")
            cli = _Rebuilder(["validate", *files, f"--ckpt_path={checkpoint}", *settings, *more])
    except SystemExit as stop:  # the parser has said why
        why = "cannot be used any more, for the reason above"
        link = stop.__context__
        while link is not None:
            if isinstance(link, ModuleNotFoundError):
                why = (
                    f"names code in a module {link.name} that is not found from here: run this in the folder where "
                    "kdlit fit ran, or put that folder on PYTHONPATH"
                )
            link = link.__cause__ or link.__context__
        raise ValueError(f"{run_dir / 'config.yaml'} {why}") from None
    module = cast("DistillationModule", cli.model)
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)  # it has been found whole
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"])
    return module.eval(), cli.datamodule


def _find_code_in(folders: Sequence[Path]) -> None:
    """Let configs name classes in files that lie there."""
    sys.path += [place for place in dict.fromkeys(map(str, folders)) if place not in sys.path]


def whole_one(folder: Path) -> Path:
    """``last.ckpt``, or if that is broken the newest whole checkpoint beside it, after saying so.

    Args:
        folder: that of the checkpoints of a run.

    Raises:
        ValueError: If none is whole.
    """
    problems = []
    for path in _by_age(folder, ("last.ckpt", "previous.ckpt")):
        try:
            load_whole(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        if path.name != "last.ckpt":
            reason = "; ".join(problems) or f"there is no {folder / 'last.ckpt'}"
            rank_zero_only(print)(f"kdlit: warning: {reason}; going on from {path}, the newest whole one")
        return path
    raise ValueError(f"--ckpt_path=last: no checkpoint is whole: {'; '.join(problems)}; start a new run")


def _by_age(folder: Path, first: Sequence[str] = ()) -> list[Path]:
    """The checkpoints of a folder, some first and then the newest."""
    paths = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [folder / name for name in first if folder / name in paths] + [one for one in paths if one.name not in first]


def _checked(path: Path) -> dict[str, Any]:
    """The content of a checkpoint; a file that is missing, broken or of something else is refused."""
    if not path.is_file():
        raise FileNotFoundError(f"--ckpt_path: there is no file {path}")
    try:
        content = load_whole(path)
    except ValueError as error:
        whole = next((other for other in _by_age(path.parent) if other != path and _is_whole(other)), None)
        offer = f"; {whole} is the newest whole one beside it" if whole else ""
        raise ValueError(f"--ckpt_path: {error}{offer}") from None
    if not isinstance(content, dict) or "pytorch-lightning_version" not in content:
        raise ValueError(
            f"--ckpt_path: {path} is not a checkpoint of a run, such as checkpoints/last.ckpt in its folder; to start "
            "from weights alone, let the config build the student by kdlit.models.from_checkpoint"
        )
    return content


def _is_whole(path: Path) -> bool:
    try:
        load_whole(path)
    except ValueError:
        return False
    return True


def epochs_of(checkpoint: str) -> int:
    """How many whole epochs the student of a checkpoint was trained for.

    Args:
        checkpoint: its file.
    """
    content = torch.load(checkpoint, weights_only=True, mmap=True)
    loops = content["loops"]["fit_loop"]
    epoch = loops["epoch_progress"]["current"]
    is_between = epoch["ready"] == epoch["processed"]
    return int(content["epoch"]) + (not is_between and loops["epoch_loop.batch_progress"]["is_last_batch"])


def _check_numbers(config: Any) -> None:
    """Refuse what would fail in the middle of a run, or write outside of its folder."""
    if config.torch_threads is not None and config.torch_threads < 1:
        raise ValueError(f"torch_threads must be >= 1, got {config.torch_threads}")
    if config.trainer.accumulate_grad_batches < 1:
        raise ValueError(f"trainer.accumulate_grad_batches must be >= 1, got {config.trainer.accumulate_grad_batches}")
    if config.trainer.val_check_interval in (0, 0.0):
        raise ValueError(
            "trainer.val_check_interval must be > 0; to validate never, set trainer.limit_val_batches to 0"
        )
    name = config.checkpoint.filename or ""
    try:
        list(string.Formatter().parse(name))
    except ValueError as error:
        raise ValueError(f"checkpoint.filename: {name!r} is no name with figures in braces: {error}") from None
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise ValueError(f"checkpoint.filename must stay in the folder of the run, got {name!r}")


def _check_folder(path: Path) -> None:
    """Refuse a run folder that cannot be written to."""
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"--run_dir: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"--run_dir: no permission to write in {existing}")


def _runs_of(configs: list[Path], which: Literal["last", "new"]) -> Path:
    """Where the runs of some configs lie: ``runs/NAME-NAME``; for the ``config.yaml`` of a run, there or beside it."""
    if configs and configs[0].name == "config.yaml":
        run = configs[0].absolute().parent
        beside = run.parent if run.name.startswith("version_") else Path("runs") / run.name
        return Path(os.path.relpath(run if which == "last" else beside))
    return Path("runs") / ("-".join(path.stem for path in configs) or "run")


def _new_run_dir(folder: Path) -> str:
    """``version_N`` with the first free N; processes that a strategy starts take over the choice of the first."""
    key = "KDLIT_RUN_DIR"
    if "LOCAL_RANK" in os.environ and key in os.environ:
        return os.environ[key]
    number = 0
    while (folder / f"version_{number}").exists():
        number += 1
    os.environ[key] = str(folder / f"version_{number}")
    return os.environ[key]


def _say_interrupted() -> NoReturn:
    print("kdlit: interrupted; checkpoints that were there are as they were", file=sys.stderr)
    sys.exit(INTERRUPTED)


def main(args: list[str] | None = None) -> None:
    """Run the command line; mistakes of the user end in one clear message and exit status 2."""
    # A loss or network in a file in the working directory or beside a config can be named by its class_path.
    _find_code_in([Path.cwd(), *(path.absolute().parent for path in config_errors.config_files(sys.argv[1:]))])
    for noise in _NOISE:
        warnings.filterwarnings("ignore", f".*{noise}")
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(lambda record: "Tip:" not in record.getMessage())
    try:
        with stopping_at_once() if sys.argv[1:2] == ["fit"] else contextlib.nullcontext():
            KdlitCLI(args)
    except KeyboardInterrupt:
        _say_interrupted()
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # that Lightning has seen first
            _say_interrupted()
        raise
    except Exception as error:
        if (message := config_errors.users_mistake(error)) is None or "KDLIT_TRACEBACK" in os.environ:
            raise
        print(f"kdlit: error: {message}", file=sys.stderr)
        sys.exit(2)
