"""Losses on layers in training: compiled, in half precision, with checkpointed gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kdlit.losses import ATLoss, CrossEntropyLoss, FitNetLoss, RKDLoss
from kdlit.models import ResNet
from kdlit.modules import ClassificationDistillation
from tests.conftest import TinyData


class Checkpointed(ResNet):
    """Runs its second stage again in the backward pass instead of keeping what it gave."""

    def __init__(self) -> None:
        super().__init__(8, (4, 4, 8, 16), num_classes=5)
        stage = self.layer2

        class Stage(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = stage

            def __len__(self) -> int:
                return len(self.inner)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return checkpoint(self.inner, x, use_reentrant=False)

        self.layer2 = Stage()


def module(student=None):
    torch.manual_seed(0)
    losses = {"ce": CrossEntropyLoss(), "fitnet": FitNetLoss(), "at": ATLoss(), "rkd": RKDLoss()}
    student = student or ResNet(8, (4, 4, 8, 16), num_classes=5)
    teacher = ResNet(14, (4, 8, 16, 32), num_classes=5)
    return ClassificationDistillation(student, losses, teacher, input_size=(3, 8, 8))


def trained(trainer, built, **kwargs):
    fitting = trainer(limit_val_batches=0, **kwargs)
    fitting.fit(built, TinyData())
    return {name: value.item() for name, value in fitting.callback_metrics.items() if name.startswith("train/loss")}


def test_compiled_networks_give_the_same_losses_and_names(trainer):
    plain, compiled = module(), module()
    compiled.student.compile(backend="aot_eager", fullgraph=True)
    compiled.teacher.compile(backend="aot_eager", fullgraph=True)
    assert trained(trainer, compiled) == pytest.approx(trained(trainer, plain), rel=1e-4)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert not any("_orig_mod" in name for name in compiled.state_dict())


def test_checkpointed_gradients_give_the_same_losses(trainer):
    torch.manual_seed(0)
    one = Checkpointed()
    other = ResNet(8, (4, 4, 8, 16), num_classes=5)
    other.load_state_dict({name.replace(".inner", ""): value for name, value in one.state_dict().items()})
    assert trained(trainer, module(one)) == pytest.approx(trained(trainer, module(other)), rel=1e-5)


def test_features_are_compared_in_single_precision(trainer):
    built = module()
    seen = set()
    built.losses["at"].loss.register_forward_pre_hook(
        lambda _, args: seen.update(value.dtype for output in args[:2] for value in output.features.values())
    )
    values = trained(trainer, built, precision="bf16-mixed")
    assert seen == {torch.float32}
    assert all(torch.tensor(value).isfinite() for value in values.values())
