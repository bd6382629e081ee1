"""The pages in docs/ hold what they should, and what they say is so; ``bash .ci/docs`` builds them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from kdlit.callbacks import GradientWatch, PlainBaseline, Throughput
from kdlit.losses import CrossEntropyLoss, KDLoss
from kdlit.modules import ClassificationDistillation
from tests.conftest import TinyData, TinyNet

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
REFERENCE = {path.stem: path.read_text() for path in sorted((ROOT / "docs" / "api").glob("*.rst"))}
DIRECTIVE = re.compile(r"^\.\. (automodule|room|manual|autofunction):: (kdlit[\w.]*)$", re.MULTILINE)
INNER = {
    "__init__",
    "__main__",
    "benchmark",
    "cli",
    "command_files",
    "config_errors",
    "files",
    "run_record",
}  # nothing to call in them


def rows(page):
    """The first cells of its tables, as far as they are code."""
    return re.findall(r"^\| `([^`]+)` \|", PAGES[page], flags=re.MULTILINE)


def test_every_public_module_is_in_the_reference():
    named = {name for text in REFERENCE.values() for _, name in DIRECTIVE.findall(text)}
    rooms = {
        path.stem for path in (ROOT / "kdlit").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    missing = {room for room in rooms - INNER if not any(f"{name}.".startswith(f"kdlit.{room}.") for name in named)}
    assert not missing
    assert rooms >= INNER


@pytest.mark.parametrize("page", REFERENCE)
def test_what_the_reference_names_is_there(page):
    found = DIRECTIVE.findall(REFERENCE[page])
    assert found
    for kind, name in found:
        module, _, attribute = name.rpartition(".") if kind == "autofunction" else (name, "", "__doc__")
        assert getattr(importlib.import_module(module), attribute)
    for _, name in (one for one in found if one[0] == "room"):
        package = importlib.import_module(name)
        assert all(getattr(package, public).__doc__ for public in package.__all__)


def test_every_page_is_in_the_contents():
    listed = re.findall(r"^(?:api/)?(\w+)$", PAGES["index"], flags=re.MULTILINE)
    assert sorted(listed) == sorted({*PAGES, *REFERENCE} - {"index"})


def test_every_logged_name_is_explained_and_no_other(trainer):
    module = ClassificationDistillation(
        student=TinyNet(), teacher=TinyNet(), losses={"ce": CrossEntropyLoss(), "kd": KDLoss()}, input_size=(3, 8, 8)
    )
    run = trainer(callbacks=[GradientWatch(), PlainBaseline(), Throughput()], log_every_n_steps=1)
    run.fit(module, TinyData())
    logged = {*run.callback_metrics} - {"loss"}
    logged |= {*run.test(module, TinyData(), verbose=False)[0]}

    names = [name.replace("A/B", "ce/kd") for name in rows("logged")]
    in_training = {name for name in names if name.startswith(("train/", "lr-"))}
    measured = set(names) - in_training
    in_training = {name.replace("NAME", term) for name in in_training for term in ("ce", "kd")}
    rare = {"train/skipped", "lr-OPTIMIZER"}
    table = {name for name in names if name.startswith("val/")} | {"train/grad_cosine/ce/dkd", "train/weighted/dkd"}
    explained = in_training | {f"{stage}/{name}" for stage in ("val", "test") for name in measured - table}
    explained |= {name for name in logged if name.startswith("train/") and name.removeprefix("train/") in measured}
    assert logged - explained == set()
    assert explained - logged - rare - table == set()


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, id=f"{page}_{number}")
        for page, text in PAGES.items()
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    ],
)
def test_code_runs_as_printed(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "page"})


def test_every_message_that_is_explained_exists():
    source = "".join(path.read_text() for path in sorted((ROOT / "kdlit").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # literals over several lines
    messages = [message for message in rows("errors")]
    assert len(messages) > 10
    assert [message for message in messages if message not in source] == []


def test_every_file_that_is_named_exists():
    for text in PAGES.values():
        for name in re.findall(r"`((?:configs|notebooks|kdlit|\.ci)/[\w./]+)`", text):
            assert (ROOT / name).exists(), name
        for name in re.findall(r"\]\(([\w/]+\.(?:md|rst))\)", text):
            assert (ROOT / "docs" / name).exists(), name
