"""Load weights that others saved into a network: strictly, and without running code from the file.

What a file may be: torch.save's zip format, its older format, or safetensors, told apart by content and not by name.

Where the weights may lie in it: at the top, or under the first of ``model``, ``state_dict``, ``net``, ``model_state``
that is a dict. Wrapper prefixes (``module.``, ``_orig_mod.``, ``model.``, ``net.``, ``backbone.``) that all names carry
are removed, in any order and depth, until names meet the network's own. Where names begin with ``student.`` or
``teacher.``, one side is taken and everything else (losses, projectors) left out.

What names are understood: the network's own; those of pytorchcv, pycls, mmpretrain and weiaicunzai for a CIFAR ResNet;
those of tiny-transformers for DeiT and PiT; ``linear`` for ``fc``, ``shortcut`` for ``downsample`` and the like, and
the reverse, where the network has the other one.

What may lie beside the weights: whatever torch.load takes with ``weights_only=True``, ``argparse.Namespace`` and NumPy
scalars. Of the latter, nothing is built: NumPy never sees what the file says.
"""

import argparse
import difflib
import pickle
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

CONTAINERS = ("model", "state_dict", "net", "model_state")
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "backbone.")
SIDES = ("student", "teacher")

UNPACK = "unpack it and give one of the files inside"
SIGNATURES = (  # offset, first bytes, what such a file is, what to do
    (0, b"\x1f\x8b", "a gzip archive", UNPACK),
    (0, b"\xfd7zXZ\x00", "an xz archive", UNPACK),
    (0, b"BZh", "a bzip2 archive", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstandard archive", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"version https://git-lfs", "a Git LFS pointer and not the file itself", "fetch it with 'git lfs pull'"),
    (0, b"<", "a web page", "its download failed: download the file again"),
)

# Start of a name elsewhere -> start of our name. "nth" counts blocks from 1, {block} from 0; "group" counts stages from
# 2, {stage_of_group} from 1.
RENAMINGS = (
    # pytorchcv
    (r"features\.init_block\.(?P<layer>conv|bn)\.", "{layer}1."),
    (
        r"features\.stage(?P<stage>\d+)\.unit(?P<nth>\d+)\.body\.conv(?P<i>\d+)\.(?P<layer>conv|bn)\.",
        "layer{stage}.{block}.{layer}{i}.",
    ),
    (r"features\.stage(?P<stage>\d+)\.unit(?P<nth>\d+)\.identity_conv\.conv\.", "layer{stage}.{block}.downsample.0."),
    (r"features\.stage(?P<stage>\d+)\.unit(?P<nth>\d+)\.identity_conv\.bn\.", "layer{stage}.{block}.downsample.1."),
    (r"output\.", "fc."),
    # pycls, tiny-transformers
    (r"stem\.(?P<layer>conv|bn)\.", "{layer}1."),
    (r"s(?P<stage>\d+)\.b(?P<nth>\d+)\.f\.a\.", "layer{stage}.{block}.conv1."),
    (r"s(?P<stage>\d+)\.b(?P<nth>\d+)\.f\.a_bn\.", "layer{stage}.{block}.bn1."),
    (r"s(?P<stage>\d+)\.b(?P<nth>\d+)\.f\.b\.", "layer{stage}.{block}.conv2."),
    (r"s(?P<stage>\d+)\.b(?P<nth>\d+)\.f\.b_bn\.", "layer{stage}.{block}.bn2."),
    (r"s(?P<stage>\d+)\.b(?P<nth>\d+)\.proj\.", "layer{stage}.{block}.downsample.0."),
    (r"s(?P<stage>\d+)\.b(?P<nth>\d+)\.bn\.", "layer{stage}.{block}.downsample.1."),
    # weiaicunzai
    (r"conv1\.0\.", "conv1."),
    (r"conv1\.1\.", "bn1."),
    (r"conv(?P<group>[2-5])_x\.(?P<i>\d+)\.shortcut\.", "layer{stage_of_group}.{i}.shortcut."),
    *(
        (
            rf"conv(?P<group>[2-5])_x\.(?P<i>\d+)\.residual_function\.{index}\.",
            f"layer{{stage_of_group}}.{{i}}.{layer}.",
        )
        for index, layer in ((0, "conv1"), (1, "bn1"), (3, "conv2"), (4, "bn2"), (6, "conv3"), (7, "bn3"))
    ),
    # tiny-transformers; ours is timm's DeiT and PiT
    (r"layers\.(?P<i>\d+)\.(?=norm|attn|mlp)", "blocks.{i}."),
    (r"pools\.0\.", "transformers.1.pool."),
    (r"pools\.1\.", "transformers.2.pool."),
    # pycls and mmpretrain; the latter's backbone prefix is not on the head
    (r"head\.fc\.", "fc."),
    (r"backbone\.", ""),
)
SYNONYMS = (  # a network uses one of each pair, or neither
    ("fc", "linear"),
    ("downsample", "shortcut"),
    ("qkv", "qkv_transform"),
    ("proj", "projection"),
    ("dist_token", "distill_token"),
    ("head_dist", "distill_head"),
)

# Networks that are easily taken for ours: a name of ours, a pattern of theirs, what theirs are, what to do.
IMPOSTORS = (
    (
        "block1.layer.0.conv1.weight",
        r"layer\d\.0\.shortcut\.0\.",
        "named as in torchdistill's Wide ResNet, whose projection takes the raw and not the activated input: renamed, "
        "they would give other logits",
        "take a file with names like 'block1.layer.0.conv1.weight'",
    ),
    (
        "block0.0.weight",
        r"features\.\d+\.",
        "of a VGG as in torchvision (chenyaofo, weiaicunzai, edadaltocg), with more max-pools and another classifier",
        "take a file with names like 'block0.0.weight'",
    ),
    (
        "layer1.0.conv5.weight",
        r"stage2\.0\.branch1\.",
        "of a ShuffleNetV2 as in torchvision (chenyaofo), with another stem",
        "take a file with names like 'layer1.0.conv5.weight'",
    ),
    *(
        (
            ours,
            r"(features|layers)\.\d+\.|conv_stem\.",
            "of a MobileNet as in torchvision, timm, chenyaofo's or kuangliu's collection, with other widths, strides "
            "or activations",
            f"take a file with names like {ours!r}",
        )
        for ours in ("blocks.0.0.conv.0.weight", "stage1.residual.0.weight", "model.1.3.weight")
    ),
    *(
        (
            ours,
            r"model\.\d+\.\d+\.",
            "of a MobileNetV1, which the code of MLKD and LSKD calls MobileNetV2",
            "build mobilenetv1",
        )
        for ours in ("blocks.0.0.conv.0.weight", "stage1.residual.0.weight")
    ),
    (
        "blocks.0.0.conv.0.weight",
        r"stage1\.residual\.",
        "of the MobileNetV2 for Tiny-ImageNet, which is also weiaicunzai's for CIFAR",
        "build mobilenetv2_tinyimagenet",
    ),
    (
        "stage1.residual.0.weight",
        r"blocks\.0\.0\.conv\.0\.",
        "of the MobileNetV2 of half width for CIFAR",
        "build mobilenetv2",
    ),
)


class CheckpointError(ValueError):
    """A file cannot give a network its weights; the message says what it is, what was expected and what to do."""


def from_checkpoint(model: nn.Module, path: str, *, part: Literal["student", "teacher"] | None = None) -> nn.Module:
    """Load the weights in a file into ``model``, all of them or none.

    Names and shapes must agree one to one, once wrapper prefixes are removed and names of other code bases translated;
    only ``num_batches_tracked``, which files of PyTorch 0.4 lack, may be missing. The accuracy that the file says the
    network has, if it does, becomes ``model.recorded_top1``, a fraction of 1, or else None.

    Args:
        model: Network that the weights belong to; changed in place, on whatever device it is.
        path: File with the weights; relative to the working directory.
        part: Which network of a distillation run's file to take; needed only if the file holds both.

    Returns:
        ``model``.

    Raises:
        CheckpointError: If the file cannot be read safely or its weights do not fit; ``model`` is then as before.
        ValueError: If ``part`` is something else.
    """
    if part is not None and part not in SIDES:
        raise ValueError(f"part must be 'student', 'teacher' or None, got {part!r}")
    file = Path(path).expanduser().absolute()
    target = model.state_dict()
    try:
        content = _read(file)
        weights = _strip(_find_weights(content), target, part)
        weights = _rename(weights, target)
        _check_names(weights, target, type(model).__name__)
        weights = _convert(weights, target)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None
    model.load_state_dict({**target, **weights})
    model.recorded_top1 = None if part == "teacher" else _recorded_top1(content, file.stem)  # type: ignore[assignment]
    return model


class _Inert:
    """Stands for an object beside the weights; takes whatever the file gives it, and does nothing with it."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


SAFE_GLOBALS: list[Callable[..., object] | tuple[Callable[..., object], str]] = [
    argparse.Namespace,
    *((_Inert, f"numpy.{name}") for name in ("core.multiarray.scalar", "_core.multiarray.scalar", "dtype")),
]


def _read(file: Path) -> object:
    """Unpickle a file, or parse it as safetensors, without running anything in it."""
    head, size = _first_bytes(file)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return _read_safetensors(file)
    for offset, magic, kind, advice in SIGNATURES:
        if head.startswith(magic, offset):
            raise CheckpointError(f"is {kind}, not a checkpoint; {advice}")
    try:
        if zipfile.is_zipfile(file):
            _check_zip(file)
        # an open stream, because of a path torch.load also looks at the suffix
        with file.open("rb") as stream, torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file fails in whatever way its bytes lead to
        blocked = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if blocked:
            raise CheckpointError(
                f"refers to {blocked[1]}, and unpickling that could run code, so it is refused. Ask its author for a "
                "state_dict or safetensors file; if you trust the source, open it in a sandbox with torch.load(..., "
                "weights_only=False), keep the weights alone with torch.save(network.state_dict(), ...), and give those"
            ) from None
        raise CheckpointError(
            f"is truncated, damaged or no checkpoint ({size} bytes; torch.load stopped with {type(error).__name__}); "
            "copy or download it again"
        ) from None


def _first_bytes(file: Path) -> tuple[bytes, int]:
    """Return the first 512 bytes and the size of a regular, readable, non-empty file."""
    try:
        status = file.stat()
        if stat.S_ISDIR(status.st_mode):
            names = sorted(entry.name for entry in file.iterdir())
            raise CheckpointError(f"is a folder; give one of its files: {_some(names)}")
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("is not a regular file")
        with file.open("rb") as stream:
            head = stream.read(512)
    except FileNotFoundError:
        if file.is_symlink():
            raise CheckpointError(f"is a link to {file.readlink()}, which does not exist") from None
        raise CheckpointError(f"no such file; {_near_names(file)}") from None
    except PermissionError:
        raise CheckpointError("no permission to read it; change its mode or owner, or that of its folders") from None
    if not head:
        raise CheckpointError("is empty (0 bytes); copy or download it again")
    return head, status.st_size


def _near_names(missing: Path) -> str:
    while not missing.parent.is_dir():
        missing = missing.parent
    names = sorted(p.name for p in missing.parent.iterdir())
    near = difflib.get_close_matches(missing.name, names)
    return f"{missing.parent} has no {missing.name!r} but {_some(near or names)}"


def _check_zip(file: Path) -> None:
    """Refuse a zip archive that torch.save did not write."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if any("/code/" in name for name in names):
        raise CheckpointError(
            "is a TorchScript program, not a checkpoint; if you trust its source, open it with torch.jit.load and save "
            "its state_dict()"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise CheckpointError(f"is a zip archive of {_some(names)}, not a checkpoint; {UNPACK}")


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError("is a safetensors file; reading it needs 'pip install safetensors'") from None
    try:
        return load_file(file, device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"is a truncated or damaged safetensors file ({error}); download it again") from None


def _recorded_top1(content: object, stem: str) -> float | None:
    """The accuracy that a file names beside the weights, as a fraction of 1.

    Args:
        content: of the file, as kdlit, mdistiller, RepDistiller or pytorch-cifar write it.
        stem: name of the file, which tells students apart that taught each other.
    """
    if not isinstance(content, Mapping):
        return None
    figures = content.get("metrics")
    if isinstance(figures, Mapping):
        peer = stem.removeprefix("student_")
        names = [f"{part}/{peer}/top1" for part in ("test", "val")]
        known = [figures.get(name) for name in (*names, *(() if peer != stem else ("test/top1", "val/top1")))]
        in_per_cent = False
    else:
        known, in_per_cent = [content.get(name) for name in ("best_acc", "accuracy", "acc")], True
    for value in known:
        if isinstance(value, (int, float, Tensor)) and (not isinstance(value, Tensor) or value.numel() == 1):
            top1 = float(value) / (100 if in_per_cent and float(value) > 1 else 1)
            if 0 < top1 <= 1:
                return top1
    return None


def _find_weights(content: object) -> dict[str, Tensor]:
    """Descend through containers to the names and tensors of a network."""
    weights = content
    while isinstance(weights, Mapping):
        inner = next((weights[c] for c in CONTAINERS if isinstance(weights.get(c), Mapping)), None)
        if inner is None:
            break
        weights = inner
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"holds a {type(weights).__name__}, not a dict of weights; save network.state_dict()")
    if not weights or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()):
        raise CheckpointError(
            f"holds no weights at its top or under {_some(CONTAINERS)}; its entries are {_some(map(str, weights))}; "
            "save network.state_dict()"
        )
    return dict(weights)


def _strip(weights: dict[str, Tensor], target: Mapping[str, object], part: str | None) -> dict[str, Tensor]:
    """Remove wrapper prefixes and choose between student and teacher."""
    chosen = False
    while True:
        sides = [side for side in SIDES if any(name.startswith(f"{side}.") for name in weights)]
        if sides:
            prefix = f"{_choose(sides, part)}."
            chosen = True
        else:
            common = [prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in weights)]
            if not common or weights.keys() & target.keys():
                break
            prefix = common[0]
        weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if part and not chosen:
        raise CheckpointError(f"holds one network, not a student and a teacher; leave out part={part!r}")
    return weights


def _choose(sides: list[str], part: str | None) -> str:
    if part is None and len(sides) > 1:
        raise CheckpointError("holds both a student and a teacher; say which with part='student' or part='teacher'")
    if part is not None and part not in sides:
        raise CheckpointError(f"holds no {part}, only a {sides[0]}; give part={sides[0]!r} or leave it out")
    return part or sides[0]


def _rename(weights: dict[str, Tensor], target: Mapping[str, object]) -> dict[str, Tensor]:
    """Translate names of other code bases into the network's, leaving alone those it has."""
    words = {word for name in target for word in name.split(".")}
    swap = {a: b for pair in SYNONYMS for a, b in (pair, pair[::-1]) if a not in words and b in words}
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        new = name if name in target else ".".join(swap.get(word, word) for word in _our_name(name).split("."))
        # two names must not become one: the second stays, to be refused as unexpected
        renamed[name if new in weights or new in renamed else new] = value
    return renamed


def _our_name(name: str) -> str:
    for pattern, template in RENAMINGS:
        if match := re.match(pattern, name):
            groups = match.groupdict()
            block, stage = int(groups.get("nth", 1)) - 1, int(groups.get("group", 2)) - 1
            return template.format(**groups, block=block, stage_of_group=stage) + name[match.end() :]
    return name


def _check_names(weights: Mapping[str, Tensor], target: Mapping[str, Tensor], network: str) -> None:
    """Refuse weights whose names or shapes are not those of the network."""
    missing = [name for name in target if name not in weights and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in weights if name not in target]
    reshaped = [
        f"{name} {tuple(value.shape)} instead of {tuple(target[name].shape)}"
        for name, value in weights.items()
        if name in target and value.shape != target[name].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    lists = [f"{len(names)} {problem}: {_some(names)}" for problem, names in problems.items() if names]
    if lists:
        reasons = _reasons(weights, target) or ["build the network that they were trained in"]
        raise CheckpointError(f"its weights do not fit this {network}: {'; '.join([*reasons, *lists])}")


def _convert(weights: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights in the network's number formats, refusing what is no number there."""
    odd = [name for name, value in weights.items() if not _can_become(value, target[name])]
    if odd:
        raise CheckpointError(f"{len(odd)} weights are integers, sparse or without data: {_some(odd)}; save floats")
    converted = {name: value.detach().to(target[name].dtype) for name, value in weights.items()}
    bad = [name for name, value in converted.items() if not value.isfinite().all()]
    if bad:
        raise CheckpointError(f"{len(bad)} weights are NaN or infinite: {_some(bad)}; take a file from before that")
    return converted


def _can_become(value: Tensor, own: Tensor) -> bool:
    """Say if a dense tensor with data can be copied over the network's own without a change of meaning."""
    is_dense = value.layout == torch.strided and not value.is_meta
    return is_dense and (value.is_floating_point() or not own.is_floating_point())


def _reasons(weights: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Name the known causes of a misfit."""
    reasons = [
        f"they are {what}; {cure}"
        for our_name, pattern, what, cure in IMPOSTORS
        if our_name in target and any(re.match(pattern, name) for name in weights)
    ]
    if "projector.conv0.weight" in weights and "projector.conv0.weight" not in target:
        reasons.append(
            "they are of a student that SimKD made; build kdlit.models.SimKDStudent around this network, as the file's "
            "note says"
        )
    theirs, ours = _blocks(weights), _blocks(target)
    are_basic = "layer1.0.conv3.weight" not in weights
    if "layer1" in theirs and are_basic and _has_projections(target) and not _has_projections(weights):
        reasons.append(
            "they are of a ResNet whose shortcuts have no parameters (option A), this one has projections (option B); "
            "take a file with projections"
        )
    if theirs != ours and theirs.keys() & ours.keys():
        reasons.append(f"the file has {_describe(theirs)}, the network {_describe(ours)}; build it as deep as the file")
    if "layer4" in theirs and "layer4" in ours and are_basic != ("layer1.0.conv3.weight" not in target):
        kinds = ("basic blocks", "bottlenecks") if are_basic else ("bottlenecks", "basic blocks")
        reasons.append(f"the file has {kinds[0]}, the network {kinds[1]}; build the network of the file")
    their_stem, our_stem = _kernel(weights.get("conv1.weight")), _kernel(target.get("conv1.weight"))
    if their_stem and our_stem and their_stem != our_stem:
        reasons.append(
            f"the file's first convolution is {their_stem}, the network's {our_stem}; take a file of the form for your "
            "image size (ResNets with 7x7 are for ImageNet and fit those of torchvision.models)"
        )
    head = _head(target)
    if head in weights and len(weights[head]) != len(target[head]):
        reasons.append(
            f"the file has {len(weights[head])} classes, the network {len(target[head])}; take a file for your data "
            f"or build the network with num_classes={len(weights[head])}"
        )
    return reasons


def _head(target: Mapping[str, Tensor]) -> str:
    """Return the name of the classifier's weight: the last matrix or, if there is none, the last convolution."""
    names = list(target)[::-1]
    return next((name for ndim in (2, 4) for name in names if target[name].ndim == ndim), "")


def _kernel(weight: Tensor | None) -> str:
    return "x".join(map(str, weight.shape[2:])) if weight is not None else ""


def _has_projections(names: Iterable[str]) -> bool:
    return any(".downsample." in name or ".shortcut." in name for name in names)


def _blocks(names: Iterable[str]) -> dict[str, int]:
    """Count residual blocks, or a VGG's convolutions, by stage."""
    found = {match.groups() for name in names if (match := re.match(r"(layer\d|block\d\.layer)\.(\d+)\.", name))}
    found |= {match.groups() for name in names if (match := re.match(r"(block\d)\.([0369])\.", name))}
    stages = sorted(stage for stage, _ in found)
    return {stage: stages.count(stage) for stage in stages}


def _describe(blocks: Mapping[str, int]) -> str:
    counts = "-".join(map(str, blocks.values()))
    if "block0" in blocks:
        return f"{counts} convolutions (VGG-{sum(blocks.values()) + 3})"
    text = f"{counts} blocks"
    if len(blocks) != 3 or len(set(blocks.values())) != 1:
        return text
    offset = 2 if "layer1" in blocks else 4
    return f"{text} (depth {6 * next(iter(blocks.values())) + offset})"


def _some(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    more = ["..."] if len(names) > limit else []
    return ", ".join(names[:limit] + more) or "nothing"
