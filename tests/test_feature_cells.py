"""Published cells of feature and relation methods: all are indexed, their files work, and their values are published."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from kdlit import losses
from kdlit.models import ResNet
from kdlit.modules import ClassificationDistillation
from kdlit.modules.base import run_loss
from tests.test_cells import ALL, CELLS, PAPERS, ROOT, _loaded, composed, name_of, read, tables  # noqa: F401

INDEXED = [row for row in ALL if row not in CELLS]
LEFT_OUT = {"ab", "ft", "fsp", "locality-guidance", "kd+dot"}  # no method of kdlit
FILES = sorted({row["config_method"] for row in INDEXED} - {""} | {f"configs/cifar100/methods/{name}.yaml" for name in ("cc", "dkd_beta8_reviewkd", "nst", "sp", "srrl")})  # fmt: skip


def built(spec):
    arguments = dict(spec.get("init_args", {}))
    if "loss" in arguments:
        arguments["loss"] = built(arguments["loss"])
    return getattr(losses, spec["class_path"])(**arguments)


@pytest.mark.parametrize("path", FILES)
def test_every_file_trains_a_step(path):
    terms = {
        name: losses.WeightedLoss(built(term["loss"]), term["weight"], term.get("warmup_epochs", 0))
        for name, term in _loaded(path)["model"]["init_args"]["losses"].items()
    }
    networks = [ResNet(8, widths, num_classes=100) for widths in ((4, 4, 8, 16), (4, 8, 16, 32))]
    module = ClassificationDistillation(networks[0], terms, networks[1]).train()
    for term in terms.values():
        term.on_fit_start(torch.arange(300) % 100)
    batch = {"image": torch.randn(8, 3, 32, 32), "target": torch.arange(8), "index": torch.arange(8)}
    batch["image_strong"] = batch["image"].flip(-1)
    teacher, student = module.run_teacher(batch), module.run_student(batch)
    values = [run_loss(name, term, student, teacher, batch) for name, term in terms.items()]
    torch.stack(values).sum().backward()
    assert all(value.isfinite() for value in values)
    trained = [parameter for parameter in module.student.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)


def test_every_published_cell_is_in_the_index(tables):  # noqa: F811
    indexed = {(row["dataset"], row["teacher"], row["student"], row["method"]): row for row in INDEXED}
    assert len(indexed) == len(INDEXED)
    logit = {row["method"] for row in CELLS}
    seen = set()
    for row in tables["results"]:
        main = row["dataset"] in ("cifar100", "imagenet") and not row["variant"] and row["source"] in PAPERS
        methods = set(row["method"].split("+"))
        if not main or row["metric"] != "top1" or row["value"] == "n/a" or row["method"] in logit | LEFT_OUT:
            continue
        if not methods & {cell["method"].split("+")[-1] for cell in INDEXED}:
            continue
        key = (row["dataset"], row["teacher"].replace("-", "_"), row["student"].replace("-", "_"), row["method"])
        seen.add(key)
        cell = indexed[key]
        assert row["value"] == cell["top1"] or f"{row['source']} prints {row['value']}" in cell["note"], row
    assert seen == set(indexed)


def settings(config, method):
    """Every value that the reference tables have a name for."""
    terms = dict(config["model"]["init_args"]["losses"])
    found = {"ce_weight": terms.pop("ce", {"weight": 0})["weight"]}
    for name, term in terms.items():
        arguments = term["loss"].get("init_args", {})
        if name == "wttm":
            found |= {"gamma": arguments["gamma"], "beta": term["weight"]}
        elif name == "itrd":
            found |= {"beta_corr": arguments["lambda_corr"], "beta_mi": arguments["lambda_mutual"]}
            found |= {"alpha_it": arguments["alpha_it"], "mu": term["weight"]}
        elif name == "crd":
            keys = {"feat_dim": "feat.dim", "negatives": "nce.k", "temperature": "nce.temperature", "momentum": "nce.momentum"}  # fmt: skip
            found |= {key: arguments[name] for name, key in keys.items()} | {"mu": term["weight"], "feat_weight": term["weight"]}  # fmt: skip
        elif name == "catkd":
            found |= {"feat_weight": arguments["cat_weight"] * term["weight"], **arguments}
        else:
            found |= {"feat_weight": term["weight"], **arguments}
            found |= {"connector.kernel_size": arguments.get("kernel_size")}
            assert arguments.get("max_mid_channels", 512) == 512  # the released code ignores its own option
            found |= {"warmup_epochs": term.get("warmup_epochs", 0), "stu_preact": arguments.get("student_preact", False)}  # fmt: skip
    optimizer = config["model"]["init_args"]["optimizer"]["init_args"]
    found |= {"lr": optimizer["lr"], "weight_decay": optimizer["weight_decay"], "momentum": optimizer["momentum"]}
    return found | {"batch_size": config["data"]["init_args"]["batch_size"], "epochs": config["trainer"]["max_epochs"]}


def same(ours, theirs):
    if isinstance(ours, bool):
        return str(ours) == theirs
    return float(ours) == pytest.approx(float(theirs))


@pytest.mark.parametrize(
    "cell", [row for row in INDEXED if row["config_method"] and "unpublished" not in row["note"]], ids=name_of
)
def test_every_value_is_the_published_one(tables, cell):  # noqa: F811
    ours = settings(composed(cell), cell["method"])
    pair = [cell[key].replace("_", "-") for key in ("teacher", "student")]
    sources = cell["note"].removeprefix("values: ").split(";")[0].split(", ")
    theirs = defaultdict(dict)
    for row in tables["hparams"]:
        general = [row["dataset"], row["teacher"], row["student"]] == ["*", "*", "*"]
        exact = [row["dataset"], row["teacher"], row["student"]] == [cell["dataset"], *pair]
        if row["method"] == cell["method"] and row["source"] in sources and (general or exact):
            theirs[row["param"]][exact] = row["value"]
    compared = {name: values.get(True, values.get(False)) for name, values in theirs.items() if name in ours}
    assert compared, f"nothing of {sources} is compared"
    if cell["student"] in ("mobilenetv2", "shufflenetv1", "shufflenetv2"):
        compared.pop("lr", None)
    wrong = {name: (ours[name], value) for name, value in compared.items() if not same(ours[name], value)}
    assert not wrong


def test_the_index_says_where_values_are_from():
    assert {row["method"] for row in INDEXED} >= {"crd", "reviewkd", "wttm+crd", "wttm+itrd", "mlkd+rkd", "nkd+vitkd"}
    for row in INDEXED:
        assert row["note"].startswith("values: ")
        assert bool(row["config_own"]) != bool(row["config_method"])
        assert (ROOT / (row["config_own"] or row["config_method"])).is_file()
