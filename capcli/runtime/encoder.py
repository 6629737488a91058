"""The layers of a network as an encoder on sparse weights: built once, called from any thread.

Letters: B batch, S tokens, H hidden size, A width of attention, F neurons, T lanes of a tile, M rows made at once.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capcli.runtime import arrangement, kernels, llvm, vectors
from capcli.runtime.kernels import Scratch, Weights
from capcli.runtime.packing import Matrix

Array = NDArray[Any]
ALIGNMENT = 64  # bytes, of a row of 16 floats


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: four matrices, its norms as indices into those of the encoder, and what its attention is."""

    qkv: Matrix
    out: Matrix
    up: Matrix
    down: Matrix
    attention_norm: int
    ffn_norm: int
    heads: int
    head_size: int
    neurons: int
    activation: int
    gated: bool = False
    norm_first: bool = False
    window: int = kernels.FAR
    rotary: int = -1

    @property
    def matrices(self) -> tuple[Matrix, Matrix, Matrix, Matrix]:
        return self.qkv, self.out, self.up, self.down


class Encoder:
    """Layers of sparse weights. Several threads may call it at once; each call has memory and helpers of its own."""

    def __init__(
        self, layers: Sequence[Layer], norms: Array, epsilon: float, threads: int, distances: Array, turns: Array
    ) -> None:
        """layers: a layer that runs twice stands there twice. norms [norms, 2, H]. distances, turns: see `Weights`."""
        self.weights = joined(layers, norms, distances, turns)
        self.epsilon, self.threads = np.float32(epsilon), threads
        self.hidden_size = norms.shape[-1]
        self.wide = max((layer.heads * layer.head_size for layer in layers), default=0)
        self.head_size = max((layer.head_size for layer in layers), default=0)
        self.neurons = max((layer.up.outputs for layer in layers), default=0)
        self._free: deque[_Workplace] = deque()
        kernels.run.prepare()

    def __deepcopy__(self, memo: Any) -> Encoder:
        return self  # nothing in it changes

    @property
    def nnz(self) -> int:
        """Weights that are kept; those of a layer that runs twice count once."""
        return len(self.weights.values)

    @property
    def bytes(self) -> int:
        """What all weights take."""
        return sum(array.nbytes for array in self.weights)

    def __call__(self, states: Array, real: Array, layers: slice = slice(None)) -> Array:
        """States [B, S, H] after the layers; zeros where there is padding, but for the first place of a text.

        real [B, S]: which places are tokens. layers: which are run, all if not said.

        Raises `ValueError` for shapes that do not fit, and for texts with more places than rotary positions are known.
        """
        self._check(states, real)
        placed = arrangement.arrange(real, self.threads)
        source = np.ascontiguousarray(states, np.float32).reshape(-1, self.hidden_size)
        target = np.zeros_like(source)
        chosen = np.ascontiguousarray(self.weights.layers[layers])
        work = self._workplace()
        work.run(self, placed, chosen, source, target)
        self._free.append(work)  # not after an exception, when a helper may still write to its memory
        return target.reshape(states.shape)

    def _check(self, states: Array, real: Array) -> None:
        """The kernels check nothing."""
        if real.dtype != bool or states.shape != (*real.shape, self.hidden_size):
            raise ValueError(f"states {list(states.shape)} do not fit a mask {list(real.shape)} of {real.dtype}")
        most = self.weights.turns.shape[2]
        if len(self.weights.turns) and real.shape[1] > most:
            raise ValueError(f"a text has {real.shape[1]:,} tokens; this model has positions for {most:,}")

    def _workplace(self) -> _Workplace:
        """A workplace that nobody uses; one that another process had before a fork has no threads any more."""
        while self._free:
            try:
                work = self._free.pop()
            except IndexError:  # another thread was faster
                break
            if work.process == os.getpid():
                return work
        return _Workplace(self.threads)


class _Workplace:
    """Memory and helping threads of one call at a time."""

    def __init__(self, threads: int) -> None:
        self.threads, self.process = threads, os.getpid()
        self.pool = ThreadPoolExecutor(threads - 1, "capcli-sparse") if threads > 1 else None
        self.memory: dict[tuple[int, int], tuple[tuple[int, int], Scratch]] = {}

    def run(
        self, encoder: Encoder, placed: arrangement.Arrangement, layers: Array, source: Array, target: Array
    ) -> None:
        """Run the kernels on all threads."""
        workers = min(self.threads, max(placed.team, len(placed.batch.bins) - 1))
        scratch = self._memory(encoder, placed)
        scratch.counters[:] = 0
        rest = (placed.team, layers, encoder.weights, encoder.epsilon, placed.batch, source, target, scratch)
        lanes = vectors.lanes_of(placed.width)
        helping = [self.pool.submit(kernels.run, lanes, me, *rest) for me in range(1, workers)] if self.pool else []
        kernels.run(lanes, 0, *rest)
        for helper in helping:
            helper.result()

    def _memory(self, encoder: Encoder, placed: arrangement.Arrangement) -> Scratch:
        """Memory for this arrangement: that of an earlier call, or more if it was less."""
        kind = placed.width, 1 if placed.team > 1 else self.threads
        (tiles, longest), scratch = self.memory.get(kind, ((0, 0), None))
        if scratch is None or tiles < placed.tiles_at_once or longest < placed.longest:
            tiles, longest = max(tiles, placed.tiles_at_once), max(longest, placed.longest)
            scratch = _scratch(encoder, self.threads, *kind, tiles, longest)
            self.memory[kind] = (tiles, longest), scratch
        return scratch


def _scratch(encoder: Encoder, threads: int, width: int, groups: int, tiles: int, longest: int) -> Scratch:
    spare, hidden = vectors.ROWS_AT_ONCE, encoder.hidden_size
    return Scratch(
        x=aligned((groups, tiles, hidden, width)),
        qkv=aligned((groups, 2, tiles * 3 * encoder.wide + spare, width)),
        normed=aligned((threads, hidden, width)),
        context=aligned((threads, encoder.wide, width)),
        hidden=aligned((threads, encoder.neurons, width)),
        scores=aligned((threads, longest + spare, llvm.GROUP)),
        head=aligned((threads, encoder.head_size + spare, llvm.GROUP)),
        shares=aligned((threads, llvm.GROUP)),
        counters=aligned((kernels.N_COUNTERS,), np.int64),
    )


def aligned(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    """Zeros whose first byte is aligned as vectors need it."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(n_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    found: Array = memory[start : start + n_bytes].view(dtype).reshape(shape)
    return found


def joined(layers: Sequence[Layer], norms: Array, distances: Array, turns: Array) -> Weights:
    """The tables of the kernels; a matrix that several layers share is in them once."""
    known: dict[int, int] = {}
    unique: list[Matrix] = []
    for layer in layers:
        for matrix in layer.matrices:
            if id(matrix) not in known:
                known[id(matrix)] = len(unique)
                unique.append(matrix)
    kept = np.cumsum([0, *(len(matrix.values) for matrix in unique)])
    rows = np.cumsum([0, *(len(matrix.starts) for matrix in unique)])
    biases = np.cumsum([0, *(matrix.outputs for matrix in unique)])
    table = [
        (rows[i], matrix.outputs, matrix.blocks, biases[i])  # FIRST_ROW, N_ROWS, N_BLOCKS, FIRST_BIAS
        for i, matrix in enumerate(unique)
    ]
    return Weights(
        matrices=np.array(table, np.int64).reshape(-1, 4),
        starts=_one([matrix.starts + kept[i] for i, matrix in enumerate(unique)], np.int64),
        columns=_one([matrix.columns for matrix in unique], np.uint16),
        values=_one([matrix.values for matrix in unique], np.float32),
        biases=_one([matrix.bias for matrix in unique], np.float32),
        norms=np.ascontiguousarray(norms, np.float32),
        layers=np.array([_layer(layer, known) for layer in layers], np.int64).reshape(-1, kernels.LAYER_COLUMNS),
        distances=np.ascontiguousarray(distances, np.float32),
        turns=np.ascontiguousarray(turns, np.float32),
    )


def _one(arrays: list[Array], dtype: Any) -> Array:
    return np.concatenate([np.zeros(0, dtype), *arrays])


def _layer(layer: Layer, known: dict[int, int]) -> list[int]:
    """A row of `Weights.layers`."""
    return [
        *(known[id(matrix)] for matrix in layer.matrices),  # QKV, OUT, UP, DOWN
        layer.attention_norm,
        layer.ffn_norm,
        layer.heads,
        layer.head_size,
        layer.neurons,
        layer.activation,
        layer.gated,
        layer.norm_first,
        layer.window,
        layer.rotary,
    ]
