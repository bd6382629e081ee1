"""Losses on one of several classifiers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdlit.losses import CrossEntropyLoss, KDLoss, LogitStandardization, MLKDTwoViewLoss, OnHead
from kdlit.modules import ClassificationDistillation
from kdlit.types import ModelOutput
from tests.conftest import TinyData, TinyNet


class TwoHeads(TinyNet):
    """Its logits are the mean of two classifiers', as those of DeiT."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(8, 5)

    def forward(self, image):
        feature = self.act(self.bn(self.stem(image))).mean((2, 3))
        return (self.fc(feature) + self.other(feature)) / 2


def test_the_wrapped_loss_sees_the_heads_logits():
    head, mean, teacher = torch.randn(3, 4, 5)
    batch = {"target": torch.arange(4)}
    student = ModelOutput(mean, {"fc": head})
    loss = OnHead(LogitStandardization(KDLoss(temperature=2.0)), "fc")
    expected = LogitStandardization(KDLoss(temperature=2.0))(ModelOutput(head), ModelOutput(teacher), batch)
    assert torch.equal(loss(student, ModelOutput(teacher), batch), expected)
    assert loss.student_layers == ("fc",)


def test_each_head_learns_from_its_own_term(trainer):
    losses = {"ce": OnHead(CrossEntropyLoss(), "fc"), "kd": OnHead(KDLoss(), "other")}
    student = TwoHeads()
    module = ClassificationDistillation(student, losses, TinyNet(), input_size=(3, 8, 8))
    fitting = trainer(max_epochs=2)
    fitting.fit(module, TinyData())
    fitting.validate(module, TinyData(), verbose=False)
    fitting.test(module, TinyData(), verbose=False)
    module.zero_grad()
    batch = next(iter(ready().train_dataloader()))
    out = module.run_student(batch)
    module.losses["ce"](out, None, batch).backward()
    assert student.fc.weight.grad.abs().sum() > 0
    assert student.other.weight.grad is None


def ready():
    data = TinyData()
    data.setup("fit")
    return data


def test_what_is_no_head_is_refused():
    student = ModelOutput(torch.zeros(4, 5), {"stem": torch.zeros(4, 8, 3, 3)})
    with pytest.raises(ValueError, match=r"layer 'stem' must give logits of shape \(4, 5\), but gives \(4, 8, 3, 3\)"):
        OnHead(CrossEntropyLoss(), "stem")(student, None, {"target": torch.zeros(4, dtype=torch.int64)})
    with pytest.raises(ValueError, match="OnHead takes one view, but MLKDTwoViewLoss needs a second"):
        OnHead(MLKDTwoViewLoss(), "fc")
