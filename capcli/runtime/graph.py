"""An ONNX graph on onnxruntime: its files, what it takes and what it gives.

A graph may come from anywhere. onnxruntime checks it and refuses weights outside its folder; no libraries of operators
are ever loaded for it. What it takes is checked here, before a text of the user goes in.

Letters: B batch, S tokens, C labels.
"""

from __future__ import annotations

import contextlib
import mmap
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capcli.errors import ConfigError, FileError, ModelError, first_line
from capcli.models.model import INPUTS
from capcli.sources import checkpoint, hub
from capcli.sources.checkpoint import GRAPH

MAX_BYTES = 2**31  # of a graph: where protobuf ends
TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
PLACE = re.compile(rb"\x0a\x08location\x12")  # a pair of protobuf: "location", and the file that holds a tensor
MAX_PLACE = 255  # bytes of the name of a file
QUANTISES = b"DynamicQuantize"  # how the names of operators begin that look for the range of a whole batch
SPANS = ("start_logits", "end_logits")


def check_package() -> None:
    """Raise `ConfigError` unless onnxruntime is installed."""
    if find_spec("onnxruntime") is None:
        raise ConfigError("an ONNX model needs onnxruntime to run", "pip install onnxruntime")


def has_graph(source: str) -> bool:
    """Whether a MODEL argument has an ONNX graph; of a hub id, whether that is all that it has."""
    return (hub.place(source, graph=True) / GRAPH).is_file()


def graph_files(folder: Path) -> tuple[Path, ...]:
    """The files of a graph: itself, and those in its folder that it names for its weights."""
    with _mapped(folder / GRAPH) as content:
        places = {_text(content, match.end()) for match in PLACE.finditer(content)}
    beside = [folder / place for place in sorted(places)]
    inside = [path for path in beside if path.is_file() and path.resolve().is_relative_to(folder.resolve())]
    return (folder / GRAPH, *inside)


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap | bytes]:
    """The content of a file, which is not read before it is looked at."""
    _check_file(path)
    with path.open("rb") as file:
        if not path.stat().st_size:  # which cannot be mapped
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content


def _text(content: mmap.mmap | bytes, begin: int) -> str:
    """The text at this place, its length before it in 7 bits of each byte, the lowest first (a varint of protobuf)."""
    length, shift, byte = 0, 0, 128
    while byte & 128 and begin < len(content) and shift < 32:
        byte = content[begin]
        length, shift, begin = length | (byte & 127) << shift, shift + 7, begin + 1
    return content[begin : begin + min(length, MAX_PLACE)].decode(errors="replace")


# On onnxruntime -------------------------------------------------------------------------------------------------------


class Graph:
    """A graph on onnxruntime's CPU provider.

    names: its inputs; outputs: what it gives, by name. alone: it quantises activations by the range of a whole batch,
    so that the answer to a text depends on the other texts.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        """Open the graph. Raises `ConfigError` without onnxruntime, `FileError` for what it cannot read."""
        check_package()
        import onnxruntime

        _check_file(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4  # failures are raised as well
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise FileError(
                f"onnxruntime cannot open {path}: {_reason(error)}", "copy or download the whole folder again"
            ) from error
        self.path, self.threads = path, threads
        self.described = f"onnxruntime {onnxruntime.__version__}"
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = tuple(value.name for value in self.session.get_outputs())
        self.alone = _contains(path, QUANTISES)

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs, in the order of the graph."""
        return tuple(self.inputs)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All that the graph gives for inputs [B, S], by name. Raises `ModelError` where it fails."""
        given = {name: self._input(name, inputs) for name in self.inputs}
        try:
            found = self.session.run(None, given)
        except Exception as error:
            raise ModelError(f"onnxruntime cannot run {self.path}: {_reason(error)}") from error
        return {name: torch.from_numpy(value) for name, value in zip(self.outputs, found, strict=True)}

    def _input(self, name: str, inputs: Mapping[str, Tensor]) -> Any:
        """An input of the type that the graph takes; where nobody gives it, all tokens are real and of one text."""
        made = torch.ones_like if name == "attention_mask" else torch.zeros_like
        values = inputs[name] if name in inputs else made(inputs["input_ids"])
        return values.numpy().astype(TYPES[self.inputs[name].type], copy=False)

    def check(self) -> None:
        """Raise `ModelError` unless the graph takes batches of token ids of any length."""
        for name, value in self.inputs.items():
            if name not in INPUTS or value.type not in TYPES or len(value.shape) != 2:
                raise ModelError(
                    f"{self.path} takes an input {name[:40]!r} of type {value.type[:40]} and shape {value.shape}: "
                    f"capcli gives {', '.join(INPUTS)} as whole numbers [batch, length]"
                )
            if any(isinstance(size, int) for size in value.shape):
                raise ModelError(
                    f"{self.path} takes inputs of a fixed size, {value.shape}",
                    "export it again with a dynamic batch size and length",
                )
        if not {"input_ids", "attention_mask"} <= self.inputs.keys():
            raise ModelError(f"{self.path} takes {', '.join(self.names)}, without input_ids and attention_mask")

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits of inputs [B, S] as `predict.forward` has them: [B, C], [B, S, C]; [B, S, 2] for spans."""
        return logits_of(self(inputs))


def _check_file(path: Path) -> None:
    checkpoint.check_no_pointer(path, str(path.parent))
    if not path.is_file() or path.stat().st_size >= MAX_BYTES:
        raise FileError(f"{path} is not a file" if not path.is_file() else f"{path} is too large for an ONNX graph")


def _reason(error: Exception) -> str:
    """What went wrong, without onnxruntime's codes and the path, which is said already."""
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed: ?)?", "", first_line(error))


def _contains(path: Path, word: bytes) -> bool:
    with _mapped(path) as content:
        return content.find(word) >= 0


def logits_of(found: Mapping[str, Tensor]) -> Tensor:
    """The logits among what a graph gives, those of begin and end [B, S] as one; of none, none per text: [B, 0]."""
    if "logits" in found:
        return found["logits"].float()
    if all(name in found for name in SPANS):
        return torch.stack([found[name].float() for name in SPANS], dim=-1)
    first = next(iter(found.values()))
    return first.new_empty(len(first), 0, dtype=torch.float32)
