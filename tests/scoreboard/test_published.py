"""The published values and recipes that are shipped are those of the reference tables and of the configs."""

from __future__ import annotations

import csv
import functools
import inspect
import json
from pathlib import Path

import pytest
import yaml

from kdlit.scoreboard import published, settings
from kdlit.scoreboard.statistics import Sample

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SMALL_RATE = ("mobilenetv2", "shufflenetv1", "shufflenetv2")
# Methods that a paper ran itself, and whose released code reports the best epoch on the test pictures.
RAN = {
    ("cifar100", "dkd"): ("kd", "dkd", "dkd+reviewkd"),
    ("cifar100", "mlkd"): ("mlkd", "mlkd+rkd", "mlkd+reviewkd"),
    ("cifar100", "lskd"): ("kd", "ctkd", "dkd", "mlkd", "kd+ls", "ctkd+ls", "dkd+ls", "mlkd+ls"),
    ("cifar100", "ttm"): ("kd", "ttm", "wttm", "wttm+crd", "wttm+itrd", "itrd"),
    ("cifar100", "rld"): ("kd", "dkd", "rld", "rld+ls", "la", "rc", "lr"),
    ("imagenet", "dkd"): ("kd", "dkd"),
    ("imagenet", "rld"): ("kd", "dkd", "rld", "rld+ls", "la", "rc", "lr"),
}


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


CELLS = read(CONFIGS / "cells.csv")


def load(path):
    content = yaml.safe_load(path.read_text())
    for holder in (content, content.get("model", {}).get("init_args", {})):
        for key, value in holder.items():
            if isinstance(value, str) and value.endswith(".yaml"):
                holder[key] = yaml.safe_load((path.parent / value).read_text())
    return content


@functools.cache
def settings_of_file(path):
    return settings.settings_of(load(path))


def base_recipe(row):
    return (
        f"{row['dataset']}_small_rate"
        if row["dataset"] == "cifar100" and row["student"] in SMALL_RATE
        else row["dataset"]
    )


def recipe_of(row):
    return f"{base_recipe(row)} {row['dataset']}/{Path(row['config_method']).stem}" if row["config_method"] else ""


def defaults_of_losses():
    """What each loss of kdlit takes where nothing is said."""
    from kdlit import losses

    return {
        f"{name}.{argument.name}": argument.default
        for name, loss in vars(losses).items()
        if inspect.isclass(loss) and issubclass(loss, losses.DistillationLoss)
        for argument in inspect.signature(loss).parameters.values()
        if argument.default is not inspect.Parameter.empty
    }


def expected_recipes():
    recipes = {"alone": settings_of_file(CONFIGS / "ablations/ce.yaml")}
    recipes["alone"] = {key: value for key, value in recipes["alone"].items() if key.startswith("model.losses.")}
    recipes["defaults"] = defaults_of_losses()
    for row in CELLS:
        if row["config_method"]:
            base = settings_of_file(ROOT / row["config_pair"])
            own = ("model.student", "model.teacher", "trainer.devices", "data.root")
            recipes[base_recipe(row)] = {key: value for key, value in base.items() if not key.startswith(own)}
            name = recipe_of(row).split()[1]
            recipes[name] = settings_of_file(ROOT / row["config_method"])
    return [
        {"recipe": name, "key": key, "value": json.dumps(value)}
        for name, recipe in sorted(recipes.items())
        for key, value in sorted(recipe.items())
    ]


@functools.cache
def names_of_transformers():
    """The names in kdlit of the networks of a cell that has a config of its own."""
    names = {}
    for row in CELLS:
        if "/transformers/" in row["config_own"]:
            networks = settings.student_and_teacher(load(ROOT / row["config_own"]))
            for there, here in zip((row["student"], row["teacher"]), networks, strict=True):
                names[row["dataset"], there] = here.partition("(")[0]
    return names


def expected_published(shared):
    cells = {(row["dataset"], row["teacher"], row["student"], row["method"]): [] for row in CELLS}
    for row in CELLS:
        cells[row["dataset"], row["teacher"], row["student"], row["method"]].append(row)
    networks = {(row["dataset"], row[key]) for row in CELLS for key in ("teacher", "student")}
    found = {}
    for row in read(shared / "reference/results.csv"):
        main = row["variant"] == ("last epoch" if row["source"] == "crd" else "")
        if row["metric"] != "top1" or not main or row["value"] == "n/a":
            continue
        teacher, student = (row[key].replace("-", "_") for key in ("teacher", "student"))
        key = (row["dataset"], teacher, student, row["method"])
        if row["method"] in ("teacher", "student"):
            network = teacher if row["method"] == "teacher" else student
            if (row["dataset"], network) not in networks:
                continue
            key = (row["dataset"], "", network, "alone")
        elif key not in cells:
            continue
        found.setdefault((*key, row["value"]), []).append(row)
    table = []
    ours = names_of_transformers()
    for (dataset, teacher, student, method, value), rows in sorted(found.items()):
        sources = {row["source"] for row in rows}
        std = next((row for row in rows if row["std"]), None)
        ran = any(method in RAN.get((dataset, source), ()) for source in sources)
        checkpoint = "last" if "crd" in sources else "best on test" if ran and "dist" not in sources else "not stated"
        places = sorted({f"{row['source']} {row['table'].removeprefix('repo:')}" for row in rows})
        if method == "alone":
            has_recipe = dataset == "cifar100" and "crd" in sources
            recipe = f"{base_recipe({'dataset': dataset, 'student': student})} alone" if has_recipe else ""
            guessed = False
        else:
            same = [cell for cell in cells[dataset, teacher, student, method] if cell["top1"] == value]
            recipe = recipe_of(same[0]) if same else ""
            guessed = bool(same) and "unpublished" in same[0]["note"]
        table.append(
            {
                "dataset": dataset, "teacher": ours.get((dataset, teacher), teacher),
                "student": ours.get((dataset, student), student), "method": method, "top1": value,
                "std": std["std"] if std else "", "trials": std["trials"] if std else "",
                "source": "; ".join(places), "checkpoint": checkpoint, "recipe": recipe,
                "settings": "" if not recipe else "guessed" if guessed else "published",
            }
        )  # fmt: skip
    return table


def test_every_published_value_is_one_of_the_reference_table_and_none_is_missing(shared):
    assert read(ROOT / "kdlit/scoreboard/published.csv") == expected_published(shared)


def test_recipes_are_those_of_the_configs():
    assert read(ROOT / "kdlit/scoreboard/recipes.csv") == expected_recipes()


def merged(earlier, later):
    """Mappings merge, but for the losses, where the later file counts alone."""
    result = dict(earlier)
    for key, value in later.items():
        both = isinstance(value, dict) and isinstance(earlier.get(key), dict) and key != "losses"
        result[key] = merged(earlier[key], value) if both else value
    return result


def composed(pair, method):
    return merged(load(CONFIGS / f"cifar100/pairs/{pair}.yaml"), load(CONFIGS / f"cifar100/methods/{method}.yaml"))


def teachers(dataset, teacher):
    return [one.top1 for one in published.find_published(dataset, "", teacher, "student alone")]


def found(config, top1=0.7, teacher_top1=0.7942, lacking=""):
    """The first verdict on a run with three seeds, and the published value."""
    student, teacher = settings.student_and_teacher(config)
    ours = Sample({str(seed): top1 for seed in range(3)}) if top1 is not None else None
    name, data = settings.method_name(config), settings.data_name(config)
    first = published.find_published(data, teacher, student, name)[0]
    return published.verdict(first, ours, settings.settings_of(config), teacher_top1, lacking), first


@pytest.mark.parametrize(
    "row",
    [row for row in CELLS if row["config_method"]][::9],
    ids=lambda row: "-".join((row["teacher"], row["student"], row["method"])),
)
def test_the_config_of_a_cell_is_named_as_the_cell_and_gets_a_verdict(row):
    config = merged(load(ROOT / row["config_pair"]), load(ROOT / row["config_method"]))
    student, teacher = settings.student_and_teacher(config)
    cell = (settings.data_name(config), teacher, student, settings.method_name(config))
    values = {one.top1: one for one in published.find_published(*cell)}
    ours = Sample({"0": float(row["top1"]) / 100})
    top1 = teachers(row["dataset"], teacher)[0] / 100
    verdict = published.verdict(values[float(row["top1"])], ours, settings.settings_of(config), top1, "")
    assert (verdict.word, verdict.why) == ("agrees", "")
    assert verdict.published.guessed == ("unpublished" in row["note"])


def test_the_tolerance_is_two_standard_errors_of_the_difference():
    # three seeds of ours, five of theirs; 0.25 is printed, and no smaller than that of ours
    verdict, one = found(composed("resnet32x4_resnet8x4", "kd"), 0.7333 - 0.0036)
    assert (one.top1, one.std, one.trials, one.checkpoint) == (73.33, 0.25, 5, "last")
    assert verdict.tolerance == pytest.approx(2 * 0.25 * (1 / 3 + 1 / 5) ** 0.5)
    assert (verdict.word, verdict.difference) == ("agrees", pytest.approx(-0.36))
    assert found(composed("resnet32x4_resnet8x4", "kd"), 0.7333 - 0.0037)[0].word == "below"
    assert found(composed("resnet32x4_resnet8x4", "kd"), 0.7333 + 0.0037)[0].word == "above"
    spread = Sample({"0": 0.72, "1": 0.74})
    assert published.tolerance(spread, one) == pytest.approx(2 * 2**0.5 * (1 / 2 + 1 / 5) ** 0.5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"trainer": {"max_epochs": 30}}, "trainer.max_epochs 30, theirs 240"),
        ({"trainer": {"limit_train_batches": 0.1}}, "trainer.limit_train_batches 0.1, theirs None"),
        ({"data": {"init_args": {"val_size": 5000}}}, "data.val_size 5000, theirs 0"),
        ({"data": {"init_args": {"subset": 0.5}}}, "data.subset 0.5, theirs 1"),
        ({"data": {"init_args": {"label_noise": 0.1}}}, "data.label_noise 0.1, theirs 0"),
        ({"data": {"init_args": {"batch_size": 128}}}, "data.batch_size 128, theirs 64"),
        ({"data": {"init_args": {"size": 64}}}, "data.size 64, theirs None"),
        ({"data": {"init_args": {"interpolation": "nearest"}}}, "data.interpolation 'nearest', theirs 'bilinear'"),
        ({"data": {"init_args": {"subset_by": "x.pt"}}}, "data.subset_by 'x.pt', theirs None"),
        ({"data": {"init_args": {"teacher_input": {"size": 64}}}}, "data.teacher_input.size 64, theirs None"),
        ({"trainer": {"sync_batchnorm": True}}, "trainer.sync_batchnorm True, theirs False"),
        ({"trainer": {"limit_train_batches": 1}}, "trainer.limit_train_batches '1 batch', theirs None"),
        ({"model": {"init_args": {"performance": "fast"}}}, "model.performance 'fast', theirs 'exact'"),
        ({"model": {"init_args": {"optimizer": {"init_args": {"dampening": 0.9}}}}}, "model.optimizer.dampening 0.9, theirs 0"),
        ({"model": {"init_args": {"optimizer": {"init_args": {"maximize": True}}}}}, "model.optimizer.maximize True, theirs False"),
        ({"model": {"init_args": {"student": {"class_path": "kdlit.models.from_checkpoint", "init_args": {"path": "s.pt", "model": {"class_path": "kdlit.models.resnet8x4"}}}}}}, "model.student.path 's.pt', theirs None"),
        ({"data": {"init_args": {"flip": False}}}, "data.flip False, theirs True"),
        ({"model": {"init_args": {"optimizer": {"init_args": {"lr": 0.1}}}}}, "model.optimizer.lr 0.1, theirs 0.05"),
        ({"trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.EarlyStopping"}]}}, "trainer.callbacks"),
    ],
)  # fmt: skip
def test_another_recipe_gets_no_verdict(change, reason):
    verdict, _ = found(merged(composed("resnet32x4_resnet8x4", "kd"), change))
    assert verdict.word == "not comparable"
    assert verdict.tolerance is None
    assert verdict.why.startswith("other recipe: ")
    assert reason in verdict.why


@pytest.mark.parametrize(
    ("term", "values", "reason"),
    [
        ("kd", {"weight": 0.5}, "KDLoss.weight 0.5, theirs 0.9"),
        ("kd", {"warmup_epochs": 20}, "KDLoss.warmup_epochs 20, theirs 0"),
        ("kd", {"loss": {"class_path": "KDLoss", "init_args": {"temperature": 2.0}}}, "temperature 2.0, theirs 4.0"),
        (
            "ce",
            {"loss": {"class_path": "CrossEntropyLoss", "init_args": {"label_smoothing": 0.1}}},
            "label_smoothing 0.1",
        ),
    ],
)
def test_other_values_of_the_method_get_no_verdict(term, values, reason):
    config = composed("resnet32x4_resnet8x4", "kd")
    config["model"]["init_args"]["losses"][term] |= values
    assert reason in found(config)[0].why


@pytest.mark.parametrize(
    ("method", "place", "argument", "value", "reason"),
    [
        ("crd", (), "negatives_from", "all", "CRDLoss.negatives_from 'all', theirs 'other_classes'"),
        ("crd", (), "negatives_from", "other_classes", ""),
        ("kd_ls_t2_w9", ("init_args", "loss"), "temperature", 7.0, "temperature 7.0, theirs 2.0"),
        ("kd_ls_t2_w9", (), "eps", 0.1, "eps 0.1, theirs 1e-07"),
    ],
)
def test_arguments_of_a_loss_that_no_recipe_names_have_to_be_its_defaults(method, place, argument, value, reason):
    config = composed("resnet32x4_resnet8x4", method)
    terms = config["model"]["init_args"]["losses"].values()
    loss = next(term["loss"] for term in terms if term["loss"]["class_path"] != "CrossEntropyLoss")
    for key in place:
        loss = loss[key]
    loss.setdefault("init_args", {})[argument] = value
    why = found(config)[0].why
    assert reason in why if reason else not why


def test_cells_of_transformers_are_found_by_the_names_that_their_configs_give():
    own = [row for row in CELLS if "/transformers/" in row["config_own"]]
    for row in own:
        config = load(ROOT / row["config_own"])
        student, teacher = settings.student_and_teacher(config)
        data = row["dataset"]
        values = published.find_published(
            data, f"{teacher}(pretrained=True)", f"{student}(drop_path=0.1)", settings.method_name(config)
        )
        assert float(row["top1"]) in [one.top1 for one in values]
    assert len(own) == 10


def test_what_else_stands_in_the_way_of_a_verdict():
    config = composed("resnet32x4_resnet8x4", "kd")
    assert found(config)[0].why == ""
    assert found(config, teacher_top1=None)[0].why.startswith("teacher not measured on the test pictures")
    assert found(config, teacher_top1=0.7850)[0].why == "other teacher: top-1 78.50, theirs 79.42"
    assert found(config, None)[0].why.startswith("no figure of the last epoch on the test pictures")
    assert found(config, lacking="unfinished runs")[0].why == "unfinished runs"
    unknown = next(one for one in published.all_published() if one.method == "takd")
    assert (
        published.verdict(unknown, Sample({"0": 0.7}), {}, None, "").why
        == "the settings behind this value are not known"
    )


def test_other_data_networks_and_methods_have_no_published_value():
    cell = ("CIFAR100", "resnet32x4", "resnet8x4", "KD")
    assert [one.top1 for one in published.find_published(*cell)] == [73.33]
    assert published.find_published("ImageNet", "resnet34", "resnet18", "KD")[0].dataset == "imagenet"
    for place, other in enumerate(("DigitPairs", "resnet56", "mylab.resnet8x4", "mylab.KD")):
        assert published.find_published(*(other if at == place else one for at, one in enumerate(cell))) == []
    assert [one.top1 for one in published.find_published("CIFAR100", "any", "resnet8x4", "student alone")] == [72.5]


def test_most_deviations_that_are_printed_are_of_the_size_that_is_taken_for_typical():
    printed = sorted(one.std for one in published.all_published() if one.std is not None)
    assert printed[len(printed) // 2] == pytest.approx(published.TYPICAL_STD, abs=0.05)
