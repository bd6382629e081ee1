"""What defines a run, as flat settings; and the names of its method, networks and data that follow from them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kdlit.command_files import flat

# What is watched, kept and where it runs, none of which changes what a run computes. The seed is told apart by itself.
_FREE = (
    *("seed_everything", "config", "run_dir", "ckpt_path", "accept_changes", "weights_only", "torch_threads"),
    *("students", "checkpoint", "last"),
    *("data.num_workers", "data.eval_batch_size"),
    *(
        f"trainer.{name}"
        for name in (
            *("accelerator", "devices", "num_nodes", "strategy", "logger", "log_every_n_steps", "profiler", "plugins"),
            *("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "enable_autolog_hparams"),
            *("max_time", "num_sanity_val_steps", "check_val_every_n_epoch", "val_check_interval", "benchmark"),
            *("detect_anomaly", "limit_test_batches", "limit_predict_batches", "inference_mode", "barebones"),
            *("default_root_dir", "model_registry", "use_distributed_sampler"),
        )
    ),
)
# Likewise for the data of kdlit; what such arguments mean to others nobody knows.
_FREE_OF_DATA = ("data.seed", "data.download", "data.verify", "data.broken")
_PUBLISHED_PICTURES = ("CIFAR10", "CIFAR100", "STL10", "TinyImageNet")  # by their sums, wherever they lie
_LIMITS = tuple(f"trainer.{name}" for name in ("limit_train_batches", "limit_val_batches", "overfit_batches"))
# Callbacks that change nothing: those of Lightning named here, and all of kdlit, which have lost their package.
_WATCHERS = re.compile(
    r"\w+$|.*\.(DeviceStatsMonitor|LearningRateMonitor|ModelCheckpoint|\w*ProgressBar|\w*ModelSummary)$"
)
TEACHER = "model.teacher"
LOSSES = "model.losses"
_WITHOUT_VALUES = ("num_classes", "path", "part", "model")  # arguments of a network that its name needs not tell
_LOSS_NAMES = {"MLKDTwoView": "MLKD", "MLKDSingleView": "MLKD", "CATKD": "CAT-KD"}
ALONE = "student alone"
CHAIN = "TAKD"  # KD, and so was the teacher trained, from a teacher of its own


def settings_of(config: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The values that decide what a run computes, by dotted key; two runs that differ in their seed alone share them.

    Classes of kdlit lose their package, so that ``kdlit.losses.KDLoss`` is ``KDLoss``; any other keeps its whole path.
    Losses are named by their classes, and those of weight 0 are left out. A teacher is known by the fingerprint of its
    weights, where the record has it, and not by where its file lies; so are the training and validation pictures of
    kdlit's own data. ``data.batch_size`` counts the pictures of all processes together.

    Args:
        config: content of ``config.yaml``.
        record: content of ``run.json``.
    """
    simple = _simple(config)
    model = simple.get("model")
    if isinstance(model, dict) and isinstance(model.get("losses"), dict):
        model["losses"] = _terms(model["losses"])
    if isinstance(trainer := simple.get("trainer"), dict) and (callbacks := _acting(trainer.pop("callbacks", None))):
        trainer["callbacks"] = callbacks
    settings: dict[str, Any] = {key: value for key, value in flat(simple).items() if not _lies_in(key, _FREE)}
    of_losses = re.compile(rf"{re.escape(LOSSES)}\..*\.class$")  # which their names tell
    settings = {key: value for key, value in settings.items() if not of_losses.match(key)}
    record = record or {}
    weights = _within(record, "teacher", "weights")
    if weights and isinstance(model, dict) and model.get("teacher"):
        settings = {key: value for key, value in settings.items() if not re.match(rf"{TEACHER}\..*\bpath$", key)}
        settings[f"{TEACHER}.weights of"] = weights
    for part in ("train", "val"):
        if pictures := _within(record, "data", part, "pictures"):
            settings[f"data.{part} pictures"] = pictures
    if is_own_data(config):
        is_published = settings.get("data.class") in _PUBLISHED_PICTURES and settings.get("data.verify") is not False
        root = ("data.root",) if is_published or "data.train pictures" in settings else ()
        free = (*_FREE_OF_DATA, *root)
        settings = {key: value for key, value in settings.items() if key not in free}
    for key in _LIMITS:
        if type(settings.get(key)) is int and settings[key] == 1:
            settings[key] = "1 batch"  # which equals 1.0, that is all
    starts = record.get("starts")
    processes = _within(starts[-1], "processes") if isinstance(starts, list) and starts else 1
    if isinstance(batch := settings.get("data.batch_size"), int) and isinstance(processes, int):
        settings["data.batch_size"] = batch * processes
    return settings


def _simple(value: Any) -> Any:
    """The same without ``init_args`` and with short names of kdlit's classes."""
    if isinstance(value, dict):
        if isinstance(path := value.get("class_path"), str) or "init_args" in value:
            arguments = _simple(value.get("init_args") or {})
            short = {"class": printable(re.sub(r"^kdlit\.\w+\.", "", path))} if isinstance(path, str) else {}
            return short | (arguments if isinstance(arguments, dict) else {"init_args": arguments})
        return {printable(str(key)): _simple(one) for key, one in value.items()}
    if isinstance(value, str):
        return printable(value)
    return [_simple(one) for one in value] if isinstance(value, list) else value


def printable(text: str) -> str:
    r"""A text with line ends, control characters and bytes that are no UTF-8 written out, as ``\n``.

    Args:
        text: a name of anything, or what was said about it.
    """
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _terms(losses: Mapping[str, Any]) -> dict[str, Any]:
    """The terms of a loss by class, each with ``loss``, ``weight`` and what else is set for it."""
    terms: dict[str, Any] = {}
    named = []
    for term in losses.values():
        if not isinstance(term, dict):
            continue
        whole = term if term.get("class", "WeightedLoss") == "WeightedLoss" else {"loss": term}
        whole = {"weight": 1.0, "warmup_epochs": 0} | {key: one for key, one in whole.items() if key != "class"}
        if whole["weight"] != 0:
            named.append((_chain(whole["loss"]), str(sorted(map(str, flat(whole).items()))), whole))
    for name, _, whole in sorted(named, key=lambda one: one[:2]):
        place, count = name, 1
        while place in terms:
            count += 1
            place = f"{name} {count}"
        terms[place] = whole
    return terms


def _chain(loss: Any) -> str:
    """``LogitStandardization(KDLoss)``."""
    if not isinstance(loss, dict) or "class" not in loss:
        return str(loss)
    inner = loss.get("loss")
    name = f"{loss['class']}({_chain(inner)})" if isinstance(inner, dict) else str(loss["class"])
    return f"{name} on the strong view" if loss.get("strong_view") is True else name


def _acting(callbacks: Any) -> list[Any]:
    given = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    return [one for one in given if not isinstance(one, dict) or not _WATCHERS.match(str(one.get("class")))]


def _lies_in(key: str, places: tuple[str, ...]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)


def _within(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


# What differs


def conditions(settings: Mapping[str, Any], with_teacher: bool = True) -> dict[str, Any]:
    """All settings but those of the method: its losses and the second view that some of them compare.

    Args:
        settings: from :func:`settings_of`.
        with_teacher: whether the teacher is one of the conditions.
    """
    method = (LOSSES, "data.strong_view", *(() if with_teacher else (TEACHER, "data.teacher_input")))
    return {key: value for key, value in settings.items() if not _lies_in(key, method)}


def differing(some: list[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all of some settings, sorted."""
    keys = sorted({key for settings in some for key in settings})
    return [key for key in keys if any(settings.get(key, _ABSENT) != some[0].get(key, _ABSENT) for settings in some)]


_ABSENT = "absent"


def told(settings: Mapping[str, Any], keys: list[str], most: int = 4) -> str:
    """Some settings in few words, as ``beta=8.0, lr=0.05``.

    Args:
        settings: all of them.
        keys: those to tell; no more than ``most`` are, and how many are not. Fingerprints are told if nothing else is.
        most: how many.
    """
    keys = [key for key in keys if " " not in key.rpartition(".")[2]] or keys
    names = {key: key.rpartition(".")[2] for key in keys}
    clear = {key: name if list(names.values()).count(name) == 1 else _longer(key) for key, name in names.items()}
    texts = [f"{clear[key]}={_value(settings.get(key, _ABSENT))}" for key in keys]
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return ", ".join(texts[:most] + more)


def _longer(key: str) -> str:
    return re.sub(r"^(model|trainer|data)\.(losses\.)?", "", key).replace(".loss.", ".")


def _value(value: Any) -> str:
    text = str(value)
    return text[:8] if re.fullmatch(r"[0-9a-f]{64}", text) else text if len(text) <= 40 else f"{text[:37]}..."


# Names


def method_name(config: Mapping[str, Any]) -> str:
    """The method of a run by its losses, as ``KD``, ``KD + LS`` or ``WTTM + CRD``; cross-entropy goes without saying.

    A class of kdlit is named without its ``Loss``, any other with its package; wrappers follow what they wrap. A
    module other than those for classification is named in front; one that has no losses in its config is all there is.

    Args:
        config: content of ``config.yaml``.
    """
    model = _simple(config).get("model")
    model = model if isinstance(model, dict) else {}
    kind = str(model.get("class", "unknown module"))
    losses = model.get("losses")
    if kind == "MutualLearning" and losses is None:
        return "DML"
    if not isinstance(losses, dict):
        return kind
    names = [_loss_name(term["loss"]) for term in _terms(losses).values()]
    names = list(dict.fromkeys(name for name in names if name != "CrossEntropy"))
    if len(names) > 1:  # LR's own cross-entropy is part of it
        names = [name for name in names if name != "TeacherRightCrossEntropy"]
    name = " + ".join(sorted(names)) or ALONE
    return name if kind in ("ClassificationDistillation", "MutualLearning") else f"{kind}: {name}"


def _loss_name(loss: Any) -> str:
    if not isinstance(loss, dict) or "class" not in loss:
        return str(loss)
    own = str(loss["class"]).removesuffix("Loss")
    if isinstance(inner := loss.get("loss"), dict):
        wrapped = _loss_name(inner)
        if own == "OnHead":
            return wrapped
        if own in ("GlobalTemperature", "InstanceTemperature") and wrapped == "KD":
            return "CTKD"
        return f"{wrapped} + {'LS' if own == 'LogitStandardization' else own}"
    return _LOSS_NAMES.get(own, own) + (" + LS" if loss.get("standardize") is True else "")


def network_name(network: Any) -> str:
    """A network as ``resnet8x4`` or ``ResNet(depth=8)``; empty for none.

    Args:
        network: its place in a config: ``class_path`` and ``init_args``.
    """
    simple = _simple(network)
    if not simple:
        return ""
    if not isinstance(simple, dict) or "class" not in simple:
        return re.sub(r"^(kdlit|torchvision)\.models\.", "", str(simple))
    name = str(simple["class"])
    if isinstance(inner := simple.get("model"), (dict, str)) and name == "from_checkpoint":
        return network_name(inner)
    if name.startswith("torchvision.models."):
        return name.rpartition(".")[2]
    own = {key: one for key, one in simple.items() if key not in ("class", *_WITHOUT_VALUES)}
    said = ", ".join(f"{key}={_value(one)}" for key, one in own.items() if one is not None and one is not False)
    return f"{name}({said})" if said else name


def student_and_teacher(config: Mapping[str, Any]) -> tuple[str, str]:
    """The names of both networks of a run, each empty where the config names none.

    Args:
        config: content of ``config.yaml``.
    """
    model = config.get("model")
    arguments = model.get("init_args") if isinstance(model, dict) else None
    arguments = arguments if isinstance(arguments, dict) else {}
    students = arguments.get("students")
    if isinstance(students, (dict, list)) and students:  # that teach each other: the first is the one that is measured
        several = list(students.values()) if isinstance(students, dict) else students
        first, *others = map(network_name, several)
        return first, ", ".join(others)
    student = arguments.get("student") or arguments.get("backbone")
    return network_name(student), network_name(arguments.get("teacher"))


def data_name(config: Mapping[str, Any]) -> str:
    """The class of the data module.

    Args:
        config: content of ``config.yaml``.
    """
    data = _simple(config).get("data")
    return str(data.get("class", "unknown data")) if isinstance(data, dict) else "unknown data"


def is_own_data(config: Mapping[str, Any]) -> bool:
    """Whether the data module is one of kdlit, whose arguments are known.

    Args:
        config: content of ``config.yaml``.
    """
    return "." not in data_name(config)
