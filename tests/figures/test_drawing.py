"""Every figure is legible: nothing overlaps or is cut off, with many and few classes, students and pictures."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import matplotlib
import pytest
import torch
from matplotlib.text import Text

from kdlit import figures
from kdlit.figures import Cost
from kdlit.figures.style import COLOURS, network_styles, shorten
from kdlit.modules import ClassificationDistillation
from tests.conftest import TinyData, TinyNet
from tests.figures.conftest import made_up

METHODS = ["KD", "DKD", "NKD", "TTM", "WTTM", "RLD", "MLKD", "LSKD", "FitNet", "CRD", "ReviewKD", "OFD"]
COSTS = [
    Cost(name, 20 + 3.3 * (n % 5), 0.74 + 0.002 * (n % 7), 10**n if n > 5 else 0) for n, name in enumerate(METHODS)
]
CURVES = {name: {epoch: 1 / (epoch + place + 1) for epoch in range(20)} for place, name in enumerate(METHODS)}
DRAWN = {
    "beta": lambda: figures.draw_beta_against_gap(made_up()),
    "beta_low": lambda: figures.beta_of_gaps({"untrained": -0.1, "resnet32x4": 8.4}),
    "transforms": figures.point_wise_transforms,
    "cost": lambda: figures.time_against_accuracy(COSTS, "Made up"),
    "entropy_curves": lambda: figures.entropy_curves(CURVES, teacher=0.3),
    "divergence_curves": lambda: figures.divergence_curves({"TTM": {0: 1.0}}),
    "teacher_size": lambda: figures.accuracy_against_teacher(
        {
            "vgg13": 0.7464,
            "wrn-28-2": 0.7545,
            "wrn-40-2": 0.7561,
            "wrn-16-4": 0.7751,
            "wrn-28-4": 0.786,
            "resnet50": 0.7934,
        },
        {"KD": {"vgg13": 0.7493, "wrn-40-2": 0.7492, "resnet50": 0.7535}, "DKD": {"vgg13": 0.7545, "resnet50": 0.76}},
    ),
}


def texts(figure):
    """All that is written in a figure and would be seen, as (text, box)."""
    figure.draw_without_rendering()
    written = [*figure.texts]
    for axes in figure.axes:
        ticks = (
            []
            if not axes.axison
            else [
                label for axis in (axes.xaxis, axes.yaxis) for tick in axis._update_ticks() for label in [tick.label1]
            ]
        )
        written += [
            *ticks,
            axes.xaxis.label,
            axes.yaxis.label,
            axes.title,
            axes._left_title,
            axes._right_title,
            *axes.texts,
        ]
        written += axes.get_legend().get_texts() if axes.get_legend() else []
    return [(one.get_text(), one.get_window_extent()) for one in written if one.get_visible() and one.get_text()]


def check_legible(figure):
    boxes = texts(figure)
    width, height = figure.bbox.size
    for text, box in boxes:
        assert box.x0 > -1, text
        assert box.x1 < width + 1, text
        assert box.y0 > -1, text
        assert box.y1 < height + 1, text
    for place, (text, box) in enumerate(boxes):
        for other, taken in boxes[:place]:
            common = min(box.x1, taken.x1) - max(box.x0, taken.x0), min(box.y1, taken.y1) - max(box.y0, taken.y0)
            assert min(common) < 1.5, f"{text!r} lies over {other!r}"
    assert all(one.get_fontsize() >= 7.5 for one in figure.findobj(Text) if one.get_text())
    assert figure._suptitle.get_text()
    assert "nan" not in figure.caption
    for axes in figure.axes:
        if axes.axison and axes.has_data():
            assert axes.get_xlabel() or axes.get_ylabel() or axes.get_title()


@pytest.mark.parametrize("name", DRAWN)
def test_figures_of_numbers_are_legible(name):
    check_legible(DRAWN[name]())


def test_figures_of_networks_are_legible():
    drawn = figures.all_figures(made_up(200, 100), points=12)
    assert len(drawn) == 12
    for figure in drawn.values():
        check_legible(figure)


@pytest.mark.parametrize(
    "draw", [figures.draw_class_difference_map, figures.draw_logit_moments_map, figures.draw_logit_range]
)
def test_many_students_with_long_names_are_legible(draw):
    check_legible(draw(made_up(60, 30, [f"runs/cifar100/method_{n}_$x$/version_{n}" for n in range(11)], used=20)))


@pytest.mark.parametrize(
    "draw", [figures.draw_tsne, figures.draw_logit_bars, figures.draw_class_difference_grid, figures.draw_top_classes]
)
def test_one_picture_of_two_classes_is_legible(draw):
    check_legible(draw(made_up(1, 2, ("_a$b",))))


def test_each_of_36_classes_has_a_look_of_its_own():
    axis = figures.draw_tsne(made_up(72, 36, ("KD",))).axes[0]
    shapes = {points.get_paths()[0].vertices.tobytes(): points for points in axis.collections}
    assert len(shapes) == 6
    for points in shapes.values():
        colours = [tuple(colour) for colour in points.get_facecolors()]
        assert (len(colours), len(set(colours))) == (12, 6), "two pictures of each of six classes"
    few = figures.draw_tsne(made_up(24, 6, ("KD",))).axes[0]
    assert sum(len(points.get_offsets()) > 0 for points in few.collections) == 6, "few classes differ in shape, too"


def test_constant_logits_and_a_thousand_classes_can_be_drawn():
    large = made_up(12, 1000, ("KD",))
    flat = made_up(9, 3, constant=True)
    unknown = replace(flat, teacher=figures.NetworkOutputs(flat.teacher.logits))  # whose features are not known
    assert "tsne" not in (drawn := figures.all_figures(unknown))
    more = [figures.draw_class_difference_map(large), figures.draw_top_classes(large), figures.draw_tsne(flat)]
    assert not any("nan" in figure.caption for figure in (*drawn.values(), *more))
    assert "Grey: 988 classes without a picture" in more[0].caption
    with pytest.raises(ValueError, match="the pooled feature of network 'teacher' is not known"):
        figures.draw_tsne(unknown)


def test_the_caption_is_text_and_can_be_left_out(outputs):
    figure = figures.draw_logit_range(outputs)
    with_caption, words = figure.get_size_inches()[1], figure.caption
    assert words.split() == figure.texts[-1].get_text().split()
    assert figure.without_caption().without_caption() is figure
    assert [one.get_text() for one in figure.texts] == ["Range of the logits"]
    assert figure.get_size_inches()[1] < with_caption - 0.3
    assert figure.caption == words
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    check_legible(figure)


def test_the_users_own_settings_change_nothing(outputs):
    def svg(figure):
        figure.savefig(file := io.StringIO(), format="svg", metadata={"Date": None})
        return file.getvalue()

    with matplotlib.rc_context({"svg.hashsalt": "0"}):
        plain = svg(figures.draw_logit_range(outputs))
    with matplotlib.rc_context(
        {"svg.hashsalt": "0", "font.size": 30, "text.color": "white", "axes.facecolor": "black", "xtick.color": "red"}
    ):
        assert svg(figures.draw_logit_range(outputs)) == plain


def test_students_are_told_apart_and_the_teacher_is_black():
    styles = network_styles(["teacher", *map(str, range(24))])
    assert len({(one["color"], one["linestyle"]) for one in styles.values()}) == 25
    assert styles["teacher"]["color"] == "black"
    assert len(COLOURS) == len(set(COLOURS)) == 6
    assert shorten("runs/cifar100/pairs/dkd/version_3", 15) == "runs/ci…rsion_3"


def test_bars_are_of_the_picture_asked_for(outputs):
    figure = figures.draw_logit_bars(outputs, sample=7)
    teacher = outputs.teacher.logits[7]
    assert f"Logit of the class: teacher {teacher[2]:.3g}" in figure.caption  # 7 modulo 5 classes
    assert figure.axes[0].patches[0].get_data().values.tolist() == teacher.tolist()
    standardised = figures.draw_logit_bars(outputs, sample=7, standardize=True)
    assert standardised.axes[0].get_legend().get_texts()[0].get_text() == "teacher, deviation 0.894"  # sqrt(4/5)
    with pytest.raises(ValueError, match="sample 99 is not among"):
        figures.draw_logit_bars(outputs, sample=99)


def test_top_classes_marks_what_comes_from_the_confused_classes():
    # the picture of class 2 is taken for 0, then 1; of all others the network is sure, and 3 is a neighbour of 0 alone
    logits = torch.tensor([[9.0, 0, 0, 5, 1], [0, 9, 0, 1, 5], [1, 0, 9, 0, 5], [7, 6, 4, 3, 0]])
    outputs = made_up(4, 5, teacher=figures.NetworkOutputs(logits), target=torch.tensor([0, 1, 2, 2]))
    figure = figures.draw_top_classes(outputs, top=3)
    assert [axes._right_title.get_text()[-1] for axes in figure.axes] == ["0", "1", "2", "2"]
    names = figure.axes[3].get_yticklabels()
    assert [one.get_text() for one in names] == ["class 0", "class 1", "class 2"]
    # means of class 2: (4, 3, 6.5, 1.5, 2.5), so that 0 and 1 are its own neighbours too
    assert [one.get_weight() for one in names] == ["normal"] * 3
    chosen = figures.draw_top_classes(outputs, classes=["class 3", 0], sample=3, top=2)
    assert chosen.axes[0].texts[0].get_text() == "no picture"
    assert [one.get_weight() for one in chosen.axes[2].get_yticklabels()] == ["bold", "normal"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda o: figures.draw_top_classes(o, network="KDD"), "network must be one of teacher, KD, DKD, got 'KDD'"),
        (lambda o: figures.draw_top_classes(o, classes=["leopard"]), "there is no class 'leopard'"),
        (lambda o: figures.draw_top_classes(o, top=0), "top must be >= 1"),
        (lambda o: figures.draw_class_difference_map(o, scale=0), "scale must be > 0, got 0"),
        (lambda o: figures.draw_class_correlation_map(o, temperature=-1), "temperature must be > 0"),
        (lambda o: figures.draw_batch_correlation_map(o, batch=0), "at least 1 picture"),
        (lambda o: figures.draw_entropy_histogram(o, bins=0), "bins must be >= 1"),
        (lambda o: figures.draw_logit_moments_map(o, bins=0), "bins must be >= 1"),
        (lambda o: figures.beta_of_gaps({}), "there is no teacher"),
        (lambda o: figures.entropy_curves({}), "got none for any label"),
        (lambda o: figures.divergence_curves({"KD": {}}), "got none for KD"),
        (lambda o: figures.time_against_accuracy([]), "there is no method"),
        (lambda o: Cost("KD", 0, 0.7), "step_ms of KD must be > 0, got 0"),
        (lambda o: Cost("KD", 1, 73.3), r"accuracy of KD must be a fraction in \[0, 1\], got 73.3"),
        (lambda o: Cost("KD", 1, 0.7, -1), "extra_parameters of KD must be >= 0, got -1"),
        (lambda o: figures.accuracy_against_teacher({"a": 0.5}, {}), "there is no student"),
        (lambda o: figures.accuracy_against_teacher({"a": 0.5}, {"KD": {"b": 0.5}}), "KD has students of b"),
        (
            lambda o: figures.accuracy_against_teacher({"a": 75}, {"KD": {"a": 0.5}}),
            "fraction in .*, got 75 for a in teachers",
        ),
    ],
)
def test_bad_input_is_named(outputs, draw, message):
    with pytest.raises(ValueError, match=message):
        draw(outputs)


def test_beta_of_several_teachers_is_measured_on_training_pictures():
    figure = figures.beta_against_gap(TinyNet(), {"a": TinyNet(), "b": TinyNet()}, TinyData(val_size=0), pictures=20)
    assert figure.caption.startswith("Measured on 20 of 96 train pictures. a gap ")
    assert ", b gap " in figure.caption


# From files


def test_costs_join_a_benchmark_with_accuracies(tmp_path):
    rows = {"KD": {"step_ms": 20.0, "extra_parameters": 0}, "CRD": {"step_ms": 50.0, "extra_parameters": 13e6}}
    (tmp_path / "steps.json").write_text(json.dumps({"machine": {}, "methods": rows}))
    found = figures.costs_of_benchmark(tmp_path / "steps.json", {"CRD": 0.755})
    assert found == [Cost("CRD", 50.0, 0.755, 13e6)]
    with pytest.raises(ValueError, match="no step was measured of DKD; measured were KD, CRD"):
        figures.costs_of_benchmark({"methods": rows}, {"DKD": 0.7})
    with pytest.raises(ValueError, match="the result holds no step times"):
        figures.costs_of_benchmark({"methods": {"KD": {}}}, {})
    (tmp_path / "steps.json").write_text("{")
    with pytest.raises(ValueError, match=r"steps\.json is not JSON"):
        figures.costs_of_benchmark(tmp_path / "steps.json", {})


def write_run(folder, rows):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed_everything: 0\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(str(row.get(name, "")) for name in names) for row in rows]
    (folder / "metrics.csv").write_text("\n".join([",".join(names), *lines]) + "\n")


def test_curves_come_from_run_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, level in (("kd", 1.0), ("ttm", 2.0)):
        rows = [
            {"epoch": epoch, "step": epoch, "train/loss": 1, "val/entropy": level + epoch, "val/teacher_entropy": 0.25}
            for epoch in range(3)
        ]
        write_run(tmp_path / "runs" / name, rows)
    write_run(tmp_path / "runs" / "old", [{"epoch": 0, "step": 0, "train/loss": 1}])
    assert figures.logged_curves(["runs"], "val/entropy") == {
        "runs/kd": {0: 1, 1: 2, 2: 3},
        "runs/ttm": {0: 2, 1: 3, 2: 4},
    }
    figure = figures.entropy_curves_of_runs(["runs"])
    assert figure.caption.endswith("Last epoch: runs/kd 3, runs/ttm 4.")
    assert figure.axes[0].get_lines()[0].get_xdata().tolist() == [1, 2, 3]
    assert figure.axes[0].get_lines()[-1].get_ydata()[0] == 0.25  # the teacher
    with pytest.raises(
        ValueError, match=r"none of the 3 runs \(runs/kd, runs/old, runs/ttm\) has logged val/kl_softened"
    ):
        figures.divergence_curves_of_runs(["runs"])
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere"):
        figures.entropy_curves_of_runs(["nowhere"])


def test_costs_come_from_run_folders(tmp_path, monkeypatch):
    from kdlit.losses import CrossEntropyLoss, FitNetLoss
    from kdlit.runs import Run

    monkeypatch.chdir(tmp_path)
    row = {"epoch": 0, "step": 0, "train/loss": 1, "train/images_per_s": 800, "val/top1": 0.5}
    write_run(tmp_path / "fitnet", [row, row | {"epoch": 1, "train/images_per_s": 1600}])
    losses = {"ce": CrossEntropyLoss(), "hint": FitNetLoss("bn", "bn")}
    module = ClassificationDistillation(TinyNet(), losses, TinyNet(width=6), input_size=(3, 8, 8))
    monkeypatch.setattr(Run, "rebuild", lambda self: (module, TinyData(batch_size=12)))
    with pytest.raises(ValueError, match="run fitnet has no test/top1; run `kdlit test` on it"):
        figures.costs_of_runs(["fitnet"])
    (cost,) = figures.costs_of_runs(["fitnet"], accuracy="val/top1")
    assert (cost.method, cost.step_ms, cost.accuracy) == ("fitnet", 10.0, 0.5)  # 12 pictures at 1200 a second
    assert cost.extra_parameters == sum(p.numel() for p in module.losses.parameters()) > 0
    (tmp_path / "fitnet" / "test.json").write_text('{"test/top1": 0.75}')
    assert figures.costs_of_runs(["fitnet"])[0].accuracy == 0.75
    write_run(tmp_path / "old", [{"epoch": 0, "step": 0, "train/loss": 1}])
    with pytest.raises(ValueError, match="run old has not logged train/images_per_s"):
        figures.costs_of_runs(["old"])
