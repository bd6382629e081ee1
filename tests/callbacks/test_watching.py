"""What is logged of a run while it goes on, and what watching it costs: nothing of what is trained."""

from __future__ import annotations

import copy
import io
import re

import lightning as L
import pytest
import rich
import torch

from kdlit.callbacks import GradientWatch, Progress, Throughput
from kdlit.callbacks.report import print_result
from kdlit.callbacks.throughput import without_times
from kdlit.loggers import RunLogger
from kdlit.losses import CrossEntropyLoss, KDLoss, WeightedLoss
from kdlit.metrics import student_figures, teacher_figures
from kdlit.modules import ClassificationDistillation, ManyStudents, MutualLearning
from kdlit.modules.clock import StepClock
from kdlit.runs import Run
from tests.conftest import TinyData, TinyNet

CPU = torch.device("cpu")


def module(seed=0, warmup=4, performance="plain"):
    L.seed_everything(seed, verbose=False)
    losses = {"ce": CrossEntropyLoss(), "kd": WeightedLoss(KDLoss(4.0), weight=0.5, warmup_epochs=warmup)}
    student, teacher = TinyNet(), TinyNet(width=12)
    return ClassificationDistillation(student, losses, teacher, input_size=(3, 8, 8), performance=performance)


def fitted(trainer, tmp_path, model, *callbacks, **kwargs):
    """The figures of every epoch by name."""
    logger = RunLogger(str(tmp_path))
    settings = {"max_epochs": 2, "log_every_n_steps": 2} | kwargs
    trainer(callbacks=list(callbacks), logger=logger, **settings).fit(model, TinyData())
    return Run(tmp_path, {}, {}).series()


def test_every_term_is_logged_with_what_it_counted_for(trainer, tmp_path):
    series = fitted(trainer, tmp_path, module())
    for epoch in (0, 1):
        warmup = (epoch + 1) / 4
        assert series["train/weight/kd"][epoch] == 0.5
        assert series["train/warmup/kd"][epoch] == warmup
        assert series["train/weighted/kd"][epoch] == pytest.approx(0.5 * warmup * series["train/loss/kd"][epoch])
        terms = series["train/weighted/kd"][epoch] + series["train/weighted/ce"][epoch]
        assert series["train/loss"][epoch] == pytest.approx(terms, rel=1e-5)


def test_validation_figures_are_means_over_all_pictures(trainer, tmp_path):
    model = module()
    series = fitted(trainer, tmp_path, model, max_epochs=1)
    data = TinyData()
    data.setup("validate")
    with torch.no_grad():
        batches = list(data.val_dataloader())
        image, target = (torch.cat([batch[key] for batch in batches]) for key in ("image", "target"))
        student, teacher = model.eval()(image), model.teacher(image)
    figures = student_figures(student, target) | teacher_figures(student, teacher, target)
    for name, value in figures.items():
        assert series[f"val/{name}"][0] == pytest.approx(value.float().mean().item(), abs=1e-5), name
    parts = [series[f"val/teacher_wrong_student_{does}"][0] for does in ("right", "same", "other")]
    assert sum(parts) == pytest.approx(series["val/teacher_wrong"][0])
    assert 0 <= series["val/ece"][0] <= 1
    assert 0 <= series["val/teacher_ece"][0] <= 1


def test_training_batches_are_looked_at_closely_now_and_then(trainer, tmp_path, monkeypatch):
    model = module()
    looked = []
    watch = model.watch_closely
    monkeypatch.setattr(model, "watch_closely", lambda *args: looked.append(model.global_step) or watch(*args))
    series = fitted(trainer, tmp_path, model, max_epochs=1, log_every_n_steps=3)
    assert looked == [0, 3], "of four batches"
    assert {"train/agreement", "train/kl", "train/entropy", "train/teacher_top1", "train/top5"} <= series.keys()
    assert "val/top1" in series


def test_without_a_teacher_there_is_nothing_about_one(trainer, tmp_path):
    alone = ClassificationDistillation(TinyNet(), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))
    series = fitted(trainer, tmp_path, alone)
    assert {"val/entropy", "val/ece", "train/logit_std", "train/weighted/ce"} <= series.keys()
    assert not [name for name in series if "teacher" in name or "agreement" in name or "kl" in name]


def test_students_that_teach_each_other_are_watched_too(trainer, tmp_path):
    series = fitted(trainer, tmp_path, MutualLearning([TinyNet(), TinyNet()], input_size=(3, 8, 8)), GradientWatch(1))
    assert {"train/weighted/0/ce", "train/entropy", "val/1/top1", "train/grad_norm/0/dml/1"} <= series.keys()


# Gradients


def test_gradient_norms_and_cosines_are_those_of_the_weighted_terms(trainer, tmp_path):
    model = module(warmup=0)
    seen = []

    class Expected(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            terms = {}
            for name, weight in (("ce", 1.0), ("kd", 0.5)):
                outputs = pl_module.run_student(batch), pl_module.run_teacher(batch), batch
                loss = weight * pl_module.losses[name].loss(*outputs)
                terms[name] = torch.cat(
                    [g.flatten() for g in torch.autograd.grad(loss, list(model.student.parameters()))]
                )
            seen.append(terms)

    # without batch statistics a second pass changes nothing
    model.student.bn = torch.nn.Identity()
    series = fitted(trainer, tmp_path, model, Expected(), GradientWatch(2), max_epochs=1)
    looked = seen[::2]
    for name in ("ce", "kd"):
        norms = [terms[name].norm().item() for terms in looked]
        assert series[f"train/grad_norm/{name}"][0] == pytest.approx(sum(norms) / len(norms), rel=1e-4)
    cosines = [torch.cosine_similarity(terms["ce"], terms["kd"], dim=0).item() for terms in looked]
    assert series["train/grad_cosine/ce/kd"][0] == pytest.approx(sum(cosines) / len(cosines), rel=1e-4)


def test_watching_changes_nothing_that_is_trained(trainer, tmp_path):
    plain, watched = module(), module()
    fitted(trainer, tmp_path / "plain", plain, log_every_n_steps=1000)
    fitted(trainer, tmp_path / "watched", watched, GradientWatch(1), Throughput(), log_every_n_steps=1)
    for one, other in zip(plain.student.state_dict().values(), watched.student.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert not watched.step_terms, "the graph of the last step is let go"


def test_each_of_several_students_has_its_own_gradients(trainer, tmp_path):
    group = ManyStudents({"a": module(1), "b": module(1, warmup=0)})
    trainer(max_epochs=1, callbacks=[GradientWatch(2), Throughput()], logger=RunLogger(str(tmp_path))).fit(
        group, TinyData()
    )
    series = Run(tmp_path, {}, {}).series()
    assert series["a/train/grad_norm/ce"][0] != series["b/train/grad_norm/ce"][0]
    assert series["train/images_per_s"][0] > 0
    assert sum(value[0] for name, value in series.items() if name.startswith("train/share/")) == pytest.approx(1)


def test_a_term_that_counts_nothing_has_no_gradient(trainer, tmp_path):
    model = module()
    model.losses["kd"].weight = 0.0
    series = fitted(trainer, tmp_path, model, GradientWatch(1))
    assert series["train/grad_norm/kd"][0] == 0
    assert series["train/grad_cosine/ce/kd"][0] == 0


def test_it_looks_at_one_step_at_least():
    with pytest.raises(ValueError, match="every_n_steps must be >= 1, got 0"):
        GradientWatch(0)


def test_students_that_teach_each_other_have_angles_where_they_share_weights(trainer, tmp_path):
    series = fitted(trainer, tmp_path, MutualLearning([TinyNet(), TinyNet()], input_size=(3, 8, 8)), GradientWatch(1))
    angles = {name.removeprefix("train/grad_cosine/") for name in series if "grad_cosine" in name}
    assert angles == {"0/ce/0/dml/1", "1/ce/1/dml/0"}


def test_weighted_terms_of_three_students_add_up(trainer, tmp_path):
    series = fitted(
        trainer, tmp_path, MutualLearning([TinyNet() for _ in range(3)], input_size=(3, 8, 8)), max_epochs=1
    )
    terms = sum(value[0] for name, value in series.items() if name.startswith("train/weighted/"))
    assert series["train/loss"][0] == pytest.approx(terms, rel=1e-5)


class Doubtful(KDLoss):
    calls = 0

    def forward(self, student, teacher, batch):
        self.calls += 1
        return super().forward(student, teacher, batch) * (float("nan") if self.calls == 2 else 1.0)


def test_a_skipped_batch_leaves_no_gradients(trainer, tmp_path):
    losses = {"ce": CrossEntropyLoss(), "kd": Doubtful()}
    other = module(performance="exact")
    teacher = copy.deepcopy(other.teacher)
    own = ClassificationDistillation(TinyNet(), losses, teacher, input_size=(3, 8, 8), non_finite="skip")
    group = ManyStudents({"a": own, "b": other})
    with pytest.warns(UserWarning, match="skipped|passed over"):
        trainer(max_epochs=1, callbacks=[GradientWatch(1)], logger=RunLogger(str(tmp_path))).fit(group, TinyData())
    series = Run(tmp_path, {}, {}).series()
    assert series["a/train/skipped"][0] == 1
    assert torch.tensor(series["a/train/grad_norm/kd"][0]).isfinite()


def test_compiled_parts_keep_their_graph(trainer):
    watch, run = GradientWatch(), trainer()
    before = torch._functorch.config.donated_buffer
    watch.setup(run, None, "fit")
    assert torch._functorch.config.donated_buffer is False
    watch.teardown(run, None, "fit")
    assert torch._functorch.config.donated_buffer is before


def test_sparse_gradients_are_measured_too(trainer, tmp_path):
    class Embeds(TinyNet):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Embedding(4, 5, sparse=True)

        def forward(self, image):
            return super().forward(image) + self.shift(torch.zeros(len(image), dtype=torch.long))

    net = ClassificationDistillation(
        Embeds(), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8), optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    assert fitted(trainer, tmp_path, net, GradientWatch(1))["train/grad_norm/ce"][0] > 0


# Speed


def test_speed_shares_and_memory(trainer, tmp_path):
    series = fitted(trainer, tmp_path, module(), Throughput())
    assert series["train/images_per_s"][1] > 0
    assert 1 < series["train/peak_memory_mb"][1] < 1e6
    shares = {name.removeprefix("train/share/"): value[1] for name, value in series.items() if "/share/" in name}
    assert shares.keys() == {"data", "teacher", "student", "losses", "update"}
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share > 0 for share in shares.values())
    assert not without_times({name: 0 for name in series if name.startswith("train/share") or "per_s" in name})


def test_a_clock_that_does_not_run_counts_nothing(monkeypatch):
    clock, moments = StepClock(), iter([1.0, 3.0, 4.0])
    clock.mark("teacher")
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    clock.start(CPU)
    clock.mark("teacher")
    clock.mark("losses")
    clock.stop()
    clock.mark("update")
    assert clock.shares(3.0) == {"data": 3 / 6, "teacher": 2 / 6, "student": 0, "losses": 1 / 6, "update": 0}
    assert clock.shares(3.0) == {}


def test_what_a_clock_skips_counts_to_nothing(monkeypatch):
    clock, moments = StepClock(), iter([1.0, 3.0, 4.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    clock.start(CPU)
    clock.skip()
    clock.mark("update")
    assert clock.shares(0.0)["update"] == 1.0


def test_validation_is_left_out_of_the_speed(monkeypatch, trainer):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    watch = Throughput()
    run = trainer(log_every_n_steps=1)
    watch._begin()
    for _ in range(2):
        watch.on_train_batch_start(run, None, {}, 0)
        now[0] += 1
        watch.on_train_batch_end(run, None, {}, {"image": torch.zeros(10, 3, 8, 8)}, 0)
    watch.on_validation_start(run, None)
    now[0] += 100
    watch.on_validation_end(run, None)
    assert watch.images_per_s == 10
    watch.on_train_batch_start(run, None, {}, 0)
    assert watch._waited == 0, "nor does a step wait for its batch while others are validated"


@pytest.mark.parametrize(
    "batch", [{"labelled": (torch.zeros(10, 3, 8, 8),)}, torch.tensor(1.0), {"image": torch.tensor(1.0)}]
)
def test_a_batch_of_a_users_own_form_is_not_counted(trainer, batch):
    watch = Throughput()
    watch.on_train_batch_end(trainer(), None, {}, batch, 0)
    assert watch.images_per_s is None


# The terminal


class Terminal(io.StringIO):
    def __init__(self, is_one):
        super().__init__()
        self.is_one = is_one

    def isatty(self):
        return self.is_one


def said(trainer, tmp_path, is_terminal, every_s=0.0, epochs=3):
    out = Terminal(is_terminal)
    bar = Progress(every_s=every_s, console_kwargs={"file": out, "width": 160, "force_terminal": is_terminal})
    callbacks = [Throughput(), bar]
    settings = {
        "max_epochs": epochs,
        "log_every_n_steps": 1,
        "enable_progress_bar": True,
        "logger": RunLogger(str(tmp_path)),
    }
    try:
        trainer(callbacks=callbacks, **settings).fit(module(), TinyData())
    finally:
        rich.reconfigure()  # the bar has bound everybody's console to its own
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())


def test_off_a_terminal_there_is_a_line_an_epoch(trainer, tmp_path):
    lines = said(trainer, tmp_path, is_terminal=False).strip().splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    for line in lines:
        assert re.fullmatch(
            r"epoch \d/3  loss [\d.]+  ce [\d.]+  kd [\d.]+  train [\d.]+%  val [\d.]+%  images/s [\d,]+(  left [\d:]+)?",
            line,
        ), line
    series = Run(tmp_path, {}, {}).series()
    assert f"loss {series['train/loss'][2]:.3f}  ce {series['train/loss/ce'][2]:.3f}" in lines[2]
    assert "left" not in lines[2]


def test_a_short_run_leaves_two_lines_in_a_log(trainer, tmp_path):
    lines = said(trainer, tmp_path, is_terminal=False, every_s=60.0, epochs=5).strip().splitlines()
    assert [line.split()[1] for line in lines] == ["1/5", "5/5"]


def test_on_a_terminal_there_is_a_bar(trainer, tmp_path):
    text = said(trainer, tmp_path, is_terminal=True)
    for part in ("Epoch 3/3", "ce: ", "kd: ", "train: ", "val: ", "images/s: ", "left: "):
        assert part in text, part


def test_the_bar_leaves_room_for_figures(trainer, tmp_path):
    text = said(trainer, tmp_path, is_terminal=True)
    assert "it/s" not in text
    assert re.search(r"Epoch 3/3 .*4/4", text)


def test_the_result_of_another_task_is_what_it_measured(trainer, tmp_path, capsys):
    (tmp_path / "config.yaml").touch()
    run = trainer()
    run.fit(module(), TinyData())
    for name in [name for name in run.callback_metrics if name.startswith("val/")]:
        del run.callback_metrics[name]
    print_result(run, str(tmp_path))
    assert "No validation pictures were held out" in capsys.readouterr().out
    run.callback_metrics["val/absolute_error"] = torch.tensor(0.25)
    print_result(run, str(tmp_path))
    told = capsys.readouterr().out
    assert re.search(r"val/absolute_error\W+0.25", told)
    assert "held out. To measure" not in told
