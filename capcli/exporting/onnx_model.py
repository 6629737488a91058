"""A model as an ONNX graph: conversion by transformers' own exporter, int8 weights. `runtime.onnx` runs it.

The graph takes int64 inputs [B, S] by name, any B and S, and gives `logits` [B, C] or [B, S, C], or for spans
`start_logits` and `end_logits` [B, S], or without a head `last_hidden_state` [B, S, H]. It holds standard operators
only: onnxruntime fuses them when it opens the file, and the exporter's fusions for it, which no other runtime knows,
were no faster.

Letters: B batch, S tokens, C labels, H hidden size.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from capcli import files
from capcli.errors import ConfigError, FileError, ModelError, first_line
from capcli.models.model import Model
from capcli.sources.checkpoint import GRAPH

MODEL_FILE, DATA_FILE = GRAPH, f"{GRAPH}.data"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 20  # what the exporter writes by default today; pinned, so that its next version writes the same
SINGLE_FILE_BYTES = 2_000_000_000  # weights; protobuf ends at 2 GiB, and the graph needs some room too
QUANTISED = ("MatMul", "Gemm", "Gather")  # layers and embeddings


def check_packages() -> None:
    """Raise `ConfigError` unless everything that conversion needs is installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing or find_spec("transformers.exporters") is None:
        raise ConfigError(
            "cap export --to onnx needs onnx, onnxscript and onnxruntime", "pip install onnx onnxscript onnxruntime"
        )


# Conversion ----------------------------------------------------------------------------------------------------------


class _Logits(nn.Module):
    """A network that puts out its logits alone, or without a head its last states: no others, no cache."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Logits by the name that they have in the graph."""
        out = self.net(**inputs, return_dict=True)
        found = {name: out[name] for name in ("logits", "start_logits", "end_logits") if name in out}
        return found or {"last_hidden_state": out["last_hidden_state"]}


def convert(model: Model, folder: Path, length: int) -> Path:
    """Write `folder`/model.onnx, and model.onnx.data if the weights need it; returns the path of the former.

    The network is on the CPU in 32 bits. length: tokens of the longest input. The same model gives the same bytes.

    Raises:
        ConfigError: packages are missing. ModelError: the exporter cannot convert this network.
    """
    check_packages()
    with _quiet():
        from onnx_ir.passes import common
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        inputs = _sample(model)
        longest = max(length, inputs["input_ids"].shape[1])
        dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=3, max=longest)}
        config = OnnxConfig(dynamic=True, dynamic_shapes=dict.fromkeys(inputs, dims), opset_version=OPSET)
        was_training = model.net.training
        try:
            program = OnnxExporter().export(_Logits(model.net).eval(), inputs, config=config).program
        except (OSError, MemoryError):
            raise
        except Exception as error:
            reason = first_line(_root(error))
            raise ModelError(f"transformers' exporter cannot convert {model.source}: {reason}") from error
        finally:
            model.net.train(was_training)
        common.ClearMetadataAndDocStringPass()(program)  # source lines of this machine
        _rename(program)
        _write(program, folder)
    return folder / MODEL_FILE


def _sample(model: Model) -> dict[str, Tensor]:
    """Two texts of unlike length: the inputs that the tokenizer gives and the network takes."""
    coded = model.tokenizer(["a " * 8, "a"], padding=True, return_tensors="pt")
    return {name: coded[name] for name in model.input_names}


def _root(error: BaseException) -> BaseException:
    """What began a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _rename(program: Any) -> None:
    """Name the axes of inputs and outputs; forget the shapes in between, which onnxruntime finds by itself."""
    import onnx_ir

    graph = program.graph
    known = {str(size): name for size, name in zip(graph.inputs[0].shape, ("batch", "length"), strict=True)}
    inner = [value for node in graph.all_nodes() for value in node.outputs if not value.is_graph_output()]
    for value in (*inner, *graph.initializers.values()):
        value.shape = value.type = None
    for value in graph.outputs:
        value.shape = onnx_ir.Shape([known.get(str(size), size) for size in value.shape])
    for value in graph.inputs:
        value.shape = onnx_ir.Shape(["batch", "length"])
    for value in (*inner, *graph.initializers.values(), *graph.inputs, *graph.outputs):
        value.metadata_props.clear()


def _write(program: Any, folder: Path) -> None:
    """One file if protobuf can hold it; otherwise the weights beside it."""
    import onnx_ir
    from transformers.exporters.exporter_onnx import OnnxExporter

    n_bytes = sum(value.const_value.nbytes for value in program.graph.initializers.values())
    folder.mkdir(parents=True, exist_ok=True)
    if n_bytes < SINGLE_FILE_BYTES:
        proto = onnx_ir.to_proto(program)
        files.write_bytes(folder / MODEL_FILE, proto.SerializeToString(deterministic=True))
    else:
        OnnxExporter.save_program(program, folder / MODEL_FILE)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep away what the exporters print, warn and log; what went wrong is said by us."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def quantise(source: Path, target: Path) -> None:
    """Write the graph `source` as `target` with 8-bit integer weights; activations are quantised as it runs.

    Layers have a scale per output and use 7 of the 8 bits: on processors without VNNI instructions, products of full
    8-bit numbers overflow, and the answers would depend on the processor. Embeddings have one scale.

    Raises:
        ConfigError: packages are missing. FileError: `source` is no graph that can be quantised.
    """
    check_packages()
    with _quiet(), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        found = Path(scratch) / MODEL_FILE
        try:
            quantize_dynamic(
                onnx.load(source),  # of a path, a working copy would be written beside it
                found,
                op_types_to_quantize=list(QUANTISED),
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
        except (OSError, MemoryError):
            raise
        except Exception as error:
            raise FileError(f"{source} cannot be quantised: {first_line(error)}") from error
        files.write_bytes(target, found.read_bytes())


def nonzero(path: Path, matrices: Sequence[Tensor], others: Sequence[Tensor]) -> int:
    """How many weights of the graph's `matrices` are not zero, counted in the file.

    They are known by their shapes, or those of their transposes; `others` are parameters that may have the same.
    """
    import onnx
    from onnx import numpy_helper

    shapes = {tuple(sorted(matrix.shape)) for matrix in matrices}
    graph = onnx.load(path).graph
    stored = (numpy_helper.to_array(t, str(path.parent)) for t in graph.initializer if tuple(sorted(t.dims)) in shapes)
    found = sum(int(np.count_nonzero(array)) for array in stored)
    return found - sum(int(t.count_nonzero()) for t in others if tuple(sorted(t.shape)) in shapes)
