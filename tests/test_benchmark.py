"""The benchmarks: what they measure and compute, never how long anything takes."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from kdlit import losses, models
from kdlit.benchmark import convolutions, cost, gpu, logs, measure, speed, training
from kdlit.benchmark.__main__ import COMMANDS, main
from kdlit.benchmark.losses import LOSSES
from kdlit.benchmark.training import METHODS, RandomPictures, Training, endless, one_by_one
from kdlit.models import ResNet

CPU = torch.device("cpu")
SMALL = "--teacher resnet8 --student resnet8 --batch_size 4 --rounds 1 --device cpu"


@pytest.fixture
def tiny(monkeypatch):
    """Networks that take no time, by the names tiny_teacher and tiny_student."""
    monkeypatch.setattr(models, "tiny_teacher", lambda: ResNet(8, (4, 4, 8, 16), 100), raising=False)
    monkeypatch.setattr(models, "tiny_student", lambda: ResNet(8, (2, 2, 4, 8), 100), raising=False)
    monkeypatch.setattr(models, "__all__", [*models.__all__, "tiny_teacher", "tiny_student"])
    monkeypatch.setattr(convolutions, "bare_seconds", lambda one, *_: (one.flops(1) / 1e9, one.flops(1) / 5e8))


def run(capsys, command):
    main([*command.split(), "--json"])
    return json.loads(capsys.readouterr().out)


def test_every_loss_is_measured_against_the_step(capsys):
    result = run(capsys, f"losses {SMALL}")
    assert result["kd_step_ms"] > 0
    assert result["losses"].keys() == LOSSES.keys()
    assert result["losses"]["kd"]["step_ratio"] == 1
    assert all(row["loss_ms"] > 0 for row in result["losses"].values())


def test_steps_of_every_method_are_measured(capsys, tmp_path):
    plot = tmp_path / "cost.svg"
    methods = run(capsys, f"steps {SMALL} --num_samples 200 --plot {plot}")["methods"]
    assert methods.keys() == METHODS.keys()
    assert methods["KD"]["ratio_to_kd"] == 1
    assert methods["KD"]["extra_parameters"] == methods["RKD"]["extra_parameters"] == 0
    assert methods["FitNet"]["extra_parameters"] == 32 * 32 + 32 + 2 * 32  # 1x1 convolution and batch norm
    assert all(row["peak_mb"] > 0.1 for row in methods.values())
    assert "ReviewKD" in plot.read_text()


def test_no_method_is_left_out():
    measured = {type(make()) for make in LOSSES.values()}
    inside = {type(term.loss) for make in LOSSES.values() if isinstance(term := make(), losses.base.LossWrapper)}
    methods = {getattr(losses, name) for name in losses.__all__ if name.endswith("Loss")}
    special = {
        losses.DistillationLoss,
        losses.WeightedLoss,
        losses.CrossEntropyLoss,
        losses.TeacherRightCrossEntropyLoss,
    }
    features = {loss for loss in methods if issubclass(loss, losses.FeatureLoss)}
    assert methods - special - features <= measured | inside
    steps = {type(term.innermost if isinstance(term, losses.LossWrapper) else term) for make in METHODS.values() for term in make().values()}  # fmt: skip
    assert features - {losses.FeatureLoss, losses.ViTKDLoss} <= steps
    assert set(speed.USUAL_METHODS) <= METHODS.keys()
    assert all(hasattr(models, name) for pair in speed.PAIRS for name in pair.split(":"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_measurement_explains_itself(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert COMMANDS[command].__doc__.strip() in capsys.readouterr().out


def test_json_goes_to_a_file_beside_the_table(capsys, tmp_path):
    main(["cost", "--images_per_s", "1000", "--json", str(tmp_path / "cost.json")])
    assert "| CIFAR-100, 240 epochs, 1 device |" in capsys.readouterr().out
    machine = json.loads((tmp_path / "cost.json").read_text())["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == 1


# Speed


def speed_of(capsys, methods, settings=None):
    command = f"speed --pairs tiny_teacher:tiny_student --methods {methods} --batch_size 4 --num_samples 100 --rounds 2 --device cpu --json"
    main([*command.split(), *(["--settings", *settings] if settings else [])])
    return {run["method"]: run for run in json.loads(capsys.readouterr().out)["runs"]}


def test_speed_measures_whole_steps_in_every_usual_setting(capsys, tiny):
    rows = speed_of(capsys, "DKD")["DKD"]["settings"]
    assert rows.keys() == {name for name in speed.SETTINGS if "compiled" not in name and "tf32" not in name}
    for name, row in rows.items():
        assert len(row["rounds_ms"]) == 2
        assert row["images_per_s"] == pytest.approx(4 / (1e-3 * row["step_ms"]))
        assert all(row[f"{part}_ms"] > 0 for part in speed.PARTS), name
        assert row["bound_reached"] == pytest.approx(row["bound_ms"] / row["step_ms"])


def test_speed_runs_methods_with_two_views_memories_and_connectors(capsys, tiny):
    settings = ["plain, pictures one by one", "exact", "exact + cache", "fast, 4 students"]
    runs = speed_of(capsys, "MLKD CRD ReviewKD", settings)
    assert "exact + cache" in runs["MLKD"]["settings"]
    assert "exact + cache" not in runs["CRD"]["settings"]  # its teacher must run for its features
    assert "exact + cache" not in runs["ReviewKD"]["settings"]
    assert runs["MLKD"]["settings"]["exact"]["bound_ms"] == pytest.approx(2 * runs["CRD"]["settings"]["exact"]["bound_ms"])  # fmt: skip


def test_bound_is_teacher_and_three_times_student_at_the_peak():
    facts = {"flops": {"teacher": 6e9, "student": 1e9}, "peak_flops": {"float32": 1e11, "bfloat16": 2e11}}
    bounds = {name: speed._bound(setting, facts, batch_size=10) for name, setting in speed.SETTINGS.items()}
    assert bounds["exact"] == bounds["plain"] == pytest.approx(10 * (6 + 3) / 100)
    assert bounds["fast"] == pytest.approx(10 * (6 + 3) / 200)
    assert bounds["plain + bf16 teacher"] == pytest.approx(10 * (6 / 200 + 3 / 100))
    assert bounds["exact + cache"] == pytest.approx(10 * 3 / 100)
    assert bounds["exact, 4 students"] == pytest.approx(10 * (6 / 4 + 3) / 100)


def test_speed_report_holds_the_promised_ratios():
    names = {"plain, pictures one by one": [80.0, 84.0], "plain": [60.0, 60.0], "exact": [40.0, 40.0], "exact + cache": [20.0, 16.0]}  # fmt: skip
    row = {"images_per_s": 100.0, "step_ms": 40.0, "peak_mb": 7.0, "bound_reached": 0.5}
    row |= {f"{part}_ms": 8.0 for part in speed.PARTS}
    run = {"teacher": "a", "student": "b", "method": "DKD", "flops": {"teacher": 6e6, "student": 1e6}}
    run |= {"peak_flops": {"float32": 1e11}, "convolutions_ms": {"float32": {"teacher": 1.0, "student": 2.0}}}
    run["settings"] = {name: row | {"rounds_ms": rounds} for name, rounds in names.items()}
    text = speed.report({"machine": measure.machine("cpu", 1), "batch_size": 64, "runs": [run]})
    assert "- exact against plain, pictures one by one: 2.05 (2.00 to 2.10)" in text
    assert "- exact + cache against exact: 2.25 (2.00 to 2.50)" in text
    assert "fast" not in text
    assert "| exact | 100 | 40 | 8 | 8 | 8 | 8 | 8 | 7 | 50% | 2.05 (2.00 to 2.10) | 1.50 (1.50 to 1.50) | 1.00 (1.00 to 1.00) |" in text  # fmt: skip


@pytest.mark.parametrize("option", ["--pairs no:resnet8", "--methods No", "--settings no"])
def test_unknown_names_are_told(option):
    with pytest.raises(SystemExit, match=f"{option.split()[0]}: there is no 'no'; known are") as stopped:
        main(["speed", *option.lower().split()])
    assert stopped.value.code


# Steps


def data_of(size=20, **settings):
    data = RandomPictures(size, batch_size=4, **settings)
    data.setup("fit")
    return data


@pytest.mark.parametrize("students", [1, 3])
def test_a_step_trains_and_tells_its_parts_in_order(tiny, students):
    data = data_of()
    one = Training("tiny_teacher", "tiny_student", "DKD", data, CPU, students=students)
    before = [parameter.clone() for group in one.optimizer.param_groups for parameter in group["params"]]
    laps = []
    one.step(next(endless(data.train_dataloader(), CPU)), laps.append)
    after = [parameter for group in one.optimizer.param_groups for parameter in group["params"]]
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    forward, backward = ["losses", "teacher", "student"], ["student", "losses"]
    expected = [*forward * students, "losses", "optimizer", *backward * students, "student", "optimizer", "losses"]
    assert laps == expected
    assert one.extra_parameters == 0


def test_a_step_does_what_a_fit_does(tiny):
    modules = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        data = data_of(8)
        one = Training("tiny_teacher", "tiny_student", "DKD", data, CPU)
        if by_hand:
            for batch in data.train_dataloader():
                one.step(batch)
        else:
            training.quiet_trainer(CPU, max_epochs=1).fit(one.module, data)
        modules.append(one.module.student.state_dict())
    for name, value in modules[0].items():
        assert torch.equal(value, modules[1][name]), name


def test_pictures_one_by_one_are_batches_as_kdlit_makes_them():
    data = data_of(strong_view=True)
    usual = next(endless(one_by_one(data), CPU))
    ours = next(endless(data.train_dataloader(), CPU))
    assert usual.keys() == ours.keys() == {"image", "image_strong", "target", "index"}
    for name, value in usual.items():
        assert value.shape == ours[name].shape
        assert value.dtype == ours[name].dtype
    assert torch.equal(usual["target"], data.train_target[usual["index"]])


def test_a_cache_gives_each_picture_its_own_logits():
    data = data_of()
    seen = {}
    for batch in itertools.islice(speed._with_cache(endless(data.train_dataloader(), CPU), data, CPU), 10):
        for index, row in zip(batch["index"].tolist(), batch["teacher_logits"], strict=True):
            assert torch.equal(seen.setdefault(index, row), row)
    assert len(seen) == 20


# Convolutions


def test_convolutions_of_a_network_are_found_and_counted():
    network = ResNet(8, (4, 4, 8, 16), 10)
    found = convolutions.convolutions_of(network)
    flops = sum(count * one.flops(1) for one, count in found.items())
    assert found[convolutions.Convolution((4, 4, 3, 3), 32, padding=1)] == 2
    assert convolutions.Convolution((8, 4, 3, 3), 32, stride=2, padding=1) in found
    assert convolutions.Convolution((8, 4, 3, 3), 32, stride=2, padding=1).flops(5) == 2 * 5 * 16 * 16 * 8 * 4 * 9
    assert convolutions.forward_flops(network) == flops + 2 * 16 * 10  # and the linear classifier


def test_convolutions_alone_are_timed_both_ways(monkeypatch):
    seconds = itertools.count(1)

    def timed(run, device):
        run()
        return float(next(seconds))

    monkeypatch.setattr(convolutions, "timed", timed)
    one = convolutions.Convolution((6, 2, 3, 3), 8, stride=2, padding=1, groups=3)
    assert convolutions.bare_seconds(one, 4, torch.float32, CPU) == (2.0, 6.0)  # the least after a first one


def test_sum_of_convolutions_counts_backward_of_the_student_alone(tiny):
    network = ResNet(8, (4, 4, 8, 16), 10)
    flops = convolutions.forward_flops(network) - 2 * 16 * 10
    assert convolutions.sum_of_bare(network, 1, torch.float32, CPU, trained=False) == pytest.approx(flops / 1e9)
    assert convolutions.sum_of_bare(network, 1, torch.float32, CPU, trained=True) == pytest.approx(3 * flops / 1e9)
    assert convolutions.peak_flops(1, torch.float32, CPU, network) == pytest.approx(1e9)


# Cost


def test_hours_and_gigabytes():
    task = cost.Task(pictures=36_000, classes=100, epochs=10, devices=2)
    assert task.hours(images_per_s=100, scaling=0.5) == 36_000 * 10 / (100 * 2 * 0.5) / 3600
    assert cost.Task(36_000, 100, 10).hours(100, scaling=0.5) == 1.0  # a device alone loses nothing
    assert task.cache_hours(50, views=3) == 36_000 * 3 / 100 / 3600
    assert task.cache_gigabytes(1) == 36_000 * 100 * 2 / 1e9
    assert task.cache_gigabytes(10, top_k=8) == 36_000 * 10 * (8 * (2 + 2) + 4) / 1e9


def test_cost_from_a_given_rate_follows_the_operations(capsys):
    result = run(capsys, "cost --images_per_s 1000 --pair resnet32x4:resnet8x4 --devices 4 --scaling 0.5")
    cifar, imagenet = result["runs"]
    teacher, student = (convolutions.forward_flops(getattr(models, name)()) for name in ("resnet32x4", "resnet8x4"))
    assert cifar["hours"] == pytest.approx(50_000 * 240 / 1000 / 3600)
    assert cifar["cached_images_per_s"] == pytest.approx(1000 * (teacher + 3 * student) / (3 * student))
    assert cifar["teacher_images_per_s"] == pytest.approx(1000 * (teacher + 3 * student) / teacher)
    step = (2 * 3.664e9 + 3 * 2 * 1.814e9)  # multiply-adds of torchvision's ResNet-34 and ResNet-18, twice  # fmt: skip
    assert imagenet["images_per_s"] == pytest.approx(1000 * (teacher + 3 * student) / step, rel=1e-2)
    assert imagenet["hours"] == pytest.approx(1_281_167 * 100 / imagenet["images_per_s"] / (4 * 0.5) / 3600)
    assert result["caches"]["ImageNet"]["every epoch's view"]["full_gb"] == pytest.approx(256.2334)


def test_cost_reads_what_speed_wrote(capsys, tmp_path):
    exact = {"images_per_s": 500.0, "teacher_ms": 64.0}
    runs = [
        {"teacher": "a", "student": "b", "method": "DKD", "flops": {"teacher": 6e9, "student": 1e9}, "settings": {"exact": exact, "exact + cache": {"images_per_s": 900.0}, "plain": {}}},
        {"teacher": "a", "student": "b", "method": "CRD", "flops": {"teacher": 6e9, "student": 1e9}, "settings": {"exact": exact}},
    ]  # fmt: skip
    file = tmp_path / "speed.json"
    file.write_text(json.dumps({"machine": measure.machine("cpu", 1), "batch_size": 64, "runs": runs}))
    main(["cost", str(file), "--imagenet_images_per_s", "50", "--json", str(tmp_path / "cost.json")])
    text = capsys.readouterr().out
    dkd, dkd_imagenet, crd, _ = json.loads((tmp_path / "cost.json").read_text())["runs"]
    assert dkd["cached_hours"] == pytest.approx(50_000 * 240 / 900 / 3600)
    assert dkd["teacher_images_per_s"] == pytest.approx(1000.0)
    assert dkd["all_views_cache_hours"] == pytest.approx(240 * dkd["cache_hours"])
    assert dkd_imagenet["images_per_s"] == pytest.approx(50.0)
    assert crd["cached_hours"] is None
    assert "| CIFAR-100, 240 epochs, 1 device | a -> b | a -> b, CRD, exact | 500.0 | 6.67 | - | - | 0.014 / 3.33 |" in text  # fmt: skip
    assert "Each of 8 devices reaches 90% of the rate of a single one." in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "needs either the file"),
        (["absent.json"], "there is no .*absent.json; write it with"),
        (["--images_per_s", "1", "--imagenet_pair", "no:resnet18"], "neither torchvision.models nor kdlit.models has 'no'"),
    ],
)  # fmt: skip
def test_cost_says_what_it_lacks(args, message):
    with pytest.raises(SystemExit, match=message):
        main(["cost", *args])


# GPU, logging, loader


def test_gpu_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="gpu needs a GPU, but torch sees none"):
        main(["gpu"])


def test_gpu_can_be_tried_out_on_a_cpu(capsys, tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "RUN", 2)
    monkeypatch.setattr(gpu._Profile, "SKIPPED", 1)
    command = "gpu --device cpu --teacher tiny_teacher --student tiny_student --batch_size 4 --num_samples 20 --num_workers 0 --steps 2 --profiled_steps 2 --rounds 2 --variants exact fast --full --json"
    main([*command.split(), str(tmp_path / "gpu.json")])
    result = json.loads((tmp_path / "gpu.json").read_text())
    rows = result["variants"]
    assert list(rows) == [gpu.PLAIN, "exact", "fast"]
    assert rows[gpu.PLAIN]["against_plain"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    for name, row in rows.items():
        assert row["run_minutes"] == pytest.approx(2 * 20 / row["images_per_s"] / 60)
        assert (row.get("busy", 0) > 0) == (name != gpu.PLAIN)
    assert sum("measured_run_minutes" in row for row in rows.values()) == 1
    assert capsys.readouterr().out.count("\n| ") == 5


def test_gpu_goes_on_without_variants_that_fail(capsys, tiny, monkeypatch, tmp_path):
    epochs = gpu.Fit.epochs

    def choosy(self, *args, **kwargs):
        if self.module.performance == gpu.VARIANTS["fast"]:
            raise RuntimeError("no such kernel\nand more")
        return epochs(self, *args, **kwargs)

    monkeypatch.setattr(gpu.Fit, "epochs", choosy)
    monkeypatch.setattr(gpu._Profile, "SKIPPED", 1)
    command = "gpu --device cpu --teacher tiny_teacher --student tiny_student --batch_size 4 --num_samples 20 --num_workers 0 --steps 2 --profiled_steps 2 --rounds 1 --variants"
    main([*command.split(), "exact", "fast"])
    told = capsys.readouterr().out
    assert "| exact |" in told
    assert "| fast |" not in told
    assert "fast fails: RuntimeError: no such kernel\n" in told
    with pytest.raises(SystemExit, match="all variants fail; fast: RuntimeError: no such kernel"):
        main([*command.split(), "fast"])


def test_union_of_spans():
    assert gpu.union([(5, 6), (0, 3), (1, 2), (2, 4)]) == 5
    assert gpu.union([]) == 0


def test_logging_adds_up_what_it_takes(capsys):
    result = run(capsys, "logging --step_ms 0.5 --steps 12 --rounds 2 --log_every_n_steps 4")
    *parts, together = result["parts"].values()
    assert [*result["parts"]] == [*logs.PARTS, "all of it"]
    assert [row["calls"] for row in parts] == [12, 3, 24, 14, 4], "none is missed and none counted twice"
    for epoch in range(2):
        assert together["step_us"][epoch] == pytest.approx(sum(row["step_us"][epoch] for row in parts))
        assert together["share"][epoch] == pytest.approx(together["step_us"][epoch] / 500)
    assert all(value > 0 for row in parts[:2] for value in row["step_us"])


def test_logging_leaves_everything_as_it_was():
    before = {(owner, name): getattr(owner, name) for methods in logs.PARTS.values() for owner, name in methods}
    logs.measure(0.1, 3, 1, 1)
    assert before == {(owner, name): getattr(owner, name) for owner, name in before}


def test_loader_compares_two_pipelines(capsys):
    result = run(capsys, "loader --num_samples 100 --rounds 2 --seconds 0.05 --num_workers 0 --batch_size 10")
    assert [len(rates) for rates in result["pictures_per_s"].values()] == [2, 2]
    assert all(rate > 0 for rates in result["pictures_per_s"].values() for rate in rates)


def test_rounds_take_turns_and_ratios_stay_within_a_round():
    calls = []
    results = measure.interleaved({name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}, 3, 1)
    assert "".join(calls) == "abbaabba"
    assert results == {"a": [4, 5, 8], "b": [3, 6, 7]}
    spread = measure.ratio([2.0, 9.0, 8.0], [1.0, 3.0, 1.0])
    assert spread == {"median": 3.0, "low": 2.0, "high": 8.0}
    assert math.isclose(measure.timed(lambda: None, CPU), 0, abs_tol=1)


def test_peak_memory_is_the_largest_sum():
    def hold() -> None:
        a = torch.empty(1000)
        del a
        b, c = torch.empty(500), torch.empty(1000)
        del b, c

    assert 6000 <= measure.peak_bytes(hold, CPU) < 7000
