"""Options that make a step faster change nothing else."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdlit import models
from kdlit.benchmark.training import METHODS
from kdlit.callbacks import RandomState
from kdlit.losses import (
    CRDLoss,
    CrossEntropyLoss,
    DistillationLoss,
    DKDLoss,
    FitNetLoss,
    KDLoss,
    WeightedLoss,
    crd,
    functional,
)
from kdlit.modules import ClassificationDistillation, ManyStudents
from kdlit.modules.performance import Performance, fused
from tests.conftest import Diary, TinyData, TinyNet


def module(performance="exact", losses=None, student=None, teacher=None, **kwargs):
    torch.manual_seed(3)
    return ClassificationDistillation(
        student or TinyNet(),
        losses or {"ce": CrossEntropyLoss(), "dkd": DKDLoss()},
        teacher or TinyNet(width=16),
        input_size=(3, 8, 8),
        performance=performance,
        **kwargs,
    )


def batch(size=8, side=8, classes=5):
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(size, 3, side, side, generator=generator)
    target = torch.randint(0, classes, (size,), generator=generator)
    return {"image": image, "target": target, "index": torch.arange(size), "image_strong": image.flip(-1)}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_loss_and_gradient_as_without_any_option(method):
    values, gradients = [], []
    for performance in ("plain", "exact"):
        torch.manual_seed(1)
        distiller = ClassificationDistillation(
            models.resnet8x4(num_classes=10),
            METHODS[method](),
            models.resnet14(num_classes=10),
            performance=performance,
        ).train()
        data = batch(side=32, classes=10)
        for term in distiller.losses.values():
            term.on_fit_start(torch.arange(100) % 10)
        distiller.performance.lay_out(distiller.student)
        torch.manual_seed(2)
        loss = distiller.distil(data, distiller.run_teacher(data))["loss"]
        loss.backward()
        values.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in distiller.student.parameters() if p.grad is not None]))
    assert values[1] == pytest.approx(values[0], rel=1e-5 if method != "PKT" else 2e-3)  # PKT: near 0
    assert (gradients[1] - gradients[0]).norm() < 5e-3 * gradients[0].norm()


def test_exact_trains_as_plain_does(trainer):
    losses = {}
    for performance in ("plain", "exact"):
        fitted = trainer(max_epochs=3)
        fitted.fit(module(performance), TinyData())
        losses[performance] = fitted.callback_metrics
    for name, value in losses["plain"].items():
        assert losses["exact"][name].item() == pytest.approx(value.item(), rel=1e-4), name


class Spy(DistillationLoss):
    """Notes what it gets."""

    def __init__(self):
        super().__init__()
        self.student_layers, self.teacher_layers, self.seen = ("stem",), ("stem",), []

    def forward(self, student, teacher, batch):
        self.seen.append((student.logits, teacher.logits, student.features["stem"], teacher.features["stem"]))
        return student.logits.square().mean()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_within_the_networks_alone(dtype):
    spy = Spy()
    options = Performance(teacher_dtype=dtype, student_dtype="bfloat16")
    distiller = module(options, {"spy": spy}).train()
    inside = {}
    distiller.student.fc.register_forward_hook(lambda layer, args, output: inside.update(student=output.dtype))
    distiller.teacher.fc.register_forward_hook(lambda layer, args, output: inside.update(teacher=output.dtype))
    data = batch()
    loss = distiller.distil(data, distiller.run_teacher(data))["loss"]
    loss.backward()
    assert inside == {"student": torch.bfloat16, "teacher": getattr(torch, dtype)}
    assert {value.dtype for value in (*spy.seen[0], loss)} == {torch.float32}
    assert {p.dtype for p in distiller.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in distiller.student.parameters()} == {torch.float32}
    assert torch.equal(distiller(data["image"]), distiller(data["image"]))
    distiller.eval()
    assert distiller(data["image"]).dtype == torch.bfloat16  # measured as it is trained


def test_fast_is_near_exact_and_its_files_are_the_same(trainer, tmp_path):
    files = {}
    for performance in ("exact", "fast"):
        fitted = trainer(max_epochs=2)
        distiller = module(performance)
        fitted.fit(distiller, TinyData())
        fitted.save_checkpoint(tmp_path / f"{performance}.ckpt")
        files[performance] = torch.load(tmp_path / f"{performance}.ckpt", weights_only=True)["state_dict"]
    assert files["exact"].keys() == files["fast"].keys()
    assert not any("teacher" in name or "_orig_mod" in name for name in files["fast"])
    assert {value.dtype for value in files["fast"].values()} <= {torch.float32, torch.int64}
    for name, value in files["exact"].items():
        assert torch.allclose(value.float(), files["fast"][name].float(), atol=0.05), name
    resumed = trainer(max_epochs=3)
    resumed.fit(module("plain"), TinyData(), ckpt_path=tmp_path / "fast.ckpt")
    assert resumed.current_epoch == 3


# The teacher


def test_the_teachers_own_weights_are_there_but_for_the_pass():
    distiller = module("fast")
    before = {name: value.clone() for name, value in distiller.teacher.state_dict().items()}
    layers = list(distiller.teacher.children())
    distiller.run_teacher(batch())
    assert list(distiller.teacher.children()) == layers
    assert distiller.teacher.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in distiller.teacher.state_dict().items())
    broken = batch()
    broken["image"] = broken["image"][:, :, :2, :2]  # smaller than the kernel
    with pytest.raises(RuntimeError):
        distiller.run_teacher(broken)
    assert list(distiller.teacher.children()) == layers
    assert all(torch.equal(value, before[name]) for name, value in distiller.teacher.state_dict().items())


def test_a_teacher_whose_weights_change_is_followed():
    distiller = module()
    first = distiller.run_teacher(batch()).logits
    other = TinyNet(width=16)
    distiller.teacher.load_state_dict(other.state_dict())
    with torch.no_grad():
        expected = other.eval()(batch()["image"])
    second = distiller.run_teacher(batch()).logits
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.allclose(second, expected, atol=1e-6)


def test_features_before_and_after_a_batch_norm_are_those_of_the_teacher():
    for layer in ("stem", "bn", "bn.input", "act", "fc.input"):
        losses = {"fitnet": FitNetLoss(student_layers="act", teacher_layers="act"), "spy": Spy()}
        losses["spy"].teacher_layers = (layer,)
        seen = []
        for performance in ("plain", "exact"):
            distiller = module(performance, dict(losses))
            distiller.teacher.bn.running_mean.fill_(0.3)
            distiller.teacher.bn.running_var.fill_(4.0)
            seen.append(distiller.run_teacher(batch()).features[layer])
        assert torch.allclose(*seen, atol=1e-6), layer


def logits_of(distiller):
    with torch.no_grad():
        return distiller.teacher(batch()["image"])


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.bn.running_mean.add_(1.0),
        lambda net: setattr(net, "stem", nn.Conv2d(3, 16, 3, stride=2)),
        lambda net: net.stem.weight.data.mul_(0.5),
        lambda net: setattr(net.stem.weight, "data", net.stem.weight.data.flip(0)),
    ],
)
def test_however_a_teacher_changes_it_is_followed_from_the_next_epoch_on(change):
    distiller = module()
    first = distiller.run_teacher(batch()).logits
    with torch.no_grad():
        change(distiller.teacher.eval())
    distiller._start_anew("train")
    second = distiller.run_teacher(batch()).logits
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.allclose(second, logits_of(distiller), atol=1e-5)


def test_a_hook_that_comes_later_sees_what_the_teacher_gives():
    distiller = module()
    distiller.run_teacher(batch())
    seen = []
    distiller.teacher.stem.register_forward_hook(lambda layer, args, output: seen.append(output.clone()))
    distiller.run_teacher(batch())
    logits_of(distiller)
    assert torch.allclose(seen[-2], seen[-1], atol=1e-6)


def test_threads_may_share_a_teacher():
    teacher = TinyNet(width=16)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distillers = [module(teacher=teacher, student=TinyNet()) for _ in range(2)]
    expected = distillers[0].run_teacher(batch()).logits
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(one.run_teacher, batch()) for one in distillers * 50]
        assert all(torch.allclose(job.result().logits, expected, atol=1e-6) for job in jobs)
    assert teacher.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("form", ["traced by fx", "scripted", "traced"])
@pytest.mark.parametrize("performance", ["exact", "plain"])
def test_teachers_in_other_forms(form, performance):
    net = TinyNet(width=16).eval()
    with torch.no_grad():
        expected = net(batch()["image"])
    make = {
        "traced by fx": torch.fx.symbolic_trace,
        "scripted": torch.jit.script,
        "traced": lambda one: torch.jit.trace(one, batch()["image"]),
    }[form]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates some of these
        output = module(performance, losses={"kd": KDLoss()}, teacher=make(net)).run_teacher(batch()).logits
    assert torch.allclose(output, expected, atol=1e-5)


class Stateful(TinyNet):
    """Counts its passes in a buffer."""

    def __init__(self):
        super().__init__(width=16)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, image):
        self.passes = self.passes + 1
        return super().forward(image)


def test_what_a_teacher_keeps_of_its_passes_stays():
    distiller = module(teacher=Stateful())
    distiller.run_teacher(batch())
    before = distiller.teacher.passes.item()
    distiller.run_teacher(batch())
    assert distiller.teacher.passes.item() == before + 1


def test_a_teacher_that_cannot_run_in_half_precision_is_said_so_before_the_first_step(trainer):
    class Mixed(TinyNet):
        def forward(self, image):
            return super().forward(image.float())

    with pytest.raises(ValueError, match=r"teacher \(Mixed\) cannot run in bfloat16: .*teacher_dtype to float32"):
        trainer().fit(module("fast", teacher=Mixed()), TinyData())


class Stubborn(TinyNet):
    def __deepcopy__(self, memo):
        raise TypeError("one of me is enough")


def test_a_teacher_that_cannot_be_copied_is_said_so_before_the_first_step(trainer):
    with pytest.raises(ValueError, match=r"teacher \(Stubborn\) cannot be copied: one of me.*set performance to plain"):
        trainer().fit(module(teacher=Stubborn()), TinyData())
    trainer().fit(module("plain", teacher=Stubborn()), TinyData())


def test_logits_known_beforehand_take_the_teachers_place():
    distiller = module(losses={"kd": KDLoss()}).train()
    distiller.teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    known = torch.randn(8, 5).half()
    output = distiller.run_teacher({**batch(), "teacher_logits": known})
    assert torch.equal(output.logits, known.float())
    two_views = module(losses={"mlkd": METHODS["MLKD"]()["mlkd"]}).train()
    with pytest.raises(ValueError, match="strong view.*teacher_logits_strong"):
        two_views.run_teacher({**batch(), "teacher_logits": known})
    with pytest.raises(ValueError, match="need its features stem"):
        module(losses={"spy": Spy()}).run_teacher({**batch(), "teacher_logits": known})


# The optimizer


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_fused_optimizer_does_the_same_steps(make):
    nets = [TinyNet() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    groups = [
        [{"params": [net.fc.weight], "lr": 0.01}, {"params": [net.fc.bias, net.stem.weight], "weight_decay": 0.1}]
        for net in nets
    ]
    plain, quick = make(groups[0], lr=0.1), fused(make(groups[1], lr=0.1))
    assert type(quick) is make
    assert all(group["fused"] for group in quick.param_groups)
    assert quick.defaults == {**plain.defaults, "fused": True}
    for _ in range(5):
        for net, optimizer in zip(nets, (plain, quick), strict=True):
            optimizer.zero_grad()
            net(batch()["image"]).square().sum().backward()
            optimizer.step()
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_optimizers_that_have_been_decided_on_stay():
    class Mine(torch.optim.SGD):
        pass

    weight = [nn.Parameter(torch.ones(2))]
    for optimizer in (
        Mine(weight, lr=0.1),
        torch.optim.SGD(weight, lr=0.1, foreach=True),
        torch.optim.SGD(weight, lr=0.1, fused=False),
        torch.optim.RMSprop(weight),
    ):
        assert fused(optimizer) is optimizer


def test_schedules_move_the_fused_optimizer(trainer):
    distiller = module(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1))
    fitted = trainer(max_epochs=2)
    fitted.fit(distiller, TinyData())
    assert fitted.optimizers[0].param_groups[0]["fused"]
    assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.01)


def test_the_student_is_given_back_in_the_usual_layout(trainer):
    class Layout(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(pl_module.student.stem.weight.is_contiguous(memory_format=torch.channels_last))

    seen, student = [], TinyNet()
    fitted = trainer(callbacks=[Layout()])
    fitted.fit(module(student=student), TinyData())
    assert seen
    assert all(seen)
    assert student.stem.weight.is_contiguous()
    alone = TinyNet()
    alone.load_state_dict(student.state_dict())
    assert torch.equal(alone.eval()(batch()["image"]), student.eval()(batch()["image"]))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_module_may_clip_gradients_itself(trainer, precision):
    class Clipping(ClassificationDistillation):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")

    distiller = Clipping(TinyNet(), {"kd": KDLoss()}, TinyNet(width=16), input_size=(3, 8, 8))
    fitted = trainer(precision=precision)
    fitted.fit(distiller, TinyData())
    assert fitted.optimizers[0].param_groups[0]["fused"]


# Resume


def test_a_resumed_epoch_goes_on_with_its_means_and_its_warmup(trainer, tmp_path):
    def fit(path=None, save_at=None):
        fitted = trainer(max_epochs=3, callbacks=[Diary(save_at, tmp_path / "mid.ckpt")])
        losses = {"ce": CrossEntropyLoss(), "dkd": WeightedLoss(DKDLoss(), warmup_epochs=4)}
        distiller = module(losses=losses)
        fitted.fit(distiller, TinyData(val_size=0), ckpt_path=path)
        return fitted.callback_metrics, distiller.student.state_dict()

    metrics, weights = fit(save_at=9)  # 6 steps an epoch
    again, resumed = fit(tmp_path / "mid.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
    again_mid, _ = fit(tmp_path / "mid.ckpt")
    assert metrics.keys() == again.keys() == again_mid.keys()
    assert {name: value.item() for name, value in metrics.items()} == {
        name: value.item() for name, value in again.items()
    }


@pytest.mark.parametrize("save_at", [6, 7, 12])  # 6 steps an epoch
def test_no_epoch_counts_steps_of_another(trainer, tmp_path, save_at):
    def fit(path=None):
        fitted = trainer(max_epochs=3, callbacks=[Diary(save_at, tmp_path / "mid.ckpt")])
        fitted.fit(module(), TinyData(val_size=0), ckpt_path=path)
        return {name: value.item() for name, value in fitted.callback_metrics.items() if name.startswith("train/")}

    assert fit() == fit(tmp_path / "mid.ckpt")


def test_a_checkpoint_at_the_end_of_a_step_holds_what_the_losses_remember_of_it(trainer, tmp_path):
    def fit(path=None):
        losses = {"crd": CRDLoss("fc.input", "fc.input", negatives=8)}
        distiller = module(losses=losses)
        trainer(max_epochs=2, callbacks=[Diary(8, tmp_path / "mid.ckpt"), RandomState()]).fit(
            distiller, TinyData(val_size=0), ckpt_path=path
        )
        return distiller.losses.state_dict()

    whole = fit()
    assert whole["crd.loss.memory_student"].abs().sum() > 0
    resumed = fit(tmp_path / "mid.ckpt")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_the_means_of_the_epoch_that_was_resumed_are_those_of_the_whole_epoch(trainer, tmp_path):
    def fit(path=None):
        fitted = trainer(max_epochs=2, callbacks=[Diary(9, tmp_path / "mid.ckpt")])
        fitted.fit(module(), TinyData(val_size=0), ckpt_path=path)
        return {name: value.item() for name, value in fitted.callback_metrics.items() if name.startswith("train/")}

    assert fit() == fit(tmp_path / "mid.ckpt")


# Nothing waits for the device


class Waits(TorchDispatchMode):
    """Counts operations that would make the host wait for an accelerator."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith(self.NAMES):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["KD", "DKD", "MLKD", "WTTM", "KD, standardised", "RLD", "DIST", "CRD", "ReviewKD"])
def test_a_step_does_not_wait_for_the_device(method, monkeypatch):
    for file in (functional, crd):
        monkeypatch.setattr(file, "_values_are_cheap", lambda tensor: False)  # as on an accelerator
    distiller = ClassificationDistillation(
        models.resnet8x4(num_classes=10), METHODS[method](), models.resnet8x4(num_classes=10)
    ).train()
    for term in distiller.losses.values():
        term.on_fit_start(torch.arange(100) % 10)
    optimizer, data = distiller.configure_optimizers(), batch(side=32, classes=10)
    outputs = distiller.distil(data, distiller.run_teacher(data))
    outputs["loss"].backward()
    with Waits() as waits:
        optimizer.zero_grad()
        outputs = distiller.distil(data, distiller.run_teacher(data))
        outputs["loss"].backward()
        optimizer.step()
        distiller.on_train_batch_end(outputs, data, 0)
    assert not waits.found


# Options


def test_options_are_checked():
    for wrong, message in (
        ({"teacher_dtype": "int8"}, "teacher_dtype must be one of 'float32', 'bfloat16', 'float16', got 'int8'"),
        ({"student_dtype": "float16"}, "student_dtype must be one of"),
        ({"compile": ["optimizer"]}, "compile must be one of 'student', 'teacher', 'losses', got 'optimizer'"),
        ({"compile_mode": "reduce-overhead"}, "compile names nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            Performance(**wrong)
    with pytest.raises(ValueError, match="performance must be one of 'plain', 'exact', 'fast', got 'fastest'"):
        module("fastest")


def test_compiled_networks_give_the_same_and_leave_no_trace_in_files(trainer, tmp_path, monkeypatch):
    compiling = nn.Module.compile  # traced as ever, but run without being translated to C++, which takes a minute
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode=None: compiling(self, backend="eager"))
    metrics, keys = [], []
    for compiled in ([], ["student", "teacher", "losses"]):
        losses = {"ce": CrossEntropyLoss(), "dkd": DKDLoss(), "fitnet": FitNetLoss("act", "act")}
        distiller = module(Performance(compile=compiled), losses)
        fitted = trainer(max_epochs=1)
        fitted.fit(distiller, TinyData(val_size=0, batch_size=32))
        metrics.append({name: value.item() for name, value in fitted.callback_metrics.items()})
        fitted.save_checkpoint(tmp_path / "one.ckpt")
        keys.append(torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"].keys())
        copy.deepcopy(distiller.student)
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-4)
    assert keys[0] == keys[1]


class Replayed(DistillationLoss):
    """Gives its value where it gave the one before, as a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.place = None

    def forward(self, student, teacher, batch):
        value = student.logits.square().mean()
        if self.place is None:
            self.place = value.detach().clone()
        self.place.copy_(value.detach())
        shown = value - value.detach()
        shown.data = self.place
        return shown


def test_figures_outlast_the_step_where_cuda_graphs_may_write_over_them():
    graphs = Performance(compile=["losses"], compile_mode="reduce-overhead")
    means = []
    for performance in (graphs, "plain"):
        distiller = module(performance, {"replayed": Replayed()}, teacher=TinyNet())
        for scale in (1.0, 2.0):
            distiller.run_step({**batch(), "image": scale * batch()["image"]})
        means.append(distiller.means["train"].take(lambda sums: sums)["train/loss/replayed"])
    assert means[0] < means[1], "without the option the second value stands for both"


@pytest.mark.parametrize("several", [False, True])
def test_cuda_graphs_are_told_of_every_step_before_it_begins(trainer, monkeypatch, several):
    told = []
    compiling = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode=None: compiling(self, backend="eager"))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: told.append("step"))
    teacher = TinyNet(width=16)
    graphs = Performance(compile=["teacher"], compile_mode="reduce-overhead")
    modules = {name: module(graphs, teacher=copy.deepcopy(teacher)) for name in "ab"}
    for one in modules.values():
        run = one.run_student
        monkeypatch.setattr(one, "run_student", lambda batch, run=run: told.append("student") or run(batch))
    trained = ManyStudents(modules) if several else modules["a"]
    run = trainer()
    run.fit(trained, TinyData(val_size=0, batch_size=32))
    run.validate(trained, TinyData(val_size=32), verbose=False)
    number = 2 if several else 1
    training = told[: 3 * 2 * number]
    assert training == (["step"] * number + ["student"] * number) * 3
    assert set(told[3 * 2 * number :]) == {"step"}
