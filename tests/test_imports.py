"""Who may import whom: the architecture, kept true."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "kdlit"
ALLOWED = {
    "types": {"torch"},
    "files": {"torch", "lightning"},
    "fingerprint": {"torch"},
    "optim": {"torch"},
    "loggers": {"lightning", "kdlit.files"},
    "losses": {"torch", "kdlit.types", "kdlit.models.features", "kdlit.models.layers", "kdlit.models.simkd"},
    "models": {"torch", "torchvision", "safetensors", "timm"},
    "data": {
        "torch",
        "torchvision",
        "lightning",
        "numpy",
        "sklearn",
        "rich",
        "PIL",
        "simplejpeg",
        "litdata",
        "kdlit.fingerprint",
        "kdlit.types",
    },
    "metrics": {"torch"},
    "modules": {
        "numpy",
        "torch",
        "lightning",
        "kdlit.types",
        "kdlit.losses",
        "kdlit.metrics",
        "kdlit.models.features",
        "kdlit.models.folding",
    },
    "callbacks": {
        "torch",
        "torchmetrics",
        "lightning",
        "rich",
        "numpy",
        "kdlit.data",
        "kdlit.files",
        "kdlit.fingerprint",
        "kdlit.loggers",
        "kdlit.metrics",
        "kdlit.modules",
        "kdlit.types",
    },
    "figures": {
        "torch",
        "numpy",
        "sklearn",
        "matplotlib",
        "lightning",
        "kdlit.data",
        "kdlit.losses",
        "kdlit.metrics",
        "kdlit.models",
        "kdlit.modules",
        "kdlit.runs",
        "kdlit.types",
    },
    "scoreboard": {"yaml", "rich", "scipy", "kdlit.command_files", "kdlit.files", "kdlit.runs"},
}
STANDARD = __import__("sys").stdlib_module_names | {"typing_extensions"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_every_room_imports_only_what_the_architecture_allows():
    for room, allowed in ALLOWED.items():
        files = sorted((PACKAGE / room).glob("*.py")) or [PACKAGE / f"{room}.py"]
        for path in files:
            for name in imported(path):
                within = (f"kdlit.{room}", *allowed)
                assert name.split(".")[0] in STANDARD or name.startswith(within), f"{path} imports {name}"


def test_every_room_is_in_the_table():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py") and not path.name.startswith("_")}
    assert rooms - {"py"} == ALLOWED.keys() | {
        *("artefacts", "benchmark", "chain", "cli", "command_files", "config_errors", "dashboards"),
        *("report", "run_record", "runs", "students", "sweeps", "workspace", "zoo"),
    }


def test_wandb_is_named_in_configs_and_its_logger_only():
    for path in PACKAGE.rglob("*.py"):
        assert path.name in ("dashboards.py", "workspace.py") or "wandb" not in set(imported(path)), path
