"""``kdlit models``: all networks, what they cost, where to look inside and how well they do.

Names without a dot are in ``kdlit.models``. Figures are for pictures and classes of the size shown; multiply-adds are
those of convolutions, linear layers and attention for one picture. Feature layers are paths for ``FeatureTap`` and for
the losses on layers. Published accuracies are of networks trained alone, from the papers dkd (Zhao et al. 2022), mlkd
(Jin et al. 2023), lskd (Sun et al. 2024), ttm (Zheng and Yang 2024), rld (Sun et al. 2024b), crd (Tian et al. 2020, its
repository) or from torchvision.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from typing import NamedTuple

import torch
import torchvision
from torch import nn

from kdlit import models
from kdlit.models.size import count_multiply_adds, count_parameters

# Nothing is listed twice: a function of kdlit.models that takes num_classes is a network, and its image size follows
# from that number unless it has one of its own.
IMAGE_SIZES = {100: 32, 200: 64, 1000: 224}  # pixels by classes: CIFAR-100, Tiny-ImageNet, ImageNet
TORCHVISION = (*(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)), "mobilenet_v2")  # the papers' on ImageNet


class Figure(NamedTuple):
    """A published accuracy.

    Attributes:
        top1: in per cent, as published.
        dataset: whose test pictures.
        source: papers that print it, or the name of torchvision's weights.
    """

    top1: str
    dataset: str
    source: str


class Network(NamedTuple):
    """One row of the table.

    Attributes:
        name: in ``kdlit.models``, or a dotted path.
        image_size: height and width of the pictures, in pixels, that the other figures are for.
        num_classes: size of the classifier that they are for.
        parameters: how many.
        multiply_adds: of one picture: products in convolutions, linear layers and attention.
        feature_layers: paths for :class:`kdlit.models.FeatureTap`.
        accuracy: published figures of a network trained alone.
    """

    name: str
    image_size: int
    num_classes: int
    parameters: int
    multiply_adds: int
    feature_layers: tuple[str, ...]
    accuracy: tuple[Figure, ...]


def networks(part: str = "") -> dict[str, Callable[..., nn.Module]]:
    """Constructors of all networks whose names contain ``part``, in upper or lower case, by name.

    Raises:
        ValueError: If no name contains it.
    """
    named = {name: getattr(models, name) for name in models.__all__}
    named = {name: value for name, value in named.items() if inspect.isfunction(value)}
    named = {name: value for name, value in named.items() if "num_classes" in inspect.signature(value).parameters}
    named |= {f"torchvision.models.{name}": getattr(torchvision.models, name) for name in TORCHVISION}
    chosen = {name: value for name, value in named.items() if part.lower() in name.lower()}
    if not chosen:
        raise ValueError(f"no network has {part!r} in its name; the names are {', '.join(named)}")
    return chosen


def model_table(part: str = "") -> list[Network]:
    """Measure all networks whose names contain ``part``, without weights.

    Those that need timm are left out where it is missing.

    Args:
        part: part of a name; upper and lower case are the same.

    Raises:
        ValueError: If no name contains it.
    """
    return sorted(_measured(part), key=lambda network: (network.image_size, network.num_classes))


def _measured(part: str) -> Iterator[Network]:
    published = _published()
    for name, constructor in networks(part).items():
        options = {key: option.default for key, option in inspect.signature(constructor).parameters.items()}
        num_classes = options.get("num_classes", 1000)
        image_size = options.get("image_size", IMAGE_SIZES.get(num_classes, 32))
        try:
            with torch.device("meta"):
                network = constructor(num_classes=num_classes).eval()
        except ImportError:
            continue
        layers = models.feature_layers(network)
        yield Network(
            name,
            image_size,
            num_classes,
            parameters=count_parameters(network),
            multiply_adds=count_multiply_adds(network, torch.empty(1, 3, image_size, image_size, device="meta")),
            feature_layers=(*layers.maps, layers.pool),
            accuracy=tuple(published.get(name, [])),
        )


def _published() -> dict[str, list[Figure]]:
    """Published accuracies by name of the network; for torchvision's also what it says of its first weights."""
    figures: dict[str, list[Figure]] = {}
    with (resources.files(models) / "accuracy.csv").open() as file:
        for row in csv.DictReader(file):
            figures.setdefault(row["network"], []).append(Figure(row["top1"], row["dataset"], row["source"]))
    for name in TORCHVISION:
        weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
        top1 = weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
        figures.setdefault(f"torchvision.models.{name}", []).append(Figure(str(top1), "imagenet", str(weights)))
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command ``kdlit models``.

    Args:
        arguments: what follows ``models`` on the command line.
    """
    parser = argparse.ArgumentParser(
        "kdlit models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", default="", metavar="NAME", help="only networks with this in their name")
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text", help="by default text")
    options = parser.parse_args(arguments)
    try:
        table = model_table(options.part)
    except ValueError as error:
        parser.exit(2, f"kdlit: error: {error}\n")
    if table:
        _print(table, options.format)
    shown = {network.name for network in table}
    if left_out := [name for name in networks(options.part) if name not in shown]:
        print(f'Left out, as timm is missing: {", ".join(left_out)}; pip install "kdlit[timm]"', file=sys.stderr)


def _print(table: Sequence[Network], style: str) -> None:
    if style == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(Network._fields)
        writer.writerows((*network[:5], " ".join(network.feature_layers), _joined(network)) for network in table)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.MARKDOWN if style == "markdown" else box.SIMPLE)
    for name in ("Network", "Pixels", "Classes", "Parameters", "Multiply-adds", "Feature layers", "Published top-1 %"):
        is_number = name in ("Pixels", "Classes", "Parameters", "Multiply-adds")
        shown.add_column(name, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for network in table:
        name, image_size, num_classes, parameters, multiply_adds, layers, _ = network
        numbers = (str(image_size), str(num_classes), f"{parameters:,}", f"{multiply_adds:,}")
        shown.add_row(name, *numbers, ", ".join(layers), _joined(network))
    # into a pipe or a file no cell is to be cut or wrapped, however long
    Console(width=None if sys.stdout.isatty() and style == "text" else 1_000).print(shown)


def _joined(network: Network) -> str:
    return "; ".join(f"{figure.top1} {figure.dataset} ({figure.source})" for figure in network.accuracy)
