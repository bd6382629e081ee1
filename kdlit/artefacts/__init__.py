"""``kdlit export``: the student of a finished run as a file that stands alone, checked on real pictures.

Formats:
  state_dict     student.state_dict.pt: the weights, plain tensors for network.load_state_dict(torch.load(FILE))
  safetensors    student.safetensors: the same weights in that format
  torch_export   student.pt2: the network itself, for torch.export.load(FILE).module(); needs torch alone
  onnx           student.onnx: the network for ONNX Runtime and others; needs pip install "kdlit[onnx]"

The latter two take batches of any size, of pictures as large as those of the run.

Every file is read again from disk, as whoever gets it would read it, and must give the logits of the trained student on
real pictures of the run: validation pictures, or test pictures if none are held out. The largest difference, in batches
of several sizes, must be at most 1e-4 of the largest logit, which also settles the predicted classes but for near ties.
A file that fails is not kept, and the exit status is 2.

student.json beside them says what the student is and how to feed it: size, scaling, mean and standard deviation of its
pictures, class names, where it comes from, how good it is and on which pictures, checksums, and a comparison with the
teacher: parameters, size, multiply-adds, time, accuracy. All but the latter is also inside the files that have room for
it. Of students that taught each other, each is written, the others as student_NAME; of a run of several students, each
into a folder of its name.

Code that the config of the run names is imported and run, as by kdlit test.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

SUFFIXES = {"state_dict": ".state_dict.pt", "safetensors": ".safetensors", "torch_export": ".pt2", "onnx": ".onnx"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command ``kdlit export``.

    Args:
        arguments: what follows ``export`` on the command line.
    """
    parser = argparse.ArgumentParser(
        "kdlit export",
        usage="kdlit export RUN_DIR [--format FORMAT,...] [--checkpoint last|best|FILE] [options]",
        description=__doc__,
        epilog="Where the pictures have moved: --data.root=FOLDER; likewise any other setting of the data.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run, or of one of its several students")
    parser.add_argument(
        "--format",
        type=_formats,
        default=["state_dict"],
        metavar="FORMAT,...",
        help=f"one or more of {', '.join(SUFFIXES)}, with commas between; by default state_dict",
    )
    parser.add_argument(
        "--checkpoint",
        default="last",
        metavar="last|best|FILE",
        help="which student: of the last epoch (default), of the best by the figure that the run watched (val/top1 "
        "unless told otherwise), or that of a file",
    )
    parser.add_argument("--output", metavar="FOLDER", help="where to write; by default RUN_DIR/export")
    parser.add_argument(
        "--with_preprocessing",
        action="store_true",
        help="normalise inside the networks of torch_export and onnx, which then take uint8 pictures, already scaled",
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=256,
        metavar="N",
        help="how many to check with, at least 4 (default 256)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=3.0,
        metavar="S",
        help="how long to measure times, for each of both batch sizes (default 3)",
    )
    options, settings = parser.parse_known_args(arguments)
    if odd := [one for one in settings if not one.startswith("--data.") or "=" not in one]:
        parser.exit(2, f"kdlit: error: unknown argument {odd[0]}; settings of the data are --data.NAME=VALUE\n")
    if options.pictures < 4:
        parser.exit(2, f"kdlit: error: --pictures must be >= 4, got {options.pictures}\n")
    if not options.seconds > 0:
        parser.exit(2, f"kdlit: error: --seconds must be > 0, got {options.seconds}\n")

    from kdlit.artefacts.export import export
    from kdlit.config_errors import users_mistake

    try:
        problems = export(
            options.run_dir,
            options.format,
            checkpoint=options.checkpoint,
            output=options.output,
            with_preprocessing=options.with_preprocessing,
            pictures=options.pictures,
            seconds=options.seconds,
            settings=settings,
        )
    except Exception as error:
        if (message := users_mistake(error)) is None:
            raise
        parser.exit(2, f"kdlit: error: {message}\n")
    for problem in problems:
        print(f"kdlit: error: {problem}", file=sys.stderr)
    if problems:
        sys.exit(2)


def _formats(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SUFFIXES:
            raise argparse.ArgumentTypeError(f"there is no format {name!r}, only {', '.join(SUFFIXES)}")
    return list(dict.fromkeys(names))
