"""Cells that one file of their own describes: mutual learning and chains."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml

from kdlit.chain import read_chain

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


def test_no_published_cell_of_them_is_left_out_but_one():
    with (ROOT / "configs" / "cells.csv").open() as file:
        joint = [row for row in csv.DictReader(file) if row["method"] in ("dml", "takd")]
    missing = [
        (row["dataset"], row["teacher"], row["student"], row["method"]) for row in joint if not row["config_own"]
    ]
    assert missing == [("imagenet", "resnet34", "resnet18", "takd")]
