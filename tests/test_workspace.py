"""The W&B workspace: all that a run logs is in it, and making it ends in an address or one clear line."""

from __future__ import annotations

import json
import re
import sys
import time

import pytest
import wandb
import yaml

pytest.importorskip("wandb_workspaces", reason="needs kdlit[wandb]")

from kdlit import dashboards, workspace
from kdlit.runs import Run
from kdlit.workspace import LAYOUT, build, layout, main
from tests.test_dashboards import Answer, Server

CONFIG = """
trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false, log_every_n_steps: 1}
data: {class_path: tests.conftest.TinyData}
torch_threads: 1
model:
  class_path: kdlit.modules.ClassificationDistillation
  init_args:
    student: {class_path: tests.conftest.TinyNet}
    teacher: {class_path: tests.conftest.TinyNet, init_args: {width: 16}}
    input_size: [3, 8, 8]
    losses:
      ce: {loss: {class_path: CrossEntropyLoss}}
      kd: {loss: {class_path: KDLoss}, warmup_epochs: 2}
"""


@pytest.fixture
def logged(tmp_path, kdlit_cli):
    """Names that a run and its test really log."""
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    out = kdlit_cli("fit", "--config=tiny.yaml", "--run_dir=run", *OPTIONS)
    assert "error" not in out, out
    kdlit_cli("test", "--config=run/config.yaml", "--ckpt_path=last")
    tested = json.loads((tmp_path / "run" / "test.json").read_text())
    return set(Run(tmp_path / "run", {}, {}).series()) | {name for name in tested if "/" in name}


OPTIONS = ["--trainer.callbacks+=kdlit.callbacks.GradientWatch"]
ELSEWHERE = ["Steps skipped, not being finite"]  # takes another run than this one


def matches(panel, name):
    return name in panel.names or bool(panel.pattern and re.search(panel.pattern, name))


def test_all_that_a_run_logs_is_shown_and_nothing_else(logged):
    names = logged - {"epoch", "step"}
    panels = [panel for section in list(LAYOUT)[:-1] for panel in LAYOUT[section]]
    assert sorted(name for name in names if not any(matches(panel, name) for panel in panels)) == []
    shown = [panel for panel in panels if panel.title not in ELSEWHERE]
    assert [panel.title for panel in shown if not any(matches(panel, name) for name in names)] == []
    foreign = {name for panel in shown for name in panel.names if name not in names}
    assert foreign == {"val/plain_top1", "test/plain_top1"}  # of a callback


def test_several_students_are_shown():
    names = ["kd/val/top1", "kd/train/top1", "kd/train/loss", "kd/val/agreement"]
    assert [[matches(panel, name) for name in names].index(True) for panel in LAYOUT["Several students in one run"]] == [
        0, 1, 2, 3,
    ]  # fmt: skip
    (rate,) = LAYOUT["Learning rate"]
    assert matches(rate, "lr-SGD")
    assert matches(rate, "kd/lr-SGD/pg1")
    assert not any(matches(panel, "val/top1") for panel in LAYOUT["Several students in one run"])


def test_the_workspace_is_what_the_layout_says():
    spec = json.loads(build("p", "me")._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    sections = spec["section"]["panelBankConfig"]["sections"]
    shown = {}
    for section in sections:
        configs = [panel["config"] for panel in section["panels"]]
        assert all(one["xAxis"] == "trainer/global_step" for one in configs)
        assert all(bool(one["metrics"]) != bool(one.get("useMetricRegex")) for one in configs)
        shown[section["name"]] = {one["chartTitle"]: one["metrics"] or [one["metricRegex"]] for one in configs}
    assert shown == layout()
    assert list(shown) == list(LAYOUT)


def test_the_layout_is_shown_without_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    main(["--print"])
    assert json.loads(capsys.readouterr().out) == layout()
    with pytest.raises(SystemExit, match="2"):
        main(["--project=p"])
    said = capsys.readouterr().err
    assert said == "kdlit: error: kdlit dashboard needs wandb-workspaces: pip install 'kdlit[wandb]'\n"


class Views(Answer):
    """Keeps the views it is given; knows one user."""

    @staticmethod
    def data(query):
        given = json.loads(query).get("variables") or {}
        if "upsertView" in query:
            return {"upsertView": {"view": {"id": "1", "name": "nw-abc-v"}, "inserted": True}}
        if "upsertModel" in query:
            entity = (given.get("input") or given).get("entityName")
            if entity != "me":
                return {"upsertModel": None}
            return {"upsertModel": {"project": {"id": "p", "name": "p"}, "model": {"name": "p"}, "inserted": True}}
        return Answer.data(query)


@pytest.fixture
def at(monkeypatch, tmp_path):
    """Point W&B to a server, with a key, all limits being short."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(dashboards, "_LOGIN", 1)

    def go(url, key="a" * 40):
        wandb.teardown()
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", key) if key else monkeypatch.delenv("WANDB_API_KEY", raising=False)

    yield go
    wandb.teardown()


def test_a_server_gets_the_project_and_the_view(at, capsys):
    server = Server()
    server.RequestHandlerClass = Views
    at(server.url)
    main(["--project=p", "--name=Mine"])
    assert capsys.readouterr().out.strip().endswith("/me/p?nw=abc")
    (view,) = [json.loads(body)["variables"] for _, body in server.received if "upsertView" in body]
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "p", "Mine")
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == list(LAYOUT)
    assert any("upsertModel" in body for _, body in server.received)


@pytest.mark.parametrize("why", ["refuses", "hangs", "no key"])
def test_without_a_server_or_a_key_one_line_says_so_in_time(why, at, capsys, monkeypatch):
    monkeypatch.setattr(workspace, "_LIMIT", 6)
    at(Server(hangs=True).url if why == "hangs" else "http://127.0.0.1:9", key=None if why == "no key" else "a" * 40)
    begin = time.monotonic()
    with pytest.raises(SystemExit, match="2"):
        main(["--project=p"])
    assert time.monotonic() - begin < 20
    said = capsys.readouterr().err
    assert said.startswith("kdlit: error: W&B: ")
    assert len(said.splitlines()) == 1
    assert ("no API key for http://127.0.0.1:9, see `wandb login`" in said) == (why == "no key")


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_a_mode_without_a_server_is_named(mode, at, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", mode)
    at("http://127.0.0.1:9")
    with pytest.raises(SystemExit, match="2"):
        main(["--project=p"])
    assert f"kdlit: error: W&B: its mode is {mode}, but " in capsys.readouterr().err


def test_the_readable_layout_is_plain_data():
    assert yaml.safe_load(yaml.safe_dump(layout())) == layout()
