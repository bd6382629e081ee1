"""What watches a run without changing the student's gradient."""

from kdlit.callbacks.baseline import PlainBaseline
from kdlit.callbacks.export import PredictionTable, StudentExport
from kdlit.callbacks.random_state import RandomState
from kdlit.callbacks.report import StudentSummary, print_result

__all__ = ["PlainBaseline", "PredictionTable", "RandomState", "StudentExport", "StudentSummary", "print_result"]
