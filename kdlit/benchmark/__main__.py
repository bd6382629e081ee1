"""The command line: a subcommand a file, each with ``add_arguments``, ``measure`` and ``report``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from pathlib import Path

import torch

from kdlit.benchmark import cost, gpu, loader, logs, losses, speed, steps
from kdlit.benchmark.measure import machine

COMMANDS = {
    "losses": losses,
    "steps": steps,
    "speed": speed,
    "loader": loader,
    "logging": logs,
    "gpu": gpu,
    "cost": cost,
}


def main(args: list[str] | None = None) -> None:
    """Measure, then print Markdown or JSON."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=int, default=1, help="CPU threads; 1, the default, measures CPU time")
    common.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON to a file too, or without one print it instead"
    )
    parser = argparse.ArgumentParser(prog="python -m kdlit.benchmark", description="What training costs.")
    subparsers = parser.add_subparsers(required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, command in COMMANDS.items():
        about = command.__doc__ or ""
        subparser = subparsers.add_parser(
            name,
            parents=[common],
            help=about.splitlines()[0],
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(command=command)
    options = vars(parser.parse_args(args))
    command, threads, file = (options.pop(name) for name in ("command", "threads", "json"))
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # advice on fits that measure nothing but time
    torch.manual_seed(0)
    try:
        result = {"machine": machine(options.get("device", "cpu"), threads), **command.measure(**options)}
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("KDLIT_TRACEBACK"):
            raise
        sys.exit(f"python -m kdlit.benchmark: error: {error}")
    if file == "-":
        print(json.dumps(result))
        return
    if file is not None:
        Path(file).write_text(json.dumps(result, indent=1) + "\n")
    print(command.report(result))


if __name__ == "__main__":
    main()
