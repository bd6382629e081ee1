"""``students`` in a config of ``kdlit fit``: several runs at once, with the same batches and one teacher.

Each student is the same command line with some more config files, values and a seed of its own::

    students:
      kd: {config: cifar100/methods/kd.yaml}            # after all other config files; relative to this one
      dkd: {config: [cifar100/methods/dkd_beta8.yaml]}
      dkd_1: {config: cifar100/methods/dkd_beta8.yaml, seed: 1}
      wide: {set: {model.student: kdlit.models.resnet14}}  # as on the command line, --KEY=VALUE

and is built, trained and kept as a run of its own would be, in a folder of its own within that of the run. They may
differ in all that is in ``model``, and share ``data`` and ``trainer``.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import Path_fr
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from kdlit.callbacks import LastCheckpoint, RandomState
from kdlit.command_files import flat
from kdlit.config_errors import config_files, users_mistake
from kdlit.modules import ManyStudents
from kdlit.modules.many_students import own_values
from kdlit.modules.streams import RandomStream

MADE_OF = "kdlit"  # under which a checkpoint holds what it was made of
_OF_THE_RUN = (
    "config",
    "run_dir",
    "ckpt_path",
    "students",
    "print_config",
    "help",
    "seed_everything",
    "accept_changes",
)


@dataclass
class Student:
    """One of several students that are trained at once.

    Args:
        config: config files to add to those of the run, in front of what the command line sets.
        set: values by dotted key, as on the command line.
        seed: by default that of the run.
    """

    config: Path_fr | list[Path_fr] = field(default_factory=list)
    set: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None


def read_students(parser: ArgumentParser, arguments: object) -> Students | None:
    """Return the students that a command line names; None where there are none.

    With ``--print_config`` the configs of all are printed, and that is all.

    Args:
        parser: of the command line.
        arguments: the command line.
    """
    if not isinstance(arguments, list):
        return None
    files = (path.read_text(encoding="utf-8", errors="replace") for path in config_files(arguments))
    if not any("students" in text for text in (*arguments, *files)):
        return None
    # The config may be whole only with a student's own files, and so may be what the command line overrides.
    said = _only(arguments, "--config", "-c", "--students", "--seed_everything")
    config: Namespace = parser.parse_args(said, _skip_validation=True)
    if not config[config.subcommand].students:
        return None
    printing = [argument for argument in arguments if argument.startswith("--print_config")]
    students = Students(parser, [argument for argument in arguments if argument not in printing], config)
    if printing:
        print("\n".join(f"# {name}\n{text}" for name, text in students.config_files().items()))
        sys.exit()
    return students


class Students:
    """The students of a command line, each with the config of its separate run.

    Args:
        parser: of the command line.
        arguments: the command line.
        config: what it says of students and seed.

    Raises:
        ValueError: If a name cannot be one, students differ in more than their model and seed, or the run has no seed.
    """

    def __init__(self, parser: ArgumentParser, arguments: Sequence[str], config: Namespace) -> None:
        self.parser = parser
        self.command: str = config.subcommand
        run = config[self.command]
        if isinstance(run.seed_everything, bool):
            raise ValueError(f"seed_everything must be a number where there are students, got {run.seed_everything}")
        self.seed: int = run.seed_everything
        self.files = run.config
        nothing = SimpleNamespace(config=[], set={}, seed=None)
        self.given: dict[str, Any] = {name: student or nothing for name, student in run.students.items()}
        self.configs: dict[str, Namespace] = {}
        for name, student in self.given.items():
            if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or name == "checkpoints":
                raise ValueError(
                    f"students.{name}: the name of a student must be text of letters, digits, _ and -, and not be "
                    f"checkpoints, got {name!r}"
                )
            if student.seed is not None and not 0 <= student.seed < 2**32:
                raise ValueError(f"students.{name}.seed must lie in 0..{2**32 - 1}, got {student.seed}")
            self.configs[name] = self._read(name, student, arguments)
        self.dumps = {name: self._dump(own) for name, own in self.configs.items()}
        self._check_shared()
        data = run_data if isinstance(run_data := next(iter(self.dumps.values())).get("data"), dict) else {}
        others = [name for name, dump in self.dumps.items() if dump["seed_everything"] != self.seed]
        if others and "seed" not in data.get("init_args", {}):
            rank_zero_warn(
                f"{data.get('class_path')} has no argument seed, so batches follow the seed of the run, {self.seed}; "
                f"a separate run of {', '.join(others)} would see others"
            )

    @property
    def names(self) -> list[str]:
        """Of all students."""
        return list(self.configs)

    def _read(self, name: str, student: Any, arguments: Sequence[str]) -> Namespace:
        """The config of a student's separate run."""
        files = student.config if isinstance(student.config, list) else [student.config]
        for key in student.set:
            if key.split(".")[0] in _OF_THE_RUN:
                hint = "; use seed" if key == "seed_everything" else ""
                raise ValueError(f"students.{name}.set: {key} cannot be set for one student{hint}")
        texts = {
            key: value if isinstance(value, str) else json.dumps(value, default=_plain)
            for key, value in student.set.items()
        }
        own = [f"--{key}={text}" for key, text in texts.items()]
        if student.seed is not None:
            own.append(f"--seed_everything={student.seed}")
        place = _after_configs(arguments)
        line = [*arguments[:place], *(f"--config={file.absolute}" for file in files), *arguments[place:], *own]
        whose = type(self.parser)
        try:
            whose.student = f"student {name}: "  # type: ignore[attr-defined]
            config: Namespace = self.parser.parse_args([*line, "--students=null"])
        finally:
            whose.student = ""  # type: ignore[attr-defined]
        data = config[self.command].data
        settings = data.get("init_args") if data is not None else None
        if settings is not None and "seed" in settings and settings.seed is None:
            settings.seed = self.seed
        return config

    def _dump(self, config: Namespace) -> dict[str, Any]:
        """All values of a config as plain data, those left out that belong to one run alone."""
        own = config[self.command].clone()
        own.run_dir = own.ckpt_path = None
        own.accept_changes = False
        dump: dict[str, Any] = yaml.safe_load(self._command_parser.dump(own, skip_none=False))
        return dump

    @property
    def _command_parser(self) -> ArgumentParser:
        commands = cast("Any", self.parser)._subcommands_action
        parser: ArgumentParser = commands._name_parser_map[self.command]
        return parser

    def _check_shared(self) -> None:
        (first, one), *others = ((name, flat(_shared(dump))) for name, dump in self.dumps.items())
        for name, other in others:
            odd = [key for key in {**one, **other} if one.get(key, "absent") != other.get(key, "absent")]
            if odd:
                ours, theirs = (values.get(odd[0], "absent") for values in (one, other))
                short = odd[0].replace(".init_args", "")
                raise ValueError(
                    f"students share data and trainer, but {odd[0]} is {ours!r} for {first} and {theirs!r} for {name}; "
                    f"set it for all, as by --{short}=... on the command line, or train {name} by itself"
                )

    # What the run is made of

    @property
    def run_config(self) -> Namespace:
        """The config of the run as a whole: what all students share."""
        config = next(iter(self.configs.values())).clone()
        run = config[self.command]
        run.model, run.students, run.seed_everything, run.config = None, None, self.seed, self.files
        return config

    def build(self, cli: LightningCLI) -> ManyStudents:
        """Build each student as its separate run does, and start its random stream where that leaves it."""
        modules, streams = {}, {}
        for name, config in self.configs.items():
            alone = config.clone()
            trainer = alone[self.command].trainer
            trainer.logger = trainer.callbacks = trainer.plugins = trainer.profiler = None
            cli.config_dump = self.dumps[name]  # what the module keeps to be rebuilt from
            L.seed_everything(self.dumps[name]["seed_everything"], workers=True, verbose=False)
            try:
                modules[name] = cli.parser.instantiate_classes(alone)[self.command].model
            except Exception as error:
                if (message := users_mistake(error)) is None:
                    raise
                raise ValueError(f"student {name}: {message}") from error
            streams[name] = RandomStream()
        L.seed_everything(self.seed, workers=True, verbose=False)
        cli.config_dump = {**next(iter(self.dumps.values())), "model": {}}
        return ManyStudents(modules, streams)

    def config_files(self) -> dict[str, str]:
        """The resolved configs, by their path in the folder of the run."""
        texts = {f"{name}/config.yaml": yaml.safe_dump(dump, sort_keys=False) for name, dump in self.dumps.items()}
        shared = {key: value for key, value in next(iter(self.dumps.values())).items() if key != "model"}
        students = {
            name: {"config": f"{name}/config.yaml", **({} if given.seed is None else {"seed": given.seed})}
            for name, given in self.given.items()
        }
        run = {**shared, "seed_everything": self.seed, "students": students}
        return {"config.yaml": yaml.safe_dump(run, sort_keys=False), **texts}

    def checkpoints(self, run_dir: str, best: Mapping[str, Any]) -> list[ModelCheckpoint]:
        """What keeps the best of each student.

        Args:
            run_dir: folder of the run.
            best: settings of the checkpoint that is chosen by a figure.
        """
        return [StudentCheckpoint(name, **{**best, "dirpath": f"{run_dir}/{name}/checkpoints"}) for name in self.names]


def _plain(value: Any) -> Any:
    """What the parser made of a class and its arguments, as it was written."""
    return value.as_dict() if isinstance(value, Namespace) else str(value)


class StudentCheckpoint(ModelCheckpoint):
    """Keeps checkpoints of one student of several, which are those of its separate run.

    Args:
        student: its name.
        **kwargs: of ``ModelCheckpoint``; figures are named without the student.
    """

    def __init__(self, student: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.student = student

    @property
    def state_key(self) -> str:
        """With the student's name, as each student has the same callbacks."""
        return f"{self.student}/{super().state_key.replace(type(self).__name__, ModelCheckpoint.__name__)}"

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        candidates = super()._monitor_candidates(trainer)
        return {name: value for name, value in candidates.items() if "/" not in name} | own_values(
            candidates, self.student
        )

    def _should_skip_saving_checkpoint(self, trainer: L.Trainer) -> bool:
        module = cast("ManyStudents", trainer.lightning_module)
        return self.student in module.dropped or super()._should_skip_saving_checkpoint(trainer)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        whole = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
        trainer.strategy.save_checkpoint(_checkpoint_of(self.student, whole, trainer), filepath)
        trainer.strategy.barrier("StudentCheckpoint")
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath


class LastOfStudents(LastCheckpoint):
    """Keeps the last checkpoint of all students together, and beside it that of each one's separate run.

    Args:
        run_dir: folder of the run.
        **kwargs: of the base.
    """

    def __init__(self, run_dir: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run_dir = Path(run_dir)

    @property
    def state_key(self) -> str:
        """That of the base."""
        return LastCheckpoint.__qualname__

    def write(self, trainer: L.Trainer) -> None:
        """Write all of them."""
        super().write(trainer)
        whole = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        for name in cast("ManyStudents", trainer.lightning_module).going:
            path = self.run_dir / name / "checkpoints" / self.path.name
            trainer.strategy.save_checkpoint(_checkpoint_of(name, whole, trainer), path)
        trainer.strategy.barrier("LastOfStudents")


def _checkpoint_of(student: str, whole: Mapping[str, Any], trainer: L.Trainer) -> dict[str, Any]:
    """The checkpoint that the separate run of a student would have written."""
    group = cast("ManyStudents", trainer.lightning_module)
    module = group.students[student]
    kept = dict(whole["students"][student])
    random = kept.pop("random")
    checkpoint = {key: value for key, value in whole.items() if key not in ("students", "dropped")} | kept
    if module.hparams:
        checkpoint[module.CHECKPOINT_HYPER_PARAMS_KEY] = dict(module.hparams)
        if hasattr(module, "_hparams_name"):
            checkpoint[module.CHECKPOINT_HYPER_PARAMS_NAME] = module._hparams_name
    if "callbacks" not in whole:
        return checkpoint
    checkpoint["optimizer_states"] = [whole["optimizer_states"][0][student]]
    states = zip(trainer.lr_scheduler_configs, whole["lr_schedulers"], strict=True)
    checkpoint["lr_schedulers"] = [
        state for config, state in states if cast("Any", config).scheduler.student == student
    ]
    precision = type(trainer.precision_plugin).__qualname__
    if group.scalers is not None:
        checkpoint[precision] = whole[precision][student]
    states_of = whole["callbacks"]
    callbacks = {key: states_of[key] for key in states_of if not key.startswith(tuple(f"{n}/" for n in group.names))}
    callbacks |= own_values(states_of, student)  # what is the student's own goes before what is the group's
    for key, state in callbacks.items():
        if isinstance(state, dict) and "students" in state:
            callbacks[key] = state["students"].get(student)
    if (key := RandomState().state_key) in callbacks:
        callbacks[key] = random
    if (key := LastCheckpoint().state_key) in callbacks:
        state = callbacks[key]
        rows = state["rows"][1 + group.names.index(student) :][:1]  # those of the group come first
        callbacks[key] = {**state, "metrics": own_values(state["metrics"], student), "rows": rows}
    if made_of := checkpoint.get(MADE_OF):
        checkpoint[MADE_OF] = {**made_of, "configs": {"config.yaml": made_of["configs"][f"{student}/config.yaml"]}}
    return checkpoint | {"callbacks": callbacks}


class LearningRates(L.Callback):
    """Logs what ``LearningRateMonitor`` logs at the start of an epoch in the separate run of each student."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start one monitor for each."""
        self.monitors = {name: LearningRateMonitor("epoch") for name in cast("ManyStudents", pl_module).names}
        for name, monitor in self.monitors.items():
            monitor.on_train_start(self._alone(trainer, name))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log."""
        rates: dict[str, float] = {}
        for name in cast("ManyStudents", pl_module).going:
            alone = self._alone(trainer, name)
            self.monitors[name].on_train_epoch_start(alone)
            trainer.callback_metrics.update({f"{name}/{key}": rate for key, rate in alone.callback_metrics.items()})
            rates |= {f"{name}/{key}": history[-1] for key, history in self.monitors[name].lrs.items()}
        for logger in trainer.loggers:
            logger.log_metrics(rates, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _alone(self, trainer: L.Trainer, name: str) -> Any:
        """What the monitor reads of the trainer of a separate run."""
        module = cast("ManyStudents", trainer.lightning_module)
        optimizers = cast("Any", trainer.optimizers[0]).optimizers
        return SimpleNamespace(
            optimizers=[optimizers[name]],
            lr_scheduler_configs=module.schedules[name],
            callback_metrics={},
            strategy=trainer.strategy,
            loggers=[SimpleNamespace(log_metrics=lambda *_, **__: None)],
            fit_loop=trainer.fit_loop,
        )


def check_callbacks(callbacks: Any, names: Sequence[str]) -> None:
    """Refuse callbacks that watch a figure which no student logs.

    Raises:
        ValueError: If there is one.
    """
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and not monitor.startswith(tuple(f"{name}/" for name in names)):
            raise ValueError(
                f"trainer.callbacks: {type(callback).__name__} watches {monitor}, but figures have the student's name "
                f"in front, as {names[0]}/{monitor}; what it does it does to all students"
            )


def _only(arguments: Sequence[str], *options: str) -> list[str]:
    """The command and some of its options, with those within them, as ``--students.kd.seed`` in ``--students``."""
    kept, keep = [], True
    for argument in arguments:
        if argument.startswith("--") or argument in ("-c", "-h"):
            name = argument.partition("=")[0]
            keep = name in options or name.startswith(tuple(f"{option}." for option in options))
        if keep:
            kept.append(argument)
    return kept


def _after_configs(arguments: Sequence[str]) -> int:
    """Where in a command line further config files take their place: after the last, or after the command."""
    place = 1
    for position, argument in enumerate(arguments):
        if argument in ("--config", "-c"):
            place = position + 2
        elif argument.startswith(("--config=", "-c=")):
            place = position + 1
    return place


def _shared(dump: Mapping[str, Any]) -> dict[str, Any]:
    return {key: copy.copy(value) for key, value in dump.items() if key not in ("model", "seed_everything", "config")}
