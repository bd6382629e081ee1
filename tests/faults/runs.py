"""Runs of ``kdlit fit`` that are killed, told to stop, or find no room on the disk, against the same run left in peace.

The processes are forked from one that has everything imported, which saves most of what starting them takes; what
they run is the command line, whole, each time anew.
"""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.conftest import repeatable_log
from tests.faults.network import PHASES

CONFIG = """
seed_everything: 3
torch_threads: 1
trainer:
  accelerator: cpu
  max_epochs: 6
  log_every_n_steps: 2
  enable_progress_bar: false
  num_sanity_val_steps: 0
  callbacks:
    - {class_path: tests.faults.network.Clock, init_args: {pace: 0.004}}
    - class_path: kdlit.callbacks.PlainBaseline
      init_args:
        lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 2}}
last: {every_n_steps: 2}
data: {class_path: tests.faults.network.Data}
model:
  class_path: kdlit.modules.ClassificationDistillation
  init_args:
    student: {class_path: tests.faults.network.Net}
    teacher: {class_path: tests.faults.network.Teacher}
    input_size: [3, 8, 8]
    losses:
      ce: {loss: {class_path: CrossEntropyLoss}}
      ctkd:
        loss: {class_path: GlobalTemperature, init_args: {loss: {class_path: KDLoss}}}
        warmup_epochs: 3
      dist: {loss: {class_path: DISTLoss}, weight: 0.5}
      mlkd: {loss: {class_path: MLKDLoss}, weight: 0.1}
      crd:
        loss: {class_path: CRDLoss, init_args: {student_layers: drop, teacher_layers: drop, feat_dim: 8, negatives: 16}}
        weight: 0.8
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.9, weight_decay: 0.0005}}
    lr_scheduler: {class_path: torch.optim.lr_scheduler.MultiStepLR, init_args: {milestones: [2, 4], gamma: 0.1}}
"""


def launch(folder: Path, *arguments: str, clock: Path | None = None, before: Callable[[], None] | None = None) -> int:
    """Fork a process that runs ``kdlit ARGUMENTS`` in a folder, and return its number.

    Args:
        folder: its working directory; what it prints goes to ``log.txt`` there.
        arguments: of the command line.
        clock: file in which it tells what it is doing.
        before: called in it first.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if (pid := os.fork()) != 0:
        return pid
    status = 70
    try:
        os.setsid()
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        # What a test runner holds of both is of the process that it runs in.
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(folder)
        os.environ.pop("KDLIT_RUN_DIR", None)
        if clock is not None:
            os.environ["KDLIT_TEST_CLOCK"] = str(clock)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        torch.set_num_threads(1)
        if before is not None:
            before()
        from kdlit.__main__ import main

        sys.argv = ["kdlit", *arguments]
        main()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pid: int, limit: float = 120.0) -> int:
    """The exit status of a process, minus the signal if one ended it; after the limit it is killed."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"a process did not end within {limit} s")


def saves_slowly(clock: Path) -> Callable[[], None]:
    """What lets a process be met while it writes a checkpoint: half of it, a pause, the other half."""

    def before() -> None:
        import io

        save = torch.save
        with clock.open("r+b") as file:
            shared = mmap.mmap(file.fileno(), 16)

        def slowly(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            whole = io.BytesIO()
            save(content, whole, *args, **kwargs)
            data = whole.getvalue()
            file.write(data[: len(data) // 2])
            file.flush()
            shared[0] = PHASES["saving"]
            time.sleep(0.004)
            file.write(data[len(data) // 2 :])

        torch.save = slowly

    return before


class Runs:
    """A run left in peace, and others with the same settings that are not.

    Args:
        folder: scratch folder.
        overrides: further arguments of all runs.
    """

    def __init__(self, folder: Path, overrides: tuple[str, ...] = ()) -> None:
        folder.mkdir(parents=True)
        (folder / "run.yaml").write_text(CONFIG)
        self.folder = folder
        self.clock = folder / "clock"
        self.clock.write_bytes(bytes(16))
        self.arguments = ("fit", "--config=run.yaml", *overrides)
        self.end("whole")

    @property
    def log(self) -> str:
        """What all runs have printed since this was last asked."""
        text = (self.folder / "log.txt").read_text()
        (self.folder / "log.txt").write_text("")
        return text

    def start(self, name: str, *arguments: str, before: Callable[[], None] | None = None) -> int:
        """Start a run, or go on with it, and return the number of its process."""
        self.clock.write_bytes(bytes(16))
        given = (*self.arguments, f"--run_dir={name}", "--ckpt_path=last", *arguments)
        return launch(self.folder, *given, clock=self.clock, before=before)

    def end(self, name: str, *arguments: str) -> None:
        """Let a run come to its end."""
        if status := wait(self.start(name, *arguments)):
            raise RuntimeError(f"the run {name} ended with status {status}:\n{self.log}")

    def signal(self, pid: int, number: int, phase: str, after: int, pause: float = 0.0) -> bool:
        """Send a signal to a process and its workers once it is in a phase; False if it ended before."""
        with self.clock.open("r+b") as file:
            shared = mmap.mmap(file.fileno(), 16)
        if not _is_in(phase, after, pid, shared, pause):
            return False
        os.killpg(pid, number)
        return True

    def compare(self, name: str) -> tuple[list[str], list[str]]:
        """Names of what a run has in common with the one left in peace to the last bit, and of what it has not."""
        return compare(self.folder / "whole", self.folder / name)


def kills(runs: Runs, number: int = 20, seed: int = 0) -> dict[str, Any]:
    """Kill a run with SIGKILL at random moments until it has been killed often enough, and let it end.

    Args:
        runs: where, and with which settings.
        number: how often.
        seed: draws the moments.

    Returns:
        ``tried``, ``survived`` (kills after which the run went on), ``killed_in``, ``identical`` and ``different``
        (names of what was compared at the end), and ``left_over`` (files of broken writes).
    """
    draw = random.Random(seed)
    killed: Counter[str] = Counter()
    while killed.total() < number:
        pid = runs.start("killed", before=saves_slowly(runs.clock))
        phase = draw.choice(("training", "validation", "saving", "start"))
        pause = draw.random() * (1.0 if phase == "start" else 0.006)
        if not runs.signal(pid, signal.SIGKILL, phase, after=1 + draw.randrange(4), pause=pause):
            break
        os.waitpid(pid, 0)
        killed[phase] += 1
    runs.end("killed")
    identical, different = runs.compare("killed")
    return {
        "tried": killed.total(),
        "survived": killed.total(),  # a run that does not go on raises an error
        "killed_in": dict(killed),
        "identical": identical,
        "different": different,
        "left_over": [str(path) for path in (runs.folder / "killed").rglob(".*.kdlit")],
    }


STOPS = (
    ("SIGTERM", "validation", 75),
    ("SIGUSR1", "training", 75),
    ("SIGHUP", "training", 75),
    ("SIGINT", "training", 130),
)


def stops(runs: Runs) -> list[dict[str, Any]]:
    """Tell runs to stop, as clusters and people do, and let them go on.

    Args:
        runs: where, and with which settings.

    Returns:
        For each signal and phase what was expected and what came: ``status``, ``message`` (which names the step),
        ``step`` (that was saved), ``identical`` and ``different``.
    """
    found = []
    for name, phase, expected in STOPS:
        run, _ = f"{name}-{phase}", runs.log
        pid = runs.start(run)
        sent = runs.signal(pid, getattr(signal, name), phase, after=9)
        status = wait(pid)
        message = next((line for line in runs.log.splitlines() if "stopped by" in line), "")
        saved = torch.load(runs.folder / run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
        runs.end(run)
        identical, different = runs.compare(run)
        found.append(
            {
                "signal": name,
                "phase": phase,
                "sent": sent,
                "expected": expected,
                "status": status,
                "message": message,
                "step": saved,
                "identical": identical,
                "different": different,
            }
        )
    return found


def start_up(runs: Runs) -> dict[str, Any]:
    """Tell a run to stop before it trains, and let it start again.

    Args:
        runs: where, and with which settings.

    Returns:
        ``status`` and ``message``, ``left_over`` (what the folder holds), ``identical`` and ``different``.
    """
    _ = runs.log
    pid = runs.start("early")
    runs.signal(pid, signal.SIGTERM, "start", after=0, pause=0.3)
    status = wait(pid)
    message = next((line for line in runs.log.splitlines() if "stopped by" in line), "")
    left_over = [str(path) for path in (runs.folder / "early").rglob("*")]
    runs.end("early")
    identical, different = runs.compare("early")
    return {
        "status": status,
        "message": message,
        "left_over": left_over,
        "identical": identical,
        "different": different,
    }


def two_processes(folder: Path, number: int = 3, seed: int = 0) -> dict[str, Any]:
    """Stop and kill a run of two processes, which are started anew each time.

    Args:
        folder: scratch folder.
        number: how often it is killed with SIGKILL, after a SIGTERM.
        seed: draws the moments.

    Returns:
        ``status`` after SIGTERM, ``tried`` and ``survived`` kills, ``identical`` and ``different``.
    """
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(CONFIG)
    # One process alone can have a twin of the student, and more time is lost at each step.
    before, after = CONFIG.split("    - class_path: kdlit.callbacks.PlainBaseline")
    text = (before + after[after.index("last:") :]).replace("0.004", "0.05")
    (folder / "run.yaml").write_text(text)
    place = os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "kdlit", "fit", "--config=run.yaml", "--ckpt_path=last"]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    log, draw = folder / "log.txt", random.Random(seed)

    def start(name: str) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen(
                [*command, f"--run_dir={name}"],
                cwd=folder,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": place, "OMP_NUM_THREADS": "1"},
            )

    def wait_for_steps(process: subprocess.Popen[bytes], name: str) -> None:
        """Until it has saved something new."""
        last, before = folder / name / "checkpoints" / "last.ckpt", time.time()
        while process.poll() is None and not (last.exists() and last.stat().st_mtime > before):
            time.sleep(0.01)
        time.sleep(draw.random() * 0.2)

    if start("whole").wait(300):
        raise RuntimeError(log.read_text()[-3000:])
    process = start("killed")
    wait_for_steps(process, "killed")
    process.send_signal(signal.SIGTERM)
    status, killed = process.wait(300), 0
    for _ in range(number):
        process = start("killed")
        wait_for_steps(process, "killed")
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
        killed += 1
    if start("killed").wait(300):
        raise RuntimeError(log.read_text()[-3000:])
    identical, different = compare(folder / "whole", folder / "killed")
    return {"status": status, "tried": killed, "survived": killed, "identical": identical, "different": different}


def full_disk(runs: Runs) -> dict[str, Any]:
    """Let a run find no room for its checkpoints half of the way, then make room.

    Args:
        runs: where, and with which settings.

    Returns:
        ``status`` and ``message`` of the run that found none, whether the checkpoint of before is ``untouched``, what
        was ``left_over``, and ``identical`` and ``different`` after it was given room.
    """
    folder = runs.folder
    pid = runs.start("full")
    runs.signal(pid, signal.SIGTERM, "training", after=7)
    wait(pid)
    last = folder / "full" / "checkpoints" / "last.ckpt"
    before, _ = last.read_bytes(), runs.log

    def no_room() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    status = wait(runs.start("full", before=no_room))
    text = runs.log
    untouched, left_over = last.read_bytes() == before, [str(path) for path in (folder / "full").rglob(".*.kdlit")]
    runs.end("full")
    identical, different = runs.compare("full")
    return {
        "status": status,
        "message": text.strip().splitlines()[-1],
        "warned": "Training goes on" in text,
        "untouched": untouched,
        "left_over": left_over,
        "identical": identical,
        "different": different,
    }


def broken_checkpoint(runs: Runs) -> list[dict[str, Any]]:
    """Damage the last checkpoint of a run that was stopped, and let it go on.

    Args:
        runs: where, and with which settings.

    Returns:
        For each way of damaging it: whether the file is ``named`` and the ``taken`` one said, ``identical`` and
        ``different``.
    """
    folder, found = runs.folder, []
    pid = runs.start("broken")
    runs.signal(pid, signal.SIGTERM, "training", after=11)
    wait(pid)
    shutil.copytree(folder / "broken", folder / "stopped")
    for way in ("truncated", "empty", "a bit flipped", "not there"):
        shutil.rmtree(folder / "broken")
        shutil.copytree(folder / "stopped", folder / "broken")
        last, _ = folder / "broken" / "checkpoints" / "last.ckpt", runs.log
        content = bytearray(last.read_bytes())
        if way == "a bit flipped":
            content[len(content) // 2] ^= 1
        last.write_bytes({"truncated": content[: len(content) // 2], "empty": b""}.get(way, content))
        if way == "not there":
            last.unlink()
        runs.end("broken")
        text = runs.log
        identical, different = runs.compare("broken")
        found.append(
            {
                "way": way,
                "named": "last.ckpt is not a whole checkpoint" in text,
                "taken": "previous.ckpt" in text,
                "identical": identical,
                "different": different,
            }
        )
    return found


def _is_in(phase: str, after: int, pid: int, shared: mmap.mmap, pause: float) -> bool:
    """Wait until a process is in a phase, a few steps after it began to do something; False if it ended before."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        steps = int.from_bytes(shared[8:16], "little")
        if phase == "start" or (shared[0] == PHASES[phase] and steps >= after):
            time.sleep(pause)
            return True
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.0005)
    raise TimeoutError(f"a process was never in {phase}")


def compare(whole: Path, other: Path) -> tuple[list[str], list[str]]:
    """Names of what two runs have in common to the last bit, and of what they have not."""
    found: dict[str, bool] = {}
    for path in sorted({*_files(whole), *_files(other)} - {Path("run.json")}):  # which tells when it was started
        if path.name in ("previous.ckpt", "clock"):
            continue
        one, two = whole / path, other / path
        if not (one.exists() and two.exists()):
            found[f"{path} is there"] = False
        elif path.name == "metrics.csv":
            found[str(path)] = repeatable_log(one.parent) == repeatable_log(two.parent)
        elif path.suffix not in (".pt", ".ckpt"):
            found[str(path)] = one.read_bytes() == two.read_bytes()
        else:
            contents = [torch.load(run, weights_only=True) for run in (one, two)]
            for content in contents:
                for state in content.get("callbacks", {}).values():
                    if "best_model_score" in state:
                        del state["current_score"]  # Lightning does not take it up again, and asks for it nowhere
            for key in {**contents[0], **contents[1]}:
                same = all(key in content for content in contents)
                found[f"{path}: {key}"] = same and equal(contents[0][key], contents[1][key], (whole, other))
    return [name for name, same in found.items() if same], [name for name, same in found.items() if not same]


def _files(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]


def equal(one: Any, two: Any, folders: tuple[Path, Path]) -> bool:
    """Whether two nests of plain data are the same, the names of the folders they lie in aside."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return (
            isinstance(two, dict)
            and list(map(str, one)) == [str(key).replace(folders[1].name, folders[0].name) for key in two]
            and all(equal(a, b, folders) for a, b in zip(one.values(), two.values(), strict=True))
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(equal(a, b, folders) for a, b in zip(one, two, strict=True))
    if isinstance(one, str):
        return one == two.replace(folders[1].name, folders[0].name)
    return bool(one == two) or (one != one and two != two)
