"""Turns what the config parser says, and what a constructor raises, into one clear message."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import traceback
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

import kdlit

_PACKAGE = str(Path(kdlit.__file__).parent)
_NOISE = re.compile(r"Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|$")
_CONTAINER = re.compile(r"Parser key \"(?P<key>.+)\":$|Problem with given class_path '(?P<class_path>.+)':$")


def users_mistake(error: BaseException) -> str | None:
    """Message of an error that kdlit, or Lightning about its settings, raised on purpose; None for any other error.

    The parser wraps what constructors raise in errors of its own, so the whole chain is searched, the outermost first.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, MisconfigurationException) or _raised_on_purpose(link):
            return str(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None


def _raised_on_purpose(error: BaseException) -> bool:
    """Whether a ``raise`` statement of kdlit made this error, not an operation that failed there."""
    if not isinstance(error, (ValueError, TypeError, OSError, ImportError)) or error.__traceback__ is None:
        return False
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return innermost.filename.startswith(_PACKAGE) and (innermost.line or "").startswith("raise ")


def explain(message: str, parser: ArgumentParser, arguments: list[str]) -> str:
    """Say which key or name is wrong, where it stands and what it was probably meant to be.

    Args:
        message: what the parser reports: a tree of alternatives that all failed.
        parser: for the names of its options.
        arguments: the command line, with the config files on it.
    """
    keys, class_path, leaf = _deepest_complaint(message)
    if found := re.search(r"Option '([^']+)' is not accepted", leaf):
        name = found[1].split(".")[0]
        return f"unknown key {name!r} of {class_path}" + _place(name, arguments) + _close(name, _parameters(class_path))
    if found := re.search(r"does not accept option '([^']+)'|unrecognized arguments: --([\w.]+)", leaf):
        name = found[1] or found[2]
        return f"unknown key {name!r}" + _place(name.split(".")[-1], arguments) + _close(name, _options(parser))
    if "Expected a dot import path string: None" in leaf:
        return f"{'.'.join(keys)}: nothing can be taken out on the command line; set the weight of a loss to 0 instead"
    if found := re.search(r"import path string: (\S+)\n\s*- Expected a typing.Literal\[(.+)\]$", message, re.MULTILINE):
        place = _place(found[1], arguments)
        return f"{'.'.join(keys)}: must be one of {found[2]}, or hold single options, got {found[1]!r}{place}"
    if found := re.search(r"Expected a dot import path string: (\S+)", leaf):
        return f"unknown class {found[1]!r}" + _place(found[1], arguments) + _close(found[1], _class_names())
    if found := re.search(r"module '([^']+)' has no attribute '([^']+)'", leaf):
        names = dir(importlib.import_module(found[1]))
        return f"{found[1]} has no {found[2]!r}" + _place(found[2], arguments) + _close(found[2], names)
    if found := re.search(r"[\w./~-]+\.ya?ml", f"{class_path} {leaf}"):
        place = _place(found[0], arguments) or _place(Path(found[0]).name, arguments)  # as written, or made absolute
        return f"there is no file {found[0]!r}, which is named{place}"
    if leaf.endswith("arguments are required: loss"):
        return (
            f"{'.'.join(keys)}: a term has no loss; is its name misspelled? A new one is made by "
            "--model.losses.NAME.loss=KDLoss"
        )
    if re.search(r"arguments are required: \w+\.(data|model)", leaf):
        return f"{leaf}; name a config: --config FILE, such as the config.yaml of a run"
    return ": ".join([".".join(keys), leaf]) if keys else leaf


def _deepest_complaint(message: str) -> tuple[list[str], str, str]:
    """The complaint that came furthest into the config: the keys that lead to it, the class it is about, its text."""
    best: tuple[int, list[str], str, str] = (-1, [], "", message.strip())
    if not _CONTAINER.search(message.splitlines()[0].strip()):
        return best[1:]
    trail: list[tuple[int, re.Match[str]]] = []
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        depth = len(line) - len(line.lstrip()) + (2 if line.lstrip().startswith("- ") else 0)
        if _NOISE.match(text):
            continue
        trail = [(at, step) for at, step in trail if at < depth]
        if container := _CONTAINER.match(text):
            trail.append((depth, container))
        elif depth > best[0] or (depth == best[0] and "dot import path" in text):
            keys = [step["key"] for _, step in trail if step["key"]]
            classes = [step["class_path"] for _, step in trail if step["class_path"]]
            best = (depth, keys, classes[-1] if classes else "", text)
    return best[1:]


def _close(name: str, candidates: list[str]) -> str:
    close = difflib.get_close_matches(name, candidates, n=3, cutoff=0.5)
    if not close and len(candidates) > 12:
        return ""
    return f"; did you mean {' or '.join(map(repr, close or sorted(candidates)))}?"


def _place(name: str, arguments: list[str]) -> str:
    """Where a name stands: in which line of which config file, or on the command line."""
    word = re.compile(rf"(?<![\w]){re.escape(name)}(?![\w])")
    for path in config_files(arguments):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if word.search(line.split(" #")[0]):
                return f" in {path}, line {number}"
    return " on the command line" if any(word.search(argument) for argument in arguments) else ""


def config_files(arguments: list[str]) -> Iterator[Path]:
    """The config files named on the command line, and those that they name in turn."""
    text = "\n".join(arguments)
    queue = [Path(name) for name in re.findall(r"^(?:--config|-c)[=\n](.+)$", text, flags=re.MULTILINE)]
    seen: set[Path] = set()
    while queue:
        path = queue.pop(0)
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        yield path
        names = re.findall(r"[\w./~-]+\.ya?ml", path.read_text(encoding="utf-8", errors="replace"))
        queue += [path.parent / name for name in names]


def _parameters(class_path: str) -> list[str]:
    """Names that a class, or a function that builds one, can be configured with."""
    module, _, name = class_path.rpartition(".")
    target = getattr(importlib.import_module(module), name)
    sources = [vars(base).get("__init__", object) for base in target.__mro__] if isinstance(target, type) else [target]
    names = {name for source in sources for name in inspect.signature(source).parameters}
    return sorted(names - {"self", "args", "kwargs"} | {"class_path", "init_args"})


def _options(parser: ArgumentParser) -> list[str]:
    """Names of all options of the command line, those of its sub-commands included."""
    options = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    for commands in (action.choices for action in parser._actions if isinstance(action.choices, dict)):
        for command in commands.values():
            options.update(_options(command))
    return sorted(options)


def _class_names() -> list[str]:
    """Classes and builders that are likely to be meant."""
    rooms = [f"kdlit.{room}" for room in ("losses", "models", "modules", "data", "callbacks")]
    rooms += ["lightning.pytorch.loggers", "lightning.pytorch.callbacks"]
    return [name for room in rooms for name in importlib.import_module(room).__all__]
