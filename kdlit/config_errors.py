"""Turns what the config parser says, and what a constructor raises, into one clear message."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch
import torch
import yaml
from jsonargparse import get_loader, set_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException

import kdlit

_PACKAGE, _PARSER, _LIGHTNING, _TORCH, _STANDARD = (
    str(Path(inspect.getfile(package)).parent) for package in (kdlit, jsonargparse, lightning.pytorch, torch, os)
)
_LIBRARIES = (_PACKAGE, str(Path(_TORCH).parent), _STANDARD)  # all that is no code of a user
_SEED = f"{Path(_LIGHTNING).parent}/fabric/utilities/seed"
_CHECKS = (f"{_LIGHTNING}/trainer", _SEED, f"{_TORCH}/optim")  # look at settings
_RESTORING = ("checkpoint_connector.py", "run_record.py", "random_state.py", "streams.py", "lr_monitor.py")
_NOISE = re.compile(r"Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|$")
_CONTAINER = re.compile(r"Parser key \"(?P<key>.+)\":$|Problem with given class_path '(?P<class_path>.+)':$")
_YAML_NAME = re.compile(r"(?<![\w./~-])[\w./~-]+\.ya?ml")  # tried at the start of a word alone, however long that is
_LONGEST = 1000  # letters of a message, which may quote a value
_PLAIN = ("true", "false", "null", "none", "nan", "inf", "infinity")
_DEEPEST, _MOST = 50, 100_000  # levels of a config, and its values once aliases are written out
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_yaml(text: str) -> None:
    """Refuse what YAML allows but no config means: a key twice, or more levels or values than can be read safely.

    Without building anything, so that a few lines whose aliases stand for millions of values take no memory.

    Raises:
        yaml.YAMLError: If the text is that, or no YAML at all.
    """
    keys: list[set[str] | None] = [None]  # of each open level; None for a list
    sizes, anchors, known = [0], [""], {"": 0}  # of each open level: values so far, its name; and sizes by name
    at_key = [False]

    def refuse(problem: str) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]

    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionEndEvent):
            keys.pop()
            at_key.pop()
            name, size = anchors.pop(), sizes.pop()
            known[name] = size
            sizes[-1] += size
        elif isinstance(event, yaml.NodeEvent):
            if at_key[-1] and isinstance(event, yaml.ScalarEvent) and (seen := keys[-1]) is not None:
                if event.value in seen:
                    refuse(f"the key {event.value!r} stands there twice")
                seen.add(event.value)
            at_key[-1] = keys[-1] is not None and not at_key[-1]
            if isinstance(event, yaml.CollectionStartEvent):
                is_mapping = isinstance(event, yaml.MappingStartEvent)
                keys.append(set() if is_mapping else None)
                at_key.append(is_mapping)
                sizes.append(1)
                anchors.append(event.anchor or "")
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor in anchors:
                    refuse(f"the alias *{event.anchor} stands within what it refers to")
                sizes[-1] += known.get(event.anchor or "", 1)
            else:
                sizes[-1] += 1
                known[event.anchor or ""] = 1
            if len(sizes) > _DEEPEST or sizes[-1] > _MOST:
                refuse(f"more than {_DEEPEST} levels or {_MOST} values, aliases written out")


_load_any_yaml = get_loader("yaml")


def _load_yaml(text: str) -> Any:
    check_yaml(text)
    return _load_any_yaml(text)


set_loader("yaml", _load_yaml, (yaml.YAMLError, RecursionError, ValueError))


def yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong with a YAML text, and in which line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return problem if mark is None else f"line {mark.line + 1}: {problem}"


def users_mistake(error: BaseException) -> str | None:
    """Message, in one line, of an error that stems from what the user gave; None for any other error.

    That is an error that kdlit, or Lightning or an optimizer about their settings, raised on purpose, what the parser
    could not make sense of, or a lack of memory. The parser wraps what constructors raise in errors of its own, so the
    whole chain is searched, the outermost first.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    for link in chain:
        if isinstance(link, MisconfigurationException) and "could not find the monitored key" in str(link):
            other = "or name a figure that is logged: --checkpoint.monitor=val/NAME --checkpoint.mode=min, or max"
            return f"{_one_line(str(link))}; {other}"
        if isinstance(link, MisconfigurationException) or _raised_on_purpose(link):
            return _one_line(str(link))
        if isinstance(link, ModuleNotFoundError) and "/lightning/" in _innermost(link):
            return f"a package is missing: {_one_line(str(link))}"
        if re.search(r"Connection (closed|reset) by peer|NCCL error|Socket closed", str(link)):
            return "another process of this run has ended; its own message says why"
        if isinstance(link, MemoryError) or re.search(r"can't allocate memory|CUDA out of memory", str(link)):
            reason = _one_line(str(link)) or "a value needs more than there is"
            return f"out of memory: {reason}; smaller networks, pictures or batches take less"
    said = sys.argv[1:]
    if isinstance(error, (UnicodeDecodeError, yaml.YAMLError)) and (broken := _broken_file(said)):
        return broken
    frames = traceback.extract_tb(error.__traceback__)
    restoring = any(one.filename.endswith(_RESTORING) or one.name == "load_state_dict" for one in frames)
    restoring |= _innermost(error).startswith(f"{_LIGHTNING}/loops") and isinstance(error, TypeError)
    resumes = any(argument.startswith("--ckpt_path") for argument in said)
    if restoring and resumes and all(_innermost(link).startswith(_LIBRARIES) for link in chain):
        reason = f"{type(error).__name__} {error}"
        return _one_line(f"--ckpt_path: the checkpoint is damaged or of another kind of run: {reason}")[:_LONGEST]
    if all(_innermost(link).startswith(_PARSER) for link in chain):
        return explain(str(error), ArgumentParser(), said)
    return None


def _raised_on_purpose(error: BaseException) -> bool:
    """Whether a ``raise`` statement made this error where values of a config are checked, not a failed operation."""
    if not isinstance(error, (ValueError, TypeError, OSError, ImportError)) or error.__traceback__ is None:
        return False
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return innermost.filename.startswith((_PACKAGE, *_CHECKS)) and (innermost.line or "").startswith("raise ")


def _innermost(error: BaseException) -> str:
    """The file in which an error came up."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename if frames else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def explain(message: str, parser: ArgumentParser, arguments: list[str]) -> str:
    """Say which key or name is wrong, where it stands and what it was probably meant to be.

    Args:
        message: what the parser reports: a tree of alternatives that all failed.
        parser: for the names of its options.
        arguments: the command line, with the config files on it.
    """
    if broken := _broken_file(arguments):
        return broken
    text = _one_line(_explain(message, parser, arguments))
    given = re.search(r"^\s*Given value: (.*)", message, re.MULTILINE)
    if re.search(r": Expected a \S+ '?[^']+'?>$", text) and given:
        text += f". Got value: {given[1]}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _explain(message: str, parser: ArgumentParser, arguments: list[str]) -> str:
    keys, class_path, leaf = _deepest_complaint(message)
    if found := re.search(r"Option '([^']+)' is not accepted", leaf):
        name = found[1].split(".")[0]
        if "to a subclass of WeightedLoss" in message and name in _parameters("kdlit.losses.WeightedLoss"):
            return (
                f"{'.'.join(keys)}: {name!r}{_place(name, arguments)} is set for a term that is first written as a "
                f"bare {class_path.rpartition('.')[2]}; write it there as "
                "NAME: {loss: {class_path: ...}, weight: ...}"
            )
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
        key, name, known = "".join(f"{key}." for key in keys)[:-1], found[1], _class_names()
        where = _place(name, arguments)
        if name in known or not re.fullmatch(r"[A-Za-z]\w*(\.\w+)*", name) or name.lower() in _PLAIN:
            return f"{key or 'the config'}: {name!r}{where} is not of a kind that may stand there"
        return (f"{key}: " if key else "") + f"unknown class {name!r}{where}{_close(name, known)}"
    if found := re.search(r"module '([^']+)' has no attribute '([^']+)'", leaf):
        names = dir(importlib.import_module(found[1]))
        return f"{found[1]} has no {found[2]!r}" + _place(found[2], arguments) + _close(found[2], names)
    if found := _YAML_NAME.search(f"{class_path} {leaf}"):
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


def _broken_file(arguments: list[str]) -> str:
    """What is wrong with the first config file that cannot be read; empty if all can."""
    own = {Path(name) for name in _named_configs(arguments)}
    for path in config_files(arguments):
        try:
            text = path.read_text(encoding="utf-8")
            check_yaml(text)
            if path in own and not isinstance(content := yaml.load(text, Loader=_Loader), dict):
                what = "nothing" if content is None else f"{type(content).__name__} {str(content)[:40]!r}"
                return f"{path} is no config: it must hold keys and their values, such as 'model: ...', got {what}"
        except yaml.YAMLError as error:
            return f"Problems parsing config {path}: {yaml_problem(error)}"
        except UnicodeDecodeError as error:
            return f"{path} is not text in UTF-8: {error.reason} at byte {error.start}; save it in that encoding"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        except ValueError as error:  # such as a date that is none
            return f"Problems parsing config {path}: {error}"
    return ""


def _close(name: str, candidates: list[str]) -> str:
    close = difflib.get_close_matches(name, candidates, n=3, cutoff=0.5)
    if not close and len(candidates) > 12:
        return ""
    return f"; did you mean {' or '.join(map(repr, close or sorted(candidates)))}?"


def _place(name: str, arguments: list[str]) -> str:
    """Where a name stands: in which line of which config file, or on the command line."""
    word = re.compile(rf"(?<![\w]){re.escape(name)}(?![\w])")
    said = re.compile(rf"--(\S+=)?{re.escape(name)}$|--[\w.]*(?<=\.){re.escape(name)}(=|$)")
    if any(said.match(argument) for argument in arguments):
        return " on the command line"
    for path in config_files(arguments):
        for number, line in enumerate(_text(path).splitlines(), start=1):
            if word.search(line.split(" #")[0]):
                return f" in {path}, line {number}"
    return " on the command line" if any(word.search(argument) for argument in arguments) else ""


def config_files(arguments: list[str]) -> Iterator[Path]:
    """The config files named on the command line, and those that they name in turn."""
    queue = [Path(name) for name in _named_configs(arguments)]
    seen: set[Path] = set()
    while queue:
        path = queue.pop(0)
        if path in seen or not _is_file(path):
            continue
        seen.add(path)
        yield path
        names = _YAML_NAME.findall(_text(path))
        queue += [path.parent / name for name in names]


def _named_configs(arguments: list[str]) -> list[str]:
    return re.findall(r"^(?:--config|-c)[=\n](.+)$", "\n".join(arguments), flags=re.MULTILINE)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or none at all
        return False


def _text(path: Path) -> str:
    """What a file holds as far as it can be read, for a look at the names in it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


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
