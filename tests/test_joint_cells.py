"""Cells that one file of their own describes: mutual learning, chains and transformers."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import yaml

from kdlit.chain import read_chain
from kdlit.models import resnet56
from tests.conftest import write_cifar_layout

ROOT = Path(__file__).parents[1]
with (ROOT / "configs" / "cells.csv").open() as file:
    CELLS = [row for row in csv.DictReader(file) if row["config_own"]]


def of(method):
    return [
        pytest.param(row, id=f"{row['dataset']}-{row['teacher']}-{row['student']}")
        for row in CELLS
        if row["method"] == method
    ]


def network(spec):
    return spec["class_path"].rpartition(".")[2]


@pytest.mark.parametrize("row", of("dml"))
def test_both_networks_of_a_mutual_cell_train_by_the_common_recipe(row, kdlit_cli):
    config = yaml.safe_load(kdlit_cli("fit", "--config", ROOT / row["config_own"], "--print_config").split("exit")[0])
    settings = config["model"]["init_args"]
    students = {name: network(spec) for name, spec in settings["students"].items()}
    assert students == {"student": row["student"], "peer": row["teacher"]}
    assert next(iter(students)) == "student", "the first is the one that is measured and exported"
    terms = {
        name: (network(term["init_args"]["loss"]), term["init_args"]["weight"])
        for name, term in settings["losses"].items()
    }
    assert terms == {"ce": ("CrossEntropyLoss", 1.0), "dml": ("DMLLoss", 1.0)}
    small = row["student"] in ("mobilenetv2", "shufflenetv1", "shufflenetv2")
    assert settings["optimizer"]["init_args"]["lr"] == (
        0.2 if row["dataset"] == "imagenet" else 0.01 if small else 0.05
    )
    assert config["trainer"]["max_epochs"] == (100 if row["dataset"] == "imagenet" else 240)


@pytest.mark.parametrize("row", of("takd"))
def test_a_chain_cell_leads_from_the_teacher_over_an_assistant_to_the_student(row):
    links = read_chain(ROOT / row["config_own"])
    assert [link.name for link in links] == ["assistant", "student"]
    assert links[1].teacher is links[0]
    content = yaml.safe_load((ROOT / row["config_own"]).read_text())["links"]["assistant"]["teacher"]
    assert network(content["init_args"].get("model", content)) == row["teacher"]
    for link in links:
        link.resolve()
        settings = link.config["model"]["init_args"]
        assert {network(term["init_args"]["loss"]) for term in settings["losses"].values()} == {
            "CrossEntropyLoss",
            "KDLoss",
        }
    assert network(links[1].student) == row["student"]
    assert network(links[0].student) not in (row["student"], row["teacher"])
    assert links[1].config["model"]["init_args"]["teacher"]["init_args"]["model"] == links[0].student


def transformers():
    return [pytest.param(row, id=f"{row['student']}-{row['method']}") for row in CELLS if "/transformers/" in row["config_own"]]  # fmt: skip


@pytest.mark.parametrize("row", transformers())
def test_a_transformer_cell_follows_the_published_recipe(row, kdlit_cli):
    config = yaml.safe_load(kdlit_cli("fit", "--config", ROOT / row["config_own"], "--print_config").split("exit")[0])
    settings, on_imagenet = config["model"]["init_args"], row["dataset"] == "imagenet"
    distilled = row["student"] == "deit_tiny" and not on_imagenet
    assert network(settings["student"]) == row["student"] + ("_distilled" if distilled else "")
    teacher = settings["teacher"]
    name = {"deit_iii_small": "deit3_small"}.get(row["teacher"], row["teacher"])
    assert network(teacher if on_imagenet else teacher["init_args"]["model"]) == name
    assert not on_imagenet or teacher["init_args"]["pretrained"] is True
    optimizer, schedule = (settings[name]["init_args"] for name in ("optimizer", "lr_scheduler"))
    data = config["data"]["init_args"]
    expected = (1e-3, 1024, "TransformerAdamW") if on_imagenet else (5e-4, 128, "AdamW")
    assert (optimizer["lr"], data["batch_size"], network(settings["optimizer"])) == expected
    assert optimizer["weight_decay"] == 0.05
    assert schedule["epochs"] == config["trainer"]["max_epochs"] == 300
    assert optimizer["lr"] * schedule["end"] == pytest.approx(1e-5 if on_imagenet else 5e-6)
    assert (data["size"], settings["input_size"]) == (224, [3, 224, 224])
    assert (data["teacher_input"] or {}).get("size") == (None if on_imagenet else 32)

    found = {}
    for name, term in settings["losses"].items():
        loss, weight = term["init_args"]["loss"], term["init_args"]["weight"]
        while "loss" in loss["init_args"]:
            found.setdefault(name, []).append(loss["init_args"].get("layer", network(loss)))
            loss = loss["init_args"]["loss"]
        found.setdefault(name, []).append((network(loss), loss["init_args"].get("temperature"), weight))
    if on_imagenet:
        if row["method"].endswith("vitkd"):
            arguments = settings["losses"]["vitkd"]["init_args"]["loss"]["init_args"]
            assert (arguments["alpha"], arguments["beta"], arguments["mask_ratio"]) == (3e-5, 3e-6, 0.5)
            assert found.pop("vitkd") == [("ViTKDLoss", None, 1.0)]
        ce = [("CrossEntropyLoss", None, 1.0)]
        published = {
            "kd": {"ce": [("CrossEntropyLoss", None, 0.5)], "kd": [("KDLoss", 1.0, 0.5)]},
            "nkd": {"ce": ce, "nkd": [("NKDLoss", 1.0, 1.0)]},
            "wttm": {"ce": ce, "wttm": [("WTTMLoss", None, 1.6)]},
            "vitkd": {"ce": ce},
        }
        assert found == published[row["method"].removesuffix("+vitkd")]
        return
    temperature, weight = {"deit_tiny": (3, 10), "t2t_vit_7": (3, 6)}.get(row["student"], (2, 9))
    heads = (["head"], ["head_dist"]) if distilled else ([], [])
    assert found == {
        "ce": [*heads[0], ("CrossEntropyLoss", None, 0.5)],
        "kd": [*heads[1], "LogitStandardization", ("KDLoss", temperature, weight)],
    }


def test_a_transformer_learns_from_a_small_teacher_each_at_its_own_size(kdlit_cli, tmp_path):
    pytest.importorskip("timm", reason="DeiT is a network of timm")
    write_cifar_layout(tmp_path / "data", classes=100, train=100, test=100)
    torch.save({"model": resnet56().state_dict()}, tmp_path / "resnet56.pth")
    out = kdlit_cli(
        "fit", "--config", ROOT / "configs/cifar100/transformers/resnet56_deit_tiny.yaml", "--data.root=data",
        "--data.verify=false", "--data.batch_size=4", "--data.num_workers=0", "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=1", "--model.teacher.path=resnet56.pth", "--trainer.accelerator=cpu",
        "--run_dir=run",
    )  # fmt: skip
    assert "error" not in out, out
    with (tmp_path / "run" / "metrics.csv").open() as file:
        logged = {name for row in csv.DictReader(file) for name, value in row.items() if value}
    assert {"train/loss/ce", "train/loss/kd"} <= logged


def test_no_published_cell_of_them_is_left_out():
    with (ROOT / "configs" / "cells.csv").open() as file:
        joint = [row for row in csv.DictReader(file) if row["method"] in ("dml", "takd")]
    assert len(joint) > 20
    assert all(row["config_own"] for row in joint)
