"""Learning from the samples of which the teacher is most, or least, sure: Zhao et al., CVPR 2022, table 5.

The paper ranks all training samples by the teacher's probability of the label and applies a loss to one half of them.
Here the rank of a sample is that among the latest probabilities of all samples seen so far, so that no pass over the
data comes first; from the second epoch on, all samples have been seen. Samples outside the chosen share get weight 0;
the loss stays a mean over the whole batch, so that each sample inside counts as much as without the wrapper.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdlit.losses.base import DistillationLoss, SampleWeighting
from kdlit.losses.functional import check_one_of, check_positive
from kdlit.losses.gathering import of_all_processes
from kdlit.types import Batch, ModelOutput


class ConfidenceSelection(SampleWeighting):
    """Applies the wrapped loss to a share of the samples, chosen by the teacher's probability of their label.

    The batch must have ``index``, the position of each sample in the training data, as all data modules here give it.

    Args:
        loss: a loss that reads sample weights, or wrappers around one.
        keep: ``"most"`` or ``"least"``: the samples of which the teacher is most or least sure.
        share: which part of the samples to keep, in (0, 1].
        num_samples: size of the training data, > 0; the largest ``index`` plus 1 or more.

    Raises:
        ValueError: If the loss does not read sample weights or an argument is out of range.
    """

    confidence: Tensor

    def __init__(
        self,
        loss: DistillationLoss,
        keep: Literal["most", "least"] = "most",
        share: float = 0.5,
        num_samples: int = 50000,
    ) -> None:
        super().__init__(loss)
        self.across_batch = True
        if not check_positive("share", share) <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share!r}")
        check_one_of("keep", keep, ("most", "least"))
        self.keep = keep
        self.share = share
        self.register_buffer("confidence", torch.full((int(check_positive("num_samples", num_samples)),), torch.nan))

    def weigh(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return 1 for samples inside the share and 0 for those outside."""
        confidence = _target_probability(teacher, batch)
        known = torch.cat([self.confidence, confidence])  # the batch itself counts before it has been remembered
        known = known[~known.isnan()]
        bound = known.quantile(1 - self.share if self.keep == "most" else self.share)
        inside = confidence >= bound if self.keep == "most" else confidence <= bound
        return inside.to(confidence.dtype)

    def on_train_batch_end(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> None:
        """Remember the teacher's probabilities of this batch, of all processes, and tell the wrapped loss."""
        if "index" not in batch:
            raise ValueError("ConfidenceSelection needs index, the positions of the samples, but the batch has none")
        index = batch["index"]
        if (last := int(index.max())) >= len(self.confidence):
            raise ValueError(f"num_samples must be above every index, got {len(self.confidence)} and {last}")
        super().on_train_batch_end(student, teacher, batch)
        index, confidence = of_all_processes(index, _target_probability(teacher, batch))
        self.confidence[index] = confidence.to(self.confidence.dtype)


def _target_probability(teacher: ModelOutput, batch: Batch) -> Tensor:
    """The teacher's probability of each sample's label: shape ``(B,)``."""
    p = teacher.logits.detach().softmax(dim=-1)
    return p.gather(1, batch["target"].long().unsqueeze(1)).squeeze(1)
