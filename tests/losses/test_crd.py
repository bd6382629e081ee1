"""CRD: golden vectors, scores without large tensors, negatives, and a memory that moves, resumes and is shared."""

from __future__ import annotations

import functools

import lightning as L
import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from kdlit.losses import CrossEntropyLoss, WeightedLoss, crd
from kdlit.losses.crd import CRDLoss, contrast_scores, crd_loss, log_normalizer
from kdlit.modules import ClassificationDistillation
from kdlit.types import ModelOutput
from tests.conftest import TinyData, TinyNet
from tests.losses import crd_processes
from tests.losses.heads import check_gradients, load_head
from tests.losses.test_golden import Case, assert_agrees, load

NUMBERS = pytest.mark.parametrize("number", range(3))


def ready(size: int = 12, classes: int = 3, widths: tuple[int, int] = (5, 7), **kwargs) -> CRDLoss:
    """A loss that reads the feature ``feat`` of both networks, for so many pictures."""
    loss = CRDLoss("feat", "feat", **({"feat_dim": 4, "negatives": 6} | kwargs))
    loss.student_layers = loss.teacher_layers = ("feat",)
    loss.build([(1, widths[0])], [(1, widths[1])])
    loss.on_fit_start(torch.arange(size) % classes)
    return loss


def run(loss: CRDLoss, student: Tensor, teacher: Tensor, index: Tensor) -> Tensor:
    return loss(ModelOutput(student, {"feat": student}), ModelOutput(teacher, {"feat": teacher}), {"index": index})


def batch(size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(size, 5), torch.randn(size, 7), torch.arange(size)


def state(loss: CRDLoss) -> dict[str, Tensor]:
    return {name: value.nan_to_num().clone() for name, value in loss.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


# Golden vectors


def golden(case: Case) -> CRDLoss:
    loss = ready(
        case.n_data, 1 + case.n_data // 2, (case["student_feat_0"].shape[1], case["teacher_feat_0"].shape[1]),
        feat_dim=case.feat_dim, negatives=case.K, temperature=case.T, momentum=case.momentum,
    ).double()  # fmt: skip
    load_head(loss, case)
    for name in ("student", "teacher"):
        getattr(loss, f"memory_{name}").copy_(case[f"memory_{name}"])
        if f"Z_{name}" in case.arrays:
            getattr(loss, f"log_z_{name}").copy_(case[f"Z_{name}"].log())
    loss.contrast = lambda index: case["contrast_index"]  # type: ignore[method-assign]
    return loss


@NUMBERS
def test_golden(number: int) -> None:
    case = load("crd", number)
    loss = golden(case)
    value = run(loss, case["student_feat_0"], case["teacher_feat_0"], case["index"])
    value.backward()
    assert_agrees(value.detach(), case["loss"], case.rtol, "loss")
    check_gradients(loss, case, 1e-9)
    _, f, g, log_z = loss._seen
    assert_agrees(f, case["embedding_student"], case.rtol, "embedding_student")
    assert_agrees(g, case["embedding_teacher"], case.rtol, "embedding_teacher")
    for name, anchor, memory, z in (("student", f, "teacher", log_z[0]), ("teacher", g, "student", log_z[1])):
        scores = contrast_scores(anchor, case[f"memory_{memory}"], case["contrast_index"], temperature=case.T)
        term = crd_loss(scores, z, num_samples=case.n_data)
        assert_agrees(term, case[f"loss_{name}_anchor"], case.rtol, f"loss_{name}_anchor")
    loss.on_train_batch_end(None, None, None)
    for name in ("student", "teacher"):
        assert_agrees(getattr(loss, f"memory_{name}"), case[f"memory_{name}_after"], case.rtol, f"memory_{name}")
        assert_agrees(getattr(loss, f"log_z_{name}").exp(), case[f"Z_{name}_after"], case.rtol, f"Z_{name}")


@NUMBERS
def test_golden_in_float32(number: int) -> None:
    case = load("crd", number)
    loss = golden(case).float()
    student = case["student_feat_0"].detach().float().requires_grad_()
    value = run(loss, student, case["teacher_feat_0"].float(), case["index"])
    value.backward()
    torch.testing.assert_close(value.double(), case["loss"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), case["grad_student_feat_0"], rtol=1e-3, atol=1e-5)


# Scores and the loss on them


@pytest.mark.parametrize("piece", [1, 100, 2**24])
@pytest.mark.parametrize("dense", [0, 32])
def test_scores_are_those_of_the_naive_form(monkeypatch, dense: int, piece: int) -> None:
    monkeypatch.setattr(crd, "DENSE", dense)
    monkeypatch.setattr(crd, "PIECE", piece)
    anchor = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(11, 3, dtype=torch.float64)
    index = torch.randint(11, (5, 8))
    index[:, 1] = index[:, 0]  # twice in a row
    scores = functools.partial(contrast_scores, memory=memory, contrast_index=index, temperature=0.5)
    naive = torch.einsum("bkd,bd->bk", memory[index], anchor) / 0.5
    torch.testing.assert_close(scores(anchor), naive, rtol=1e-12, atol=1e-12)
    weight = torch.randn(5, 8, dtype=torch.float64)
    expected, got = (torch.autograd.grad((weight * one).sum(), anchor)[0] for one in (naive, scores(anchor)))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(scores, anchor)


def test_nothing_of_the_size_of_all_rows_is_allocated() -> None:
    """Neither against all rows nor row by row: the naive form takes 64 x 2049 x 128 numbers, 67 MB."""
    for rows in (4_000, 100_000):
        anchor, memory = torch.randn(64, 128, requires_grad=True), torch.randn(rows, 128)
        index = torch.randint(rows, (64, 2049))
        crd.PIECE, limit = 2**20, crd.PIECE
        try:
            with torch.profiler.profile(profile_memory=True) as profile:
                contrast_scores(anchor, memory, index).sum().backward()
        finally:
            crd.PIECE = limit
        largest = max(event.self_cpu_memory_usage / max(event.count, 1) for event in profile.key_averages())
        assert 2**18 < largest < 8 * 2**20


def test_the_loss_is_the_formula() -> None:
    scores = 3 * torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    log_z = log_normalizer(scores, num_samples=10)
    torch.testing.assert_close(log_z.exp(), 10 * scores.detach().exp().mean())
    x, c = scores.exp() / log_z.exp(), 6 / 10
    expected = -((x[:, 0] / (x[:, 0] + c + 1e-7)).log() + (c / (x[:, 1:] + c + 1e-7)).log().sum(dim=1)).mean()
    torch.testing.assert_close(crd_loss(scores, log_z, num_samples=10), expected, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda s: crd_loss(s, log_z, num_samples=10), scores)
    order = torch.randperm(4)
    torch.testing.assert_close(crd_loss(scores[order], log_z, num_samples=10), expected)


@pytest.mark.parametrize("scale", [1e4, 1e-30])
def test_large_scores_and_half_precision(scale: float) -> None:
    scores = (scale * torch.randn(3, 6)).requires_grad_()
    value = crd_loss(scores, log_normalizer(scores, num_samples=9), num_samples=9)
    value.backward()
    assert value.isfinite()
    assert scores.grad.isfinite().all()
    half = scores.detach().bfloat16()
    wide = crd_loss(half.float(), log_normalizer(half, num_samples=9), num_samples=9)
    torch.testing.assert_close(crd_loss(half, log_normalizer(half, num_samples=9), num_samples=9), wide)


def test_the_teacher_gets_no_gradient_and_one_picture_is_enough() -> None:
    loss = ready(temperature=1e-3)
    student, teacher, index = (one.requires_grad_() if one.is_floating_point() else one for one in batch(1))
    value = run(loss, 1e4 * student, 1e4 * teacher, index)
    value.backward()
    assert value.isfinite()
    assert teacher.grad is None
    assert student.grad.isfinite().all()
    assert loss.embed_t.weight.grad.isfinite().all()
    assert loss.memory_student.grad is None


# Negatives


def test_negatives_are_uniform_over_the_other_classes() -> None:
    target = torch.tensor([7, 3, 3, 9, 7, 3, 9, -1])  # any integers
    loss = ready(negatives=40_000)
    loss.on_fit_start(target)
    index = torch.arange(len(target))
    drawn = loss.contrast(index)
    assert drawn.shape == (8, 40_001)
    assert torch.equal(drawn[:, 0], index)
    for row, label in zip(drawn, target, strict=True):
        share = row[1:].bincount(minlength=8) / 40_000
        allowed = target != label
        assert not share[~allowed].any()
        torch.testing.assert_close(share[allowed], torch.full_like(share[allowed], 1 / allowed.sum()), rtol=0.1, atol=0)
    assert not torch.equal(drawn, loss.contrast(index))


@pytest.mark.parametrize("how", ["option", "no labels"])
def test_negatives_may_be_all_other_samples(how: str) -> None:
    if how == "option":
        loss = ready(size=6, negatives=30_000, negatives_from="other_samples")
    else:
        loss = ready(size=6, negatives=30_000, num_samples=6)
        loss.on_fit_start(None)
    for own, row in enumerate(loss.contrast(torch.arange(6))):
        share = row[1:].bincount(minlength=6) / 30_000
        expected = torch.full((6,), 0.2)
        expected[own] = 0
        torch.testing.assert_close(share, expected, rtol=0.1, atol=0)


# The memory


def test_the_memory_starts_as_published_and_alike_everywhere() -> None:
    one = ready(size=3000, classes=10, feat_dim=16)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    memory = CRDLoss(feat_dim=16, negatives=4, num_samples=3000)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(memory.memory_student, one.memory_student)
    bound = (3 / 16) ** 0.5
    assert one.memory_student.abs().max() <= bound
    torch.testing.assert_close(one.memory_teacher.std(), torch.tensor(0.25), rtol=0.02, atol=0)
    assert not torch.equal(one.memory_student, one.memory_teacher)


def test_the_memory_moves_after_the_batch_with_what_forward_saw() -> None:
    loss = ready(momentum=0.25)
    student, teacher, index = batch()
    before = state(loss)
    f = torch.nn.functional.normalize(loss.embed_s(student)).detach()
    run(loss, student, teacher, index)
    assert same(state(loss), before)
    with torch.no_grad():
        loss.embed_s.weight.zero_()  # as an optimizer's step would
    loss.on_train_batch_end(None, None, None)
    expected = torch.nn.functional.normalize(0.25 * before["memory_student"][:4] + 0.75 * f)
    torch.testing.assert_close(loss.memory_student[:4], expected)
    assert torch.equal(loss.memory_student[4:], before["memory_student"][4:])
    known = loss.log_z_student.clone()
    assert known.isfinite()
    run(loss, 3 * student, teacher, index)
    loss.on_train_batch_end(None, None, None)
    assert torch.equal(loss.log_z_student, known)


def test_evaluation_leaves_no_trace() -> None:
    loss = ready()
    before = state(loss)
    loss.eval()
    assert run(loss, *batch()).isfinite()
    loss.on_train_batch_end(None, None, None)
    loss.train()
    loss.on_train_batch_end(None, None, None)
    assert same(state(loss), before)
    run(loss, *batch())
    assert "_seen" not in loss.state_dict()
    loss.on_train_batch_end(None, None, None)
    after = state(loss)
    loss.on_train_batch_end(None, None, None)  # nothing is taken in twice
    assert same(state(loss), after)


def test_of_a_picture_that_is_there_twice_the_last_counts() -> None:
    assert crd._last_of_each(torch.tensor([3, 1, 3, 8, 3, 1])).tolist() == [4, 5, 4, 3, 4, 5]
    loss, other = ready(), ready()
    other.load_state_dict(loss.state_dict())
    student, teacher, _ = batch(5)
    run(loss, student, teacher, torch.tensor([3, 1, 3, 8, 3]))
    loss.on_train_batch_end(None, None, None)
    run(other, student[[1, 3, 4]], teacher[[1, 3, 4]], torch.tensor([1, 8, 3]))
    other.on_train_batch_end(None, None, None)
    torch.testing.assert_close(loss.memory_student, other.memory_student)
    torch.testing.assert_close(loss.memory_teacher, other.memory_teacher)


def test_a_second_fit_keeps_the_memory_unless_the_data_is_of_another_size() -> None:
    loss = ready()
    run(loss, *batch())
    loss.on_train_batch_end(None, None, None)
    before = state(loss)
    loss.on_fit_start(torch.arange(12) % 2)
    assert same(state(loss), before)
    loss.double().on_fit_start(torch.arange(20) % 3)
    assert loss.memory_student.shape == (20, 4)
    assert loss.memory_student.dtype == torch.float64
    assert loss.log_z_student.isnan()


def test_an_empty_memory_takes_the_size_of_one_that_is_loaded() -> None:
    loss, empty = ready(), CRDLoss("feat", "feat", feat_dim=4, negatives=6)
    empty.build([(1, 5)], [(1, 7)])
    run(loss, *batch())
    loss.on_train_batch_end(None, None, None)
    empty.load_state_dict(loss.state_dict())
    assert same(state(loss), state(empty))
    with pytest.raises(RuntimeError, match="size mismatch for memory_student"):
        ready(size=20).load_state_dict(loss.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CRDLoss(momentum=1.5), "momentum must be from 0 to 1, got 1.5"),
        (lambda: CRDLoss(negatives=0), "negatives must be > 0, got 0"),
        (lambda: CRDLoss(negatives_from="labels"), "negatives_from must be one of 'other_classes', 'other_samples'"),
        (lambda: CRDLoss(num_samples=1), "num_samples must be at least 2, got 1"),
        (lambda: CRDLoss().on_fit_start(None), "needs num_samples, the number of training pictures"),
        (lambda: CRDLoss(num_samples=5).on_fit_start(torch.arange(4)), "num_samples is 5, but the data has 4"),
        (lambda: ready(classes=1), "no negatives: all 12 training pictures are of one class"),
        (lambda: run(ready(), *batch(2)[:2], torch.tensor([0, 12])), r"must lie in 0..11 .* got 0..12"),
        (lambda: contrast_scores(torch.ones(2, 3), torch.ones(4, 5), torch.zeros(2, 2).long()), r"\(2, 3\), \(4, 5\)"),
    ],
)
def test_mistakes(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_without_a_size_forward_says_what_is_missing() -> None:
    loss = CRDLoss("feat", "feat", feat_dim=4)
    with pytest.raises(RuntimeError, match="on_fit_start must be called before the first batch"):
        loss({}, {}, {"index": torch.zeros(1, dtype=torch.int64)})


# In training


class Reseed(L.Callback):
    """Draws of the second epoch do not depend on whether the first was in this run."""

    def on_train_epoch_start(self, trainer, pl_module):
        torch.manual_seed(100 + trainer.current_epoch)


def distil(**kwargs) -> ClassificationDistillation:
    torch.manual_seed(0)
    loss = WeightedLoss(CRDLoss(feat_dim=4, negatives=6, **kwargs), weight=0.8)
    return ClassificationDistillation(
        TinyNet(), {"ce": CrossEntropyLoss(), "crd": loss}, TinyNet(width=12), input_size=(3, 8, 8)
    )


def test_a_resumed_run_has_the_same_memory_bit_for_bit(trainer, tmp_path) -> None:
    whole = distil()
    trainer(max_epochs=2, callbacks=[Reseed()]).fit(whole, TinyData())
    first = distil()
    stopped = trainer(max_epochs=1, callbacks=[Reseed()])
    stopped.fit(first, TinyData())
    stopped.save_checkpoint(tmp_path / "last.ckpt")
    second = distil()
    trainer(max_epochs=2, callbacks=[Reseed()]).fit(second, TinyData(), ckpt_path=tmp_path / "last.ckpt")
    resumed = second.losses.state_dict()
    assert len(whole.losses["crd"].loss.memory_student) == 64
    for name, value in whole.losses.state_dict().items():
        assert torch.equal(resumed[name], value), name
    assert not torch.equal(first.losses["crd"].loss.memory_student, whole.losses["crd"].loss.memory_student)


def test_a_checkpoint_with_a_memory_can_be_measured(trainer, tmp_path) -> None:
    fitting = trainer(limit_val_batches=0)
    module = distil()
    fitting.fit(module, TinyData())
    fitting.save_checkpoint(tmp_path / "last.ckpt")
    again = distil()
    figures = trainer().test(again, TinyData(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert figures[0]["test/top1"] == trainer().test(module, TinyData(), verbose=False)[0]["test/top1"]
    assert same(state(again.losses["crd"].loss), state(module.losses["crd"].loss))


def test_accumulated_gradients_and_evaluation_between_batches(trainer) -> None:
    """Each micro-batch is taken in once; validation in the middle of an epoch takes in nothing."""
    module = distil()
    seen = []

    class Watch(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            self.before = state(module.losses["crd"].loss)

        def on_validation_end(self, trainer, pl_module):
            assert same(state(module.losses["crd"].loss), self.before)
            assert module.losses["crd"].loss._seen is None
            seen.append(trainer.global_step)

    fitting = trainer(accumulate_grad_batches=2, val_check_interval=1, callbacks=[Watch()], num_sanity_val_steps=0)
    start = CRDLoss(feat_dim=4, num_samples=64).memory_student
    fitting.fit(module, TinyData(batch_size=16))
    assert len(seen) == 4
    assert (module.losses["crd"].loss.memory_student != start).any(dim=1).all()


def test_data_without_labels_or_index_is_refused_with_the_cure(trainer) -> None:
    pairs = [(torch.rand(3, 8, 8), target) for target in range(4)]
    loader = torch.utils.data.DataLoader(pairs, batch_size=2)
    with pytest.raises(ValueError, match="needs num_samples"):
        trainer().fit(distil(), loader)
    with pytest.raises(ValueError, match=r"losses.crd needs 'index' in the batch"):
        trainer().fit(distil(num_samples=4), loader)


def test_two_processes_keep_one_memory(tmp_path) -> None:
    """Equal to each other bit for bit, and to a single process that sees the whole batches, once normalisers are set.

    In the first step each process has its own estimate of the normalisers in its loss; no step is taken on it here.
    """
    torch.multiprocessing.spawn(crd_processes.process, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = crd_processes.Step()
    expected = crd_processes.train(alone, alone.loss, None)
    for name, value in expected.items():
        assert torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one[name], value, rtol=1e-12, atol=1e-12, msg=name)
    start = crd_processes.Step().loss.state_dict()
    assert all(not torch.equal(value, start[name]) for name, value in one.items())
