"""The teacher takes no part in training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from kdlit.losses import CrossEntropyLoss, DistillationLoss, KDLoss
from kdlit.modules import ClassificationDistillation
from tests.conftest import TinyData, TinyNet


def module(teacher=None, **kwargs):
    losses = kwargs.pop("losses", {"ce": CrossEntropyLoss(), "kd": KDLoss()})
    return ClassificationDistillation(
        TinyNet(), losses, teacher=teacher if teacher is not None else TinyNet(width=16), input_size=(3, 8, 8), **kwargs
    )


def test_fit_leaves_every_tensor_of_the_teacher_as_it_was(trainer):
    distiller = module()
    before = copy.deepcopy(distiller.teacher.state_dict())
    student_before = copy.deepcopy(distiller.student.state_dict())
    trainer(max_epochs=2).fit(distiller, TinyData())
    assert all(torch.equal(before[name], value) for name, value in distiller.teacher.state_dict().items())
    assert not torch.equal(student_before["fc.weight"], distiller.student.fc.weight)
    assert not torch.equal(student_before["bn.running_mean"], distiller.student.bn.running_mean)


def test_teacher_is_frozen_and_stays_in_eval_mode_whatever_flips_the_module():
    distiller = module(teacher=TinyNet().train())
    assert not any(parameter.requires_grad for parameter in distiller.teacher.parameters())
    for flip in (distiller.train, distiller.eval, lambda: distiller.train(True), lambda: distiller.train(False)):
        flip()
        assert not any(layer.training for layer in distiller.teacher.modules())
    distiller.train()
    assert distiller.student.training
    assert distiller.student.bn.training


class ModeSpy(DistillationLoss):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, student, teacher, batch):
        self.seen.append((teacher.logits.requires_grad, student.logits.requires_grad, teacher.logits.grad_fn))
        return student.logits.square().mean()


def test_teacher_output_has_no_graph_and_stays_so_after_validation_flips_modes(trainer):
    spy = ModeSpy()
    distiller = module(losses={"spy": spy})
    modes = []
    distiller.teacher.register_forward_hook(lambda layer, *_: modes.append(layer.training))
    trainer(max_epochs=2).fit(distiller, TinyData())
    assert len(spy.seen) == 8
    assert set(spy.seen) == {(False, True, None)}
    assert not any(modes)


def test_optimizer_holds_student_and_loss_parameters_only():
    loss = KDLoss()
    loss.scale = torch.nn.Parameter(torch.ones(1))
    distiller = module(losses={"kd": loss})
    held = {id(p) for group in distiller.configure_optimizers().param_groups for p in group["params"]}
    assert held == {id(p) for p in distiller.student.parameters()} | {id(loss.scale)}


def test_checkpoint_holds_nothing_of_the_teacher_and_resumes_it_from_its_own_weights(trainer, tmp_path):
    teacher = TinyNet(width=16)
    distiller = module(teacher=copy.deepcopy(teacher))
    fitted = trainer()
    fitted.fit(distiller, TinyData())
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    names = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert names
    assert not [name for name in names if name.startswith("teacher.")]

    again = module(teacher=copy.deepcopy(teacher))
    trainer(max_epochs=2).fit(again, TinyData(), ckpt_path=tmp_path / "a.ckpt")
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in again.teacher.state_dict().items())


def test_resuming_with_a_student_of_another_shape_is_an_error(trainer, tmp_path):
    fitted = trainer()
    fitted.fit(module(), TinyData())
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    wider = ClassificationDistillation(TinyNet(width=9), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))
    with pytest.raises(ValueError, match=r"not of this student and these losses: .* of another shape \(student.stem"):
        trainer().fit(wider, TinyData(), ckpt_path=tmp_path / "a.ckpt")


def test_ddp_neither_reduces_nor_broadcasts_the_teacher(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        distiller = module()
        wrapped = DistributedDataParallel(distiller)
        teacher = {f"teacher.{name}" for name in distiller.teacher.state_dict()}
        assert teacher <= set(wrapped.parameters_to_ignore)
        broadcast = {id(buffer) for buffer in wrapped.modules_buffers}
        assert not broadcast & {id(buffer) for buffer in distiller.teacher.buffers()}
        assert broadcast >= {id(buffer) for buffer in distiller.student.buffers()}
        reduced = {id(p) for p in wrapped._module_parameters}
        assert not reduced & {id(p) for p in distiller.teacher.parameters()}
        assert reduced >= {id(p) for p in distiller.student.parameters()}
    finally:
        torch.distributed.destroy_process_group()
