"""``kdlit chain``: each link's student is the teacher of a later link (TAKD, Mirzadeh et al., AAAI 2020).

A chain file names the links in the order in which they are trained::

    run_dir: runs/chain                   # of all links, one folder each; by default runs/NAME of this file
    links:
      teacher:
        configs: [cifar100/plain.yaml]    # as for kdlit fit --config; relative to this file
        overrides: {model.student: kdlit.models.resnet110}   # as on its command line: --KEY=VALUE
      assistant:
        configs: [cifar100/plain.yaml, kd.yaml]
        overrides: {model.student: kdlit.models.resnet56}
        teacher: teacher                  # an earlier link; or a network, such as kdlit.models.digit_pairs_teacher
      student:
        configs: [cifar100/plain.yaml, kd.yaml]
        overrides: {model.student: kdlit.models.resnet20}
        teacher: assistant

Without ``teacher`` a link has the teacher that its configs name, if any. Paths in overrides are relative to the working
directory, as they are on the command line.

The same command again skips the links that are finished and goes on with the one that is not. A link's folder holds
``link.yaml``, the resolved config that it was begun with, beside what every run leaves.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kdlit.command_files import (
    STOPPED,
    CommandFileError,
    close,
    differences,
    mapping,
    passed_on_to,
    read_file,
    resolved,
    stop,
)

_SET_BY_THE_CHAIN = ("config", "run_dir", "ckpt_path", "print_config")


class ChainError(CommandFileError):
    """The chain file, or what an earlier run of it left behind, does not allow to go on."""


@dataclass
class Link:
    """One distillation of a chain.

    Attributes:
        name: key in the chain file.
        folder: its run folder.
        arguments: what the chain file says, as arguments of ``kdlit fit``.
        teacher: the earlier link whose student is the teacher here; None for any other teacher.
        config: every value, resolved; empty until :meth:`resolve`.
    """

    name: str
    folder: Path
    arguments: list[str]
    teacher: Link | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def exported(self) -> Path:
        """The file that a finished link leaves for the next."""
        return self.folder / "student.pt"

    @property
    def is_finished(self) -> bool:
        """Whether all its epochs are done."""
        return self.exported.exists()

    @property
    def has_begun(self) -> bool:
        """Whether there is anything that would be lost if it began anew."""
        return self.is_finished or (self.folder / "checkpoints" / "last.ckpt").exists()

    @property
    def student(self) -> dict[str, Any]:
        """Spec of the network that it trains and hands on."""
        settings = self.config["model"]["init_args"]
        students = settings.get("students") or [settings.get("student")]  # of several, the first is exported
        spec = next(iter(students.values() if isinstance(students, Mapping) else students))
        if not isinstance(spec, dict):
            raise ChainError(f"link {self.name!r}: {self.config['model']['class_path']} has no student to hand on")
        return spec

    def resolve(self) -> None:
        """Find the value of every option, as the command line does; nothing is built or trained.

        Raises:
            ChainError: If a config is wrong, or that of an earlier link names no student.
        """
        arguments = [*self.arguments]
        if self.teacher is not None:
            weights = {"model": self.teacher.student, "path": str(self.teacher.exported)}
            spec = {"class_path": "kdlit.models.from_checkpoint", "init_args": weights}
            arguments.append(f"--model.teacher={json.dumps(spec)}")
        try:
            self.config = resolved(arguments)
        except CommandFileError as error:
            raise ChainError(f"link {self.name!r}: {error}") from None

    def check(self) -> None:
        """Make sure that what lies in its folder is of this chain.

        Raises:
            ChainError: If it was trained with another config or its teacher is gone.
        """
        if not self.has_begun:
            return
        cure = f"name another --run_dir, or delete {self.folder} to train it again"
        if not (self.folder / "link.yaml").exists():
            raise ChainError(f"link {self.name!r}: {self.folder} holds a run that is not of a chain; {cure}")
        try:
            before = yaml.safe_load((self.folder / "link.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, ValueError) as error:
            raise ChainError(
                f"link {self.name!r}: {self.folder / 'link.yaml'} is damaged: {' '.join(str(error).split())}; {cure}"
            ) from None
        if before != self.config:
            raise ChainError(
                f"link {self.name!r} was trained with another config: {differences(before, self.config)}; {cure}"
            )
        if self.teacher is not None and not self.teacher.is_finished:
            raise ChainError(
                f"link {self.name!r} was trained by {self.teacher.name!r}, but {self.teacher.exported} is gone; {cure}"
            )

    def train(self) -> None:
        """Run ``kdlit fit`` in a process of its own, from the last checkpoint if there is one.

        Raises:
            ChainError: If it fails.
            SystemExit: If a signal told it to stop; it has said so itself.
        """
        from kdlit.files import write_whole

        text = yaml.safe_dump(self.config, sort_keys=False).encode()
        write_whole(self.folder / "link.yaml", lambda file: file.write(text))
        options = ["--config", str(self.folder / "link.yaml"), "--run_dir", str(self.folder), "--ckpt_path=last"]
        process = subprocess.Popen([sys.executable, "-m", "kdlit", "fit", *options])
        with passed_on_to(process):
            status = process.wait()
        if status in STOPPED:
            said = f"link {self.name!r} was stopped; kdlit chain with the same arguments goes on"
            print(f"kdlit: {said}", file=sys.stderr)
            sys.exit(status)
        if status or not self.is_finished:
            raise ChainError(
                f"link {self.name!r} failed with exit status {status}; what it has done is in {self.folder}, and the "
                "same command goes on from there"
            )


def read_chain(path: Path, run_dir: str | None = None) -> list[Link]:
    """Read a chain file; see the top of this file for its form.

    Args:
        path: the chain file.
        run_dir: folder for all links; None for the one that the file names.

    Returns:
        The links in the order in which they are trained, not yet resolved.

    Raises:
        ChainError: If a file is missing, a key unknown, or a teacher neither an earlier link nor a network.
    """
    chain = read_file(path, ("run_dir", "links"))
    if not isinstance(chain.get("links"), dict) or not chain["links"]:
        raise ChainError(f"{path}: links must map the name of each link to its configs, got {chain.get('links')!r}")
    folder = run_dir or chain.get("run_dir") or f"runs/{path.stem}"
    if not isinstance(folder, str):
        raise ChainError(f"{path}: run_dir must be a folder, got {folder!r}")
    links: dict[str, Link] = {}
    for name, settings in chain["links"].items():
        place = f"{path}: links.{name}"
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ChainError(f"{place}: the name of a link must be made of letters, digits, _ and -, got {name!r}")
        settings = mapping(settings, place, ("configs", "overrides", "teacher"))
        arguments = [f"--config={config}" for config in _configs(settings.get("configs"), path.parent, place)]
        teacher, teacher_arguments = _teacher(settings, links, list(chain["links"]), place)
        overrides = settings.get("overrides") or {}
        if not isinstance(overrides, dict):
            raise ChainError(f"{place}.overrides must map options to values, got {overrides!r}")
        for key, value in overrides.items():
            if key in _SET_BY_THE_CHAIN or ("teacher" in settings and str(key).startswith("model.teacher")):
                raise ChainError(f"{place}.overrides: the chain itself sets {key}; leave it out")
            arguments.append(f"--{key}={value if isinstance(value, str) else json.dumps(value, default=str)}")
        links[name] = Link(name, Path(folder) / name, arguments + teacher_arguments, teacher)
    return list(links.values())


def _configs(names: object, base: Path, place: str) -> Iterable[Path]:
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ChainError(f"{place}.configs must be a list of at least one config file, got {names!r}")
    for name in names:
        if not (base / name).is_file():
            raise ChainError(f"{place}.configs: there is no file {name!r} in {base.absolute()}")
        yield base / name


def _teacher(
    settings: Mapping[str, Any], earlier: Mapping[str, Link], names: Sequence[str], place: str
) -> tuple[Link | None, list[str]]:
    """The earlier link that is the teacher, or the argument that names another teacher."""
    teacher = settings.get("teacher")
    if isinstance(teacher, str) and teacher in earlier:
        return earlier[teacher], []
    if isinstance(teacher, str) and teacher in names:
        raise ChainError(
            f"{place}.teacher: {teacher!r} is not trained yet; a link learns from one that stands above it"
        )
    if isinstance(teacher, str) and "." not in teacher:
        raise ChainError(
            f"{place}.teacher: there is no link {teacher!r}{close(teacher, list(earlier))}; a network is named in "
            "full, as in kdlit.models.resnet20"
        )
    if teacher is not None and not isinstance(teacher, (str, dict)):
        raise ChainError(f"{place}.teacher must be an earlier link, a network or null, got {teacher!r}")
    text = teacher if isinstance(teacher, str) else json.dumps(teacher)
    return None, [f"--model.teacher={text}"] if "teacher" in settings else []


def print_chain(links: Sequence[Link]) -> None:
    """Print what each link reached: its network, parameters, accuracy at the end, and folder.

    Args:
        links: finished links.

    Raises:
        ChainError: If what one of them left is damaged.
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    table = Table("Link", "Network", "Parameters", "val top-1 %", "Folder", title="The chain")
    for column in table.columns:
        column.overflow = "fold"
    for link in links:
        try:
            exported = torch.load(link.exported, map_location="cpu", weights_only=True)
            top1, parameters = exported["metrics"].get("val/top1"), exported["num_parameters"]
        except Exception as error:  # a damaged file can raise almost anything
            raise ChainError(
                f"link {link.name!r}: {link.exported} is damaged ({type(error).__name__}); delete {link.folder} to "
                "train it again"
            ) from None
        settings = ", ".join(f"{key}={value}" for key, value in link.student.get("init_args", {}).items())
        table.add_row(
            link.name,
            f"{link.student['class_path'].rpartition('.')[2]}({settings})",
            f"{parameters:,}",
            "-" if top1 is None else f"{100 * top1:.2f}",
            str(link.folder),
        )
    Console().print(table)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command ``kdlit chain``.

    Args:
        args: what follows ``chain`` on the command line.
    """
    parser = argparse.ArgumentParser(
        "kdlit chain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the chain file")
    parser.add_argument("--run_dir", metavar="FOLDER", help="folder for all links, instead of that of the chain file")
    options = parser.parse_args(args)
    try:
        links = read_chain(options.config, options.run_dir)
        for link in links:
            link.resolve()
        for link in links:
            link.check()
    except CommandFileError as error:
        stop(str(error), 2)
    for number, link in enumerate(links, start=1):
        state = "finished before" if link.is_finished else "goes on" if link.has_begun else "begins"
        print(f"\nLink {number} of {len(links)}, {link.name}, in {link.folder}: {state}", flush=True)
        try:
            if not link.is_finished:
                link.train()
        except CommandFileError as error:
            stop(str(error), 1)
    try:
        print_chain(links)
    except CommandFileError as error:
        stop(str(error), 1)
