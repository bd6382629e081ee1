"""Golden cases of methods on features, run through the loss classes, and stubs of networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdlit.losses import FeatureLoss
from kdlit.types import Batch, ModelOutput
from tests.losses.test_golden import Case, load

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Gives(nn.Module):
    """Gives layers ``layers.0``, ``layers.1``, ... with these features for any picture."""

    def __init__(self, features: Sequence[Tensor]) -> None:
        super().__init__()
        self.given = [feature.detach() for feature in features]
        self.layers = nn.ModuleList(nn.Identity() for _ in features)

    def forward(self, image: Tensor) -> Tensor:
        for layer, feature in zip(self.layers, self.given, strict=True):
            layer(feature)
        return torch.zeros(len(image), 3)


def set_up(kind: type[FeatureLoss], student: Sequence[Tensor], teacher: Sequence[Tensor], **options: Any) -> Any:
    """A loss whose connectors fit these features."""
    loss = kind(*([f"layers.{index}" for index in range(len(one))] for one in (student, teacher)), **options)
    loss.setup(Gives(student), Gives(teacher), EXAMPLE)
    return loss


def apply(loss: FeatureLoss, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """What the loss gives for these features."""
    logits = torch.zeros(len(student[0]), 3)
    batch: Batch = {"image": torch.zeros(len(logits), 3, 8, 8)}
    return loss(
        ModelOutput(logits, dict(zip(loss.student_layers, student, strict=True))),
        ModelOutput(logits, dict(zip(loss.teacher_layers, teacher, strict=True))),
        batch,
    )


class Golden:
    """One golden case: its features, from shallow to deep, and its loss with the heads of the file."""

    def __init__(
        self, method: str, number: int, kind: type[FeatureLoss], options: Sequence[str], dtype: torch.dtype
    ) -> None:
        self.case: Case = load(method, number)
        self.student, self.teacher = (
            [
                self.case[name].detach().to(dtype).requires_grad_(role == "student")
                for name in sorted(self.case.arrays)
                if name.startswith(f"{role}_feat_") and "proj" not in name
            ]
            for role in ("student", "teacher")
        )
        options_of_case = {name: self.case.params[name] for name in options}
        self.loss = set_up(kind, self.student, self.teacher, **options_of_case).to(dtype)
        heads = {f"heads.0.{name[6:]}": value for name, value in self.case.arrays.items() if name.startswith("param/")}
        missing, unexpected = self.loss.load_state_dict(heads, strict=False)
        assert not unexpected
        assert all("running" in name or "num_batches" in name for name in missing)

    def value(self) -> Tensor:
        return apply(self.loss, self.student, self.teacher)

    def gradients(self) -> dict[str, Tensor]:
        """Of every array that the file differentiates; after a backward pass."""
        found = {f"student_feat_{index}": feature.grad for index, feature in enumerate(self.student)}
        found |= {f"param/{name[8:]}": head.grad for name, head in self.loss.named_parameters()}
        return found
