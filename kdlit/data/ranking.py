"""Scores that say which training pictures to keep."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kdlit.types import Batch


class TeacherConfidence:
    """Scores pictures by the teacher's probability of their label: Zhao et al., CVPR 2022, section 3.2 and table 5.

    With ``subset=0.5`` training sees the half of the pictures of which the teacher is most, or least, sure. The labels
    are those of training, noise included; the pictures are not augmented.

    Args:
        teacher: network that returns logits.
        keep: the pictures of which it is ``"most"`` or ``"least"`` sure.

    Raises:
        ValueError: If ``keep`` is neither.
    """

    def __init__(self, teacher: nn.Module, keep: Literal["most", "least"] = "most") -> None:
        if keep not in ("most", "least"):
            raise ValueError(f"keep must be 'most' or 'least', got {keep!r}")
        self.teacher = teacher
        self.keep = keep

    @torch.no_grad()
    def __call__(self, pictures: DataLoader[Batch]) -> Tensor:
        """Return one score a picture, float, shape ``(N,)``.

        Raises:
            ValueError: If the teacher has too few classes.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        teacher = self.teacher.to(device).eval()
        scores = []
        quiet = getattr(rank_zero_only, "rank", 0) != 0
        bar = track(pictures, "Scoring pictures", transient=True, disable=quiet, console=Console(stderr=True))
        for batch in bar:
            logits = teacher(batch.get("image_teacher", batch["image"]).to(device))
            if (last := int(batch["target"].max())) >= logits.shape[1]:
                raise ValueError(
                    f"the teacher of subset_by gives {logits.shape[1]} logits, but labels go up to {last}; set its "
                    "num_classes"
                )
            p = logits.float().softmax(dim=-1)
            scores.append(p.gather(1, batch["target"].to(device).unsqueeze(1)).squeeze(1).cpu())
        score = torch.cat(scores)
        return score if self.keep == "most" else -score
