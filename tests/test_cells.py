"""The index of published cells: it is complete, its files compose, and every value is the one that was published."""

from __future__ import annotations

import csv
import functools
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import yaml

from kdlit import losses
from kdlit.types import ModelOutput
from tests.test_configs import fit_parser, one_cell_for_each_file

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
PAPERS = ("dkd", "mlkd", "lskd", "ttm", "rld")
METHODS = ("kd", "dkd", "nkd", "ttm", "wttm", "mlkd", "rld", "ctkd", "dist", "dml", "takd", "la", "rc", "lr")
RECIPE = ("epochs", "batch_size", "lr", "lr_decay_stages", "lr_decay_rate", "weight_decay", "momentum")


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


ALL = read(CONFIGS / "cells.csv")
CELLS = [row for row in ALL if row["method"].removesuffix("+ls") in METHODS]  # the others are tested by themselves
ABLATIONS = read(CONFIGS / "ablations.csv")
RUNNABLE = [row for row in CELLS if row["config_method"]]


def name_of(row):
    return "-".join(row[key] for key in ("teacher", "student", "method", "variant", "top1") if key in row)


# Composition without the command line, which is checked against it below.


def load(path):
    content = yaml.safe_load(path.read_text())
    for holder in (content, content.get("model", {}).get("init_args", {})):
        for key, value in holder.items():
            if isinstance(value, str) and value.endswith(".yaml"):
                holder[key] = yaml.safe_load((path.parent / value).read_text())
    return content


def merged(earlier, later):
    """Mappings merge, but for the losses, where the later file counts alone."""
    result = dict(earlier)
    for key, value in later.items():
        both = isinstance(value, dict) and isinstance(earlier.get(key), dict) and key != "losses"
        result[key] = merged(earlier[key], value) if both else value
    return result


@functools.cache
def _loaded(path):
    return load(ROOT / path)


def composed(row):
    return merged(_loaded(row["config_pair"]), _loaded(row["config_method"]))


def assert_holds(full, part, where=""):
    """Every value of ``part`` is in ``full``, class paths up to their package."""
    if isinstance(part, dict):
        if "loss" in part and "weight" in part and full.get("class_path") == "kdlit.losses.WeightedLoss":
            full = full["init_args"]
        for key, value in part.items():
            assert key in full, f"{where}.{key}"
            assert_holds(full[key], value, f"{where}.{key}")
    elif where.endswith("class_path"):
        assert full == part or full.endswith(f".{part}"), where
    else:
        assert getattr(full, "name", full) == part, where  # torchvision's names of weights become members of an enum


@pytest.fixture(scope="module")
def parser():
    return fit_parser()


@pytest.mark.parametrize("row", one_cell_for_each_file([*ALL, *ABLATIONS]), ids=name_of)
def test_files_compose_on_the_command_line_as_they_read(parser, row):
    pair, method = ROOT / row["config_pair"], ROOT / row["config_method"]
    config = parser.parse_args(["fit", "--config", str(pair), "--config", str(method)]).as_dict()["fit"]
    expected = composed(row)
    assert_holds(config, expected)
    assert set(config["model"]["init_args"]["losses"]) == set(expected["model"]["init_args"]["losses"])


def _built(spec):
    arguments = dict(spec.get("init_args", {}))
    if "loss" in arguments:
        arguments["loss"] = _built(arguments["loss"])
    return getattr(losses, spec["class_path"])(**arguments)


@pytest.mark.parametrize("path", sorted({row["config_method"] for row in [*CELLS, *ABLATIONS]} - {""}))
def test_every_loss_gives_a_finite_value(path):
    config = _loaded(path)
    student, teacher = torch.randn(2, 8, 10).mul(5).unbind()
    views = [ModelOutput(logits=logits, logits_strong=logits.roll(1, 0)) for logits in (student, teacher)]
    batch = {"target": torch.arange(8)}
    for name, term in config["model"]["init_args"]["losses"].items():
        loss = losses.WeightedLoss(_built(term["loss"]), term["weight"], term.get("warmup_epochs", 0))
        loss.on_train_epoch_start(0, 240)
        assert torch.isfinite(loss(*views, batch)), name
        assert not loss.needs_strong_view or config["data"]["init_args"]["strong_view"] is True, name


def test_every_file_is_in_an_index_or_can_be_parsed(parser):
    indexed = {row[key] for row in [*ALL, *ABLATIONS] for key in ("config_pair", "config_method")} - {""}
    assert {path for path in indexed if not (ROOT / path).is_file()} == set()
    files = {str(path.relative_to(ROOT)) for kind in ("*/methods", "*/pairs", "ablations/**") for path in CONFIGS.glob(f"{kind}/*.yaml")}  # fmt: skip
    files |= {str(path.relative_to(ROOT)) for path in CONFIGS.glob("ablations/*.yaml")}
    sweep = {path for path in files if path.startswith("configs/ablations/ttm/ttm_gamma")}
    others = {f"configs/cifar100/methods/{name}.yaml" for name in ("cc", "dkd_beta8_reviewkd", "nst", "sp", "srrl")}
    assert files - indexed == sweep | others  # the papers print no accuracy of the latter
    for path in sweep | others:
        pair = "configs/cifar100/pairs/resnet32x4_resnet8x4.yaml"
        parser.parse_args(["fit", "--config", str(ROOT / pair), "--config", str(ROOT / path)])
    for path in sweep:
        ttm = _loaded(path)["model"]["init_args"]["losses"]["ttm"]
        gamma = ttm["loss"]["init_args"]["gamma"]
        assert path == f"configs/ablations/ttm/ttm_gamma{gamma:g}.yaml"
        assert ttm["weight"] == pytest.approx(9 / gamma)


def test_no_cell_is_listed_twice():
    keys = [(row["dataset"], row["teacher"], row["student"], row["method"], row["config_method"]) for row in CELLS]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("row", RUNNABLE, ids=name_of)
def test_a_cell_names_the_networks_of_its_pair(row):
    assert row["config_pair"] == f"configs/{row['dataset']}/pairs/{row['teacher']}_{row['student']}.yaml"
    arguments = _loaded(row["config_pair"])["model"]["init_args"]
    teacher = arguments["teacher"]
    if row["dataset"] == "cifar100":
        assert teacher["init_args"]["model"]["class_path"] == f"kdlit.models.{row['teacher']}"
        assert row["teacher"] in teacher["init_args"]["path"].lower()
        assert arguments["student"]["class_path"] == f"kdlit.models.{row['student']}"
    else:
        assert teacher == {"class_path": f"torchvision.models.{row['teacher']}", "init_args": {"weights": "IMAGENET1K_V1"}}  # fmt: skip
        assert arguments["student"]["class_path"].split(".")[-1] == row["student"]
        assert arguments["input_size"] == [3, 224, 224]


def test_every_cell_has_a_config_and_says_where_its_values_are_from():
    without = [row for row in CELLS if not row["config_method"]]
    assert all(row["config_own"] for row in without)
    assert all(row["note"].startswith("values: ") for row in CELLS)


# What a config says, in the names of the reference tables


def _chain(term):
    """The wrappers of a term and its innermost loss, by class name."""
    found, loss = {}, term["loss"]
    while loss is not None:
        arguments = loss.get("init_args", {})
        found[loss["class_path"]] = arguments
        loss = arguments.get("loss")
    return found


def _optimizer(config):
    arguments = config["model"]["init_args"]
    optimizer, steps = arguments["optimizer"]["init_args"], arguments["lr_scheduler"]["init_args"]
    return {
        "epochs": config["trainer"]["max_epochs"],
        "batch_size": config["data"]["init_args"]["batch_size"] * config["trainer"]["devices"],
        "lr": optimizer["lr"],
        "weight_decay": optimizer["weight_decay"],
        "momentum": optimizer["momentum"],
        "lr_decay_stages": steps["milestones"],
        "lr_decay_rate": steps["gamma"],
    }


def settings(config, method):
    """Every value that the reference tables have a name for."""
    terms = dict(config["model"]["init_args"]["losses"])
    ce = terms.pop("ce", {"weight": 0})
    values = _optimizer(config) | {"ce_weight": ce["weight"]}
    if method in ("mlkd", "mlkd+ls"):
        strong = terms.pop("ce_strong")
        assert strong == {"loss": {"class_path": "CrossEntropyLoss", "init_args": {"strong_view": True}}, "weight": ce["weight"]}  # fmt: skip
    ((_, term),) = terms.items()
    chain, weight = _chain(term), term["weight"]
    if (standardization := chain.pop("LogitStandardization", None)) is not None:
        assert (standardization["unbiased"], standardization["eps"]) == (True, 1e-7)
        values["std"] = "unbiased (K-1), 1e-7 added"
    temperature = chain.pop("GlobalTemperature", None)
    ((cls, loss),) = chain.items()
    plain = method.removesuffix("+ls")
    expected_class = {"mlkd": "MLKDTwoViewLoss", "ctkd": "KDLoss"}.get(plain, f"{plain.upper()}Loss")
    assert cls == expected_class
    assert (temperature is not None) == (plain == "ctkd")
    assert ("std" in values) == (method.endswith("+ls") and plain != "mlkd")
    values |= loss
    if "temperature" in loss:
        values["base_temperature"] = loss["temperature"]
    if plain in ("kd", "ctkd", "mlkd", "la"):
        values["kd_weight"] = weight
    if plain == "ctkd":
        values |= temperature | {"kd_T": loss["temperature"], "have_mlp": 1, "mlp_name": "global", "cosine_decay": 1}
    if plain in ("ttm", "wttm"):
        values["beta"] = weight
    if plain in ("dkd", "rld"):
        values["warmup_epochs"] = term.get("warmup_epochs", 0)
        values |= {f"{name}_effective": weight * loss[name] for name in ("alpha", "beta")}
        values["kd_weight"] = weight
        assert method.endswith("+ls") or weight == 1
    else:
        assert not term.get("warmup_epochs")
    if plain == "rld":
        values["alpha_temperature"] = values.pop("confidence_temperature")
    if method == "rld+ls":  # the table gives what alpha and beta become
        assert loss["beta"] == 8
        values |= {"alpha": values["alpha_effective"], "beta": f"{weight:g}*beta"}
    if plain == "mlkd":
        assert config["data"]["init_args"]["strong_view"] is True
        values["views"] = "weak and strong"
        assert loss["levels"] == ["instance", "batch", "class"]
        values["temperatures"] = [loss["temperature"], 3, 5, 2, 6]
        if method == "mlkd+ls":
            assert loss["standardize"] is True
            values |= {"temperatures": "base_temp 3 5 2 6", "standardized_terms": "instance level only"}
            values["std"] = "unbiased (K-1), 1e-7 added"  # what the loss does where it standardises, by its own test
        else:
            assert loss["standardize"] is False
    if plain in ("rc", "dist", "nkd", "lr"):
        assert weight == 1
    return values


# What the reference tables say

NOT_TRAINING = {"num_workers", "noise_ratio"}  # of no consequence for the result; of table 3 of DKD alone
IN_THE_LOSS = {  # fixed inside the released form of MLKD and tested there against golden vectors
    "t2_factor", "sample_mask", "class_mask", "strong_augmentation", "instance_strong_temperatures",
    "class_terms_in_the_sum", "batch_terms_in_the_sum",
}  # fmt: skip


def number(text):
    """Numbers as numbers, several as a list, and words as they are."""
    parts = str(text).strip("[]").replace(",", " ").split()
    try:
        values = [float(part) for part in parts]
    except ValueError:
        return text
    return values[0] if len(values) == 1 else values


@pytest.fixture(scope="module")
def tables():
    folder = ROOT.parent / "shared" / "reference"
    if not folder.exists():
        pytest.skip(f"no reference material in {folder}")
    return {name: read(folder / f"{name}.csv") for name in ("hparams", "results", "training")}


@pytest.fixture(scope="module")
def by_method(tables):
    found = defaultdict(list)
    for row in tables["hparams"]:
        found[row["method"]].append(row)
    return found


def _matching(by_method, cell, method, source):
    """Rows of a source for a cell, the most specific first; figures and README examples of other values left out."""
    teacher, student = (cell[key].replace("_", "-") for key in ("teacher", "student"))
    rows = [
        row
        for name in ([method, "*+ls"] if method.endswith("+ls") else [method])
        for row in by_method[name]
        if row["source"] == source
        and row["dataset"] in (cell["dataset"], "*")
        and row["teacher"] in (teacher, "*")
        and row["student"] in (student, "*")
        and not row["note"].startswith("Fig. 1")
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (row["teacher"] == "*") + (row["student"] == "*") + (row["dataset"] == "*"))


def sources_of(cell):
    """``values: a, b; text`` and ``values: unpublished (a, b); text``."""
    head = cell["note"].removeprefix("values: ").split(";")[0]
    unpublished = head.startswith("unpublished (")
    names = head.removeprefix("unpublished (")[:-1] if unpublished else head
    return unpublished, [name for name in names.split(", ") if name != "none"]


def published(by_method, cell):
    method, values = cell["method"], {}
    _, sources = sources_of(cell)
    for source in sources:
        for row in _matching(by_method, cell, method, source):
            if row["param"] not in NOT_TRAINING | IN_THE_LOSS:
                values.setdefault(row["param"], number(row["value"]))
    if method == "mlkd+ls":  # its log names have no learning rate; the yaml is that of mlkd
        for row in _matching(by_method, cell, "mlkd", "lskd-repo"):
            if row["param"] in RECIPE:
                values.setdefault(row["param"], number(row["value"]))
    if method == "dist" and "weight" in values:
        weight = values.pop("weight")
        values |= {name: weight * values[name] for name in ("beta", "gamma")}
    if cell["dataset"] == "imagenet" and method == "ctkd+ls" and "kd_T" in values:
        values["kd_T"], values["kd_weight"] = values["kd_weight"], values["kd_T"]  # exchanged in the script
    if method == "rld" and "temperature" in values:
        values["alpha_temperature"] = values["temperature"]  # the paper's one temperature, not the code's default
    return values


ORIGINS = {  # whose recipe on ImageNet, where it is not that of Zhao et al.
    "wttm": ("torchdistill", "official kd yaml"),
    "dist": ("dist-repo", "resnet_dist.yaml"),
    "nkd": ("cls_kd", "configs (ResNet and MobileNet"),
    "ctkd": ("lskd-repo", "CTKD/scripts/run_imagenet"),
    "ctkd+ls": ("lskd-repo", "CTKD/scripts/run_imagenet"),
}


def common_recipe(tables, cell):
    origin = ORIGINS.get(cell["method"]) if cell["dataset"] == "imagenet" else None
    if cell["config_method"].endswith("kd_t4_w1.yaml"):
        origin = ORIGINS["dist"]
    source, start = origin or ("mdistiller", f"configs/{cell['dataset']} and code")
    (row,) = [
        row
        for row in tables["training"]
        if row["source"] == source and row["dataset"] == cell["dataset"] and row["origin"].startswith(start)
    ]
    rate, _, slower = row["base_lr"].partition(";")
    if cell["student"] in slower:
        rate = slower.split()[0]
    steps = "30 60 90" if row["lr_steps"] == "every 30 epochs" else row["lr_steps"]
    return {
        "epochs": float(row["epochs"]),
        "batch_size": float(row["batch_size"].split()[0]),
        "lr": float(rate),
        "weight_decay": float(row["weight_decay"]),
        "momentum": float(row["momentum"]),
        "lr_decay_stages": number(steps),
        "lr_decay_rate": float(row["lr_gamma"]),
    }


@pytest.mark.parametrize("cell", RUNNABLE, ids=name_of)
def test_every_value_is_the_published_one(tables, by_method, cell):
    ours, theirs = settings(composed(cell), cell["method"]), published(by_method, cell)
    unpublished, sources = sources_of(cell)
    if sources:
        assert set(theirs) - set(RECIPE), f"no value of {sources} is compared"
    expected = common_recipe(tables, cell) | theirs
    assert {name: ours.get(name) for name in expected} == expected

    # Values that papers print for the very pair and that another source was preferred to would be an oversight.
    pair = [cell[key].replace("_", "-") for key in ("teacher", "student")]
    printed = {
        row["param"]: row["value"]
        for row in by_method[cell["method"]]
        if row["source"] in PAPERS
        and [row["dataset"], row["teacher"], row["student"]] == [cell["dataset"], *pair]
        and row["param"] not in NOT_TRAINING
    }
    for name, value in printed.items():
        if value.startswith("grid "):
            assert ours[name] in number(value.removeprefix("grid ")), name
        else:
            assert ours[name] == number(value), name
    if unpublished:
        own = {name for name, value in printed.items() if not value.startswith("grid ")}
        assert not {"beta", "temperature", "kd_weight"} & own, "the paper prints it after all"


def test_the_gradient_is_clipped_where_it_was_and_nowhere_else():
    for cell in RUNNABLE:
        clipped = composed(cell)["trainer"].get("gradient_clip_val")
        assert clipped == (5 if (cell["method"], cell["student"]) == ("nkd", "mobilenetv1") else None), cell


# Accuracies


def _is_of_a_logit_method(row):
    return row["metric"] == "top1" and row["value"] != "n/a" and row["method"].removesuffix("+ls") in METHODS


def test_every_published_cell_is_in_the_index(tables):
    index = defaultdict(list)
    for cell in CELLS:
        index[cell["dataset"], cell["teacher"], cell["student"], cell["method"]].append(cell)
    seen = set()
    for row in tables["results"]:
        main = row["dataset"] in ("cifar100", "imagenet") and not row["variant"] and row["source"] in PAPERS
        if not (main and _is_of_a_logit_method(row)):
            continue
        key = (row["dataset"], row["teacher"].replace("-", "_"), row["student"].replace("-", "_"), row["method"])
        seen.add(key)
        assert key in index, key
        assert any(row["value"] == cell["top1"] or f"{row['source']} prints {row['value']}" in cell["note"] for cell in index[key]), row  # fmt: skip
    assert seen == set(index)


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_an_accuracy_is_that_of_its_source(tables, cell):
    pair = [cell[key].replace("_", "-") for key in ("teacher", "student")]
    assert [cell["source"], cell["top1"]] in [
        [row["source"], row["value"]]
        for row in tables["results"]
        if [row["dataset"], row["teacher"], row["student"], row["method"]] == [cell["dataset"], *pair, cell["method"]]
        and row["metric"] == "top1"
        and not row["variant"]
    ]


# Ablations

ABLATED = {
    ("dkd", "1"), ("dkd", "5"), ("dkd", "A.1"), ("dkd", "A.3"), ("dkd", "ablation-alpha"), ("dkd", "ablation-beta"),
    ("lskd", "4"), ("mlkd", "6"), ("rld", "1"), ("rld", "5"), ("ttm", "6"),
}  # fmt: skip


def test_every_line_of_the_ablations_is_in_their_index(tables):
    columns = ("source", "table", "teacher", "student", "variant", "value")
    printed = sorted(
        tuple(row[key].replace("-", "_") if key in ("teacher", "student") else row[key] for key in columns)
        for row in tables["results"]
        if (row["source"], row["table"]) in ABLATED and row["metric"] == "top1"
    )
    ours = sorted(tuple(row["top1" if key == "value" else key] for key in columns) for row in ABLATIONS)
    assert ours == printed


def test_every_ablation_has_a_config():
    assert [row["variant"] for row in ABLATIONS if not row["config_method"]] == []


def _ablated(row):
    terms = composed(row)["model"]["init_args"]["losses"]
    return {name: (_chain(term), term["weight"]) for name, term in terms.items()}


@pytest.mark.parametrize("row", [row for row in ABLATIONS if row["config_method"]], ids=name_of)
def test_an_ablation_changes_what_its_line_says(row, by_method_or_none):
    variant = dict(part.split("=", 1) for part in row["variant"].split(";"))
    terms = _ablated(row)
    ce = terms.pop("ce", ({}, 0))[1]
    table = (row["source"], row["table"])
    if table == ("lskd", "4"):
        ((chain, weight),) = terms.values()
        assert (ce, weight) == (float(variant["ce_weight"]), float(variant["kd_weight"]))
        assert chain["KDLoss"]["temperature"] == float(variant["base_temperature"])
        assert ("LogitStandardization" in chain) == ("std" in variant["logits"])
    elif table == ("mlkd", "6"):
        levels = variant["alignment"].split("+")
        if "prediction_augmentation" in levels:
            assert terms["mlkd"][0]["MLKDTwoViewLoss"]["levels"] == levels[:3]
        else:
            assert [args["KDLoss"]["temperature"] for args, _ in terms.values() if "KDLoss" in args] == [4]
            assert [args["MLKDLoss"]["levels"] for args, _ in terms.values() if "MLKDLoss" in args] == [[level] for level in levels[1:]]  # fmt: skip
            assert {weight for _, weight in terms.values()} == {0.9}
    elif table == ("ttm", "6"):
        assert (ce > 0) == (variant["with_ce"] == "true")
        if not ce:
            assert terms["wttm"][1] == 1
            if by_method_or_none is not None:
                networks = [row[key].replace("_", "-") for key in ("teacher", "student")]
                (gamma,) = [
                    float(found["value"])
                    for found in by_method_or_none["wttm(no ce)"]
                    if [found[key] for key in ("teacher", "student")] == networks
                ]
                assert terms["wttm"][0]["WTTMLoss"]["gamma"] == gamma
    elif row["source"] == "rld":
        wanted = (variant["scd"] == "true", variant.get("mcd", "true") == "true")
        mask = {"greater": "g"}.get(variant.get("mask"), "ge")
        assert ce == 1
        if wanted == (False, False):
            assert terms == {}
        else:
            assert terms["rld"] == ({"RLDLoss": {"alpha": float(wanted[0]), "beta": 8.0 * wanted[1], "temperature": 4.0, "confidence_temperature": 4.0, "mask": mask}}, 1.0)  # fmt: skip
    else:
        _is_the_line_of_dkd(variant, terms)
        assert ce == 1


def _is_the_line_of_dkd(variant, terms):
    parts = (variant.get("tckd"), variant.get("nckd"))
    if parts == ("false", "false"):
        assert terms == {}
    elif parts == ("true", "true") or variant.get("beta") == "1-pt":
        assert terms == {"kd": ({"KDLoss": {"temperature": 4.0}}, 1.0)}
    else:
        alpha, beta = (float(part == "true") for part in parts) if parts[0] else (float(variant["alpha"]), float(variant["beta"]))  # fmt: skip
        temperature = float(variant.get("temperature", 4))
        chain, weight = terms["dkd"]
        half = {"top50%_teacher_confidence": "most", "bottom50%_teacher_confidence": "least"}
        selection = dict(chain.pop("ConfidenceSelection", {"keep": None, "share": 0.5, "num_samples": 50000}))
        selection.pop("loss", None)
        assert selection == {"keep": half.get(variant.get("nckd_subset")), "share": 0.5, "num_samples": 50000}
        assert chain == {"DKDLoss": {"alpha": alpha, "beta": beta, "temperature": temperature}}
        assert (len(terms), weight) == (1, 1.0)


@pytest.fixture(scope="module")
def by_method_or_none(request):
    return request.getfixturevalue("by_method") if (ROOT.parent / "shared" / "reference").exists() else None
