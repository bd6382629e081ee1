"""``kdlit`` and ``python -m kdlit``; a plain ``--help`` or ``--version`` answers without loading torch."""

from __future__ import annotations

import os
import sys
from importlib import import_module

USAGE = """\
usage: kdlit {fit,validate,test,predict} --config FILE [--config FILE ...] [--NAME.SUBNAME=VALUE ...]
       kdlit chain --config FILE [--run_dir FOLDER]
       kdlit models [NAME]
       kdlit compare RUN_DIR...
       kdlit report RUN_DIR...
       kdlit export RUN_DIR --format {state_dict,torch_export,onnx}
       kdlit sweep --config FILE [--run_dir FOLDER]
       kdlit dashboard --project NAME

Knowledge distillation of vision models.

commands:
  fit        train a student, with a teacher or without
  validate   measure a checkpoint on the held-out training pictures
  test       measure a checkpoint on the test pictures
  predict    write the predicted classes of the test pictures to predictions.csv
  chain      train the links of a chain file in turn, each with an earlier one as its teacher; resumes by itself
  models     list the networks: parameters, multiply-adds, feature layers, published accuracy
  compare    gather runs into a table: seeds, difference to KD, published values
  report     write what there is to see of runs into one HTML file
  export     take the student out of a run, checked against it on real pictures
  sweep      try values of a config, and choose by held-out training pictures; resumes by itself
  dashboard  lay out what is logged as a W&B workspace

common options:
  --config FILE             config in YAML; later ones override earlier ones
  --model.losses.kd.weight=0.9
                            override any value of the config, however nested
  --ckpt_path FILE | last   resume (fit) or measure this checkpoint; last: the newest of this run
  --run_dir FOLDER          where the run writes; by default runs/NAME/version_N
  --print_config            show the resolved config and stop

`kdlit fit --help` lists every option; `kdlit fit --model.losses.help=DKDLoss` those of one class.
"""

COMMANDS = {  # those that do not need the trainer, and the rooms where they live
    "chain": "kdlit.chain",
    "models": "kdlit.zoo",
    "compare": "kdlit.scoreboard",
    "report": "kdlit.report",
    "export": "kdlit.artefacts",
    "sweep": "kdlit.sweeps",
    "dashboard": "kdlit.workspace",
}


def main() -> None:
    """Run a command; Ctrl-C ends it in one line, and a reader of its output that has gone, as ``head``, in none."""
    try:
        try:
            _run(sys.argv[1:])
        finally:
            print(end="", flush=True)  # here rather than when the interpreter ends, where nothing can be caught
    except KeyboardInterrupt:
        if "KDLIT_TRACEBACK" in os.environ:
            raise
        command = sys.argv[1] if len(sys.argv) > 1 else ""
        cure = f"; kdlit {command} with the same arguments goes on" if command in ("chain", "sweep") else ""
        print(f"kdlit: stopped by Ctrl-C{cure}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        try:
            print(flush=True)  # an empty line tells whether it was this pipe, also where nothing is buffered
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter will flush once more
            sys.exit(141)  # as of a shell
        raise


def _run(arguments: list[str]) -> None:
    """Answer what needs no torch at once, and hand everything else to the command line proper."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
    elif arguments[0] == "--version":
        from kdlit import __version__

        print(f"kdlit {__version__}")
    elif arguments[0] in COMMANDS:
        import_module(COMMANDS[arguments[0]]).main(arguments[1:])
    else:
        from kdlit.cli import main as run

        run()


if __name__ == "__main__":
    main()
