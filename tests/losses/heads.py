"""What the tests of losses with fusions, projectors and generators share: golden cases and a network of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdlit.types import ModelOutput
from tests.losses.test_golden import Case


def close(actual: Tensor, expected: Tensor, rtol: float) -> None:
    """As the golden vectors ask for: within ``atol + rtol * max|y|``, the maximum over the array."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    assert (actual.double() - expected).abs().max() <= 1e-9 + rtol * expected.abs().max()


def load_head(loss: nn.Module, case: Case, prefix: str = "") -> None:
    """Put the parameters of a case into a head, all of them."""
    state = {f"{prefix}{name[6:]}": value.detach() for name, value in case.arrays.items() if name.startswith("param/")}
    missing, unexpected = loss.load_state_dict(state, strict=False)
    assert not unexpected
    assert not {name for name in missing if name in dict(loss.named_parameters())}


def check_gradients(loss: nn.Module, case: Case, rtol: float) -> None:
    """Compare all gradients of a case, after the backward pass."""
    parameters = dict(loss.named_parameters())
    names = [name[5:] for name in case.arrays if name.startswith("grad_")]
    assert len(names) == len(case.differentiated)
    for name in names:
        got = parameters[name[6:]].grad if name.startswith("param/") else case[name].grad
        close(got, case[f"grad_{name}"], rtol)


def in_float32(case: Case) -> Case:
    """The same case with inputs in float32."""
    names = [
        name for name in case.arrays if "feat" in name or "pooled" in name or name.split("_")[-1] in ("low", "high")
    ]
    for name in names:
        if not name.startswith("grad_"):
            value = case.arrays[name].detach().float()
            case.arrays[name] = value.requires_grad_(name in case.differentiated)
    return case


class Own(nn.Module):
    """A network of a user, which says nothing about itself."""

    def __init__(self, width: int = 6, num_classes: int = 5) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width))
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.second(self.first(image)).relu().mean((2, 3)))


def outputs(loss: Any, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> tuple[ModelOutput, ModelOutput, Any]:
    """Arguments of a loss for features by path."""
    size = len(next(iter(student.values())))
    return ModelOutput(torch.zeros(size, 2), student), ModelOutput(torch.zeros(size, 2), teacher), {}
