"""Is the report whole, true and harmless, whatever lies in the folder of a run?"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kdlit.figures import draw_logit_moments_map, draw_logit_range, draw_top_classes
from kdlit.losses import CrossEntropyLoss, KDLoss
from kdlit.modules import ClassificationDistillation, MutualLearning
from kdlit.report import main, report_html
from kdlit.runs import Run, find_runs
from tests.conftest import TinyData, TinyNet
from tests.report.cases import HOSTILE, logged, write_run


class Page(HTMLParser):
    """What a browser would make of the page: ids, addresses, scripts, text, the cells of each table."""

    def __init__(self, html):
        super().__init__()
        self.ids, self.addresses, self.elements, self.attributes = [], [], [], set()
        self.scripts, self.text, self.rows, self.headings = [], [], [], []
        self.inside = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        if tag not in ("meta", "img", "input", "br", "line", "rect", "path", "use", "image"):
            self.inside.append(tag)
        for name, value in attributes:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "srcset", "action", "xlink:href"):
                self.addresses.append(value)
            self.addresses += re.findall(r"url\(([^)]*)\)", value or "")
        if tag == "tr":
            self.rows.append([])
        if tag == "data":
            self.rows[-1].append(float(dict(attributes)["value"]))
        if tag == "th":
            self.rows[-1].append("")

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass

    def handle_data(self, data):
        if "script" in self.inside:
            self.scripts.append(data)
        elif "style" in self.inside:
            self.addresses += re.findall(r"url\(([^)]*)\)|@import", data)
        else:
            self.text.append(data)
        if "th" in self.inside and self.rows and self.rows[-1] and isinstance(self.rows[-1][-1], str):
            self.rows[-1][-1] += data
        if self.inside and self.inside[-1] in ("h1", "h2", "h3", "h4"):
            self.headings.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    def row(self, name):
        return next(row[1:] for row in self.rows if row and str(row[0]).strip() == name)


def page(*folders, **options):
    html = report_html(find_runs(folders), **({"without_networks": True} | options))
    return Page(html), html


@pytest.fixture
def networks(monkeypatch):
    """Makes every run one of small networks, without its config."""

    def choose(module=None, data=None):
        monkeypatch.setattr("kdlit.figures.all_figures", lambda outputs: {})
        if module is None:
            module = ClassificationDistillation(
                TinyNet(), {"ce": CrossEntropyLoss(), "kd": KDLoss()}, teacher=TinyNet(), input_size=(3, 8, 8)
            )
        monkeypatch.setattr(Run, "rebuild", lambda self: (module.eval(), data or TinyData()))
        return module

    return choose


def test_a_hostile_run_gives_a_page_that_is_whole_and_asks_for_nothing(tmp_path, networks, monkeypatch):
    class Hostile(TinyData):
        def load(self):
            pictures = super().load()
            self.class_names = [HOSTILE, "</style>", "$_{", "a\nb\x00", "-->\udce9"]
            return pictures

    networks(data=Hostile())
    monkeypatch.setattr("kdlit.figures.all_figures", lambda said: {"top": draw_top_classes(said)})  # the one with names
    read, html = page(write_run(tmp_path / "a<b>&c", everything=True), without_networks=False, pictures=2)
    assert len(read.ids) == len(set(read.ids))
    assert {address[:5] for address in read.addresses} <= {"data:"} | {
        one[:5] for one in read.addresses if one[0] == "#"
    }
    assert {one[1:] for one in read.addresses if one.startswith("#")} <= set(read.ids)
    assert len(read.scripts) == 1
    assert "alert(" not in read.scripts[0]
    assert not any(name.startswith("on") for name in read.attributes)
    assert read.elements.count("script") == 1
    assert "<script>alert" not in html.lower()
    assert html.count("</style>") == 2
    assert "default-src 'none'" in html
    assert HOSTILE in " ".join(read.text)  # told as it is, in words
    assert "a<b>&c" in read.words
    assert read.headings.count(read.headings[0]) == 1
    assert "missing:" not in read.words
    assert "could not be used" not in read.words
    assert html.count("<svg") > 20
    assert "mathdefault" not in html


def test_the_final_table_has_the_figures_of_the_log(tmp_path):
    folder = write_run(tmp_path / "run", epochs=12, planned=12)
    read, _ = page(folder)
    top1 = [float(row["val/top1"]) for row in csv.DictReader((folder / "metrics.csv").open())]
    last, mean, best, test = read.row("student")
    assert (last, best, test) == (top1[-1], max(top1), 0.625)
    assert mean == pytest.approx(sum(top1[-10:]) / 10)
    assert read.row("teacher") == [logged(11)["val/teacher_top1"], 0.75]
    assert read.row("repeats the mistake") == [0.2, pytest.approx(0.5)]
    assert "chosen on these pictures" in read.words


def test_what_makes_figures_doubtful_is_said(tmp_path):
    read, _ = page(write_run(tmp_path / "run", epochs=2, planned=9))
    for words in (
        "the log ends after epoch 2 of 9",
        "The teacher was right on 50.00 % of 1,000 pictures before training, 40.00 points below",
        "Went on with other settings at start 2",
        "The test figures are of best.ckpt",
        "not committed",
        "Not finite in some epochs: train/loss",
        "10.00 % of the training labels",
        "best epoch was chosen on the validation pictures",
    ):
        assert words in read.words


def test_a_test_of_other_pictures_is_said(tmp_path):
    test = {
        "checkpoint": "last.ckpt",
        "epochs": 3,
        "test/top1": 0.5,
        "limit_batches": 1,
        "otherwise": "data.mean 0 -> 1",
    }
    read, _ = page(write_run(tmp_path / "run", test__json=json.dumps(test)))
    assert "of a part of the pictures: limit_test_batches 1." in read.words
    assert "The student was tested otherwise than trained: data.mean 0" in read.words
    read, _ = page(write_run(tmp_path / "all", test__json=json.dumps(test | {"limit_batches": 1.0, "otherwise": ""})))
    assert "a part of the pictures" not in read.words
    assert "otherwise than trained" not in read.words


def test_a_run_that_is_as_it_should_be_is_not_warned_of(tmp_path):
    log = "step,epoch,train/loss,val/top1\n1,0,2.0,0.5\n"
    read, html = page(write_run(tmp_path / "run", planned=1, metrics__csv=log, run__json=None, test__json=None))
    assert 'class="warning"' not in html
    assert "There is no run.json" in read.words


@pytest.mark.parametrize(
    "broken",
    [
        {"metrics__csv": "step,epoch,train/loss\n1,here,\x00\n"},
        {"metrics__csv": ""},
        {"metrics__csv": None},
        {"run__json": '{"starts": [3], "data": 4, "teacher": "x"}'},
        {"run__json": '{"starts": [{"git": 3, "versions": [], "machine": 4, "changes": 5}], "data": {"val": 3}}'},
        {"test__json": '{"test/top1": "much", "checkpoint": 3}'},
        {"test__json": "no json"},
        {"config__yaml": "model: 3\ndata: [1]\ntrainer: x\n"},
        {"metrics__csv": "step,epoch,val/top1,lr-SGD\n1,0,nan,inf\n"},
    ],
)
def test_broken_files_leave_a_report_of_what_there_is(tmp_path, broken):
    read, _ = page(write_run(tmp_path / "run", **broken))
    assert "What was run" in read.headings
    assert len(read.ids) == len(set(read.ids))


def test_a_run_that_cannot_be_rebuilt_is_told_as_such_and_none_is_where_not_asked(tmp_path, monkeypatch):
    def gone(self):
        print("error: no class mylab.Gone", file=sys.stderr)
        raise ValueError("config.yaml cannot be used any more")

    monkeypatch.setattr(Run, "rebuild", gone)
    folder = write_run(tmp_path / "run")
    read, _ = page(folder, without_networks=False)
    assert "could not be used: error: no class mylab.Gone ValueError: config.yaml cannot be used" in read.words
    assert "could not be used" not in page(folder)[0].words
    assert "by --without_networks" in page(folder)[0].words


def test_the_checkpoint_is_named_and_a_broken_one_too(tmp_path, networks, monkeypatch):
    module = networks()

    def rebuild(self):
        print("kdlit: warning: last.ckpt is damaged; going on from best.ckpt, the newest whole one")
        return module.eval(), TinyData()

    monkeypatch.setattr(Run, "rebuild", rebuild)
    monkeypatch.setattr("kdlit.cli.whole_one", lambda folder: folder / "best.ckpt")
    monkeypatch.setattr("kdlit.cli.epochs_of", lambda path: 7)
    read, _ = page(write_run(tmp_path / "run"), without_networks=False, pictures=0)
    assert "by the student of best.ckpt, epoch 7 and its teacher" in read.words
    assert "last.ckpt is damaged; going on from best.ckpt" in read.words


def test_tables_of_classes_and_confusions_count_right(tmp_path, networks):
    class Constant(TinyNet):
        def __init__(self, said):
            super().__init__()
            self.said = said

        def forward(self, image):
            return 3.0 * torch.nn.functional.one_hot(torch.full((len(image),), self.said), 5) + 0 * super().forward(
                image
            )

    losses = {"ce": CrossEntropyLoss()}
    networks(ClassificationDistillation(Constant(1), losses, teacher=Constant(2), input_size=(3, 8, 8)))
    read, html = page(write_run(tmp_path / "run"), without_networks=False, split="test", pictures=3)
    assert "On 40 test pictures" in read.words
    assert read.row("c → b") == [1.0, 1.0, 0.0]  # the teacher is right there
    assert read.row("a → b") == [1.0, 0.0, 0.0]
    assert read.row("a") == [0.0, 0.0]
    assert read.row("b") == [1.0, 0.0]
    assert "Teacher right, student wrong (8 pictures" in read.words
    assert "Student right, teacher wrong (8 pictures" in read.words
    assert "Both wrong, each in its own way (24 pictures" in read.words
    assert html.count('<img class="crisp"') == 12


def test_networks_without_teacher_or_with_data_of_any_kind(tmp_path, networks):
    folder = write_run(tmp_path / "run")
    losses = {"ce": CrossEntropyLoss()}
    networks(ClassificationDistillation(TinyNet(), losses, input_size=(3, 8, 8)))
    read, _ = page(folder, without_networks=False)
    assert "no teacher, so there is nothing to compare" in read.words
    assert "Worst classes, on 32 validation pictures" in read.headings
    networks(MutualLearning([TinyNet(), TinyNet()], input_size=(3, 8, 8)), TinyData(val_size=0))
    read, _ = page(folder, without_networks=False)
    assert "Worst classes, on 40 test pictures" in read.headings

    import lightning as L

    class Own(L.LightningDataModule):
        def test_dataloader(self):
            image, target = torch.randn(20, 3, 8, 8), torch.arange(20) % 5
            return DataLoader(TensorDataset(image, target), batch_size=8)

    networks(data=Own())
    read, html = page(folder, without_networks=False, pictures=2)
    assert "Worst classes, on 20 test pictures" in read.headings
    assert '<img class="crisp"' in html
    read, _ = page(folder, without_networks=False, pictures=0)
    assert not any("judge differently" in heading for heading in read.headings)

    class Shuffled(Own):
        passes = 0

        def test_dataloader(self):
            self.passes += 1
            generator = torch.Generator().manual_seed(self.passes)
            image, target = torch.randn(20, 3, 8, 8), torch.arange(20) % 5
            return DataLoader(TensorDataset(image, target), batch_size=8, shuffle=True, generator=generator)

    networks(data=Shuffled())
    read, _ = page(folder, without_networks=False, pictures=8)
    assert "in another order each time" in read.words


def test_several_runs_stand_side_by_side(tmp_path):
    first, second = write_run(tmp_path / "one", everything=True), write_run(tmp_path / "two", epochs=2)
    read, html = page(first, second)
    assert "Scoreboard" in read.headings
    assert "not validated on the same pictures" in read.words
    assert html.count("var(--s2)") > 8  # the second run in each drawing
    assert len(read.ids) == len(set(read.ids))
    assert "@media(prefers-color-scheme" not in html  # the scoreboard follows the theme of the page


def test_the_same_runs_give_the_same_page_but_for_its_date(tmp_path, networks, monkeypatch):
    networks()
    few = {"moments": draw_logit_moments_map, "range": draw_logit_range}
    monkeypatch.setattr("kdlit.figures.all_figures", lambda said: {name: draw(said) for name, draw in few.items()})
    folder = write_run(tmp_path / "run")
    pages = [re.sub(r"<time.*?</time>", "", page(folder, without_networks=False)[1]) for _ in range(2)]
    assert pages[0] == pages[1]
    assert "<text" in pages[0].partition("Figures of the papers")[2]


def test_colours_are_told_apart_from_their_background_in_both_themes(tmp_path):
    def lightness(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    _, html = page(write_run(tmp_path / "run"))
    themes = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", style)) for style in html.split("</style>")[:2]]
    for colours in themes:
        assert {"ink", "card", "page", "s8"} <= colours.keys()
        for name, colour in colours.items():
            needed = 3.0 if re.fullmatch(r"s\d", name) else 4.5
            if name in ("ink", "muted", "accent", "warn", "good", "bad") or needed == 3.0:
                backgrounds = ["card", "page"] + (["warn-back"] if name == "warn" else [])
                for background in backgrounds:
                    light, dark = sorted((lightness(colour), lightness(colours[background])), reverse=True)
                    assert (light + 0.05) / (dark + 0.05) >= needed, (name, background)


def test_the_command_writes_beside_the_run_and_replaces_what_was_there(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "one")
    (folder / "report.html").write_text("old")
    main([str(folder), "--without_networks"])
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    write_run(tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    main(["one", "two", "--without_networks"])
    assert "2 runs" in Path("report.html").read_text()
    assert f"Report: {folder / 'report.html'}" in capsys.readouterr().out
    for wrong in (["nowhere"], ["one", "--output", "two"], ["one", "--pictures=-1"],
                  ["one", "--output", "report.html/page.html"]):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main([*wrong, "--without_networks"])
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith("kdlit: error: ")


def test_help_answers_without_torch():
    code = (
        "import sys, kdlit.report as r\ntry: r.main(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "reports of runs that you trust" in told
