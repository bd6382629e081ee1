"""What whole runs and teacher caches cost in hours and gigabytes, computed from measured pictures a second.

Reads what ``speed --json FILE`` wrote, or takes --images_per_s. The page states what it assumes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision

from kdlit import models
from kdlit.benchmark.convolutions import forward_flops
from kdlit.benchmark.measure import heading, table
from kdlit.data.teacher_logits import LogitFormat


@dataclass(frozen=True)
class Task:
    """A published run.

    Attributes:
        pictures: training pictures.
        classes: how many.
        epochs: of the run.
        devices: that share it.
    """

    pictures: int
    classes: int
    epochs: int
    devices: int = 1

    def hours(self, images_per_s: float, scaling: float) -> float:
        """Of the whole run, given the rate of one device and what is left of it for each of several."""
        rate = images_per_s * self.devices * (scaling if self.devices > 1 else 1)
        return self.pictures * self.epochs / rate / 3600

    def cache_gigabytes(self, views: int, top_k: int | None = None) -> float:
        """Of the teacher's logits in float16, for so many views of each picture: all, or the ``top_k`` largest."""
        return LogitFormat(self.pictures, self.classes, views, top_k=top_k).size / 1e9

    def cache_hours(self, teacher_images_per_s: float, views: int) -> float:
        """To run the teacher on so many views of each picture, on all devices."""
        return self.pictures * views / (teacher_images_per_s * self.devices) / 3600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this page."""
    parser.add_argument("file", nargs="?", help="what `speed --json FILE` wrote")
    parser.add_argument("--images_per_s", type=float, help="in place of the file, of a training step of --pair")
    parser.add_argument("--pair", default="resnet32x4:resnet8x4", help="on CIFAR-100, for --images_per_s")
    parser.add_argument(
        "--imagenet_pair",
        default="resnet34:resnet18",
        metavar="TEACHER:STUDENT",
        help="names in torchvision.models or kdlit.models, default: resnet34:resnet18",
    )
    parser.add_argument(
        "--imagenet_images_per_s",
        type=float,
        help="measured on one device; by default scaled from CIFAR-100 by the number of operations",
    )
    parser.add_argument("--devices", type=int, default=8, help="that share the run on ImageNet, default: 8")
    parser.add_argument("--scaling", type=float, default=0.9, help="rate of each of several devices, default: 0.9")
    parser.add_argument("--top_k", type=int, default=16, help="logits that a small cache keeps, default: 16")


def measure(
    file: str | None,
    images_per_s: float | None,
    pair: str,
    imagenet_pair: str,
    imagenet_images_per_s: float | None,
    devices: int,
    scaling: float,
    top_k: int,
) -> dict[str, Any]:
    """Compute hours and gigabytes.

    Args:
        file: what ``speed`` wrote.
        images_per_s: in place of it.
        pair: ``TEACHER:STUDENT`` that ``images_per_s`` is of.
        imagenet_pair: ``TEACHER:STUDENT`` of the run on ImageNet.
        imagenet_images_per_s: its rate on one device; None scales that on CIFAR-100.
        devices: that share the run on ImageNet.
        scaling: rate of each of several devices, as a share of that of a single one.
        top_k: logits that a small cache keeps.

    Raises:
        ValueError: If neither or both of ``file`` and ``images_per_s`` are given or a network is not known.
        FileNotFoundError: If there is no such file.
    """
    if (file is None) == (images_per_s is None):
        raise ValueError("cost needs either the file that `speed --json FILE` wrote or --images_per_s")
    for option, rate in (("--images_per_s", images_per_s), ("--imagenet_images_per_s", imagenet_images_per_s)):
        if rate is not None and not rate > 0:
            raise ValueError(f"{option} must be > 0, got {rate}")
    tasks = {"CIFAR-100": Task(50_000, 100, 240), "ImageNet": Task(1_281_167, 1000, 100, devices)}
    imagenet = {
        role: forward_flops(_imagenet_network(name), 224, "meta")
        for role, name in _pair("--imagenet_pair", imagenet_pair).items()
    }
    rows = []
    measured_on = None
    if file is None:
        assert images_per_s is not None
        flops = {role: forward_flops(_cifar_network(name)) for role, name in _pair("--pair", pair).items()}
        sources = iter([_given(pair, images_per_s, flops)])
    else:
        result = json.loads(_read(file))
        measured_on = result.get("machine")
        sources = _sources(result)
    for source in sources:
        flops = source["flops"]
        for name, task in tasks.items():
            rates = {key: source[key] for key in ("images_per_s", "cached_images_per_s", "teacher_images_per_s")}
            if name == "ImageNet":
                scale = {
                    "images_per_s": _step_flops(flops) / _step_flops(imagenet),
                    "cached_images_per_s": flops["student"] / imagenet["student"],
                    "teacher_images_per_s": flops["teacher"] / imagenet["teacher"],
                }
                given = imagenet_images_per_s and imagenet_images_per_s / (
                    rates["images_per_s"] * scale["images_per_s"]
                )
                rates = {key: rate and rate * scale[key] * (given or 1) for key, rate in rates.items()}
            rows.append(
                {
                    "task": name,
                    "pair": source["pair"] if name == "CIFAR-100" else imagenet_pair,
                    "measured": f"{source['pair']}, {source['method']}, {source['setting']}",
                    **rates,
                    "hours": task.hours(rates["images_per_s"], scaling),
                    "cached_hours": rates["cached_images_per_s"] and task.hours(rates["cached_images_per_s"], scaling),
                    "cache_hours": task.cache_hours(rates["teacher_images_per_s"], 1),
                    "all_views_cache_hours": task.cache_hours(rates["teacher_images_per_s"], task.epochs),
                }
            )
    caches = {
        name: {
            views: {"full_gb": task.cache_gigabytes(count), "top_k_gb": task.cache_gigabytes(count, top_k)}
            for views, count in (("one view", 1), ("every epoch's view", task.epochs))
        }
        for name, task in tasks.items()
    }
    return {
        "measured_on": measured_on,
        "tasks": {name: asdict(task) for name, task in tasks.items()},
        "scaling": scaling,
        "top_k": top_k,
        "imagenet_rate_given": imagenet_images_per_s is not None,
        "runs": rows,
        "caches": caches,
    }


def report(result: Mapping[str, Any]) -> str:
    """Write the result as Markdown."""
    columns = ["run", "pair", "rate from", "images/s", "hours", "images/s, cache", "hours, cache", "hours to fill it"]
    runs = (
        [
            _describe(row["task"], result["tasks"][row["task"]]),
            row["pair"].replace(":", " -> "),
            row["measured"].replace(":", " -> "),
            *(
                "-" if row[key] is None else f"{row[key]:,.{digits}f}"
                for key, digits in (
                    ("images_per_s", 1),
                    ("hours", 2),
                    ("cached_images_per_s", 1),
                    ("cached_hours", 2),
                )
            ),
            f"{row['cache_hours']:,.3f} / {row['all_views_cache_hours']:,.2f}",
        ]
        for row in result["runs"]
    )
    caches = (
        [task, views, f"{size['full_gb']:,.3f}", f"{size['top_k_gb']:,.3f}"]
        for task, kinds in result["caches"].items()
        for views, size in kinds.items()
    )
    top_k = result["top_k"]
    many = result["tasks"]["ImageNet"]["devices"]
    scaled = (
        "was given for a step; with a cache and of the teacher alone it is scaled by operations"
        if result["imagenet_rate_given"]
        else "is that on CIFAR-100, scaled by the operations of a step (teacher forward, three times student forward)"
    )
    measured_on = result["measured_on"]
    title = heading({"machine": measured_on}, "rates measured on") if measured_on else "Rate as given.\n"
    return "\n".join(
        [
            title,
            table(columns, runs),
            "",
            "Size of the teacher's logits in GB (1e9 bytes):",
            "",
            table(["pictures", "views stored", "all classes, float16", f"top {top_k}"], caches),
            "",
            "Assumed:",
            "",
            *(
                f"- {name}: {task['pictures']:,} pictures, {task['classes']} classes, {task['epochs']} epochs, "
                f"{task['devices']} device{'s' * (task['devices'] > 1)}."
                for name, task in result["tasks"].items()
            ),
            f"- The rate on ImageNet (224 pixels) {scaled}; the data keeps up with it.",
            f"- Each of {many} devices reaches {result['scaling']:.0%} of the rate of a single one.",
            "- images/s are of one device; hours are training alone, without validation.",
            "- To fill a cache, the teacher runs once on one view of each picture / on every epoch's own view of it. "
            "With one, all epochs train on the logits of that view; with all, on those of a run without a cache: to "
            "fill it costs what it saves, and only further students gain.",
            "- A rate with a cache that was not measured follows from that without one, less the teacher's operations.",
            "- Methods that compare two views keep twice as much; those that read features cannot use a cache (-).",
        ]
    )


def _step_flops(flops: Mapping[str, float]) -> float:
    return flops["teacher"] + 3 * flops["student"]


def _given(pair: str, images_per_s: float, flops: dict[str, int]) -> dict[str, Any]:
    """A source whose rates follow from one rate and the numbers of operations."""
    rate = images_per_s * _step_flops(flops)
    return {
        "pair": pair,
        "method": "any method",
        "setting": "given",
        "flops": flops,
        "images_per_s": images_per_s,
        "cached_images_per_s": rate / (3 * flops["student"]),
        "teacher_images_per_s": rate / flops["teacher"],
    }


def _sources(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rates that a result of ``speed`` holds, of the settings that one would train with."""
    for run in result["runs"]:
        pair = f"{run['teacher']}:{run['student']}"
        for setting in ("exact", "fast"):
            if setting not in run["settings"]:
                continue
            row = run["settings"][setting]
            source = _given(pair, row["images_per_s"], run["flops"])
            source |= {"method": run["method"], "setting": setting}
            source["teacher_images_per_s"] = 1e3 * result["batch_size"] / row["teacher_ms"]
            cached = run["settings"].get(f"{setting} + cache")
            source["cached_images_per_s"] = cached and cached["images_per_s"]
            yield source


def _read(file: str) -> str:
    path = Path(file)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path.absolute()}; write it with `speed --json {file}`")
    return path.read_text()


def _pair(option: str, text: str) -> dict[str, str]:
    names = text.split(":")
    if len(names) != 2:
        raise ValueError(f"{option} must be TEACHER:STUDENT, got {text!r}")
    return dict(zip(("teacher", "student"), names, strict=True))


def _cifar_network(name: str) -> torch.nn.Module:
    if name not in models.__all__:
        raise ValueError(f"--pair: kdlit.models has no {name!r}")
    network: torch.nn.Module = getattr(models, name)()
    return network


def _imagenet_network(name: str) -> torch.nn.Module:
    """A network without weights in memory; torchvision's comes first, as those of kdlit are for small pictures."""
    make = getattr(torchvision.models, name, None) or getattr(models, name, None)
    if make is None:
        raise ValueError(f"--imagenet_pair: neither torchvision.models nor kdlit.models has {name!r}")
    with torch.device("meta"):
        network: torch.nn.Module = make(num_classes=1000)
    return network


def _describe(name: str, task: Mapping[str, int]) -> str:
    return f"{name}, {task['epochs']} epochs, {task['devices']} device{'s' * (task['devices'] > 1)}"
