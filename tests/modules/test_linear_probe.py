"""A probe trains its linear layer and nothing else, and is otherwise a module like any other."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from kdlit.callbacks import StudentExport
from kdlit.data import DigitPairs
from kdlit.models import digit_pairs_teacher, wrn_16_2
from kdlit.modules.linear_probe import LinearProbe
from tests.conftest import TinyData
from tests.data.test_stl10 import write_stl10
from tests.test_configs import fit_parser, init_args

CONFIGS = Path(__file__).parents[2] / "configs" / "transfer"


class Backbone(nn.Module):
    """A network for seven classes that would change in train mode: by its statistics, and by dropping features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5))
        self.fc = nn.Linear(8, 7)

    def forward(self, image):
        return self.fc(self.pool(self.act(self.bn(self.stem(image)))))


def probe(backbone=None, **kwargs):
    return LinearProbe(backbone or Backbone(), **({"num_classes": 5, "input_size": (3, 8, 8)} | kwargs))


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_only_the_linear_layer_trains(trainer):
    module = probe()
    before = state_of(module.student)
    trainer(max_epochs=2).fit(module, TinyData())
    assert changed(before, state_of(module.student)) == {"head.weight", "head.bias"}
    assert all(parameter.grad is None for parameter in module.student.backbone.parameters())
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == 5 * 8 + 5


def test_the_optimizer_is_that_of_the_paper_and_has_two_tensors():
    optimizer = probe().configure_optimizers()
    (group,) = optimizer.param_groups
    assert [tuple(parameter.shape) for parameter in group["params"]] == [(5, 8), (5,)]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0)


class ModeOfTheBackbone(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        student = pl_module.student
        self.seen.append((student.training, any(module.training for module in student.backbone.modules())))


def test_the_backbone_stays_in_eval_mode_whatever_is_called(trainer):
    seen = ModeOfTheBackbone()
    module = probe()
    trainer(callbacks=[seen], max_epochs=2).fit(module, TinyData())
    assert set(seen.seen) == {(True, False)}
    module.train()
    assert module.student.training
    assert not any(inner.training for inner in module.student.backbone.modules())
    image = torch.rand(4, 3, 8, 8)
    assert torch.equal(module(image), module(image))


@pytest.mark.parametrize("layer", ["pool", "act", "bn"])
def test_logits_are_linear_in_the_feature_averaged_over_space(layer):
    backbone = Backbone()
    module, image = probe(backbone, layer=layer), torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        expected = backbone.bn(backbone.stem(image))
        expected = expected.mean((2, 3)) if layer == "bn" else expected.relu().mean((2, 3))
    torch.testing.assert_close(module.student.feature(image), expected)
    assert not module.student.feature(image).requires_grad
    torch.testing.assert_close(module(image), expected @ module.student.head.weight.T + module.student.head.bias)


def test_a_trained_network_has_better_features_than_an_untrained_one(trainer):
    trained = digit_pairs_teacher()
    untrained = copy.deepcopy(trained)
    untrained.apply(lambda layer: layer.reset_parameters() if hasattr(layer, "reset_parameters") else None)
    top1 = {}
    for name, backbone in (("trained", trained), ("untrained", untrained)):
        module, data = probe(backbone, num_classes=100, input_size=(3, 8, 16)), DigitPairs(1000, 300, 300)
        fitted = trainer(max_epochs=3, check_val_every_n_epoch=3)
        fitted.fit(module, data)
        top1[name] = fitted.callback_metrics["val/top1"].item()
    assert top1["trained"] > 0.9 > 0.5 > top1["untrained"]


def test_a_checkpoint_holds_the_whole_network(trainer, tmp_path):
    module, data = probe(), TinyData()
    first = trainer()
    first.fit(module, data)
    first.save_checkpoint(tmp_path / "probe.ckpt")
    assert len(first.predict(module, data)) == 1
    expected = first.test(module, data, verbose=False)[0]
    other = probe()
    assert trainer().test(other, data, ckpt_path=tmp_path / "probe.ckpt", verbose=False)[0] == expected
    assert changed(state_of(module.student), state_of(other.student)) == set()


def test_a_resumed_run_ends_like_one_that_was_not_interrupted(trainer, tmp_path):
    module = probe()
    start = copy.deepcopy(module)
    L.seed_everything(1, verbose=False)
    trainer(max_epochs=2).fit(module, TinyData())
    L.seed_everything(1, verbose=False)
    first = trainer(max_epochs=1)
    first.fit(start, TinyData())
    first.save_checkpoint(tmp_path / "one.ckpt")
    resumed = probe()
    trainer(max_epochs=2).fit(resumed, TinyData(), ckpt_path=tmp_path / "one.ckpt")
    assert changed(state_of(module.student), state_of(resumed.student)) == set()


def test_the_exported_student_is_backbone_and_head(trainer, tmp_path):
    backbone = Backbone()
    module = probe(backbone)
    trainer(callbacks=[StudentExport(str(tmp_path / "student.pt"))]).fit(module, TinyData())
    content = torch.load(tmp_path / "student.pt")
    assert content["num_classes"] == 5
    inner = {name.removeprefix("backbone."): v for name, v in content["model"].items() if name.startswith("backbone.")}
    assert changed(state_of(backbone), inner) == set()
    probe().student.load_state_dict(content["model"])


def test_half_precision_trains_the_same_layer(trainer):
    module = probe()
    before = state_of(module.student)
    trainer(precision="bf16-mixed").fit(module, TinyData())
    assert changed(before, state_of(module.student)) == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layer": "pol"}, "Backbone has no layer 'pol'; close names: pool"),
        ({"num_classes": 0}, "num_classes must be >= 1, got 0"),
        (
            {"input_size": (4, 8, 8)},
            r"the backbone \(Backbone\) gives no feature 'pool' for pictures of input_size \(4, 8, 8\): ",
        ),
    ],
)
def test_what_cannot_be_probed_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        probe(**kwargs)


def test_a_feature_of_another_shape_is_refused():
    backbone = Backbone()
    backbone.pool = nn.Sequential(nn.Flatten(2), nn.Linear(36, 1), nn.Flatten())
    with pytest.raises(ValueError, match=r"layer 'pool.0' of Backbone must give .* gives \(1, 8, 36\); name another"):
        probe(backbone, layer="pool.0")


def test_other_classes_than_those_of_the_data_are_refused(trainer):
    with pytest.raises(ValueError, match="the data has 5 classes, but the student gives 4 logits"):
        trainer().fit(probe(num_classes=4), TinyData())


# The shipped configs


@pytest.mark.parametrize(("name", "classes"), [("stl10", 10), ("tiny_imagenet", 200)])
def test_the_recipe_is_the_published_one(shared, name, classes):
    config = fit_parser().parse_args(["fit", "--config", str(CONFIGS / f"{name}.yaml")]).as_dict()["fit"]
    with (shared / "reference" / "training.csv").open() as file:
        (row,) = [
            row
            for row in csv.DictReader(file)
            if (row["source"], row["dataset"], row["scope"]) == ("dkd", name.replace("_", "-"), "linear probe")
        ]
    model, optimizer = init_args(config, "model"), init_args(config, "model", "optimizer")
    assert optimizer["lr"] == float(row["base_lr"])
    assert optimizer["momentum"] == float(row["momentum"])
    assert optimizer["weight_decay"] == float(row["weight_decay"])
    assert init_args(config, "model", "lr_scheduler")["milestones"] == [int(step) for step in row["lr_steps"].split()]
    assert init_args(config, "model", "lr_scheduler")["gamma"] == float(row["lr_gamma"])
    assert config["trainer"]["max_epochs"] == int(row["epochs"])
    assert init_args(config, "data")["batch_size"] == int(row["batch_size"])
    assert (model["num_classes"], model["layer"]) == (classes, "pool")
    assert model["backbone"]["init_args"]["model"]["class_path"] == "kdlit.models.wrn_16_2"
    published = (shared / "reference" / "results.csv").read_text().splitlines()
    rows = [line.split(",") for line in published if line.startswith(f"{name.replace('_', '-')},wrn-40-2,wrn-16-2,")]
    values = {row[3]: row[6] for row in rows}
    header = (CONFIGS / f"{name}.yaml").read_text()
    assert f"trained alone {values['student']}, KD {values['kd']}, DKD {values['dkd']}." in header


def test_a_student_is_probed_on_the_command_line(kdlit_cli, tmp_path):
    write_stl10(tmp_path, train=8, test=6, classes=10)
    student = wrn_16_2()
    torch.save({"model": student.state_dict()}, tmp_path / "student.pt")
    out = kdlit_cli(
        "fit", "--config", CONFIGS / "stl10.yaml", "--model.backbone.path=student.pt", f"--data.root={tmp_path}",
        "--data.verify=false", "--data.batch_size=4", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
        "--run_dir=run",
    )  # fmt: skip
    assert "Student alone: run/student.pt" in out
    probed = torch.load(tmp_path / "run" / "student.pt")["model"]
    inner = {name.removeprefix("backbone."): v for name, v in probed.items() if name.startswith("backbone.")}
    assert changed(state_of(student), inner) == set()
    out = kdlit_cli("test", "--config", "run/config.yaml", "--ckpt_path=last", "--run_dir=run")
    assert 0 <= json.loads((tmp_path / "run" / "test.json").read_text())["test/top1"] <= 1
    assert "error" not in out
