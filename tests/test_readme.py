"""What the README shows runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from kdlit.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands():
    for block in blocks("sh"):
        yield from (
            command for line in block.splitlines() for command in line.split(" && ") if command.startswith("kdlit")
        )


@pytest.mark.parametrize("code", blocks("python"), ids=["distil", "own loss"])
def test_python_runs_as_printed(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    if "trainer" in names:
        assert names["trainer"].current_epoch == 40
        assert names["trainer"].callback_metrics["val/teacher_top1"] > 0.9
        assert names["trainer"].callback_metrics["val/top1"] > 0.3
    else:
        assert names["ConfidenceGap"]().needs_teacher


@pytest.mark.parametrize("command", list(commands()))
def test_commands_are_understood(command, kdlit_cli, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = [part for part in command.split()[1:] if part != "--ckpt_path=last"]
    if arguments[0] in COMMANDS and arguments[0] != "chain":
        out = kdlit_cli(arguments[0], "--help")
        assert all(option.partition("=")[0] in out for option in arguments if option.startswith("--"))
        return
    out = kdlit_cli(*arguments, "--print_config")
    assert "class_path: kdlit.modules.ClassificationDistillation" in out
    assert "error" not in out


@pytest.mark.parametrize("text", blocks("yaml"), ids=["teacher_input"])
def test_configs_are_understood(text, kdlit_cli, monkeypatch, tmp_path):
    path = tmp_path / "readme.yaml"
    path.write_text(text)
    monkeypatch.chdir(ROOT)
    pair = "configs/imagenet/pairs/resnet34_resnet18.yaml"
    out = kdlit_cli("fit", "--config", pair, "--config", path, "--model.losses.ce=CrossEntropyLoss", "--print_config")
    config = yaml.safe_load(out.split("exit")[0])
    assert config["data"]["init_args"]["teacher_input"]["size"] == 384
    assert config["model"]["init_args"]["teacher_input_size"] == [3, 384, 384]


def test_there_are_exactly_two_set_up_commands():
    section = README.split("## Set up")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```sh\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    assert block.splitlines() == [
        "pip install -e . && kdlit fit --config configs/quickstart.yaml",
        'pip install -e ".[dev]" && pytest',
    ]


def test_every_file_the_readme_names_is_there():
    for name in re.findall(r"`((?:configs|notebooks|kdlit|\.ci)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`methods/([\w]+)\.yaml`", README):
        assert (ROOT / "configs" / "cifar100" / "methods" / f"{name}.yaml").exists()
