"""Bad inputs by the thousand: each must be taken or be refused by kdlit in one message that names it.

``python -m tests.faults.fuzz`` runs them all; ``--only KIND NUMBER`` runs one again and shows what it says. A case
follows from the seed, its kind and its number alone. All run in a child process with a limit on memory, watched by an
audit hook: nothing may be started, no connection be opened and no file be written outside the scratch folder. A case
that hangs or brings the process down is a fault, too, and the next ones run in a new child.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save as save_safetensors

import kdlit
import kdlit.cli
from kdlit import chain
from kdlit.data import CIFAR10, CIFAR100, STL10, ImageNet, TinyImageNet
from kdlit.data.download import fetch
from kdlit.data.photographs import read_photograph
from kdlit.data.teacher_logits import LogitFormat, TeacherLogits, create
from kdlit.models import from_checkpoint
from tests.conftest import TinyNet, write_cifar_layout
from tests.test_cli import CONFIG, OWN

COUNTS = {
    "config": 120,
    "override": 100,
    "chain": 120,
    "checkpoint": 40,
    "weights": 500,
    "labels": 460,
    "image": 560,
    "archive": 120,
    "cache": 120,
}
SECONDS = 20  # a case that takes longer hangs
MEMORY = 3 * 2**30  # bytes of address space beyond what the process has when it starts


class Case(NamedTuple):
    """One bad input.

    Attributes:
        title: what was done to what.
        names: what the message must name, one of these; empty where that cannot be told.
        act: gives the input to kdlit.
    """

    title: str
    names: tuple[str, ...]
    act: Callable[[], object]


class Outcome(NamedTuple):
    """How a case ended.

    Attributes:
        kind: of the case.
        number: of the case.
        title: of the case.
        end: ``taken``, ``refused`` or ``fault``.
        text: the message; of a fault, what is wrong with it.
    """

    kind: str
    number: int
    title: str
    end: str
    text: str


class Danger(BaseException):
    """What no input may cause; not to be caught by the code under test."""


# Mutations that know nothing of what they change


def bent(draw: random.Random, data: bytes) -> tuple[str, bytes]:
    """Bytes with one to three things wrong with them."""
    titles = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        where, length = draw.randrange(len(data) + 1), draw.choice((1, 2, 4, 16, 256))
        what = draw.choice(
            ("cut", "flip", "flip", "zero", "ones", "noise", "insert", "drop", "repeat", "head", "empty")
        )
        part = data[where : where + length]
        if what == "cut":
            data = data[:where]
        elif what == "flip":
            data = data[:where] + bytes(byte ^ 1 << draw.randrange(8) for byte in part[:1]) + data[where + 1 :]
        elif what in ("zero", "ones", "noise"):
            new = {"zero": b"\0" * len(part), "ones": b"\xff" * len(part)}.get(what) or draw.randbytes(len(part))
            data = data[:where] + new + data[where + length :]
        elif what == "insert":
            data = data[:where] + draw.randbytes(length) + data[where:]
        elif what == "drop":
            data = data[:where] + data[where + length :]
        elif what == "repeat":
            data = data[: where + length] + data[where:]
        elif what == "head":
            data = draw.randbytes(length) + data[length:]
        elif draw.random() < 0.2:
            data = b""
        titles.append(f"{what} at {where}")
    return ", ".join(titles), data


ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 10**9, 2**63, 10**30, 0.5, -0.5, 1e308, 1e-308, float("nan"), float("inf"),
    -float("inf"), "", " ", "abc", "1", "-", "~", "é", "日本", "a" * 2000, "../../../etc/passwd", "/dev/null", "/", ".",
    "nan", "no such file.yaml", "tiny.yaml", "{", "[1", "'", "a: b", "- a", "\t", "*a", "&a", "!!python/name:os.system",
    "!!python/object/apply:os.system ['touch pwned']", "${oops}", "%s", "$(touch pwned)", "os.system", "kdlit", "torch.nn.Linear",
    "kdlit.models", "nothing.At.All", "builtins.int", [], {}, [None], [1, 2, 3], ["a"], [[]], {"a": 1}, {"class_path": "os.system"},
    {"class_path": None}, {"class_path": 3}, {"class_path": "KDLoss"}, {"class_path": "torch.nn.Linear"}, {"init_args": {}}, {"loss": None},
    {"class_path": "kdlit.losses.KDLoss", "init_args": None}, {"class_path": "kdlit.losses.KDLoss", "init_args": 3}, {1: 2},
)  # fmt: skip


def spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """The places in nested dictionaries and lists, few of a long list: what holds each, and its key there."""
    for key in list(tree) if isinstance(tree, dict) else range(min(5, len(tree))) if isinstance(tree, list) else ():
        yield tree, key
        yield from spots(tree[key])


def warped(draw: random.Random, tree: Any, odd: Callable[[Any], Any]) -> tuple[str, str, Any]:
    """A nested value with something wrong at one place: what was done, the key there, the whole."""
    tree = copy.deepcopy(tree)
    holder, key = draw.choice(list(spots(tree)))
    what = draw.choice(("replace", "replace", "replace", "drop", "rename", "add", "swap"))
    if what == "drop":
        del holder[key]
    elif what == "rename" and isinstance(holder, dict):
        holder[draw.choice((f"{key}x", str(key)[:-1], "", 7, "é"))] = holder.pop(key)
    elif what == "add" and isinstance(holder, dict):
        holder[draw.choice(("extra", "", "a.b", 3))] = odd(holder[key])
    elif what == "swap":
        other, place = draw.choice(list(spots(tree)))
        holder[key] = copy.deepcopy(other[place])
    else:
        holder[key] = odd(holder[key])
        what = f"replace by {str(holder[key])[:40]!r}"
    return f"{what} at {key}", str(key), tree


# The cases


class Workshop:
    """Good inputs to spoil.

    Args:
        folder: scratch folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = folder
        os.chdir(folder)
        (folder / "losses").mkdir(exist_ok=True)
        self.configs = {
            "tiny.yaml": CONFIG,
            "losses/kd.yaml": "loss: {class_path: KDLoss, init_args: {temperature: 2.0}}\nweight: 0.9\nwarmup_epochs: 2\n",
        }
        (folder / "own.py").write_text(OWN)
        self.write_configs()
        # A parser is the same for every command line, and takes longer to build than to use.
        build, kept = kdlit.cli.KdlitCLI.setup_parser, {}

        def setup(cli: Any, *args: Any) -> None:
            if not kept:
                before = set(vars(cli))
                build(cli, *args)
                kept.update({name: value for name, value in vars(cli).items() if name not in before})
            vars(cli).update(kept)

        kdlit.cli.KdlitCLI.setup_parser = setup  # type: ignore[method-assign]
        self.fit("--trainer.max_epochs=1", "--run_dir=run")
        self.last = torch.load("run/checkpoints/last.ckpt", weights_only=True)
        self.exported = torch.load("run/student.pt", weights_only=True)
        self.pictures = list(_pictures())
        parser: Any = kept["_subcommand_parsers"]["fit"]
        options = {option for action in parser._actions for option in action.option_strings}
        # Ours to choose: how much is computed, and in how many processes.
        away = (
            "-h",
            "--help",
            "--config",
            "-c",
            "--print_config",
            "--trainer.devices",
            "--trainer.num_nodes",
            "--run_dir",
        )
        self.options = sorted(option for option in options if option.startswith("--") and option not in away)
        self.options += [
            *(f"--model.{name}" for name in ("student", "teacher", "losses", "losses.kd.loss", "losses.kd.weight")),
            *(f"--model.{name}" for name in ("student.width", "teacher.width", "teacher.num_classes", "lr_scheduler.gamma")),
            *(f"--model.{name}" for name in ("losses.kd.warmup_epochs", "losses.kd.loss.temperature", "optimizer", "optimizer.lr")),
            *(f"--model.{name}" for name in ("lr_scheduler.milestones", "performance", "performance.teacher_dtype", "monitor")),
            *(f"--data.{name}" for name in ("val_size", "batch_size", "nothing")),
            *(f"--students{name}" for name in ("", ".a", ".a.set", ".a.config", ".a.seed")),
        ]  # fmt: skip

    def write_configs(self) -> None:
        for name, text in self.configs.items():
            (self.folder / name).write_text(text)

    def fit(self, *arguments: str) -> None:
        sys.argv = ["kdlit", "fit", "--config", "tiny.yaml", "--trainer.enable_progress_bar=false", *arguments]
        os.environ.pop("KDLIT_RUN_DIR", None)
        kdlit.cli.main()

    def fit_briefly(self, *arguments: str) -> None:
        self.fit(*arguments, "--trainer.fast_dev_run=1", f"--run_dir={self.place / 'run'}")

    def config(self, draw: random.Random) -> Case:
        """A config file, as text or as what it says."""
        self.write_configs()
        name = draw.choice(tuple(self.configs))
        text = self.configs[name]
        if draw.random() < 0.45:
            title, _, tree = warped(draw, yaml.safe_load(text), lambda old: draw.choice(ODD))
            new = yaml.safe_dump(tree).encode()
        else:
            title, new = self._bent_yaml(draw, text)
        (self.folder / name).write_bytes(new)
        return Case(f"{name}: {title}", (), self.fit_briefly)

    def _bent_yaml(self, draw: random.Random, text: str) -> tuple[str, bytes]:
        lines = text.splitlines()
        at = draw.randrange(len(lines))
        what = draw.choice(("bytes", "bytes", "line", "twice", "tab", "word", "word", "whole"))
        if what == "bytes":
            title, data = bent(draw, text.encode())
            return title, data
        if what == "line":
            del lines[at]
        elif what == "twice":
            lines.insert(at, lines[at])
        elif what == "tab":
            lines[at] = "\t" + lines[at]
        elif what == "word":
            key, _, value = lines[at].partition(":")
            word = draw.choice(
                ("*a", "&a", "!!python/object/apply:os.system ['touch pwned']", "%", "@", "`", "\0", "\ufeff", "\x1b[2J", "a: b: c",
                 "---", "...", "<<", "? ", "|", ">", "{", "]", "0x", "1_000", "1e400", "2001-01-01", "~", "=", "!", "!!set {a}",
                 "!!binary aGk=", "!!float abc", "!!int x", "&b [*b]", "${HOME}")
            )  # fmt: skip
            lines[at] = f"{key}: {word} {value}" if draw.random() < 0.5 else f"{key}: {word}"
            what = word
        else:
            bomb = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(12))
            return "whole file", draw.choice(
                ("", "3", "null", "text", "[1, 2]", "- a\n- b", "\n\n", "# nothing", "{}", "trainer:", "{" * 3000, "[" * 200_000,
                 "a: " + "[" * 300 + "]" * 300, "- " * 5000, bomb, f"{bomb}\n{text}", "? a", "--- 1\n--- 2", text + text, "\ufeff" + text,
                 "a" * 100_000, "a: &a [*a]", "é: 1", "%YAML 9.9\n---\na: 1", "trainer: 3", "data: [1]", "model: x\n" + text, "tiny.yaml",
                 "config: tiny.yaml\n" + text)
            ).encode(draw.choice(("utf-8", "utf-8", "utf-16", "utf-32", "utf-8-sig")))  # fmt: skip
        return f"{what!r} in line {at + 1}", "\n".join(lines).encode()

    def override(self, draw: random.Random) -> Case:
        """A value on the command line."""
        self.write_configs()
        option = draw.choice(self.options)
        value = draw.choice(ODD)
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        if draw.random() < 0.15:
            option, text = (
                f"{option}{draw.choice(('.x', 's', '+', '.', '.0', '..', '.class_path', '.init_args'))}",
                str(text),
            )
        arguments = [option] if draw.random() < 0.03 else [f"{option}={text}"]
        words = [word for word in (*option.strip("-").replace("+", ".").split("."), text[:20]) if len(word) > 1]
        words.append("on the command line")
        return Case(" ".join(arguments)[:200], tuple(words), lambda: self.fit_briefly(*arguments))

    def chain(self, draw: random.Random) -> Case:
        """A chain file."""
        self.write_configs()
        good = {
            "run_dir": str(self.place / "chain"),
            "links": {
                "first": {"configs": ["tiny.yaml"], "overrides": {"model.teacher": None, "model.losses.kd.weight": 0}},
                "second": {"configs": ["tiny.yaml"], "overrides": {"trainer.max_epochs": 1}, "teacher": "first"},
            },
        }
        if draw.random() < 0.6:
            title, _, tree = warped(draw, good, lambda old: draw.choice(ODD))
            data = yaml.safe_dump(tree).encode()
        else:
            title, data = self._bent_yaml(draw, yaml.safe_dump(good))
        path = self.folder / "chain.yaml"
        path.write_bytes(data)

        def act() -> None:
            links = chain.read_chain(path)
            if draw.random() < 0.15:
                links[0].resolve()

        return Case(title, ("chain.yaml", "link '"), act)

    def checkpoint(self, draw: random.Random) -> Case:
        """The checkpoint of a run, given to ``--ckpt_path``."""
        self.write_configs()
        path = self.place / "last.ckpt"
        if draw.random() < 0.4:
            title, data = bent(draw, self._saved(self.last, draw))
            path.write_bytes(data)
        else:
            title, _, tree = warped(draw, _listed(self.last), lambda old: self._odd_tensor(draw, old))
            torch.save(tree, path)
        run = (
            f"--trainer.max_epochs={draw.choice((1, 2))}",
            f"--run_dir={self.place / 'run'}",
            f"--ckpt_path={path}",
            "--accept_changes=true",
        )
        # What the checkpoint says may make the run last longer.
        limit = ("--trainer.max_steps=6", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1")
        return Case(title, ("last.ckpt", "--ckpt_path", "checkpoint"), lambda: self.fit(*run, *limit))

    def weights(self, draw: random.Random) -> Case:
        """A file with weights, given to ``from_checkpoint``."""
        weights = self.exported["model"]
        content = draw.choice(
            (
                weights,
                {"model": weights},
                self.exported,
                {"state_dict": {f"student.{k}": v for k, v in weights.items()}},
            )
        )
        name = draw.choice(("net.pt", "net.pth", "net.ckpt", "net.safetensors", "net.bin"))
        path = self.place / name
        if draw.random() < 0.5:
            data = (
                save_safetensors({key: value.contiguous() for key, value in weights.items()})
                if name.endswith("safetensors")
                else self._saved(content, draw)
            )
            title, data = bent(draw, data)
            if name.endswith("safetensors") and draw.random() < 0.3:
                title, data = "declared size", struct.pack("<Q", draw.choice((0, 1, 2**20, 2**40, 2**63))) + data[8:]
            path.write_bytes(data)
        else:
            title, _, tree = warped(draw, content, lambda old: self._odd_tensor(draw, old))
            torch.save(tree, path)
        return Case(f"{name}: {title}", (name,), lambda: from_checkpoint(TinyNet(), str(path)))

    def _saved(self, content: object, draw: random.Random) -> bytes:
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=draw.random() < 0.7)
        return file.getvalue()

    @staticmethod
    def _odd_tensor(draw: random.Random, old: Any) -> Any:
        plain = [None, "", "abc", -1, 0, 10**30, 2**63, float("nan"), [], {}, [1], {"a": 1}, True, b"x", (1, 2)]
        if not isinstance(old, torch.Tensor):
            return draw.choice((*plain, torch.zeros(3), torch.tensor(7)))
        if old.ndim == 0:
            return draw.choice((None, 3, torch.zeros(3), old.float() * float("nan"), old.float()))
        return draw.choice(
            (
                None, "abc", 3, [], {}, old.float() * float("nan"), old.float() * float("inf"), torch.zeros(2, 2), torch.tensor(1.0), torch.zeros(0),
                old.reshape(-1), old.to(torch.complex64), old.bool(), old.half(), old.double(), old.contiguous().to_sparse(), torch.zeros(old.shape[-1:]).expand(old.shape),
                torch.empty(old.shape, device="meta"), torch.zeros(1, dtype=torch.uint8).expand(10**12), torch.nn.Parameter(old.float()),
            )
        )  # fmt: skip

    def labels(self, draw: random.Random) -> Case:
        """Files of a data set that are no pictures."""
        make = draw.choice(
            (
                self._cifar,
                self._cifar,
                self._cifar,
                self._stl10,
                self._tiny_imagenet,
                self._tiny_imagenet,
                self._imagenet,
            )
        )
        return make(draw)

    def _cifar(self, draw: random.Random) -> Case:
        folder = write_cifar_layout(self.place, train=12, test=6)
        kind: Any = CIFAR100
        if draw.random() < 0.3:
            kind = CIFAR10
            ten = self.place / "cifar-10-batches-py"
            ten.mkdir()
            for name, size in [*((f"data_batch_{i}", 4) for i in range(1, 6)), ("test_batch", 4)]:
                content = {"data": np.zeros((size, 3072), np.uint8), "labels": [i % 2 for i in range(size)]}
                (ten / name).write_bytes(pickle.dumps(content, protocol=2))
            (ten / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b"]}, protocol=2))
            folder = ten
        name = draw.choice(sorted(path.name for path in folder.iterdir()))
        path = folder / name
        if draw.random() < 0.5:
            title, data = bent(draw, path.read_bytes())
            path.write_bytes(data)
        else:
            odd = (
                None, 3, "abc", [], {}, [1], [None], ["a"], [[1], [2, 3]], [10**30], [1.5], [-1] * 12, [2**40] * 12, np.zeros(12), np.zeros((12, 1), int),
                np.zeros((12, 3072), np.float32), np.zeros((12, 3071), np.uint8), np.zeros((0, 3072), np.uint8), np.array(3), True,
                np.array([None]), ["x"] * 12, [True] * 12, [float("nan")] * 12, "c" * 12, b"abc", np.arange(12), {"a": 1}, [["a"]], ["", ""],
                np.datetime64("2020-01-01"), np.zeros(12, "M8[s]"), [b"x"] * 3, ["\udcff"] * 3,
            )  # fmt: skip
            content = pickle.loads(path.read_bytes(), encoding="latin1")
            title, _, content = warped(draw, content, lambda old: draw.choice(odd))
            path.write_bytes(pickle.dumps(content, protocol=draw.choice((0, 2, 4, 5))))
        return Case(
            f"{kind.__name__} {name}: {title}",
            (str(folder), "pictures"),
            lambda: _one_batch(kind(str(self.place), verify=False, batch_size=2, val_size=0)),
        )

    def _stl10(self, draw: random.Random) -> Case:
        folder = self.place / "stl10_binary"
        folder.mkdir()
        for split in ("train", "test"):
            (folder / f"{split}_X.bin").write_bytes(bytes(3 * 96 * 96 * 4))
            (folder / f"{split}_y.bin").write_bytes(bytes([1, 2, 1, 2]))
        (folder / "class_names.txt").write_text("ape\nbee\n")
        name = draw.choice(sorted(path.name for path in folder.iterdir()))
        title, data = bent(draw, (folder / name).read_bytes())
        (folder / name).write_bytes(data)
        return Case(
            f"STL10 {name}: {title}",
            (name, name.replace("X", "y"), "pictures", "_y.bin"),
            lambda: _one_batch(STL10(str(self.place), verify=False, batch_size=2)),
        )

    def _tiny_imagenet(self, draw: random.Random) -> Case:
        folder = self.place / "tiny-imagenet-200"
        picture = _encoded(Image.new("RGB", (64, 64)), "JPEG")
        for wnid in ("n00000001", "n00000002"):
            (folder / "train" / wnid / "images").mkdir(parents=True)
            for number in range(2):
                (folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG").write_bytes(picture)
        (folder / "val" / "images").mkdir(parents=True)
        lines = []
        for number, wnid in enumerate(("n00000001", "n00000002")):
            (folder / "val" / "images" / f"val_{number}.JPEG").write_bytes(picture)
            lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t9\t9\n")
        (folder / "val" / "val_annotations.txt").write_text("".join(lines))
        (folder / "wnids.txt").write_text("n00000001\nn00000002\n")
        (folder / "words.txt").write_text("n00000001\tape\nn00000002\tbee\n")
        name = draw.choice(("wnids.txt", "words.txt", "val/val_annotations.txt"))
        path = folder / name
        if draw.random() < 0.7:
            title, data = bent(draw, path.read_bytes())
            path.write_bytes(data)
        else:
            title = _disordered(draw, folder)
        return Case(
            f"TinyImageNet {name}: {title}",
            (str(folder),),
            lambda: _one_batch(TinyImageNet(str(self.place), verify=False, batch_size=2)),
        )

    def _imagenet(self, draw: random.Random) -> Case:
        folder = self.place / "imagenet"
        for part in ("train", "val"):
            for name in ("ape", "bee"):
                (folder / part / name).mkdir(parents=True)
                for number in range(2):
                    (folder / part / name / f"{number}.png").write_bytes(self.pictures[0][1])
        classes = folder / "classes.txt"
        classes.write_text("bee\nape\n")
        if draw.random() < 0.5:
            title, data = bent(draw, classes.read_bytes())
            classes.write_bytes(data)
        else:
            title = _disordered(draw, folder)
        options = {"batch_size": 2, "num_workers": 0, "size": 8, "resize": 8, "classes": str(classes)}
        return Case(f"ImageNet: {title}", (str(folder),), lambda: _one_batch(ImageNet(str(folder), **options)))

    def image(self, draw: random.Random) -> Case:
        """A picture file."""
        name, data = draw.choice(self.pictures)
        if draw.random() < 0.2:
            title, data = _huge(draw)
        elif draw.random() < 0.1:
            title = "other name"
        else:
            title, data = bent(draw, data)
        ends = ("jpg", "JPEG", "png", "ppm", "bmp", "tiff", "webp")
        path = self.place / f"picture.{draw.choice(ends)}"
        path.write_bytes(data)
        return Case(f"{name}: {title}", (path.name,), lambda: read_photograph(path))

    def archive(self, draw: random.Random) -> Case:
        """An archive to fetch and unpack."""
        kind = draw.choice(("zip", "tar", "tar.gz", "tar.bz2", "tar.xz"))
        file = io.BytesIO()
        names = ["things/a.txt", "things/b/c.txt"]
        odd = draw.random() < 0.5
        if odd:
            names.insert(
                draw.randrange(3),
                draw.choice(("../out.txt", "/tmp/out.txt", "things/../../out.txt", "things", "things/a.txt", "things/a.txt/b", "a" * 300,
                             "things/" + "b/" * 200 + "c", "C:\\out.txt", "\\out.txt", "..\\out.txt", "\udcff", "things/./a", "", ".", "..", "//out", "a\0b",
                             "things/a\nb", "~/out", "-rf"))
            )  # fmt: skip
        if kind == "zip":
            with (
                zipfile.ZipFile(file, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as zipped,
                _quiet(),
            ):
                for name in names:
                    with contextlib.suppress(UnicodeEncodeError):
                        zipped.writestr(name, b"text " * 40)
        else:
            with tarfile.open(fileobj=file, mode=f"w:{kind[4:]}", errors="surrogateescape") as tarred:
                for name in names:
                    member = tarfile.TarInfo(name)
                    member.size = 200
                    tarred.addfile(member, io.BytesIO(b"text " * 40))
                if draw.random() < 0.3:
                    link = tarfile.TarInfo("things/link")
                    link.type, link.linkname = (
                        draw.choice((b"1", b"2", b"3", b"6")),
                        draw.choice(("/etc/passwd", "../../x", "a.txt")),
                    )
                    tarred.addfile(link)
        data, title = file.getvalue(), f"members {names}"[:150]
        if not odd or draw.random() < 0.2:
            title, data = bent(draw, data)
        path = self.place / f"things.{kind}"
        path.write_bytes(data)
        digest = hashlib.md5(data).hexdigest()
        return Case(
            f"{kind}: {title}", (path.name,), lambda: fetch(path.as_uri(), self.place / "goal" / "things", digest)
        )

    def cache(self, draw: random.Random) -> Case:
        """A cache of the teacher's logits."""
        folder = self.place / "cache"
        top_k = draw.choice((None, 2))
        logits = create(
            folder, {"teacher": {"class": "A"}, "data": {}}, LogitFormat(40, 5, epochs=2, top_k=top_k), seed=3
        )
        for block in list(logits.claims()):
            logits.write(block, torch.randn(40, 1, 5))
        logits.close()
        name = draw.choice(("teacher_cache.json", "teacher_cache.json", "logits.bin", "blocks.bin"))
        path = folder / name
        if name == "teacher_cache.json" and draw.random() < 0.6:
            title, _, tree = warped(draw, json.loads(path.read_text()), lambda old: draw.choice(ODD))
            path.write_text(json.dumps(tree))
        else:
            title, data = bent(draw, path.read_bytes())
            path.write_bytes(data)

        def act() -> None:
            kept = TeacherLogits(folder)
            kept.check()
            if kept.complete:
                kept.read(1, torch.arange(kept.format.pictures))

        return Case(f"{name}: {title}", ("cache",), act)


def _listed(tree: Any) -> Any:
    """Plain dictionaries and lists, which can be changed."""
    if isinstance(tree, dict):
        return {key: _listed(value) for key, value in tree.items()}
    return [_listed(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _one_batch(data: Any) -> None:
    data.setup("fit")
    next(iter(data.train_dataloader()))
    next(iter(data.test_dataloader()))


def _encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def _pictures() -> Iterator[tuple[str, bytes]]:
    """Small pictures of every kind."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise)
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    sixteen = Image.fromarray(noise[..., 0].astype(np.uint16) << 8)
    yield "png", _encoded(rgb, "PNG")
    for mode in ("RGBA", "L", "LA", "P", "1"):
        yield f"png {mode}", _encoded(rgba.convert("RGB").convert(mode) if mode in "P1" else rgba.convert(mode), "PNG")
    yield "png 16 bit", _encoded(sixteen, "PNG")
    yield "png animated", _encoded(rgb, "PNG", save_all=True, append_images=[rgb.rotate(90)])
    yield "jpeg", _encoded(rgb, "JPEG")
    yield "jpeg again", _encoded(rgb, "JPEG", quality=30, optimize=True)
    yield "jpeg progressive", _encoded(rgb, "JPEG", progressive=True)
    yield "jpeg grey", _encoded(grey, "JPEG")
    yield "jpeg cmyk", _encoded(rgb.convert("CMYK"), "JPEG")
    yield "jpeg exif", _encoded(rgb, "JPEG", exif=bytes(Image.Exif().tobytes()) + b"MM\0*" + b"\xff" * 20)
    yield "gif animated", _encoded(rgb.convert("P"), "GIF", save_all=True, append_images=[rgb.rotate(90).convert("P")])
    yield "webp", _encoded(rgb, "WEBP")
    yield "webp animated", _encoded(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)])
    yield "bmp", _encoded(rgb, "BMP")
    yield "ppm", _encoded(rgb, "PPM")
    yield "pgm", _encoded(grey, "PPM")
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "jpeg"):
        yield f"tiff {compression}", _encoded(rgb, "TIFF", compression=compression)
    yield "tiff 16 bit", _encoded(sixteen, "TIFF")
    yield "tiff cmyk", _encoded(rgb.convert("CMYK"), "TIFF")


def _huge(draw: random.Random) -> tuple[str, bytes]:
    """A small file that says it is a large picture."""
    side = draw.choice((65_500, 40_000, 30_000, 2**31 - 1))
    form = draw.choice(("jpeg", "png", "bmp", "ppm", "gif", "tiff", "webp", "svg", "eps"))
    if form == "jpeg":
        data = _encoded(Image.new(draw.choice(("RGB", "L", "CMYK")), (16, 16)), "JPEG")
        at = data.index(b"\xff\xc0") + 5
        data = data[:at] + struct.pack(">HH", min(side, 65_500), min(side, 65_500)) + data[at + 4 :]
    elif form == "png":
        rows = zlib.compress(bytes(4 * 10**6), 9)  # the beginning of a picture that is all zeros
        chunks = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
        data = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in chunks
        )
    elif form == "bmp":
        data = _encoded(Image.new("RGB", (4, 4)), "BMP")
        data = data[:18] + struct.pack("<ii", side, side) + data[26:]
    elif form == "gif":
        data = _encoded(Image.new("P", (4, 4)), "GIF")
        data = data[:6] + struct.pack("<HH", 65_535, 65_535) + data[10:]
    elif form == "tiff":
        data = _encoded(Image.new("RGB", (4, 4)), "TIFF").replace(
            struct.pack("<HHII", 256, 4, 1, 4), struct.pack("<HHII", 256, 4, 1, side)
        )
    elif form == "webp":
        data = _encoded(Image.new("RGB", (4, 4)), "WEBP", lossless=True)
        data = data[:21] + b"\xff\xff\xff\x0f" + data[25:]
    else:
        data = {
            "ppm": b"P6 %d %d 255\n\0" % (side, side),
            "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>',
            "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(pwned) (w) file closefile\nshowpage\n%%EOF\n",
        }[form]
    return f"{form} of {side} pixels a side", data


def _disordered(draw: random.Random, folder: Path) -> str:
    """Do something to one of the files or folders; return what."""
    paths = sorted(path for path in folder.rglob("*"))
    path = draw.choice(paths)
    what = draw.choice(
        ("gone", "file", "folder", "renamed", "loop", "dangling", "pipe", "closed", "loose", "odd", "outside")
    )
    if what in ("loop", "dangling", "outside"):
        place = path if path.is_dir() else path.parent
        for number in range(2):
            goal = {"loop": place, "dangling": "nowhere.jpg", "outside": "/proc"}[what]
            (place / f"link{number}{'.jpg' if what == 'dangling' else ''}").symlink_to(goal)
        return f"{what} in {place.name}"
    if what in ("loose", "odd"):
        place = path if path.is_dir() else path.parent
        name = (
            "loose.png"
            if what == "loose"
            else draw.choice(("new\nline.png", "\udcff\udcfe.png", "*.png", ".png", " .png", "a" * 250 + ".png"))
        )
        (place / name).write_bytes(b"x")
        return f"{name!r} in {place.name}"
    if what == "renamed":
        path.rename(path.with_name(f"{path.name}x"))
        return f"{path.name} renamed"
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if what == "file":
        path.write_bytes(b"something else")
    elif what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "closed":
        path.symlink_to(path)
    return f"{path.relative_to(folder)} {what}"


# Running them


def run(seed: int = 0, counts: dict[str, int] | None = None, only: tuple[str, int] | None = None) -> dict[str, Any]:
    """Run cases of every kind.

    Args:
        seed: draws the mutations.
        counts: how many of each kind; by default :data:`COUNTS`.
        only: kind and number of the one case to run.

    Returns:
        ``seed``; ``inputs``, ``taken``, ``refused`` and ``faults``: numbers of cases; ``kinds``: the latter three for
        each kind; ``seconds``; ``outcomes``: list of :class:`Outcome`.
    """
    counts = COUNTS if counts is None else counts
    todo = [only] if only else [(kind, number) for kind, count in counts.items() for number in range(count)]
    outcomes: list[Outcome] = []
    start = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="kdlit-fuzz-"))
    try:
        while len(outcomes) < len(todo):
            outcomes += _in_a_child(scratch, seed, todo[len(outcomes) :])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    ends = {kind: Counter(one.end for one in outcomes if one.kind == kind) for kind in counts}
    total = sum(ends.values(), Counter())
    return {
        "seed": seed,
        "inputs": len(outcomes),
        "taken": total["taken"],
        "refused": total["refused"],
        "faults": total["fault"],
        "kinds": {kind: {end: ends[kind][end] for end in ("taken", "refused", "fault")} for kind in ends},
        "seconds": round(time.monotonic() - start, 1),
        "outcomes": outcomes,
    }


def _in_a_child(scratch: Path, seed: int, todo: list[tuple[str, int]]) -> list[Outcome]:
    """Run cases until all are done or one hangs or brings the process down, which is its outcome."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            _work(scratch, seed, todo, writing)
        except BaseException:
            os.write(2, traceback.format_exc().encode("utf-8", "replace"))
        finally:
            os._exit(0)
    os.close(writing)
    outcomes: list[Outcome] = []
    said = b""
    with open(reading, "rb", buffering=0) as pipe:
        if pipe.read(1) != b"\n":
            os.waitpid(child, 0)
            raise RuntimeError(f"there is nothing to spoil: {(scratch / 'log').read_text()}")
        while len(outcomes) < len(todo):
            ready = select.select([pipe], [], [], SECONDS)[0]
            new = pipe.read(2**16) if ready else b""
            if not new:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kind, number = todo[len(outcomes)]
                log = (scratch / "log").read_text(errors="replace")[-800:]
                reason = f"the process was brought down: {log}" if ready else f"it hangs: no end after {SECONDS} s"
                return [*outcomes, Outcome(kind, number, "?", "fault", reason)]
            *lines, said = (said + new).split(b"\n")
            outcomes += [Outcome(*json.loads(line)) for line in lines]
    os.waitpid(child, 0)
    return outcomes


def _work(scratch: Path, seed: int, todo: list[tuple[str, int]], pipe: int) -> None:
    """In the child: run the cases, and write each outcome into the pipe."""
    torch.set_num_threads(1)
    home = scratch / "home"
    home.mkdir()
    os.environ |= {"HOME": str(home), "TMPDIR": str(home), "WANDB_MODE": "offline"}
    tempfile.tempdir = str(home)
    sys.path[:0] = [str(scratch), str(Path(__file__).parents[2])]
    sys.dont_write_bytecode = True
    log = os.open(scratch / "log", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(log, stream)
    with _listening() as said:
        try:
            workshop = Workshop(scratch)
        except BaseException:
            (scratch / "log").write_text(f"{said.getvalue()}\n{traceback.format_exc()}")
            raise
    os.write(pipe, b"\n")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    dangers = _watch(scratch)
    for kind, number in todo:
        workshop.place = scratch / f"{kind}-{number}"
        workshop.place.mkdir()
        os.chdir(scratch)
        case: Case = getattr(workshop, kind)(random.Random(f"{seed} {kind} {number}"))
        end, text = _judge(case)
        if dangers:
            end, text = "fault", f"{dangers.pop()}; {text}"
            dangers.clear()
        shutil.rmtree(workshop.place, ignore_errors=True)
        os.write(pipe, json.dumps((kind, number, case.title, end, text)).encode("utf-8", "replace") + b"\n")


def _judge(case: Case) -> tuple[str, str]:
    """Run a case; how it ended, and what was said."""
    with _listening() as said:
        try:
            case.act()
        except SystemExit as stop:
            return _judge_exit(stop, said.getvalue(), case.names)
        except Danger as danger:
            return "fault", str(danger)
        except BaseException as error:
            innermost = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{innermost.filename}:{innermost.lineno}: {innermost.line}"
            text = f"{type(error).__name__}: {error}"
            if not innermost.filename.startswith(str(Path(kdlit.__file__).parent)) or "raise" not in (
                innermost.line or ""
            ):
                return "fault", f"not raised by kdlit but in {where}: {text}"
            if not isinstance(error, (ValueError, OSError)):
                return "fault", f"of another type: {text}"
            if case.names and not any(name in str(error) for name in case.names):
                return "fault", f"does not name {' or '.join(case.names)}: {text}"
            return "refused", text
    return "taken", ""


def _judge_exit(stop: SystemExit, said: str, names: tuple[str, ...]) -> tuple[str, str]:
    if not stop.code:
        return "taken", said
    messages = [line for line in said.splitlines() if line.startswith("kdlit: error: ")]
    if stop.code != 2 or len(messages) != 1 or said.splitlines()[-1] != messages[0] or "Traceback" in said:
        return "fault", f"exit status {stop.code}, not one line: {said[-1500:]}"
    message = messages[0].removeprefix("kdlit: error: ")
    if len(message) > 2500 or not message.strip():
        return "fault", f"a message of {len(message)} letters: {message[:1500]}"
    if names and not any(name in message for name in names):
        return "fault", f"does not name {' or '.join(names)}: {message}"
    return "refused", message


@contextlib.contextmanager
def _listening() -> Iterator[io.StringIO]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


def _watch(scratch: Path) -> list[str]:
    """Forbid this process to start anything or to write outside the scratch folder; the list gets what was tried."""
    inside = str(scratch.resolve())
    dangers: list[str] = []
    forbidden = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "os.kill")
    changing = {
        "os.rename": (0, 1),
        "os.remove": (0,),
        "os.rmdir": (0,),
        "os.mkdir": (0,),
        "os.link": (1,),
        "os.symlink": (1,),
        "os.truncate": (0,),
        "os.chmod": (0,),
        "os.chown": (0,),
    }

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        written: list[Any] = []
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            written = [arguments[0]]
        elif event in changing:
            written = [arguments[position] for position in changing[event]]
        elif event in forbidden and "git" not in arguments:  # which a run asks for its version
            dangers.append(f"{event} {arguments!r:.200}")
            raise Danger(dangers[-1])
        for path in written:
            if isinstance(path, int):
                continue
            place = os.path.abspath(os.fsdecode(path))
            if not (place + "/").startswith(inside + "/") and place != "/dev/null":
                dangers.append(f"{event} {place}")
                raise Danger(dangers[-1])

    sys.addaudithook(look)
    return dangers


def main() -> None:
    """Run all cases, or one, and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=tuple(COUNTS), default=list(COUNTS))
    parser.add_argument("--times", type=float, default=1, help="times as many cases")
    parser.add_argument("--only", nargs=2, metavar=("KIND", "NUMBER"), help="one case")
    parser.add_argument("--show", action="store_true", help="also what is no fault")
    options = parser.parse_args()
    counts = {kind: round(COUNTS[kind] * options.times) for kind in options.kinds}
    only = (options.only[0], int(options.only[1])) if options.only else None
    figures = run(options.seed, counts, only)
    for one in figures.pop("outcomes"):
        if one.end == "fault" or only or options.show:
            print(f"{one.kind} {one.number}: {one.title!r}\n    {one.end}: {one.text!r}")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
