"""Made-up outputs of networks."""

from __future__ import annotations

import pytest
import torch

from kdlit.figures import NetworkOutputs, Outputs


def made_up(pictures=40, classes=5, students=("KD", "DKD"), used=None, constant=False, **changes):
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(pictures) % (used or classes)

    def network(scale):
        logits = scale * torch.randn(pictures, classes, generator=generator)
        logits[torch.arange(pictures), target] += 3 * scale
        features = torch.randn(pictures, 6, generator=generator) + target.unsqueeze(1)
        return NetworkOutputs(
            *((torch.full_like(x, 2.0) for x in (logits, features)) if constant else (logits, features))
        )

    settings = {
        "students": {label: network(1 + place) for place, label in enumerate(students)},
        "teacher": network(2.0),
        "target": target,
        "class_names": [f"class {number}" for number in range(classes)],
        "split": "test",
        "index": torch.arange(pictures),
        "available": 100,
    }
    return Outputs(**(settings | changes))


@pytest.fixture
def outputs():
    return made_up()
