"""Every shipped config composes, builds and says what the papers say."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.strategies import FSDPStrategy
from PIL import Image

from kdlit.cli import KdlitCLI

CONFIGS = Path(__file__).parents[1] / "configs"
BETA = {  # Zhao et al. 2022, table A.2
    "resnet56": 2, "resnet110": 2, "wrn_40_2": 6, "vgg13": 6, "resnet32x4": 8, "resnet50": 8,
}  # fmt: skip
SMALL = {"mobilenetv2", "shufflenetv1", "shufflenetv2"}


def _cells():
    with (CONFIGS / "cells.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["dataset"] == "cifar100" and row["config_method"]]


def _of(rows, key):
    """The first row for each value of a column."""
    return list({row[key]: row for row in reversed(rows)}.values())


def one_cell_for_each_file(rows):
    """Few rows of an index in which every pair and every method occurs."""
    rows = [row for row in rows if row["config_method"]]
    covered, chosen = set(), []
    for least in (2, 1):  # first those that cover two files at once
        for row in rows:
            files = {row["config_pair"], row["config_method"]}
            if len(files - covered) >= least:
                covered |= files
                chosen.append(row)
    return chosen


def cover(rows):
    """Few rows in which every network occurs."""
    seen, chosen = set(), []
    for least in (2, 1):
        for row in rows:
            networks = {row["teacher"], row["student"]}
            if len(networks - seen) >= least:
                seen |= networks
                chosen.append(row)
    return chosen


CELLS = _cells()
PAIRS = _of(CELLS, "config_pair")
PAIR = CONFIGS / "cifar100" / "pairs" / "resnet32x4_resnet8x4.yaml"


class _StopAtTheParserError(Exception):
    pass


class _OnlyTheParser(KdlitCLI):
    def parse_arguments(self, parser, args):
        raise _StopAtTheParserError(parser)


def fit_parser():
    """The parser of the command line, to be used many times: making one costs more than parsing."""
    try:
        _OnlyTheParser(["fit"])
    except _StopAtTheParserError as stop:
        return stop.args[0]


@pytest.fixture(scope="module")
def parser():
    return fit_parser()


def resolved(kdlit_cli, *arguments):
    return yaml.safe_load(kdlit_cli("fit", *arguments, "--print_config").split("exit")[0])


def init_args(config, *path):
    for key in path:
        config = config[key]
        config = config.get("init_args", config)
    return config


def files_of(row):
    root = CONFIGS.parent
    return str(root / row["config_pair"]), str(root / row["config_method"])


@pytest.mark.parametrize("row", PAIRS, ids=lambda row: Path(row["config_pair"]).stem)
def test_every_pair_has_its_networks_and_recipe(parser, row):
    pair, method = files_of(row)
    config = parser.parse_args(["fit", "--config", pair, "--config", method]).as_dict()["fit"]
    teacher, student = (init_args(config, "model")[role] for role in ("teacher", "student"))
    assert teacher["init_args"]["model"]["class_path"] == f"kdlit.models.{row['teacher']}"
    assert student["class_path"] == f"kdlit.models.{row['student']}"
    assert Path(pair).stem == f"{row['teacher']}_{row['student']}"
    recipe = {"lr": 0.01 if row["student"] in SMALL else 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    assert init_args(config, "model", "optimizer") | recipe == init_args(config, "model", "optimizer")
    assert init_args(config, "model", "lr_scheduler")["milestones"] == [150, 180, 210]
    assert config["trainer"]["max_epochs"] == 240
    assert init_args(config, "data")["batch_size"] == 64
    assert init_args(config, "data")["mean"] == [0.5071, 0.4867, 0.4408]
    assert init_args(config, "data")["std"] == [0.2675, 0.2565, 0.2761]


def losses(kdlit_cli, method, pair=PAIR):
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


def test_the_values_are_those_of_the_reference_tables(shared, parser):
    with (shared / "reference" / "hparams.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == "cifar100" and row["source"] == "dkd"]
    printed = {(row["teacher"], row["student"]) for row in rows if row["method"] == "dkd" and row["student"] != "*"}
    compared = set()
    for cell in CELLS:
        networks = (cell["teacher"].replace("_", "-"), cell["student"].replace("_", "-"))
        if cell["method"] != "dkd" or networks not in printed:
            continue
        compared.add(networks)
        values = {
            row["param"]: float(row["value"])
            for row in rows
            if (row["teacher"], row["student"], row["method"]) == (*networks, "dkd") and row["param"] != "noise_ratio"
        }
        pair, method = files_of(cell)
        assert method.endswith(f"dkd_beta{BETA[cell['teacher']]}.yaml")
        config = parser.parse_args(["fit", "--config", pair, "--config", method]).as_dict()["fit"]
        terms = {name: term["init_args"] for name, term in init_args(config, "model")["losses"].items()}
        ours = {**terms["dkd"]["loss"]["init_args"], "ce_weight": terms["ce"]["weight"]}
        assert ours | {"warmup_epochs": terms["dkd"]["warmup_epochs"]} == values
    assert compared == printed
    kd = {row["param"]: float(row["value"]) for row in rows if row["method"] == "kd"}
    assert kd == {"ce_weight": 0.1, "kd_weight": 0.9}


@pytest.mark.parametrize("name", sorted({row[role] for row in CELLS for role in ("teacher", "student")}))
def test_every_network_of_a_pair_can_be_trained_plainly(parser, name):
    plain = str(CONFIGS / "cifar100" / "plain.yaml")
    config = parser.parse_args(["fit", "--config", plain, f"--model.student=kdlit.models.{name}"]).as_dict()["fit"]
    assert init_args(config, "model")["student"]["class_path"] == f"kdlit.models.{name}"
    assert init_args(config, "model")["teacher"] is None
    assert list(init_args(config, "model")["losses"]) == ["ce"]


@pytest.mark.parametrize("row", cover(PAIRS), ids=lambda row: Path(row["config_pair"]).stem)
def test_a_cell_builds_with_a_published_teacher_file(monkeypatch, tmp_path, cifar_folder, row):
    """Everything is really built: networks, losses, optimizer and schedule, and one step is taken."""
    from kdlit import models

    torch.save({"model": getattr(models, row["teacher"])(3).state_dict(), "epoch": 240}, tmp_path / "teacher.pth")
    monkeypatch.chdir(tmp_path)
    pair, method = files_of(row)
    monkeypatch.setattr(
        "sys.argv",
        [
            "kdlit", "fit", "--config", pair, "--config", method,
            "--model.teacher.path=teacher.pth", "--model.teacher.model.num_classes=3", "--model.student.num_classes=3",
            f"--data.root={cifar_folder.parent}", "--data.verify=false", "--data.batch_size=4", "--data.eval_batch_size=4",
            "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu",
        ],
    )  # fmt: skip
    cli = KdlitCLI()
    assert cli.trainer.global_step == 1
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == (0.01 if row["student"] in SMALL else 0.05)


@pytest.mark.parametrize(
    ("pair", "method"), [("resnet34_resnet18", "mlkd_lr0.1"), ("resnet50_mobilenetv1", "nkd_clip5")]
)
def test_a_cell_of_imagenet_builds_and_takes_a_step(monkeypatch, tmp_path, pair, method):
    for split in ("train", "val"):
        for label in ("a", "b", "c"):
            folder = tmp_path / "pictures" / split / label
            folder.mkdir(parents=True)
            Image.effect_noise((40, 30), 60).convert("RGB").save(folder / "one.png")
    own = {"model": {"init_args": {"teacher": {"init_args": {"weights": None, "num_classes": 3}}}}}
    (tmp_path / "untrained.yaml").write_text(yaml.safe_dump(own))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv",
        [
            "kdlit", "fit", "--config", str(CONFIGS / f"imagenet/pairs/{pair}.yaml"),
            "--config", str(CONFIGS / f"imagenet/methods/{method}.yaml"),
            "--config", "untrained.yaml", "--model.student.num_classes=3",
            "--data.root=pictures", "--data.batch_size=3", "--data.num_workers=0",
            "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu",
        ],
    )  # fmt: skip
    cli = KdlitCLI()
    assert cli.trainer.global_step == 1
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.1


def test_quickstart_configs_build(kdlit_cli):
    for name in ("quickstart.yaml", "quickstart/teacher.yaml"):
        config = resolved(kdlit_cli, "--config", CONFIGS / name)
        assert config["data"]["class_path"] == "kdlit.data.DigitPairs"


def test_one_line_adds_the_dashboard(kdlit_cli):
    config = resolved(kdlit_cli, "--config", CONFIGS / "quickstart.yaml", "--config", CONFIGS / "wandb.yaml")
    assert config["trainer"]["logger"]["class_path"] == "kdlit.dashboards.PatientWandbLogger"
    assert config["trainer"]["logger"]["init_args"]["offline"] is True
    assert config["trainer"]["max_epochs"] == 200


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed"])
def test_strategies_are_added_to_any_run(kdlit_cli, strategy):
    pair, method = files_of(PAIRS[0])
    alone = resolved(kdlit_cli, "--config", pair, "--config", method)
    config = resolved(
        kdlit_cli, "--config", pair, "--config", method, "--config", CONFIGS / f"strategies/{strategy}.yaml"
    )
    changed = {key for key, value in config["trainer"].items() if value != alone["trainer"][key]}
    assert changed == {"accelerator", "devices", "precision", "strategy"}
    assert {key for key in config if config[key] != alone[key]} == {"trainer"}
    if strategy == "fsdp":
        spec = config["trainer"]["strategy"]
        assert isinstance(FSDPStrategy(**spec["init_args"], **spec.get("dict_kwargs", {})), FSDPStrategy)
