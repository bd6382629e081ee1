"""Every shipped config composes, builds and says what the papers say."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import pytest
import torch
import yaml

from kdlit.cli import KdlitCLI

CONFIGS = Path(__file__).parents[1] / "configs"
PAIRS = sorted((CONFIGS / "cifar100" / "pairs").glob("*.yaml"))
METHODS = sorted((CONFIGS / "cifar100" / "methods").glob("*.yaml"))
BETA = {"resnet56": 2, "resnet110": 2, "wrn_40_2": 6, "resnet32x4": 8}  # Zhao et al. 2022, table A.2


def resolved(kdlit_cli, *arguments):
    return yaml.safe_load(kdlit_cli("fit", *arguments, "--print_config").split("exit")[0])


def init_args(config, *path):
    for key in path:
        config = config[key]
        config = config.get("init_args", config)
    return config


@pytest.mark.parametrize(("pair", "method"), itertools.product(PAIRS, METHODS), ids=lambda path: path.stem)
def test_every_pair_goes_with_every_method(kdlit_cli, pair, method):
    config = resolved(kdlit_cli, "--config", pair, "--config", method)
    teacher, student = (init_args(config, "model")[role] for role in ("teacher", "student"))
    assert (
        f"{teacher['init_args']['model']['class_path']}_{student['class_path']}".replace("kdlit.models.", "")
        == pair.stem
    )
    assert init_args(config, "model", "optimizer") | {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4} == init_args(
        config, "model", "optimizer"
    )
    assert init_args(config, "model", "lr_scheduler")["milestones"] == [150, 180, 210]
    assert config["trainer"]["max_epochs"] == 240
    assert init_args(config, "data")["batch_size"] == 64
    assert init_args(config, "data")["mean"] == [0.5071, 0.4867, 0.4408]
    assert init_args(config, "data")["std"] == [0.2675, 0.2565, 0.2761]


def losses(kdlit_cli, method, pair=PAIRS[0]):
    config = resolved(kdlit_cli, "--config", pair, "--config", method)
    terms = init_args(config, "model")["losses"]
    return {name: term["init_args"] for name, term in terms.items()}


def test_kd_has_the_weights_of_its_convention(kdlit_cli):
    terms = losses(kdlit_cli, CONFIGS / "cifar100" / "methods" / "kd.yaml")
    assert set(terms) == {"ce", "kd"}
    assert (terms["ce"]["weight"], terms["kd"]["weight"]) == (0.1, 0.9)
    assert terms["kd"]["warmup_epochs"] == 0
    assert terms["kd"]["loss"]["init_args"] == {"temperature": 4.0}


@pytest.mark.parametrize("beta", [2, 6, 8])
def test_dkd_has_the_values_of_its_paper(kdlit_cli, beta):
    terms = losses(kdlit_cli, CONFIGS / "cifar100" / "methods" / f"dkd_beta{beta}.yaml")
    assert terms["ce"]["weight"] == 1.0
    assert (terms["dkd"]["weight"], terms["dkd"]["warmup_epochs"]) == (1.0, 20)
    assert terms["dkd"]["loss"]["init_args"] == {"alpha": 1.0, "beta": beta, "temperature": 4.0}


def test_the_values_are_those_of_the_reference_tables(shared, kdlit_cli):
    with (shared / "reference" / "hparams.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == "cifar100" and row["source"] == "dkd"]
    for pair in PAIRS:
        teacher, student = (name.replace("_", "-") for name in _networks(pair))
        values = {
            row["param"]: float(row["value"])
            for row in rows
            if (row["teacher"], row["student"], row["method"]) == (teacher, student, "dkd")
            and row["param"] != "noise_ratio"
        }
        assert values, pair
        beta = BETA[_networks(pair)[0]]
        terms = losses(kdlit_cli, CONFIGS / "cifar100" / "methods" / f"dkd_beta{beta}.yaml", pair)
        ours = {**terms["dkd"]["loss"]["init_args"], "ce_weight": terms["ce"]["weight"]}
        assert ours | {"warmup_epochs": terms["dkd"]["warmup_epochs"]} == values
    kd = {row["param"]: float(row["value"]) for row in rows if row["method"] == "kd"}
    assert kd == {"ce_weight": 0.1, "kd_weight": 0.9}


def _networks(pair):
    student = "wrn_16_2" if pair.stem.endswith("wrn_16_2") else pair.stem.split("_")[-1]
    return pair.stem.removesuffix(f"_{student}"), student


@pytest.mark.parametrize("name", [name for pair in PAIRS for name in _networks(pair)])
def test_every_network_of_a_pair_can_be_trained_plainly(kdlit_cli, name):
    config = resolved(
        kdlit_cli, "--config", CONFIGS / "cifar100" / "plain.yaml", f"--model.student=kdlit.models.{name}"
    )
    assert init_args(config, "model")["student"]["class_path"] == f"kdlit.models.{name}"
    assert init_args(config, "model")["teacher"] is None
    assert list(init_args(config, "model")["losses"]) == ["ce"]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda path: path.stem)
def test_a_cell_builds_with_a_published_teacher_file(monkeypatch, tmp_path, cifar_folder, pair):
    """Everything is really built: networks, losses, optimizer and schedule; only the first step is not taken."""
    from kdlit import models

    teacher, _ = _networks(pair)
    torch.save({"model": getattr(models, teacher)(3).state_dict(), "epoch": 240}, tmp_path / "teacher.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv",
        [
            "kdlit", "fit", "--config", str(pair), "--config", str(CONFIGS / "cifar100/methods/dkd_beta8.yaml"),
            "--model.teacher.path=teacher.pth", "--model.teacher.model.num_classes=3", "--model.student.num_classes=3",
            f"--data.root={cifar_folder.parent}", "--data.verify=false", "--data.batch_size=4", "--data.eval_batch_size=4",
            "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu",
        ],
    )  # fmt: skip
    cli = KdlitCLI()
    assert cli.trainer.global_step == 1
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.05


def test_quickstart_configs_build(kdlit_cli):
    for name in ("quickstart.yaml", "quickstart/teacher.yaml"):
        config = resolved(kdlit_cli, "--config", CONFIGS / name)
        assert config["data"]["class_path"] == "kdlit.data.DigitPairs"


def test_one_line_adds_the_dashboard(kdlit_cli):
    config = resolved(kdlit_cli, "--config", CONFIGS / "quickstart.yaml", "--config", CONFIGS / "wandb.yaml")
    assert config["trainer"]["logger"]["class_path"] == "lightning.pytorch.loggers.WandbLogger"
    assert config["trainer"]["logger"]["init_args"]["offline"] is True
    assert config["trainer"]["max_epochs"] == 200
