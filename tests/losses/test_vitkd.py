"""ViTKD: tokens of early blocks mimicked, tokens of the last generated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kdlit.losses import CrossEntropyLoss
from kdlit.losses.vitkd import ViTKDLoss, token_mask
from kdlit.models import resnet8
from kdlit.modules import ClassificationDistillation
from tests.conftest import TinyData
from tests.losses.heads import check_gradients, close, in_float32, load_head, outputs
from tests.losses.test_golden import load


class Tokens(nn.Module):
    """Three blocks on patches of 2x2, behind some tokens that are no patches."""

    def __init__(self, width=6, prefix=1, num_classes=5, patch=2):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.prefix = nn.Parameter(torch.randn(1, prefix, width))
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(3)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, image):
        patches = self.patches(image).flatten(2).mT
        tokens = torch.cat([self.prefix.expand(len(image), -1, -1), patches], dim=1)
        return self.head(self.blocks(tokens).mean(1))


LAYERS = [f"blocks.{index}" for index in range(3)]


def built(student=6, teacher=8, count=17, **options):
    loss = ViTKDLoss(LAYERS, LAYERS, **options)
    loss.student_layers = loss.teacher_layers = LAYERS
    loss.build(*([(1, count, width)] * 3 for width in (student, teacher)))
    return loss


def golden(number, dtype):
    case = load("vitkd", number)
    if dtype == torch.float32:
        in_float32(case)
        case.arrays["noise"] = case["noise"].float()
    widths = [case[f"{role}_high"].shape[2] for role in ("student", "teacher")]
    count = case["student_high"].shape[1]
    weights = {"alpha": case.alpha, "beta": case.beta, "mask_ratio": case.params["lambda"]}
    loss = built(*widths, count, **weights)
    load_head(loss, case)
    return case, loss.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("number", range(2))
def test_golden_values_and_gradients(number, dtype, monkeypatch):
    case, loss = golden(number, dtype)
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    assert torch.equal(token_mask(case["noise"], loss.mask_ratio).double(), case["mask"].double())
    close(loss.mimicking(case["student_low"].unbind(1), case["teacher_low"].unbind(1)), case["mimicking"], rtol)
    close(loss.generation(case["student_high"], case["teacher_high"], case["noise"]), case["generation"], rtol)
    monkeypatch.setattr(torch, "rand", lambda *size, device: case["noise"])
    features = [[*case[f"{role}_low"].unbind(1), case[f"{role}_high"]] for role in ("student", "teacher")]
    value = loss.compare(*features)
    close(value, case["loss"], rtol)
    value.backward()
    check_gradients(loss, case, rtol)


def test_laws():
    loss = built(6, 6, 11, prefix_tokens=(2, 2)).double()
    assert not hasattr(loss.align_high, "weight")
    student, teacher = ([torch.randn(4, 11, 6, dtype=torch.float64) for _ in range(3)] for _ in range(2))
    assert loss.mimicking(teacher[:2], teacher[:2]) == 0
    noise = torch.rand(4, 9)
    assert token_mask(noise, 0.5).sum(1).tolist() == [5] * 4
    assert token_mask(noise, 1.0).all()
    order = torch.randperm(4)
    patches = [student[2][:, 2:], teacher[2][:, 2:]]
    torch.testing.assert_close(
        loss.generation(*(tokens[order] for tokens in patches), noise[order]), loss.generation(*patches, noise)
    )
    other = loss.generation(torch.where(token_mask(noise, 0.5)[..., None], 7.0, patches[0]), patches[1], noise)
    torch.testing.assert_close(other, loss.generation(*patches, noise))  # what is masked is not seen
    torch.manual_seed(1)
    value = loss.compare(student, teacher)
    changed = [[torch.cat([9 * tokens[:, :2], tokens[:, 2:]], 1) for tokens in each] for each in (student, teacher)]
    torch.manual_seed(1)
    torch.testing.assert_close(loss.compare(*changed), value)  # neither are the tokens in front
    torch.manual_seed(2)
    assert loss.compare(student, teacher) != value
    target = teacher[2].requires_grad_()
    features = outputs(loss, dict(zip(LAYERS, student, strict=True)), dict(zip(LAYERS, teacher, strict=True)))
    loss.alpha = loss.beta = 1e-20
    assert loss(*features).isfinite()
    loss(*features).backward()
    assert target.grad is None
    assert (
        loss.float()
        .compare([1e4 * x.float() for x in student], [-1e4 * x.detach().float() for x in teacher])
        .isfinite()
    )
    tiny = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    small = built(2, 2, 4).double()
    assert torch.autograd.gradcheck(
        lambda x: small.generation(x, torch.ones(1, 4, 2).double(), torch.rand(1, 4) * 0), tiny
    )


@pytest.mark.parametrize(("student_prefix", "teacher_prefix"), [(0, 1), (1, 2)])
def test_it_trains_and_stays_out_of_the_export(trainer, student_prefix, teacher_prefix):
    loss = ViTKDLoss(LAYERS, LAYERS, alpha=1e-2, beta=1e-2)
    module = ClassificationDistillation(
        Tokens(prefix=student_prefix),
        {"ce": CrossEntropyLoss(), "vitkd": loss},
        Tokens(width=8, prefix=teacher_prefix),
        input_size=(3, 8, 8),
    )
    before = copy.deepcopy(loss.state_dict())
    trainer().fit(module, TinyData())
    changed = {name for name, value in loss.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == set(dict(loss.named_parameters()))
    assert changed == {
        "mask_token",
        *(
            f"{name}.{part}"
            for name in ("align_low0", "align_low1", "align_high", "gen0", "gen1")
            for part in ("weight", "bias")
        ),
    }
    held = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert {id(parameter) for parameter in loss.parameters()} <= held
    assert module.student.state_dict().keys() == Tokens(prefix=student_prefix).state_dict().keys()
    fresh = built(6, 8, alpha=1e-2, beta=1e-2)
    fresh.load_state_dict(loss.state_dict())
    tokens = [[torch.randn(2, 16, 6)] * 3, [torch.randn(2, 16, 8)] * 3]
    noise = torch.rand(2, 16)
    assert torch.equal(
        fresh.generation(tokens[0][2], tokens[1][2], noise),
        copy.deepcopy(loss).generation(tokens[0][2], tokens[1][2], noise),
    )


def test_default_layers_of_timms_transformers():
    models = pytest.importorskip("kdlit.models", reason="timm is an extra")
    pytest.importorskip("timm", reason="the networks are timm's, an extra")
    loss = ViTKDLoss()
    module = ClassificationDistillation(
        models.deit_tiny(num_classes=5, image_size=32),
        {"vitkd": loss},
        models.deit3_small(num_classes=5, image_size=32),
        input_size=(3, 32, 32),
    )
    assert loss.student_layers == loss.teacher_layers == ("blocks.0", "blocks.1", "blocks.11")
    assert loss.align_low1.weight.shape == (384, 192)
    batch = {"image": torch.rand(2, 3, 32, 32)}
    loss(module.run_student(batch), module.run_teacher(batch), batch).backward()
    assert module.student.blocks[11].mlp.fc2.weight.grad is not None
    ViTKDLoss().setup(models.deit_tiny_distilled(image_size=32), module.teacher, torch.zeros(1, 3, 32, 32))


def test_errors():
    example = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"the student's 19 tokens at 'blocks.0' are not a square .* at most 2 others"):
        ViTKDLoss(LAYERS, LAYERS).setup(Tokens(prefix=3), Tokens(), example)
    ViTKDLoss(LAYERS, LAYERS, prefix_tokens=(3, 1)).setup(Tokens(prefix=3), Tokens(), example)
    with pytest.raises(ValueError, match=r"the teacher's 17 tokens at 'blocks.0' are not a square .* behind 3 others"):
        ViTKDLoss(LAYERS, LAYERS, prefix_tokens=(1, 3)).setup(Tokens(), Tokens(), example)
    with pytest.raises(ValueError, match=r"square pictures, got input_size \(3, 6, 16\)"):  # 1 + 3 * 8 is a square too
        ViTKDLoss(LAYERS, LAYERS).setup(Tokens(), Tokens(), torch.zeros(1, 3, 6, 16))
    with pytest.raises(ValueError, match=r"the student's 17 tokens .* behind 17 others"):
        ViTKDLoss(LAYERS, LAYERS, prefix_tokens=(17, 1)).setup(Tokens(), Tokens(), example)
    with pytest.raises(ValueError, match="student's are 4x4 and the teacher's 2x2"):
        ViTKDLoss(LAYERS, LAYERS).setup(Tokens(), Tokens(patch=4), example)
    with pytest.raises(ValueError, match=r"student_layers: 'patches' gives \(1, 6, 4, 4\), but all must give tokens"):
        ViTKDLoss(["patches", "blocks.2"], LAYERS[1:]).setup(Tokens(), Tokens(), example)
    with pytest.raises(ValueError, match="ViTKDLoss needs two or more layers of each network, got blocks.2"):
        ViTKDLoss(["blocks.2"], ["blocks.2"]).setup(Tokens(), Tokens(), example)
    with pytest.raises(ValueError, match="ViTKDLoss needs student_layers: Tokens does not say"):
        ViTKDLoss().setup(Tokens(), Tokens(), example)
    with pytest.raises(ValueError, match=r"student_layers: 'relu' gives \(1, 16, 32, 32\)|'layer1' gives"):
        ViTKDLoss().setup(resnet8(), resnet8(), torch.zeros(1, 3, 32, 32))
    for options, message in (
        ({"mask_ratio": 0.0}, "mask_ratio must be > 0 and <= 1, got 0.0"),
        ({"alpha": -1.0}, "alpha must be >= 0, got -1.0"),
        ({"beta": -1.0}, "beta must be >= 0, got -1.0"),
        ({"prefix_tokens": (1, -1)}, r"prefix_tokens must be two numbers >= 0, of student and teacher, got \(1, -1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ViTKDLoss(**options)
