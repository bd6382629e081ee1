"""Mistakes in configs that once ended in a traceback, without end, or in a message that led astray."""

from __future__ import annotations

import time

import pytest
import yaml

from kdlit.chain import ChainError, Link, print_chain, read_chain
from kdlit.command_files import CommandFileError
from kdlit.config_errors import check_yaml, yaml_problem
from kdlit.data import ImageNet
from kdlit.data.photographs import BrokenPhotograph, decode_photograph, list_photographs
from tests.faults.fuzz import _huge
from tests.test_cli import CONFIG, project  # noqa: F401  the folder of a user

BOMB = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(12))

TEXTS = {
    "twice": (b"a: 1\nb: {c: 2,\n  c: 3}\n", "bad.yaml: line 3: the key 'c' stands there twice"),
    "aliases that multiply": (BOMB.encode(), "bad.yaml: line 6: more than 50 levels or 100000 values"),
    "too deep for the parser's stack": (b"[" * 200_000, "bad.yaml: line 1: more than 50 levels"),
    "within itself": (b"a: &a [*a]", "bad.yaml: line 1: the alias *a stands within what it refers to"),
    "tab": (b"trainer:\n\tmax_epochs: 1", "bad.yaml: line 2: found character that cannot start any token"),
    "latin-1": ("# caf\u00e9\ntrainer: {}".encode("latin-1"), "bad.yaml is not text in UTF-8: invalid continuation byte at byte 5"),
    "nothing": (b"# nothing\n", "bad.yaml is no config: it must hold keys and their values, such as 'model: ...', got nothing"),
    "number": (b"3", "bad.yaml is no config: it must hold keys and their values, such as 'model: ...', got int '3'"),
    "list": (b"- a", "got list \"['a']\""),
    "null byte": (b"a: \0", "bad.yaml: unacceptable character"),
    "a very long word": (b"a" * 300_000, "bad.yaml is no config"),
}  # fmt: skip


@pytest.mark.parametrize("what", TEXTS)
def test_a_file_that_is_no_config_is_named_in_one_line(project, kdlit_cli, what):  # noqa: F811
    content, expected = TEXTS[what]
    (project / "bad.yaml").write_bytes(content)
    start = time.monotonic()
    out = kdlit_cli("fit", "--config", "tiny.yaml", "--config", "bad.yaml")
    assert time.monotonic() - start < 10
    (line,) = out.removesuffix("exit 2").splitlines()
    assert line.startswith("kdlit: error: ")
    assert expected in line
    with pytest.raises(CommandFileError, match=r"bad\.yaml"):
        read_chain(project / "bad.yaml")


def test_what_configs_may_hold_is_read(project, kdlit_cli):  # noqa: F811
    check_yaml("a: &x {b: 1}\nc:\n  <<: *x\n  b: 2\nd: [*x, *x]\n? [1, 2]\n: 3\n")
    anchored = CONFIG.replace("student: {class_path: own.own_builder}", "student: &net {class_path: own.OwnNet}")
    (project / "anchors.yaml").write_text(
        anchored.replace("teacher: {class_path: own.OwnNet, init_args: {width: 16}}", "teacher: *net")
    )
    assert "error" not in kdlit_cli("fit", "--config", "anchors.yaml", "--print_config")


def test_the_line_of_a_problem_is_given_from_1():
    with pytest.raises(yaml.YAMLError) as caught:
        check_yaml("a: 1\na: 2")
    assert yaml_problem(caught.value) == "line 2: the key 'a' stands there twice"


VALUES = {
    "weight of a bare loss": (
        ("--config", "bare.yaml", "--model.losses.ce.weight=2"),
        "losses: 'weight' on the command line is set for a term that is first written as a bare CrossEntropyLoss; write it there as NAME:"),
    "learning rate": (("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=-1"), "Invalid learning rate: -1.0"),
    "strategy": (("--trainer.strategy=ddpp",), "invalid strategy name: `strategy='ddpp'`"),
    "accelerator": (("--trainer.accelerator=gpuu",), "invalid accelerator name: `accelerator='gpuu'`"),
    "memory": (("--model.input_size=[3, 1000000, 1000000]",), "out of memory"),
    "no class": (("--data=${oops}",), "data: '${oops}' on the command line is not of a kind that may stand there"),
    "class of another kind": (("--model.teacher=KDLoss",), "KDLoss"),
    "number": (("--trainer.limit_test_batches=/",), "trainer.limit_test_batches: Expected a <class 'int'>. Got value: /"),
    "long": (("--model.losses.kd.weight=" + "a" * 5000,), "losses.weight: Expected a <class 'float'>"),
    "long name of a config": (("--config", "a" * 5000 + ".yaml"), "aaa"),
}  # fmt: skip


@pytest.mark.parametrize("what", VALUES)
def test_a_value_that_cannot_be_is_named_in_one_line(project, kdlit_cli, what):  # noqa: F811
    arguments, expected = VALUES[what]
    bare = CONFIG.replace("ce: {loss: {class_path: CrossEntropyLoss}}", "ce: {class_path: CrossEntropyLoss}")
    (project / "bare.yaml").write_text(bare)
    out = kdlit_cli("fit", "--config", "tiny.yaml", *arguments, "--trainer.fast_dev_run=1")
    lines = [line for line in out.removesuffix("exit 2").splitlines() if line.startswith("kdlit: error: ")]
    assert len(lines) == 1, out
    assert expected in lines[0]
    assert len(lines[0]) < 6000
    assert "Traceback" not in out


def test_pictures_that_claim_to_be_huge_are_refused_before_they_are_decoded():
    import random

    for number in range(60):
        title, data = _huge(random.Random(number))
        with pytest.raises(BrokenPhotograph, match=r"cannot decode it\.jpg"):
            raise_if_taken(decode_photograph(data, "it.jpg"), title)


def raise_if_taken(picture, title):
    assert picture.numel() < 1000, title
    raise BrokenPhotograph("cannot decode it.jpg")  # a small part of one, as it says in its own way


def test_links_that_lead_back_are_refused(tmp_path):
    for name in ("ape", "bee"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"x")
    (tmp_path / "bee" / "one").symlink_to(tmp_path)
    (tmp_path / "bee" / "two").symlink_to(tmp_path / "bee")
    with pytest.raises(ValueError, match="is a link to a folder that it lies in"):
        list_photographs(tmp_path)


@pytest.mark.parametrize(("content", "message"), [(b"\xff\xfe", "must be text"), (b"  \n", "names no class")])
def test_a_list_of_classes_that_is_none_is_named(tmp_path, content, message):
    for part in ("train", "val"):
        (tmp_path / part / "ape").mkdir(parents=True)
    (tmp_path / "classes.txt").write_bytes(content)
    data = ImageNet(str(tmp_path), classes=str(tmp_path / "classes.txt"), num_workers=0)
    with pytest.raises(ValueError, match=f"classes.txt.*{message}"):
        data.setup("fit")


def test_what_a_link_left_is_named_where_it_is_damaged(tmp_path):
    link = Link("first", tmp_path, [])
    (tmp_path / "student.pt").write_bytes(b"damaged")
    (tmp_path / "link.yaml").write_bytes(b"\xff: [")
    with pytest.raises(ChainError, match=r"link 'first': .*link\.yaml is damaged"):
        link.check()
    with pytest.raises(ChainError, match=r"link 'first': .*student\.pt is damaged"):
        print_chain([link])
