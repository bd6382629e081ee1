"""The forms in which a student leaves a run: how each is written, and how whoever gets it reads it again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from kdlit.data.inputs import NetworkInput
from kdlit.modules.networks import logits_of

Predict = Callable[[Tensor], Tensor]

TRACED = ("torch_export", "onnx")
_ONNX = ("onnx", "onnxscript", "onnxruntime")
_ONNX_LIMIT = 2_000_000_000  # bytes: one protocol buffer holds no more


class ExportError(ValueError):
    """A student cannot be written in a format; the others are not concerned."""


class _Graph(nn.Module):
    """What is traced where that is not the network itself: normalises the pictures, and takes out the logits.

    Args:
        network: the student.
        normalisation: turns uint8 pictures into what it takes; None if they are normalised already.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, normalisation: NetworkInput | None) -> None:
        super().__init__()
        self.network = network
        self.normalises = normalisation is not None
        if normalisation is not None:
            mean, std = (torch.tensor(value)[:, None, None] for value in (normalisation.mean, normalisation.std))
            self.register_buffer("scale", 1 / (255 * std))
            self.register_buffer("shift", mean / std)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits, shape ``(B, K)``.

        Args:
            image: shape ``(B, C, H, W)``; uint8 if pictures are normalised here, else float32.
        """
        if self.normalises:
            image = image.to(torch.float32) * self.scale - self.shift
        return logits_of(self.network(image), "student")


class Leaving:
    """A student on its way out of a run.

    Args:
        network: the student as it was trained, rebuilt from the config, in eval mode, without hooks of losses; its
            parameters no longer ask for gradients from now on, so that logits of the traced formats need no detach.
        example: a batch of two pictures as the traced formats take them, for their size and type.
        normalisation: what the traced formats do to the pictures first; None for nothing.
    """

    def __init__(
        self,
        network: nn.Module,
        example: Tensor,
        normalisation: NetworkInput | None = None,
    ) -> None:
        self.network = network.requires_grad_(False)
        self.example = torch.zeros_like(example)
        self.normalisation = normalisation

    @cached_property
    def program(self) -> ExportedProgram:
        """The network as torch.export sees it, for batches of any size.

        Raises:
            ExportError: If it cannot be traced.
        """
        graph = self.network
        with torch.no_grad():
            if self.normalisation is not None or not isinstance(self.network(self.example), Tensor):
                graph = _Graph(self.network, self.normalisation).eval()
        first: Exception | None = None
        for strict in (False, True):  # some networks pass the one, some the other
            try:
                program = torch.export.export(
                    graph, (self.example,), dynamic_shapes=({0: Dim("batch")},), strict=strict
                )
            except Exception as error:  # whatever its code does, and whatever the tracer makes of it
                first = first or error
                continue
            for node in program.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths and lines of this machine's sources
            return program
        raise ExportError(
            f"torch.export cannot follow {type(self.network).__name__}: {_first_line(first)}. Its forward must not "
            "decide by the values of tensors or by the size of the batch; export state_dict, which needs no tracing"
        ) from first

    def write(self, kind: str, about: Mapping[str, Any], file: IO[bytes]) -> None:
        """Write it in one format.

        Args:
            kind: name of the format.
            about: what to say of it inside the file, where there is room.
            file: open binary file.

        Raises:
            ExportError: If that is not possible.
        """
        notes = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
        if kind == "torch_export":
            torch.export.save(self.program, file, extra_files={"student.json": json.dumps(about, indent=1)})
        elif kind == "onnx":
            file.write(self._onnx(notes))
        else:
            weights = {name: value.detach().clone().contiguous() for name, value in self.network.state_dict().items()}
            if kind == "safetensors":
                file.write(to_safetensors(weights, metadata=notes))
            else:
                torch.save(weights, file)

    def _onnx(self, notes: Mapping[str, str]) -> bytes:
        size = sum(value.nbytes for value in self.program.state_dict.values())
        if size > _ONNX_LIMIT:
            raise ExportError(
                f"the student's weights take {size / 1e9:.1f} GB, but one ONNX file holds 2 GB; export torch_export"
            )
        try:
            program = torch.onnx.export(
                self.program, dynamo=True, input_names=["image"], output_names=["logits"], verbose=False
            )
        except Exception as error:  # an operation without counterpart, above all
            raise ExportError(
                f"{type(self.network).__name__} cannot be translated to ONNX: {_first_line(error)}; export torch_export"
            ) from error
        assert program is not None
        model = program.model_proto
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
        for node in model.graph.node:
            del node.metadata_props[:]  # paths and lines of this machine's sources
        del model.graph.value_info[:]  # names the batch otherwise; runtimes find these shapes by themselves
        for name, text in notes.items():
            model.metadata_props.add(key=name, value=text)
        content: bytes = model.SerializeToString()
        return content

    def read(self, kind: str, path: Path) -> Predict:
        """Read a file as whoever gets it would; returns what gives logits for pictures.

        Args:
            kind: name of the format.
            path: the file.
        """
        if kind == "torch_export":
            module: Predict = torch.export.load(path).module()
            return module
        if kind == "onnx":
            return _session(path)
        network = copy.deepcopy(self.network)
        with torch.no_grad():
            for value in network.state_dict().values():  # every value has to come from the file
                value.fill_(torch.nan if value.is_floating_point() else 0)
        network.load_state_dict(
            load_file(path) if kind == "safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        )
        return logits_from(network)


def logits_from(network: nn.Module) -> Predict:
    """What gives a network's logits alone."""
    return lambda image: logits_of(network(image), "student")


def _session(path: Path) -> Predict:
    """An ONNX file as ONNX Runtime runs it on the CPU, with as many threads as torch has."""
    import onnxruntime  # type: ignore[import-untyped,unused-ignore]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


def check_packages(kinds: list[str]) -> None:
    """Raise ImportError if what a format needs is not installed."""
    missing = [name for name in _ONNX if find_spec(name) is None] if "onnx" in kinds else []
    if missing:
        raise ImportError(f'the format onnx needs {", ".join(missing)}: pip install "kdlit[onnx]"')


def _first_line(error: BaseException | None) -> str:
    """The first line of the innermost cause, which is what the network or its operation said."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
