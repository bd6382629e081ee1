"""Do the terms of the objective pull the student the same way?"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import lightning as L
import torch
from torch import Tensor

from kdlit.modules import DistillationModule, ManyStudents


class GradientWatch(L.Callback):
    """Logs, now and then, how hard each term pulls at the student, and the angle between the terms.

    ``train/grad_norm/NAME`` is the Euclidean norm of the gradient of the weighted term, warm-up included, with respect
    to all weights that are trained in the student; ``train/grad_cosine/A/B`` the cosine between those of two terms,
    below 0 where they work against each other. Both are means over the steps that are looked at, in the epoch, and of
    several processes each sees its own share of the batch. Such a step takes one more backward pass a term; what is
    trained stays the same.

    Args:
        every_n_steps: one step in so many, counted from the start of the epoch.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be >= 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._looks = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether this step is looked at."""
        self._looks = batch_idx % self.every_n_steps == 0

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Look at the terms, before their graph is used up."""
        if not self._looks:
            return
        if not isinstance(pl_module, ManyStudents):
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            _look(pl_module, 1.0 if scaler is None else scaler.get_scale())
            return
        for name in pl_module.going:
            _look(
                pl_module.students[name], 1.0 if pl_module.scalers is None else pl_module.scalers.of[name].get_scale()
            )


def _look(module: L.LightningModule, scale: float) -> None:
    if not isinstance(module, DistillationModule):
        return
    weights = [one for network in module.trained() for one in network.parameters() if one.requires_grad]
    gradients = {}
    for name, term in module.step_terms.items():
        if term.requires_grad:  # one of weight 0 need not
            parts = torch.autograd.grad(scale * term, weights, retain_graph=True, allow_unused=True)
            kept = [torch.zeros_like(one) if part is None else part for one, part in zip(weights, parts, strict=True)]
            gradients[name] = torch.cat([part.float().flatten() for part in kept]) / scale
    norms = {name: gradient.norm() for name, gradient in gradients.items()}
    figures = {f"train/grad_norm/{name}": norm for name, norm in norms.items()}
    for one, other in combinations(gradients, 2):
        product = (norms[one] * norms[other]).clamp(min=torch.finfo(torch.float32).tiny)
        figures[f"train/grad_cosine/{one}/{other}"] = gradients[one] @ gradients[other] / product
    if figures:
        module.means["train"].add(figures, 1)
