"""Several networks as one teacher.

Probabilities are averaged, never logits: logits of different networks have different scales and offsets. What comes out
are log-probabilities, which are logits too, so an ensemble can be the teacher of any loss; a temperature then softens
the averaged distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class _Members(nn.Module):
    """Networks that see the same picture."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise ValueError(f"members must hold at least one network, got {members!r}")
        self.members = nn.ModuleList(members)

    def log_probabilities(self, image: Tensor) -> Tensor:
        """What each member makes of each picture: shape ``(members, B, K)``, in float32 or wider."""
        outputs = [member(image) for member in self.members]
        shapes = [tuple(logits.shape) for logits in outputs]
        if len(set(shapes)) > 1:
            raise ValueError(f"members must give logits of one shape, got {', '.join(map(str, shapes))}")
        logits = torch.stack(outputs)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


class MeanEnsemble(_Members):
    """Mean of the members' probabilities, weighted or not.

    Args:
        members: networks that give logits of shape ``(B, K)`` for the same classes, at least one.
        weights: how much each member counts, >= 0 and not all 0, in any unit; None for the same.

    Raises:
        ValueError: If there is no member, the number of weights is not that of the members, or a weight is negative; in
            the first pass, if the members disagree on the number of classes.
    """

    log_weights: Tensor

    def __init__(self, members: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__(members)
        weights = [1.0] * len(members) if weights is None else list(weights)
        if len(weights) != len(members):
            raise ValueError(f"weights must hold one number for each of the {len(members)} members, got {weights!r}")
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights):
            raise ValueError(f"weights must be finite, >= 0 and not all 0, got {weights!r}")
        self.register_buffer("log_weights", (torch.tensor(weights) / sum(weights)).log(), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Logarithms of the mean probabilities, shape ``(B, K)``."""
        log_p = self.log_probabilities(image)
        return (log_p + self.log_weights.to(log_p).view(-1, 1, 1)).logsumexp(dim=0)


class MostConfidentEnsemble(_Members):
    """For each picture, the prediction of the member with the largest single probability; the first of equals.

    A network sees no labels, so the member that is best for a picture cannot be told here: the surest one stands for
    it.

    Args:
        members: networks that give logits of shape ``(B, K)`` for the same classes, at least one.

    Raises:
        ValueError: If there is no member; in the first pass, if the members disagree on the number of classes.
    """

    def forward(self, image: Tensor) -> Tensor:
        """Log-probabilities of the surest member, shape ``(B, K)``."""
        log_p = self.log_probabilities(image)
        surest = log_p.amax(dim=-1).argmax(dim=0)
        return log_p.gather(0, surest.view(1, -1, 1).expand(1, -1, log_p.shape[-1])).squeeze(0)
