"""Accumulated and clipped gradients: what they change and what they must not; and that students train through gather."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from kdlit.losses import CrossEntropyLoss, DistillationLoss, DISTLoss, DKDLoss, KDLoss, VIDLoss, WeightedLoss
from kdlit.modules import ClassificationDistillation, ManyStudents, MutualLearning
from tests.conftest import TinyData, TinyNet


class Plain(TinyNet):
    """No batch norm: each sample is on its own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width=width)
        self.bn = nn.Identity()


def distil(losses=None, **kwargs):
    torch.manual_seed(0)
    terms = {
        "ce": CrossEntropyLoss(),
        "dkd": WeightedLoss(DKDLoss(beta=2.0), warmup_epochs=3),
        "vid": WeightedLoss(VIDLoss("stem", "stem"), weight=0.5),
    }
    student, teacher = Plain(), TinyNet(width=12)
    return ClassificationDistillation(student, losses or terms, teacher, input_size=(3, 8, 8), **kwargs)


def trained(trainer, batch_size=16, module=None, **settings):
    module = module or distil()
    fit = trainer(**{"max_epochs": 3, "limit_val_batches": 0} | settings)
    fit.fit(module, TinyData(batch_size=batch_size))
    return module, fit


def learned(module):
    return {name: value for name, value in module.state_dict().items() if not name.startswith("teacher.")}


def test_two_halves_of_a_batch_are_the_batch(trainer):
    """Losses that are means over samples; schedules and warm-up count epochs, whatever a step is made of."""

    def module():
        return distil(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))

    whole, fit = trained(trainer, 16, module())
    halves, other = trained(trainer, 8, module(), accumulate_grad_batches=2)
    assert fit.global_step == other.global_step == 12
    assert fit.optimizers[0].param_groups[0]["lr"] == other.optimizers[0].param_groups[0]["lr"] == 0.05 * 0.5**3
    assert whole.losses["dkd"].factor == halves.losses["dkd"].factor == 1.0
    start = learned(distil())
    for name, value in learned(whole).items():
        torch.testing.assert_close(learned(halves)[name], value, rtol=1e-4, atol=1e-6, msg=name)
        assert not torch.equal(value, start[name]), name
    for name in ("train/loss", "train/loss/ce", "train/loss/dkd", "train/loss/vid"):
        assert other.callback_metrics[name] == pytest.approx(float(fit.callback_metrics[name]), rel=1e-4), name


def test_the_warm_up_counts_epochs_not_batches(trainer):
    factors = []

    class Notes(CrossEntropyLoss):
        def on_train_batch_end(self, student, teacher, batch):
            factors.append(module.losses["dkd"].factor)

    module = distil({"ce": Notes(), "dkd": WeightedLoss(DKDLoss(), weight=3.0, warmup_epochs=3)})
    trained(trainer, 8, module, accumulate_grad_batches=3)
    assert factors == [1.0] * 8 + [2.0] * 8 + [3.0] * 8


def test_losses_across_the_batch_see_half_of_it(trainer):
    whole, _ = trained(trainer, 16, distil({"dist": DISTLoss()}))
    halves, _ = trained(trainer, 8, distil({"dist": DISTLoss()}), accumulate_grad_batches=2)
    assert (whole.student.stem.weight - halves.student.stem.weight).abs().max() > 1e-3


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_limit_that_is_never_reached_changes_nothing(trainer, algorithm):
    free, _ = trained(trainer, max_epochs=1)
    limited, _ = trained(trainer, max_epochs=1, gradient_clip_val=1e12, gradient_clip_algorithm=algorithm)
    assert all(torch.equal(value, learned(limited)[name]) for name, value in learned(free).items())


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_norm_is_that_of_student_and_losses_together_and_the_teacher_is_left_alone(trainer, accumulated):
    norms = []

    class Watched(ClassificationDistillation):
        def on_before_optimizer_step(self, optimizer):
            norms.append(self._norm("before"))

        def configure_gradient_clipping(self, *args, **kwargs):
            super().configure_gradient_clipping(*args, **kwargs)
            norms.append(self._norm("after"))

        def _norm(self, when):
            assert all(p.grad is None for p in self.teacher.parameters())
            parts = [
                torch.stack([p.grad.norm() for p in part.parameters()]).norm() for part in (self.student, self.losses)
            ]
            return when, *map(float, parts)

    torch.manual_seed(0)
    losses = {"ce": CrossEntropyLoss(), "vid": WeightedLoss(VIDLoss("stem", "stem"), weight=3.0)}
    module = Watched(Plain(), losses, TinyNet(width=12), input_size=(3, 8, 8))
    teacher = {name: value.clone() for name, value in module.teacher.state_dict().items()}
    settings = {"max_epochs": 1, "gradient_clip_val": 0.01, "accumulate_grad_batches": accumulated}
    trained(trainer, module=module, **settings)
    assert len(norms) == 2 * 4 // accumulated
    for (_, student, loss), (_, student_after, loss_after) in zip(norms[::2], norms[1::2], strict=True):
        scale = 0.01 / (student**2 + loss**2) ** 0.5
        assert scale < 0.5
        assert student_after == pytest.approx(scale * student, rel=1e-3)
        assert loss_after == pytest.approx(scale * loss, rel=1e-3)
    assert all(torch.equal(value, teacher[name]) for name, value in module.teacher.state_dict().items())


@pytest.mark.parametrize("kind", ["one", "many", "mutual"])
def test_all_modules_give_losses_what_gather_put_together(trainer, monkeypatch, kind):
    """In a step and after it; here the other process is a copy of this one."""
    sizes = []

    class Counts(DistillationLoss):
        def forward(self, student, teacher, batch):
            sizes.append((len(student.logits), len(teacher.logits), len(batch["target"])))
            return student.logits.square().mean()

        def on_train_batch_end(self, student, teacher, batch):
            self(student, teacher, batch)

    def twice(student, teacher, batch, **_):
        outputs = [type(one)(torch.cat([one.logits] * 2)) for one in (student, teacher)]
        return *outputs, {key: torch.cat([value] * 2) for key, value in batch.items()}

    monkeypatch.setattr("kdlit.losses.base.process_count", lambda: 2)
    monkeypatch.setattr("kdlit.losses.base.gathered", twice)
    losses = {"ce": CrossEntropyLoss(), "kd": KDLoss(), "counts": WeightedLoss(Counts(), gather=True)}
    module = MutualLearning([Plain(), Plain()], losses, input_size=(3, 8, 8)) if kind == "mutual" else distil(losses)
    trained(trainer, 16, ManyStudents({"a": module}) if kind == "many" else module, max_epochs=1)
    assert sizes == [(32, 32, 32)] * (4 * 2 * (2 if kind == "mutual" else 1))


def test_gather_is_an_option_of_the_command_line(kdlit_cli):
    """Of every term, with a line in the help."""
    help_text = kdlit_cli("fit", "--model.losses.help=WeightedLoss")
    assert "--losses.gather {true,false}" in help_text
    assert "give the loss the" in " ".join(help_text.split())
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    config = kdlit_cli("fit", "--config", quickstart, "--model.losses.dkd.gather=true", "--print_config")
    losses = yaml.safe_load(config.removesuffix("exit 0"))["model"]["init_args"]["losses"]
    assert (losses["dkd"]["init_args"]["gather"], losses["ce"]["init_args"]["gather"]) == (True, False)
