"""What watches a run without changing the student's gradient."""

from kdlit.callbacks.baseline import PlainBaseline
from kdlit.callbacks.export import PredictionTable, StudentExport
from kdlit.callbacks.random_state import RandomState
from kdlit.callbacks.report import Progress, StudentSummary, print_result
from kdlit.callbacks.teacher_cache import TeacherCache

__all__ = [
    "PlainBaseline",
    "PredictionTable",
    "Progress",
    "RandomState",
    "StudentExport",
    "StudentSummary",
    "TeacherCache",
    "print_result",
]
