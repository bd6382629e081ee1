"""The vision transformers, ours against the published names and timm's blocks, and timm's through kdlit."""

import json
import sys

import pytest
import torch
from torch import nn

from kdlit.losses import CrossEntropyLoss, DistillationLoss, KDLoss
from kdlit.models import (
    PVT,
    FeatureTap,
    T2TViT,
    checkpoint,
    deit3_small,
    deit_tiny,
    deit_tiny_distilled,
    from_checkpoint,
    pit_tiny,
    pvt_tiny,
    t2t_vit_7,
    vit,
)
from kdlit.models._transformer import Block, to_square
from kdlit.models.pvt import PatchEmbedding, SpatialReductionAttention
from kdlit.models.t2t import Attention, PerformerAttention, sinusoids
from kdlit.modules import ClassificationDistillation
from tests.conftest import TinyNet

PUBLISHED = {  # name in the manifest and number of parameters, 100 classes
    deit_tiny: ("DeiT-Ti", 5_543_716),
    deit_tiny_distilled: ("DeiT-Ti (distill token)", 5_563_400),
    pit_tiny: ("PiT-Ti", 4_615_972),
    pvt_tiny: ("PVT-Ti", 12_767_588),
    t2t_vit_7: ("T2T-ViT-7", 4_078_922),
}
OF_TIMM = (deit_tiny, deit_tiny_distilled, deit3_small, pit_tiny)
LAST_BLOCK = {pvt_tiny: "block4.1", t2t_vit_7: "layers.6", pit_tiny: "transformers.2.blocks"}

every_network = pytest.mark.parametrize("constructor", [*PUBLISHED, deit3_small])


@pytest.fixture(autouse=True)
def _timm(request):
    parameters = getattr(request.node, "callspec", None)
    if parameters and parameters.params.get("constructor") in OF_TIMM:
        pytest.importorskip("timm")


def tokens(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("constructor", PUBLISHED)
def test_number_of_parameters_and_names(constructor, shared):
    name, n_parameters = PUBLISHED[constructor]
    with torch.device("meta"):
        model = constructor(num_classes=100)
        published = json.loads((shared / "models" / "manifest.json").read_text())["tiny_transformers"][name]
        weights = {key: torch.empty(shape) for key, shape in published["state_dict"]}
    assert sum(parameter.numel() for parameter in model.parameters()) == published["params"] == n_parameters
    ours = {key: value.shape for key, value in model.state_dict().items()}
    renamed = checkpoint._rename(weights, model.state_dict())
    assert {key: value.shape for key, value in renamed.items()} == ours


@pytest.mark.parametrize(("classes", "n_parameters"), [(1000, 22_059_496), (10, 22_059_496 - 990 * 385)])
def test_deit3_small(classes, n_parameters):
    pytest.importorskip("timm")
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in deit3_small(classes).parameters()) == n_parameters


@pytest.mark.parametrize("constructor", [deit_tiny_distilled, pit_tiny])
def test_weights_named_as_by_tiny_transformers(constructor, tmp_path):
    model = constructor(num_classes=3, image_size=32)
    names = (("blocks.", "layers."), ("head_dist", "distill_head"), ("dist_token", "distill_token"))
    if constructor is pit_tiny:
        names = (("transformers.1.pool.", "pools.0."), ("transformers.2.pool.", "pools.1."))
    names += ((".qkv.", ".qkv_transform."), (".proj.", ".projection."))
    theirs = {}
    for key, value in model.state_dict().items():
        for new, old in names:
            key = key.replace(new, old)
        theirs[key] = torch.randn_like(value)
    assert not all(key in model.state_dict() for key in theirs)
    torch.save({"epoch": 3, "model_state": theirs}, tmp_path / "model.pyth")
    from_checkpoint(model, str(tmp_path / "model.pyth"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), theirs.values(), strict=True))


@every_network
def test_classes_and_image_size(constructor):
    model = constructor(num_classes=7, image_size=32).eval()
    image = torch.rand(2, 3, 32, 32)
    path = LAST_BLOCK.get(constructor, "blocks.11")
    tap = FeatureTap(model, [path])
    logits = model(image)
    assert logits.shape == (2, 7)
    assert logits[0].ne(logits[1]).all()
    assert tap.take()[path].shape[0] == 2
    with pytest.raises((ValueError, AssertionError, RuntimeError)):  # the latter two are timm's
        model(torch.rand(2, 3, 64, 64))
    for wrong in (0, -3, 10.0):
        with pytest.raises(ValueError, match=f"num_classes must be an integer >= 1, got {wrong}"):
            constructor(num_classes=wrong)
    with pytest.raises(ValueError, match="image_size must be"):
        constructor(image_size=8)
    for wrong in (1.0, -0.1):
        with pytest.raises(ValueError, match=f"drop_path must be >= 0 and < 1, got {wrong}"):
            constructor(drop_path=wrong)


@pytest.mark.parametrize("constructor", [pvt_tiny, t2t_vit_7, deit_tiny])
def test_drop_path_acts_in_training_alone(constructor):
    image = torch.rand(1, 3, 32, 32)
    model = constructor(num_classes=5, image_size=32, drop_path=0.0)
    assert torch.equal(model(image), model.eval()(image))
    model = constructor(num_classes=5, image_size=32, drop_path=0.9)
    assert not torch.equal(model(image), model(image))
    model.eval()
    assert torch.equal(model(image), model(image))


def test_drop_path_rises_evenly_over_all_stages():
    with torch.device("meta"):
        rates = [module.p for module in pvt_tiny(drop_path=0.7).modules() if hasattr(module, "p")]
    assert rates == pytest.approx([i / 10 for i in range(8)])


@pytest.mark.parametrize("shape", [(2, 3, 32, 33), (2, 1, 32, 32), (3, 32, 32), (2, 3, 64, 64)])
@pytest.mark.parametrize("model", [PVT(image_size=32), T2TViT(image_size=32)], ids=["pvt", "t2t"])
def test_no_such_image(model, shape):
    with pytest.raises(ValueError, match=r"image must have shape \(B, 3, 32, 32\), got ") as caught:
        model(torch.zeros(shape))
    assert str(shape) in str(caught.value)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"depths must be four integers, one a stage, got \(2, 2\)"):
        PVT((2, 2))
    with pytest.raises(ValueError, match="image_size must be a positive multiple of 32, got 48"):
        PVT(image_size=48)
    with pytest.raises(ValueError, match="image_size must be a positive multiple of 16, got 40"):
        T2TViT(image_size=40)
    with pytest.raises(ValueError, match="width must be an even multiple of heads, got 30 and 4"):
        T2TViT(width=30, heads=4)
    with pytest.raises(ValueError, match="depth must be an integer >= 1, got 0"):
        T2TViT(depth=0)


# What ours compute


def test_performer_attention_is_attention_with_the_kernel_of_its_features():
    layer = PerformerAttention(10, 8).double()
    x = tokens(2, 5, 10).double()
    query, key, value = layer.qkv_transform(x).split(8, dim=-1)

    def phi(vector):
        return torch.stack([torch.exp(row @ vector - vector @ vector / 2) / 2 for row in layer.w])

    for b in range(2):
        kernel = torch.stack([torch.stack([phi(q) @ phi(k) for k in key[b]]) for q in query[b]])
        mean = kernel / kernel.sum(1, keepdim=True) @ value[b]
        torch.testing.assert_close(layer(x)[b], value[b] + layer.projection(mean), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer.w @ layer.w.T, 4 * torch.eye(4).double(), atol=1e-5, rtol=0)
    assert not layer.w.requires_grad


@pytest.mark.parametrize("family", ["t2t", "pvt"])
def test_blocks_equal_those_of_timm(family):
    blocks = pytest.importorskip("timm.models.vision_transformer")
    ours = Block(8, Attention(8, 2) if family == "t2t" else SpatialReductionAttention(8, 2, 1), 24, 0.0)
    theirs = blocks.Block(8, num_heads=2, mlp_ratio=3, qkv_bias=family == "pvt", norm_layer=nn.LayerNorm)
    state = {
        key.replace("qkv_transform", "qkv").replace("projection", "proj"): v for key, v in ours.state_dict().items()
    }
    if family == "pvt":
        for kind in ("weight", "bias"):
            state[f"attn.qkv.{kind}"] = torch.cat([state.pop(f"attn.q.{kind}"), state.pop(f"attn.kv.{kind}")])
    theirs.load_state_dict(state)
    x = tokens(2, 5, 8)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_keys_and_values_come_from_the_reduced_square():
    layer = SpatialReductionAttention(8, 2, 2)
    x = tokens(3, 36, 8)
    patches = x.reshape(3, 3, 2, 3, 2, 8).permute(0, 1, 3, 5, 2, 4).flatten(3)  # rows, columns, then one vector each
    reduced = layer.norm(patches.reshape(3, 9, 32) @ layer.sr.weight.flatten(1).T + layer.sr.bias)
    reference = nn.MultiheadAttention(8, 2, batch_first=True)
    reference.in_proj_weight.data = torch.cat([layer.q.weight, layer.kv.weight])
    reference.in_proj_bias.data = torch.cat([layer.q.bias, layer.kv.bias])
    reference.out_proj.load_state_dict(layer.proj.state_dict())
    torch.testing.assert_close(layer(x), reference(x, reduced, reduced)[0])


def test_tokens_lie_row_by_row():
    layer = PatchEmbedding(3, 5, 4)
    image = torch.rand(2, 3, 12, 12)
    torch.testing.assert_close(to_square(layer(image)), layer.norm(layer.proj(image).movedim(1, -1)).movedim(-1, 1))


def test_positions_are_sines_and_cosines():
    table = sinusoids(6, 8)
    angle = 5 / 10_000.0 ** torch.tensor([0, 0.25, 0.5, 0.75])
    torch.testing.assert_close(table[5, 0::2], angle.sin())
    torch.testing.assert_close(table[5, 1::2], angle.cos())
    model = T2TViT(depth=1, image_size=32)
    assert not model.pos_embed.requires_grad
    assert torch.equal(model.pos_embed[0], sinusoids(5, 256))


# timm


def test_distilled_deit_gives_the_mean_of_its_heads():
    pytest.importorskip("timm")
    model = deit_tiny_distilled(num_classes=5, image_size=32)
    for training in (True, False):
        tap = FeatureTap(model.train(training), ["head", "head_dist"])
        logits = model(torch.rand(2, 3, 32, 32))
        heads = tap.take()
        torch.testing.assert_close(logits, (heads["head"] + heads["head_dist"]) / 2)
        tap.remove()


@pytest.mark.parametrize("build", OF_TIMM)
def test_timm_is_named_where_it_is_missing(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'is a network of timm, which is missing: pip install "kdlit\[timm\]"'):
        build()
    assert not hasattr(vit, "timm")  # imported within the constructors alone


# As students


class MeanTokenLoss(DistillationLoss):
    """Reads a block of the student."""

    def __init__(self, path):
        super().__init__()
        self.student_layers = (path,)

    def forward(self, student, teacher, batch):
        return student.features[self.student_layers[0]].mean(1).square().mean()


@pytest.mark.parametrize("constructor", [pvt_tiny, t2t_vit_7, deit_tiny_distilled, pit_tiny])
def test_is_a_student(constructor, trainer):
    student = constructor(num_classes=5, image_size=32)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    loss = MeanTokenLoss(LAST_BLOCK.get(constructor, "blocks.11"))
    module = ClassificationDistillation(
        student, {"ce": CrossEntropyLoss(), "kd": KDLoss(), "tokens": loss}, teacher=TinyNet(), input_size=(3, 32, 32)
    )
    batch = {"image": torch.rand(4, 3, 32, 32), "target": torch.arange(4), "index": torch.arange(4)}
    loader = torch.utils.data.DataLoader([{key: value[i] for key, value in batch.items()} for i in range(4)], 4)
    trainer(max_steps=1).fit(module, loader)
    frozen = {name for name, value in student.named_parameters() if not value.requires_grad}
    unmoved = {name for name, value in student.named_parameters() if torch.equal(value, before[name])}
    assert frozen <= unmoved
    assert frozen == {
        name for name in before if name.endswith("attn.w") or (name == "pos_embed" and constructor is t2t_vit_7)
    }
    assert len(unmoved - frozen) < len(before) / 10
