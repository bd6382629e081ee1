"""The benchmark measures every loss."""

from __future__ import annotations

import json

from kdlit import benchmark, losses

SMALL = "--teacher resnet8 --student resnet8 --batch_size 4 --rounds 1 --device cpu --json"


def run(monkeypatch, capsys, command):
    monkeypatch.setattr("sys.argv", ["benchmark", *command.split()])
    benchmark.main()
    return json.loads(capsys.readouterr().out)


def test_every_loss_is_measured_against_the_step(monkeypatch, capsys):
    result = run(monkeypatch, capsys, f"losses {SMALL}")
    assert result["kd_step_ms"] > 0
    assert result["losses"].keys() == benchmark.LOSSES.keys()
    assert result["losses"]["kd"]["step_ratio"] == 1
    assert all(row["loss_ms"] > 0 for row in result["losses"].values())


def test_steps_of_every_method_are_measured(monkeypatch, capsys, tmp_path):
    plot = tmp_path / "cost.svg"
    methods = run(monkeypatch, capsys, f"steps {SMALL} --num_samples 200 --plot {plot}")["methods"]
    assert methods.keys() == benchmark.METHODS.keys()
    assert methods["KD"]["ratio_to_kd"] == 1
    assert methods["KD"]["extra_parameters"] == methods["RKD"]["extra_parameters"] == 0
    assert methods["FitNet"]["extra_parameters"] == 32 * 32 + 32 + 2 * 32  # 1x1 convolution and batch norm
    assert all(row["peak_mb"] > 0.1 for row in methods.values())
    assert "ReviewKD" in plot.read_text()


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
    features = {loss for loss in methods if issubclass(loss, losses.FeatureLoss)}
    assert methods - special - features <= measured | inside
    steps = {type(term.innermost if isinstance(term, losses.LossWrapper) else term) for make in benchmark.METHODS.values() for term in make().values()}  # fmt: skip
    assert features - {losses.FeatureLoss, losses.ViTKDLoss} <= steps
