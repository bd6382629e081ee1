"""The figures of the five papers.

A figure of student and teacher comes in two forms. ``entropy_histogram(student, teacher, data)`` shows the pictures to
the networks and draws; ``draw_entropy_histogram(outputs)`` draws what :func:`outputs_of` has found, so that one pass is
enough for many figures. All give a :class:`CaptionedFigure`, a matplotlib figure that holds its caption as text.
"""

from kdlit.figures.beta import beta_against_gap, beta_of_gaps, draw_beta_against_gap, mean_logit_gap
from kdlit.figures.clusters import draw_tsne, scatter_ratio, silhouette, tsne, tsne_positions
from kdlit.figures.correlation import (
    batch_correlation_map,
    class_correlation_map,
    correlation_differences,
    draw_batch_correlation_map,
    draw_class_correlation_map,
)
from kdlit.figures.cost import (
    Cost,
    cost_of_run,
    costs_of_benchmark,
    costs_of_runs,
    extra_parameters,
    time_against_accuracy,
)
from kdlit.figures.curves import (
    divergence_curves,
    divergence_curves_of_runs,
    entropy_curves,
    entropy_curves_of_runs,
    logged_curves,
)
from kdlit.figures.entropy_histograms import draw_entropy_histogram, entropy, entropy_histogram
from kdlit.figures.logit_difference import (
    class_difference_grid,
    class_difference_map,
    class_mean_logit_difference,
    class_mean_logits,
    draw_class_difference_grid,
    draw_class_difference_map,
    mean_logit_difference,
)
from kdlit.figures.logit_spread import draw_logit_moments_map, logit_moments, logit_moments_map
from kdlit.figures.logit_values import draw_logit_bars, draw_logit_range, logit_bars, logit_range, logit_ranges
from kdlit.figures.outputs import NetworkOutputs, Outputs, outputs_of
from kdlit.figures.style import CaptionedFigure
from kdlit.figures.teacher_size import accuracy_against_teacher
from kdlit.figures.top_logits import draw_top_classes, telling_mistake, top_classes
from kdlit.figures.transforms import check_point_wise, point_wise_transforms

__all__ = [
    "CaptionedFigure",
    "Cost",
    "NetworkOutputs",
    "Outputs",
    "accuracy_against_teacher",
    "all_figures",
    "batch_correlation_map",
    "beta_against_gap",
    "beta_of_gaps",
    "check_point_wise",
    "class_correlation_map",
    "class_difference_grid",
    "class_difference_map",
    "class_mean_logit_difference",
    "class_mean_logits",
    "correlation_differences",
    "cost_of_run",
    "costs_of_benchmark",
    "costs_of_runs",
    "divergence_curves",
    "divergence_curves_of_runs",
    "draw_batch_correlation_map",
    "draw_beta_against_gap",
    "draw_class_correlation_map",
    "draw_class_difference_grid",
    "draw_class_difference_map",
    "draw_entropy_histogram",
    "draw_logit_bars",
    "draw_logit_moments_map",
    "draw_logit_range",
    "draw_top_classes",
    "draw_tsne",
    "entropy",
    "entropy_curves",
    "entropy_curves_of_runs",
    "entropy_histogram",
    "extra_parameters",
    "logged_curves",
    "logit_bars",
    "logit_moments",
    "logit_moments_map",
    "logit_range",
    "logit_ranges",
    "mean_logit_difference",
    "mean_logit_gap",
    "outputs_of",
    "point_wise_transforms",
    "scatter_ratio",
    "silhouette",
    "telling_mistake",
    "time_against_accuracy",
    "top_classes",
    "tsne",
    "tsne_positions",
]


def all_figures(outputs: Outputs, *, points: int = 500) -> dict[str, CaptionedFigure]:
    """Every figure that needs nothing but what the networks say, by name.

    The gap of :func:`draw_beta_against_gap` is not among them, as it belongs to the training pictures.

    Args:
        outputs: what the networks say.
        points: how many pictures t-SNE draws, by far the slowest of all; 0 leaves it out, as does a network whose
            pooled feature is not known.
    """
    knows_features = all(network.features is not None for network in outputs.networks.values())
    return {
        **({"tsne": draw_tsne(outputs, points=points)} if points and knows_features else {}),
        "logit_bars": draw_logit_bars(outputs),
        "logit_bars_standardized": draw_logit_bars(outputs, standardize=True),
        "logit_range": draw_logit_range(outputs),
        "logit_moments": draw_logit_moments_map(outputs),
        "class_difference_map": draw_class_difference_map(outputs),
        "class_difference_map_standardized": draw_class_difference_map(outputs, standardize=True),
        "class_difference_grid": draw_class_difference_grid(outputs),
        "batch_correlation": draw_batch_correlation_map(outputs),
        "class_correlation": draw_class_correlation_map(outputs),
        "entropy_histogram": draw_entropy_histogram(outputs),
        "top_classes": draw_top_classes(outputs),
    }
