"""W&B with servers that refuse, reject or never answer, in this process; none of it may reach training."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import lightning as L
import pytest
import torch
import wandb
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from kdlit import dashboards
from kdlit.dashboards import PatientWandbLogger
from tests.conftest import TinyData, TinyNet

BIN = Path(sys.executable).parent
STEPS = 8  # of each training here


class Server(ThreadingHTTPServer):
    """As much of a W&B server as a run needs, until it is told to reject or to hang."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, status=200, hangs=False):
        super().__init__(("127.0.0.1", 0), Answer)
        self.status, self.hangs, self.received = status, hangs, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode(errors="replace")
        while self.server.hangs:
            time.sleep(0.05)
        self.server.received.append((self.path, body))
        content = json.dumps({"data": self.data(body)} if self.path == "/graphql" else {}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    @staticmethod
    def data(query):
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}
        if "upsertBucket" in query:
            name = json.loads(query)["variables"].get("name")
            return {"upsertBucket": {"bucket": {"id": "b", "name": name, "project": project}, "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": None} for name in json.loads(query)["variables"]["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "serverInfo" in query:
            return {"serverInfo": {"features": []}}
        if "viewer" in query:
            return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return {}


class Net(L.LightningModule):
    """Logs at each step; has a look at its logger, as a user's may."""

    def __init__(self, after_step=lambda step: None):
        super().__init__()
        self.net, self.after_step = TinyNet(), after_step
        self.save_hyperparameters({"depth": 8})

    def training_step(self, batch, _):
        loss = torch.nn.functional.cross_entropy(self.net(batch["image"]), batch["target"])
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, *_):
        self.after_step(self.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(autouse=True)
def _without_a_run_of_other_tests():
    if wandb.run is not None:
        wandb.finish()
    wandb.teardown()


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Point W&B to a server, with a key, all limits being short; gives the place where runs lie."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    for name in ("WANDB_INIT_TIMEOUT", "WANDB_ERROR_REPORTING"):  # the logger sets them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(dashboards, "_LOGIN", 1)

    def at(url, key="a" * 40):
        wandb.teardown()  # what is left of other tests keeps their environment
        monkeypatch.setenv("WANDB_BASE_URL", url)
        if key:
            monkeypatch.setenv("WANDB_API_KEY", key)
        else:
            monkeypatch.delenv("WANDB_API_KEY", raising=False)

    yield at
    wandb.teardown()


@pytest.fixture
def fit(trainer, tmp_path):
    """Train with a logger, end its run, and return the warnings that name W&B."""

    def run(logger, after_step=lambda step: None):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one = trainer(logger=logger, max_epochs=2, log_every_n_steps=1)
            one.fit(Net(after_step), TinyData())
            logger._finish()  # as at the end of the process
        assert one.global_step == STEPS
        return [str(warning.message) for warning in caught if "W&B" in str(warning.message)]

    return run


def records(run):
    """All that a run on disk holds, by W&B's own reader."""
    lines = subprocess.run(
        [BIN / "wandb", "leet", "inspect", "--json", run], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in lines.stdout.splitlines()]


def assert_whole(run):
    kept = records(run)
    history = [record["history"]["item"] for record in kept if record["type"] == "history"]
    assert [row["trainer/global_step"] for row in history] == list(range(STEPS))
    assert all(row["loss"] > 0 for row in history)
    assert {"depth": 8} in [record["config"]["update"] for record in kept if record["type"] == "config"]
    assert kept[-1]["type"] == "exit"


def run_in(warning):
    """The folder that a warning says how to upload."""
    assert "\n" not in warning
    return Path(re.search("`wandb sync --include-online (.*)`$", warning)[1])


@pytest.mark.parametrize(
    ("why", "said"),
    [
        ("refuses", "did not accept the API key within 1 s"),
        ("rejects", "401"),
        ("hangs", "did not accept the API key within 1 s"),
    ],
)
def test_a_server_that_cannot_be_used_leaves_a_whole_run_on_disk(why, said, online, fit, tmp_path):
    if why == "refuses":
        online("http://127.0.0.1:9")
    else:
        online(Server(401 if why == "rejects" else 200, why == "hangs").url)
    begin = time.monotonic()
    (warning,) = fit(PatientWandbLogger(project="p", save_dir=tmp_path))
    assert time.monotonic() - begin < 12  # W&B alone takes 15 s on an idle machine, and 90 s with its own limits
    assert said in warning
    assert run_in(warning).name.startswith("offline-run-")
    if why == "hangs":  # the others differ in the reason alone
        assert_whole(run_in(warning))


def test_a_good_server_gets_everything_while_training_goes_on(online, fit, tmp_path):
    server = Server()
    online(server.url)
    assert fit(PatientWandbLogger(project="p", save_dir=tmp_path)) == []
    assert_uploaded(server)


def assert_uploaded(server):
    streams = [body for path, body in server.received if path.endswith("file_stream")]
    for step in range(STEPS):
        assert any(f'\\"trainer/global_step\\":{step}' in body for body in streams), step
    assert any("depth" in body for path, body in server.received if path == "/graphql")


@pytest.mark.parametrize("hangs_at", [3, STEPS])
def test_a_server_that_hangs_later_delays_the_end_by_the_limit_and_the_run_can_be_uploaded(
    hangs_at, online, fit, tmp_path
):
    server = Server()
    online(server.url)
    times = {}

    def after_step(step):
        server.hangs = server.hangs or step >= hangs_at
        times[step] = time.monotonic()

    logger = PatientWandbLogger(project="p", save_dir=tmp_path)
    (warning,) = fit(logger, after_step)
    assert time.monotonic() - times[STEPS] < 8
    assert times[STEPS] - times[hangs_at] < 3
    assert "within 1 s" in warning
    if hangs_at < STEPS:
        assert_whole(run_in(warning))
        wandb.teardown()
        again = Server()
        command = warning.split("`")[1].split()
        environment = os.environ | {"WANDB_BASE_URL": again.url}
        subprocess.run([BIN / command[0], *command[1:]], check=True, env=environment, timeout=20, capture_output=True)
        assert_uploaded(again)


def offline(tmp_path, **kwargs):
    return PatientWandbLogger(project="p", save_dir=tmp_path, offline=True, **kwargs)


def test_a_wandb_that_cannot_start_at_all_is_asked_no_more(online, monkeypatch, fit, tmp_path):
    asked = []

    def fail(**init):
        asked.append(init["mode"])
        raise OSError("broken")

    monkeypatch.setattr(wandb, "init", fail)
    logger = offline(tmp_path)
    (warning,) = fit(logger)
    assert "start: broken. Training is not affected; nothing is kept" in warning
    assert asked == ["offline", "offline", "disabled"]


def test_failures_within_wandb_are_said_once(online, monkeypatch, fit, tmp_path):
    logger = offline(tmp_path)

    def fail(*_, **__):
        raise wandb.errors.CommError("no way\nthrough")

    monkeypatch.setattr(logger.experiment, "log", fail)
    (warning,) = fit(logger)
    assert "log_metrics: no way." in warning
    assert run_in(warning).exists()


def test_a_hang_within_wandb_ends_in_one_warning_and_no_more_logging(online, monkeypatch, fit, tmp_path):
    logger = offline(tmp_path)
    run, version = logger.experiment, logger.version
    hang = threading.Event()
    monkeypatch.setattr(run, "log", lambda *_, **__: hang.wait())
    monkeypatch.setattr(PatientWandbLogger._patiently, "__defaults__", (0.5,))
    begin = time.monotonic()
    (warning,) = fit(logger)
    assert time.monotonic() - begin < 8
    hang.set()
    assert "hangs for 0.5 s" in warning
    assert run_in(warning).exists()
    assert logger.version == version
    assert logger.experiment.log({"a": 1}) is None  # a stand-in
    assert run._torch._hook_handles == {}


def test_a_folder_that_cannot_be_made_does_not_stop_training(online, fit, tmp_path):
    (tmp_path / "file").write_text("")
    logger = offline(tmp_path / "file" / "runs")
    fit(logger)
    assert logger.experiment is not None


def test_hyper_parameters_join_those_of_a_sweep(online, monkeypatch, tmp_path):
    online("http://127.0.0.1:9")
    (tmp_path / "sweep.yaml").write_text("lr: {value: 0.3}")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(tmp_path / "sweep.yaml"))
    logger = PatientWandbLogger(save_dir=tmp_path)
    with pytest.warns(UserWarning, match="did not accept the API key"):
        logger.log_hyperparams({"depth": 8})
    logger.log_hyperparams({"depth": 20})
    assert dict(logger.experiment.config) == {"lr": 0.3, "depth": 20}
    logger._finish()


def test_pictures_and_tables_are_kept(online, tmp_path):
    logger = offline(tmp_path)
    logger.log_image("picture", [torch.rand(3, 8, 8)])
    logger.log_table("table", columns=["a"], data=[[1]])
    run = Path(logger.experiment.dir).parent
    logger._finish()
    assert {path.parent.name for path in run.glob("files/media/**/*.*")} >= {"images", "table"}


def test_only_the_first_process_logs(online, monkeypatch, tmp_path):
    logger = offline(tmp_path)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger.log_metrics({"a": 1.0}, 0)
    logger.watch(TinyNet())
    assert logger._experiment is None
    assert not (tmp_path / "wandb").exists()


def test_a_logger_that_exists_becomes_patient(online, fit, tmp_path):
    online("http://127.0.0.1:9", key=None)
    logger = WandbLogger(project="p", save_dir=tmp_path)
    logger.__class__ = PatientWandbLogger
    (warning,) = fit(logger)
    assert "no API key" in warning


def test_a_logger_can_be_sent_to_another_process(online, tmp_path):
    logger = offline(tmp_path)
    name = logger.experiment.id
    assert pickle.loads(pickle.dumps(logger))._id == name
    logger._finish()


def test_the_config_is_understood():
    parser = ArgumentParser()
    parser.add_subclass_arguments(Logger, "logger")
    content = yaml.safe_load((Path(__file__).parents[1] / "configs" / "wandb.yaml").read_text())
    config = parser.parse_object({"logger": content["trainer"]["logger"]})
    assert config.logger.class_path == "kdlit.dashboards.PatientWandbLogger"
    assert config.logger.init_args.offline is True
    logger = parser.instantiate(config).logger
    assert isinstance(logger, PatientWandbLogger)
    assert (logger.name, logger.save_dir) == ("kdlit", "runs")


def test_wandb_is_imported_only_when_a_run_starts():
    for node in ast.parse(Path(dashboards.__file__).read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert "wandb" not in [getattr(node, "module", ""), *(alias.name for alias in node.names)]
