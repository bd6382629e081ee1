"""Students that teach each other: objective, gradients, what a run of theirs leaves behind."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdlit.losses import CrossEntropyLoss, DistillationLoss, DMLLoss, KDLoss, WeightedLoss, dml_loss, kd_loss
from kdlit.models import from_checkpoint
from kdlit.modules import ClassificationDistillation, MutualLearning
from tests.conftest import TinyData, TinyNet


def mutual(students, losses=None, **kwargs):
    return MutualLearning(students, losses, input_size=(3, 8, 8), **kwargs)


def batch(size=16):
    return torch.rand(size, 3, 8, 8), torch.randint(0, 5, (size,))


def step(module, data):
    """What one training step gives; the log goes nowhere."""
    module.log = module.log_dict = lambda *_, **__: None
    return module.train().training_step(data, 0)["loss"]


def test_two_students_by_hand():
    a, b = TinyNet(), TinyNet(width=12)
    image, target = batch()
    z, v = copy.deepcopy(a)(image), copy.deepcopy(b)(image)
    expected = F.cross_entropy(z, target) + dml_loss(z, v) + F.cross_entropy(v, target) + dml_loss(v, z)
    assert step(mutual([a, b]), (image, target)).item() == pytest.approx(expected.item(), rel=1e-6)


def test_several_peers_are_averaged_with_any_loss_weight_and_warmup():
    nets = {"a": TinyNet(), "b": TinyNet(width=12), "c": TinyNet(width=4)}
    image, target = batch()
    logits = {name: copy.deepcopy(net)(image) for name, net in nets.items()}
    expected = 0.0
    for name, z in logits.items():
        peers = [kd_loss(z, v, temperature=2.0) for other, v in logits.items() if other != name]
        expected += 0.5 * F.cross_entropy(z, target) + 3 / 4 * sum(peers) / 2
    module = mutual(
        nets,
        {"labels": WeightedLoss(CrossEntropyLoss(), 0.5), "kd": WeightedLoss(KDLoss(2.0), 3.0, warmup_epochs=4)},
    )
    assert step(module, (image, target)).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_of_one_student_does_not_reach_its_peer():
    """The gradient of the sum on each student is that of its own objective, its peer a constant."""
    a, b = TinyNet(), TinyNet(width=12)
    twins = copy.deepcopy((a, b))
    data = image, target = batch()
    step(mutual([a, b]), data).backward()
    for net, peer, trained in ((twins[0], twins[1], a), (twins[1], twins[0], b)):
        z, v = net(image), peer(image).detach()
        (F.cross_entropy(z, target) + dml_loss(z, v)).backward()
        for mine, theirs in zip(net.parameters(), trained.parameters(), strict=True):
            assert torch.allclose(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)
        net.zero_grad()
        peer.zero_grad()


def test_with_mutual_weight_0_each_student_is_its_own_plain_run_bit_for_bit(trainer):
    nets = {"a": TinyNet(), "b": TinyNet(width=12)}
    plain = copy.deepcopy(nets)
    losses = {"ce": CrossEntropyLoss(), "dml": WeightedLoss(DMLLoss(), weight=0.0)}
    fit(trainer, mutual(nets, losses))
    for name, net in plain.items():
        fit(trainer, ClassificationDistillation(net, {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8)))
        for key, value in net.state_dict().items():
            assert torch.equal(value, nets[name].state_dict()[key]), (name, key)


def fit(trainer, module, epochs=3, **kwargs):
    torch.manual_seed(7)
    fitted = trainer(max_epochs=epochs)
    fitted.fit(module, TinyData(), **kwargs)
    return fitted


def test_mutual_weight_above_0_makes_another_student(trainer):
    nets = [TinyNet(), TinyNet(width=12)]
    plain = copy.deepcopy(nets[0])
    fit(trainer, mutual(nets))
    fit(trainer, ClassificationDistillation(plain, {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8)))
    assert not torch.equal(plain.fc.weight, nets[0].fc.weight)


def test_all_students_learn_in_train_mode_with_one_pass_a_step(trainer):
    module = mutual([TinyNet(), TinyNet(), TinyNet()])
    modes = []
    for student in module.students.values():
        student.register_forward_hook(lambda net, *_: modes.append(net.training))
    torch.manual_seed(0)
    trainer(max_epochs=1, limit_val_batches=0, num_sanity_val_steps=0).fit(module, TinyData())
    assert modes == [True] * 12
    held = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert held == {id(p) for student in module.students.values() for p in student.parameters()}


def test_every_student_is_measured_and_the_first_stands_for_the_run(trainer):
    module = mutual({"small": TinyNet(), "large": TinyNet(width=16)})
    fitted = fit(trainer, module, epochs=30)
    figures = fitted.callback_metrics
    for stage in ("train", "val"):
        assert figures[f"{stage}/small/top1"] == figures[f"{stage}/top1"] > 0.5
        assert figures[f"{stage}/large/top1"] > 0.5
    terms = [f"train/loss/{name}" for name in ("small/ce", "small/dml/large", "large/ce", "large/dml/small")]
    assert figures.keys() >= {*terms, "train/loss/small", "train/loss/large"}
    assert figures["train/loss"].item() == pytest.approx(sum(figures[name].item() for name in terms), rel=1e-5)
    tested = trainer().test(module, TinyData(), verbose=False)[0]
    data = TinyData()
    data.setup("test")
    with torch.no_grad():
        logits = module.eval().students["large"](data.views.evaluation(data._pictures["test"].image)["image"])
    hits = (logits.argmax(1) == data._pictures["test"].target).float().mean().item()
    assert tested["test/large/top1"] == pytest.approx(hits)
    assert module(data.views.evaluation(data._pictures["test"].image)["image"]).shape == (40, 5)


class Memory(DistillationLoss):
    """A loss with layers, parameters and a memory of its own."""

    student_layers = ("stem",)
    teacher_layers = ("bn",)

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def setup(self, student, teacher, example):
        self.connect = nn.Linear(student.fc.in_features, teacher.fc.in_features)

    def forward(self, student, teacher, batch):
        assert not teacher.features["bn"].requires_grad
        pooled = self.connect(student.features["stem"].mean((2, 3)))
        return (pooled - teacher.features["bn"].mean((2, 3))).square().mean()

    def on_train_batch_end(self, student, teacher, batch):
        self.seen += teacher.features["bn"].shape[1]


def test_losses_with_state_have_a_copy_for_each_student_and_peer(trainer, tmp_path):
    losses = {"ce": CrossEntropyLoss(), "memory": Memory()}
    module = mutual({"a": TinyNet(), "b": TinyNet(width=12)}, losses)
    fitted = fit(trainer, module, epochs=1)
    assert module.losses["a/memory/b"].loss.seen == 4 * 12
    assert module.losses["b/memory/a"].loss.seen == 4 * 8
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    again = mutual({"a": TinyNet(), "b": TinyNet(width=12)}, losses)
    fit(trainer, again, epochs=1, ckpt_path=tmp_path / "a.ckpt")  # one epoch is behind it: nothing more is trained
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mutual([TinyNet()]), "students must hold at least two networks, got 1"),
        (lambda: mutual([TinyNet()] * 2), "students 0 and 1 share parameters; give each its own"),
        (lambda: mutual({"a.b": TinyNet(), "c": TinyNet()}), "letters, digits, _ and -, got 'a.b'"),
        (lambda: mutual({"keys": TinyNet(), "c": TinyNet()}), "letters, digits, _ and -, got 'keys'"),
        (lambda: mutual([TinyNet(), TinyNet(num_classes=6)]), "student 0 gives 5 logits and student 1 6"),
        (lambda: mutual([TinyNet(), nn.Conv2d(1, 5, 3)]), r"student 1 \(Conv2d\) cannot take pictures of input_size"),
        (lambda: mutual([TinyNet(), TinyNet()], {"dml": DMLLoss()}), "must hold one that needs no teacher.* got dml"),
    ],
)
def test_mistakes_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


CONFIG = """
trainer: {max_epochs: 2, accelerator: cpu, log_every_n_steps: 2}
data: {class_path: tests.conftest.TinyData}
model:
  class_path: kdlit.modules.MutualLearning
  init_args:
    students:
      small: {class_path: tests.conftest.TinyNet}
      large: {class_path: tests.conftest.TinyNet, init_args: {width: 12}}
    losses:
      ce: {loss: {class_path: CrossEntropyLoss}}
      dml: {loss: {class_path: DMLLoss}}
    input_size: [3, 8, 8]
"""


def test_command_line_trains_resumes_tests_and_exports(tmp_path, kdlit_cli):
    (tmp_path / "mutual.yaml").write_text(CONFIG)
    arguments = ("--config", "mutual.yaml", "--run_dir=run", "--model.students.large.width=16")
    out = kdlit_cli("fit", *arguments, "--model.losses.dml.weight=0.5")
    assert "Student alone: run/student.pt" in out
    kdlit_cli("fit", *arguments, "--ckpt_path=last", "--trainer.max_epochs=3", "--model.losses.dml.weight=0.5",
              "--accept_changes=true")  # fmt: skip
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 12
    module = MutualLearning.load_from_checkpoint(checkpoint, weights_only=True)
    for file, network in (("student.pt", module.student), ("student_large.pt", module.peers["large"])):
        exported = from_checkpoint(copy.deepcopy(network), str(tmp_path / "run" / file)).state_dict()
        assert all(torch.equal(value, exported[name]) for name, value in network.state_dict().items())
    small = from_checkpoint(TinyNet(), str(checkpoint)).state_dict()
    assert all(torch.equal(value, small[name]) for name, value in module.student.state_dict().items())
    assert "test/large/top1" in kdlit_cli("test", *arguments, "--ckpt_path=last")
    kdlit_cli("predict", *arguments, "--ckpt_path=last")
    assert len((tmp_path / "run/predictions.csv").read_text().splitlines()) == 41


def test_the_quickstart_of_mutual_learning_builds_and_steps(kdlit_cli):
    config = Path(__file__).parents[2] / "configs" / "quickstart" / "mutual.yaml"
    out = kdlit_cli("fit", "--config", config, "--run_dir=run", "--trainer.fast_dev_run=1")
    assert "error" not in out
    assert Path("run/student_wide.pt").exists()
