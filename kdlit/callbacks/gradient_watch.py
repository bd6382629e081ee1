"""Do the terms of the objective pull the student the same way?"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch._functorch import config as functorch

from kdlit.modules import DistillationModule, ManyStudents


class GradientWatch(L.Callback):
    """Logs, now and then, how hard each term pulls at the student, and the angle between the terms.

    ``train/grad_norm/NAME`` is the Euclidean norm of the gradient of the weighted term, warm-up included, with respect
    to all weights that are trained in the student; ``train/grad_cosine/A/B`` the cosine between those of two terms,
    below 0 where they work against each other; of students that teach each other, where both reach the same one. Both
    are means over the steps that are looked at, in the epoch, and of several processes each sees its own share of the
    batch. Such a step takes one more backward pass a term; what is trained stays the same (but for batch norms under
    activation checkpointing, which see the batch once more).

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
        self._donated: bool | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let compiled parts keep their graph for more than one pass."""
        self._donated = functorch.donated_buffer
        functorch.donated_buffer = False

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put that back."""
        if self._donated is not None:
            functorch.donated_buffer, self._donated = self._donated, None

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
            _look(pl_module, getattr(trainer.precision_plugin, "scaler", None))
            return
        for name in pl_module.going:
            _look(pl_module.students[name], pl_module.scalers and pl_module.scalers.of[name])


def _look(module: L.LightningModule, scaler: Any) -> None:
    if not isinstance(module, DistillationModule):
        return
    scale = 1.0 if scaler is None else scaler.get_scale()
    weights = [one for network in module.trained() for one in network.parameters() if one.requires_grad]
    gradients: dict[str, dict[int, Tensor]] = {}  # of the weights that a term reaches
    for name, term in module.step_terms.items():
        if term.requires_grad:  # one of weight 0 need not
            parts = torch.autograd.grad(scale * term, weights, retain_graph=True, allow_unused=True)
            gradients[name] = {
                place: (part.to_dense() if part.is_sparse else part).float().flatten() / scale
                for place, part in enumerate(parts)
                if part is not None
            }
    figures = {f"train/grad_norm/{name}": _product(own, own).sqrt() for name, own in gradients.items() if own}
    for one, other in combinations(gradients, 2):
        if gradients[one].keys() & gradients[other].keys():
            norms = figures[f"train/grad_norm/{one}"] * figures[f"train/grad_norm/{other}"]
            product = _product(gradients[one], gradients[other])
            figures[f"train/grad_cosine/{one}/{other}"] = product / norms.clamp(min=torch.finfo(torch.float32).tiny)
    if figures:
        module.means["train"].add(figures, 1)
    module.clock.skip()


def _product(one: Mapping[int, Tensor], other: Mapping[int, Tensor]) -> Tensor:
    """Inner product of two gradients."""
    return torch.stack([one[place] @ other[place] for place in one if place in other]).sum()
