"""``kdlit dashboard``: a W&B workspace that shows what kdlit logs, in sections.

Needs `pip install 'kdlit[wandb]'`, and a key from `wandb login` or in WANDB_API_KEY. Every run of the project is shown,
whether logged before or after. The same command again makes another view; nothing that is there is changed. --print
shows the sections, needing neither.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

_LIMIT = 30  # seconds for all that the server has to do
_STEP = "trainer/global_step"  # the one thing that every row has


@dataclass(frozen=True)
class Panel:
    """Lines in one plot.

    Attributes:
        title: what it shows, with the unit.
        names: what is plotted, as logged.
        pattern: or else a regular expression for that, where names depend on the config.
    """

    title: str
    names: tuple[str, ...] = ()
    pattern: str | None = None


def _stages(*names: str, of: Sequence[str] = ("train", "val", "test")) -> tuple[str, ...]:
    return tuple(f"{stage}/{name}" for stage in of for name in names)


LAYOUT: dict[str, list[Panel]] = {
    "Accuracy": [
        Panel("Top-1 of student and teacher, validation", ("val/top1", "val/plain_top1", "val/teacher_top1")),
        Panel("Top-1 of the student", _stages("top1")),
        Panel("Top-5 of the student", _stages("top5")),
        Panel("Cross-entropy of the student, nats", _stages("cross_entropy", of=["val", "test"])),
        Panel("Top-1 of the teacher", _stages("teacher_top1")),
        Panel("Top-5 of the teacher", _stages("teacher_top5")),
        Panel("Test pictures", ("test/top1", "test/plain_top1", "test/teacher_top1")),
    ],
    "Losses": [
        Panel("Sum of the weighted terms", ("train/loss",)),
        Panel("Each term, raw", pattern="^train/loss/.+$"),
        Panel("Each term, weighted", pattern="^train/weighted/.+$"),
        Panel("Weight of each term, before warm-up", pattern="^train/weight/.+$"),
        Panel("Warm-up of each term, 0 to 1", pattern="^train/warmup/.+$"),
        Panel("Steps skipped, not being finite", ("train/skipped",)),
    ],
    "Agreement with the teacher": [
        Panel("Same top class", _stages("agreement")),
        Panel("Teacher's top class among the student's five", _stages("agreement5")),
        Panel("Teacher wrong, share of pictures", _stages("teacher_wrong")),
        Panel("Teacher wrong, student right", _stages("teacher_wrong_student_right")),
        Panel("Teacher wrong, student the same", _stages("teacher_wrong_student_same")),
        Panel("Teacher wrong, student wrong otherwise", _stages("teacher_wrong_student_other")),
    ],
    "Distributions": [
        Panel("KL(teacher || student), nats", _stages("kl")),
        Panel("KL(softened teacher || student), nats", _stages("kl_softened")),
        Panel("Entropy of the student, nats", _stages("entropy")),
        Panel("Entropy of the teacher, nats", _stages("teacher_entropy")),
        Panel("Mean of the logits", _stages("logit_mean", "teacher_logit_mean")),
        Panel("Standard deviation of the logits", _stages("logit_std", "teacher_logit_std")),
    ],
    "Calibration": [
        Panel("Expected calibration error, validation", _stages("ece", "teacher_ece", of=["val"])),
        Panel("Expected calibration error, test", _stages("ece", "teacher_ece", of=["test"])),
    ],
    "Gradients": [
        Panel("Norm of each term's gradient", pattern="^train/grad_norm/.+$"),
        Panel("Cosine between the gradients of two terms", pattern="^train/grad_cosine/.+$"),
    ],
    "Speed and memory": [
        Panel("Images per second", ("train/images_per_s",)),
        Panel("Share of a step's time", pattern="^train/share/.+$"),
        Panel("Peak memory, MB", ("train/peak_memory_mb",)),
    ],
    "Learning rate": [Panel("Learning rate", pattern="^(.+/)?lr-.+$")],
    "Several students in one run": [
        Panel("Top-1, validation", pattern="^.+/val/top1$"),
        Panel("Top-1, training", pattern="^.+/train/top1$"),
        Panel("Sum of the weighted terms", pattern="^.+/train/loss$"),
        Panel("Same top class as the teacher, validation", pattern="^.+/val/agreement$"),
    ],
}  # fmt: skip


def layout() -> dict[str, dict[str, list[str]]]:
    """Sections, their panels, and in each the names or the one regular expression, as plain data."""
    return {
        section: {panel.title: list(panel.names or [panel.pattern or ""]) for panel in panels}
        for section, panels in LAYOUT.items()
    }


def build(project: str, entity: str, name: str = "Distillation") -> Workspace:
    """Build the workspace; no server is asked.

    Args:
        project: where the runs are.
        entity: user or team that owns the project.
        name: of the view.
    """
    import wandb_workspaces.reports.v2.interface as panels
    import wandb_workspaces.workspaces as workspaces

    sections = []
    for section, content in LAYOUT.items():
        plots: list[Any] = [
            panels.LinePlot(title=one.title, x=_STEP, y=list(one.names), metric_regex=one.pattern) for one in content
        ]
        shape = workspaces.SectionLayoutSettings(columns=3, rows=-(-len(plots) // 3))
        is_open = section in ("Accuracy", "Losses", "Agreement with the teacher")
        sections.append(workspaces.Section(name=section, panels=plots, is_open=is_open, layout_settings=shape))
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=_STEP),
    )


def save(project: str, entity: str | None = None, name: str = "Distillation") -> str:
    """Make the project, if there is none, and the workspace in it.

    Args:
        project: where the runs are.
        entity: user or team that owns the project; None for the one that the key belongs to.
        name: of the view.

    Returns:
        Its address.

    Raises:
        ConnectionError: If W&B is offline or disabled, or the server does not answer in time, accept the key, or know
            the entity.
        ModuleNotFoundError: If wandb-workspaces is not installed.
    """
    import wandb
    import wandb_workspaces.workspaces  # noqa: F401  if that is missing, the server need not be asked

    from kdlit.dashboards import _login_problem

    os.environ.setdefault("WANDB_SILENT", "true")
    if (mode := wandb.setup().settings.mode) in ("offline", "dryrun", "disabled"):
        raise ConnectionError(f"W&B: its mode is {mode}, but it is its server that keeps views; set WANDB_MODE=online")
    if problem := _within(_LIMIT, _login_problem, "the login"):
        raise ConnectionError(f"W&B: {_first_line(problem)}")

    def work() -> str:
        api = wandb.Api(timeout=_LIMIT)
        owner = str(entity or api.default_entity)
        try:
            api.create_project(project, owner)  # leaves one that is there as it is
            return str(build(project, owner, name).save().url)  # type: ignore[no-untyped-call]
        except Exception as error:
            raise ConnectionError(
                f"W&B did not take a workspace for {owner}/{project}: {_first_line(error)}; name the user or team that "
                "owns the project by --entity"
            ) from None

    return str(_within(_LIMIT, work, "the workspace"))


def _within(seconds: float, call: Callable[[], Any], what: str) -> Any:
    """What a call gives, that may hang."""
    result: Future[Any] = Future()

    def work() -> None:
        try:
            result.set_result(call())
        except BaseException as error:  # belongs to whoever waits
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return result.result(seconds)
    except TimeoutError:
        raise ConnectionError(f"W&B: no answer within {seconds:g} s about {what}; is there a network?") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command ``kdlit dashboard``.

    Args:
        args: what follows ``dashboard`` on the command line.
    """
    parser = argparse.ArgumentParser(
        "kdlit dashboard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--project", default="kdlit", metavar="P", help="where the runs are; by default kdlit")
    parser.add_argument("--entity", metavar="E", help="user or team that owns it; by default that of the key")
    parser.add_argument("--name", default="Distillation", help="of the view; by default Distillation")
    parser.add_argument("--print", action="store_true", help="show the sections as JSON, and make nothing")
    options = parser.parse_args(args)
    if options.print:
        print(json.dumps(layout(), indent=2))
        return
    try:
        print(save(options.project, options.entity, options.name))
    except ModuleNotFoundError:
        _stop("kdlit dashboard needs wandb-workspaces: pip install 'kdlit[wandb]'")
    except (ConnectionError, ValueError) as error:  # the latter of a name that W&B does not take
        _stop(_first_line(error))


def _stop(message: str) -> NoReturn:
    print(f"kdlit: error: {message}", file=sys.stderr)
    sys.exit(2)
