"""What watches a run without changing the student's gradient."""

from kdlit.callbacks.baseline import PlainBaseline
from kdlit.callbacks.export import PredictionTable, StudentExport
from kdlit.callbacks.gradient_watch import GradientWatch
from kdlit.callbacks.last_checkpoint import LastCheckpoint
from kdlit.callbacks.random_state import RandomState
from kdlit.callbacks.report import Progress, StudentSummary, print_result
from kdlit.callbacks.teacher_cache import TeacherCache
from kdlit.callbacks.teacher_check import TeacherCheck
from kdlit.callbacks.throughput import Throughput

__all__ = [
    "GradientWatch",
    "LastCheckpoint",
    "PlainBaseline",
    "PredictionTable",
    "Progress",
    "RandomState",
    "StudentExport",
    "StudentSummary",
    "TeacherCache",
    "TeacherCheck",
    "Throughput",
    "print_result",
]
