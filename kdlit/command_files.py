"""Files that say which runs of ``kdlit fit`` to make: what chains and sweeps share; importing it loads no torch."""

from __future__ import annotations

import contextlib
import difflib
import io
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import yaml

_PREEMPTED, _INTERRUPTED = STOPPED = (75, 130)  # exit statuses of a run that a signal told to stop: any other; Ctrl-C
_FEW = 12  # names that a message can list


class CommandFileError(ValueError):
    """A file, or what an earlier run of it left behind, does not allow to go on."""


def read_file(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Read a file in YAML.

    Args:
        path: the file.
        keys: that it may have.

    Raises:
        CommandFileError: If it is missing or no YAML, or has other keys.
    """
    from kdlit.config_errors import check_yaml  # not before it is needed: it loads torch

    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text)
        content = yaml.safe_load(text)
    except OSError as error:
        raise CommandFileError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter for a date that is none
        raise CommandFileError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    return mapping(content, str(path), keys)


def mapping(content: object, place: str, keys: Sequence[str]) -> dict[str, Any]:
    """Return what is a mapping with some of these keys and no others.

    Args:
        content: what the file has there.
        place: where that is, for the message.
        keys: that it may have.

    Raises:
        CommandFileError: If it is something else.
    """
    if not isinstance(content, dict):
        raise CommandFileError(f"{place}: must have the keys {', '.join(keys)}, got {content!r}")
    for key in content:
        if key not in keys:
            raise CommandFileError(f"{place}: unknown key {key!r}{close(key, keys)}")
    return content


def close(name: object, candidates: Sequence[str]) -> str:
    """The end of a message about an unknown name: which known ones look like it, or else all if they are few.

    Args:
        name: the unknown one.
        candidates: the known ones.
    """
    close = difflib.get_close_matches(str(name), candidates, cutoff=0.5)
    if not close and len(candidates) <= _FEW:
        close = list(candidates)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def resolved(arguments: list[str]) -> dict[str, Any]:
    """What ``kdlit fit ARGUMENTS --print_config`` prints: every value of the config.

    Args:
        arguments: of ``kdlit fit``.

    Raises:
        CommandFileError: If they are wrong.
        KeyboardInterrupt: After Ctrl-C.
        SystemExit: If another signal told it to stop.
    """
    from kdlit.cli import main as run

    printed, complaint = io.StringIO(), io.StringIO()
    given, sys.argv = sys.argv, ["kdlit", "fit", *arguments, "--print_config"]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
            run()
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            raise KeyboardInterrupt from None
        if stop.code == _PREEMPTED:
            raise
        if stop.code:
            text = stop.code if isinstance(stop.code, str) else complaint.getvalue()
            raise CommandFileError(text.split("kdlit: error: ")[-1].strip()) from None
    finally:
        sys.argv = given
    config: dict[str, Any] = yaml.safe_load(printed.getvalue())
    return config


def differences(before: object, now: object) -> str:
    """Name the first few keys whose values differ, and both values.

    Args:
        before: nested mappings.
        now: likewise.
    """
    old, new = flat(before), flat(now)
    texts = [
        f"{key} was {old.get(key, 'absent')!r}, is now {new.get(key, 'absent')!r}"
        for key in {**old, **new}
        if key not in old or key not in new or old[key] != new[key]
    ]
    return "; ".join(texts[:4]) + (f"; and {len(texts) - 4} more" if len(texts) > 4 else "")


def flat(value: object, key: str = "") -> dict[str, object]:
    """The values of a nest of mappings by dotted key; an empty mapping is a value.

    Args:
        value: the nest.
        key: of the nest itself.
    """
    if not isinstance(value, dict) or not value:
        return {key: value}
    return {path: leaf for name in value for path, leaf in flat(value[name], f"{key}.{name}".lstrip(".")).items()}


@contextlib.contextmanager
def passed_on_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let a process answer the signals that this one gets; a terminal sends Ctrl-C to both.

    Signals that this process ignores, as under ``nohup``, are left so, as the other has inherited that.

    Args:
        process: one that has been started, and has ended when the block is left.

    Raises:
        KeyboardInterrupt: If Ctrl-C came and the process ended otherwise than by the statuses in ``STOPPED``, killed
            while it started, or finished.
        SystemExit: Likewise for another signal, with status 75.
    """
    came: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        came.append(number)
        if number != signal.SIGINT:
            process.send_signal(number)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, pass_on) for number in heard}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came and process.returncode not in STOPPED:
        if signal.SIGINT in came:
            raise KeyboardInterrupt
        print(f"kdlit: stopped by {signal.Signals(came[0]).name}; the same command goes on", file=sys.stderr)
        sys.exit(_PREEMPTED)


def stop(message: str, status: int) -> NoReturn:
    """End this process with a message for the user.

    Args:
        message: what is wrong, and what to do.
        status: exit status.
    """
    print(f"kdlit: error: {message}", file=sys.stderr)
    sys.exit(status)
