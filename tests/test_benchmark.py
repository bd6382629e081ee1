"""The benchmark measures every loss."""

from __future__ import annotations

import json

from kdlit import benchmark, losses


def test_every_loss_is_measured_against_the_step(monkeypatch, capsys):
    options = "--teacher resnet8 --student resnet8 --batch_size 4 --rounds 1 --device cpu --json"
    monkeypatch.setattr("sys.argv", ["benchmark", *options.split()])
    benchmark.main()
    result = json.loads(capsys.readouterr().out)
    assert result["kd_step_ms"] > 0
    assert result["losses"].keys() == benchmark.LOSSES.keys()
    assert result["losses"]["kd"]["step_ratio"] == 1
    assert all(row["loss_ms"] > 0 for row in result["losses"].values())


def test_no_method_is_left_out():
    measured = {type(make()) for make in benchmark.LOSSES.values()}
    inside = {
        type(term.loss) for make in benchmark.LOSSES.values() if isinstance(term := make(), losses.base.LossWrapper)
    }
    methods = {getattr(losses, name) for name in losses.__all__ if name.endswith("Loss")}
    special = {
        losses.DistillationLoss,
        losses.WeightedLoss,
        losses.CrossEntropyLoss,
        losses.TeacherRightCrossEntropyLoss,
    }
    assert methods - special <= measured | inside
