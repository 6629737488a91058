"""Each kernel against a loop in 64 bits, for all shapes and sparsities; NaN and infinity."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
import slow_encoder
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capcli.runtime import functions, kernels, vectors
from capcli.runtime.compiling import OPTIONS
from capcli.runtime.encoder import Encoder, Layer, aligned, joined
from capcli.runtime.llvm import GROUP
from capcli.runtime.packing import Matrix, entries, pack

WIDTHS = (16, 64)
NO_DISTANCES, NO_TURNS = np.zeros((0, 0), np.float32), np.zeros((0, 2, 0, 0), np.float32)
NUMBERS = {"gelu": functions.GELU, "gelu_tanh": functions.GELU_TANH, "silu": functions.SILU, "relu": functions.RELU}


@functools.cache
def compiled(function: Callable[..., Any]) -> Any:
    return numba.njit(**OPTIONS)(function)


def linear(lanes: Any, weights: Any, x: Any, y: Any, more: bool, activation: int, until: int) -> None:
    kernels.linear(lanes, weights, 0, x.ctypes.data, y, more, activation, until)


def dense_rows(c: Any, a: Any, b: Any, count: int, more: bool) -> None:
    """c [M, 16] from a [M, count] and b [count, 16]."""
    vectors.dense_rows(c.ctypes.data, a.ctypes.data, b.ctypes.data, count, 4 * a.shape[1], 4, 64, more)


def softmax(scores: Any, count: int, shares: Any) -> None:
    vectors.softmax(scores.ctypes.data, count, shares.ctypes.data)


def activate(lanes: Any, row: Any, activation: int) -> None:
    vectors.activate(lanes, row.ctypes.data, activation)


def normalise(lanes: Any, x: Any, y: Any, norm: Any, epsilon: float) -> None:
    vectors.normalise(lanes, x.ctypes.data, y.ctypes.data, norm.ctypes.data, x.shape[0], epsilon)


def put(out: Any, rows: Any, count: int, shares: Any, first: int, end: int) -> None:
    vectors.put(out.ctypes.data, 4 * out.shape[1], rows.ctypes.data, count, shares.ctypes.data, first, end)


def random(rng: np.random.Generator, *shape: int) -> Any:
    found = aligned(shape)
    found[...] = rng.standard_normal(shape)
    return found


def sparse(rng: np.random.Generator, outputs: int, inputs: int, sparsity: float) -> Any:
    """A matrix in 32 bits with this share of zeros, some rows of which are empty."""
    matrix = rng.standard_normal((outputs, inputs)).astype(np.float32)
    matrix[rng.random((outputs, inputs)) < sparsity] = 0
    matrix[rng.random(outputs) < 0.1] = 0
    return matrix


def one(matrix: Matrix) -> Any:
    """The tables of the kernels for one matrix."""
    layer = Layer(
        **dict.fromkeys(("qkv", "out", "up", "down"), matrix),
        **dict.fromkeys(("attention_norm", "ffn_norm"), 0),
        **dict.fromkeys(("heads", "head_size", "neurons", "activation"), 1),
    )
    return joined([layer], np.zeros((0, 2, 1), np.float32), NO_DISTANCES, NO_TURNS)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    outputs=st.integers(0, 70),
    inputs=st.integers(1, 400),
    sparsity=st.sampled_from([0.0, 0.3, 0.8, 0.97, 1.0]),
    width=st.sampled_from(WIDTHS),
    more=st.booleans(),
    activation=st.sampled_from(["", *NUMBERS]),
)
def test_linear_is_the_sum_over_kept_weights(
    seed: int, outputs: int, inputs: int, sparsity: float, width: int, more: bool, activation: str
) -> None:
    rng = np.random.default_rng(seed)
    matrix, bias = sparse(rng, outputs, inputs, sparsity), random(rng, outputs)
    x, y = random(rng, inputs, width), random(rng, outputs, width)
    expected = slow_encoder.linear(matrix.astype(float), bias.astype(float), x.astype(float)) + (y if more else 0)
    until = outputs // 2
    if activation:
        expected[:until] = getattr(slow_encoder, activation)(expected[:until])
    weights = one(pack(entries(torch.from_numpy(matrix)), bias))
    number = NUMBERS.get(activation, functions.NONE)
    compiled(linear)(vectors.lanes_of(width), weights, x, y, more, number, until)
    np.testing.assert_allclose(y, expected, atol=2e-5, rtol=2e-5)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), count=st.integers(0, 512), more=st.booleans())
def test_dense_rows_are_a_product(seed: int, count: int, more: bool) -> None:
    rng = np.random.default_rng(seed)
    rows = vectors.ROWS_AT_ONCE
    a, b, c = random(rng, rows, count), random(rng, count, GROUP), random(rng, rows, GROUP)
    expected = a.astype(float) @ b.astype(float) + (c if more else 0)
    compiled(dense_rows)(c, a, b, count, more)
    np.testing.assert_allclose(c, expected, atol=1e-4)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), count=st.integers(1, 512), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_softmax_of_each_lane(seed: int, count: int, scale: float) -> None:
    scores, shares = random(np.random.default_rng(seed), count, GROUP), aligned((GROUP,))
    scores *= scale
    expected = torch.from_numpy(scores).double().softmax(dim=0)
    compiled(softmax)(scores, count, shares)
    np.testing.assert_allclose(scores * shares, expected, atol=1e-6)
    assert (scores.max(axis=0) == 1).all()  # the highest stands out whatever its lane


def test_softmax_of_what_nothing_is_attended_to_is_zero_and_nan_stays() -> None:
    scores, shares = np.zeros((5, GROUP), np.float32), aligned((GROUP,))
    own = aligned(scores.shape)
    own[:, 0], own[1:, 1], own[2, 2], own[3, 3] = vectors.OUTSIDE, vectors.OUTSIDE, np.nan, np.inf
    compiled(softmax)(own, 5, shares)
    found = own * shares
    assert (found[:, 0] == 0).all()
    np.testing.assert_allclose(found[:, 1], [1, 0, 0, 0, 0], atol=1e-37)
    assert np.isnan(found[:, 2]).all() and np.isnan(found[:, 3]).any()  # as softmax of torch
    np.testing.assert_allclose(found[:, 4:], 0.2, rtol=1e-6)


@pytest.mark.parametrize("name", NUMBERS)
def test_activations(name: str) -> None:
    values = np.concatenate([np.linspace(-12, 12, 1000), [0.0, -0.0, 1e-30, -1e-30, 90.0, -90.0, 1e30, -1e30]])
    row = aligned((64 * -(-len(values) // 64),))
    row[: len(values)] = values
    expected = getattr(slow_encoder, name)(row.astype(float).clip(-1e4, 1e4))
    for part in row.reshape(-1, 64):
        compiled(activate)(vectors.lanes_of(64), part, NUMBERS[name])
    np.testing.assert_allclose(row.clip(-1e4, 1e4), expected, atol=5e-7, rtol=1e-6)


@pytest.mark.parametrize("name", NUMBERS)
def test_activations_keep_what_is_not_finite(name: str) -> None:
    row = aligned((16,))
    row[:2] = np.nan, np.inf
    compiled(activate)(vectors.lanes_of(16), row, NUMBERS[name])
    assert np.isnan(row[0])
    assert not np.isfinite(row[1])
    assert (row[2:] == 0).all()


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    size=st.integers(1, 800),
    width=st.sampled_from(WIDTHS),
    offset=st.sampled_from([0.0, 100.0]),
)
def test_normalise_each_token(seed: int, size: int, width: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    x, norm, y = random(rng, size, width), random(rng, 2, size), aligned((size, width))
    x += np.float32(offset)
    compiled(normalise)(vectors.lanes_of(width), x, y, norm, np.float32(1e-5))
    expected = slow_encoder.norm(x.astype(float), norm[0].astype(float), norm[1].astype(float), 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-3 if offset else 2e-5)


@given(first=st.integers(-16, 16), length=st.integers(0, 32))
def test_put_writes_its_lanes_alone(first: int, length: int) -> None:
    out, rows, shares = aligned((3, 32)), aligned((3, GROUP)), aligned((GROUP,))
    out[...], rows[...], shares[...] = 7, 2, 3
    compiled(put)(out[:, :], rows, 3, shares, first, first + length)
    inside = [first <= lane < first + length for lane in range(GROUP)]
    assert (out[:, :GROUP] == np.where(inside, 6, 7)).all()
    assert (out[:, GROUP:] == 7).all()


# The whole encoder ---------------------------------------------------------------------------------------------------


def layer_of(
    rng: np.random.Generator, hidden: int, heads: int, size: int, neurons: int, sparsity: float
) -> dict[str, Any]:
    wide = heads * size
    shapes = {"query": (wide, hidden), "key": (wide, hidden), "value": (wide, hidden), "out": (hidden, wide)}
    shapes |= {"up": (neurons, hidden), "down": (hidden, neurons)}
    found: dict[str, Any] = {name: sparse(rng, *shape, sparsity) * 0.3 for name, shape in shapes.items()}
    found |= {f"{name}_bias": random(rng, shape[0]) for name, shape in shapes.items()}
    return found | {name: 1 + 0.1 * random(rng, 2, hidden) for name in ("attention_norm", "ffn_norm")}


def encoder_of(layers: list[dict[str, Any]], heads: int, size: int, threads: int) -> Encoder:
    scale = np.float32(size**-0.5)
    made = []
    for i, layer in enumerate(layers):
        parts = np.concatenate([layer["query"] * scale, layer["key"], layer["value"]])
        bias = np.concatenate([layer["query_bias"] * scale, layer["key_bias"], layer["value_bias"]])
        others = {name: pack(entries(torch.from_numpy(layer[name])), layer[name + "_bias"]) for name in
                  ("out", "up", "down")}  # fmt: skip
        made.append(
            Layer(
                qkv=pack(entries(torch.from_numpy(parts)), bias),
                **others,
                attention_norm=2 * i,
                ffn_norm=2 * i + 1,
                heads=heads,
                head_size=size,
                neurons=len(layer["up"]),
                activation=functions.GELU,
            )
        )
    norms = np.stack([layer[name] for layer in layers for name in ("attention_norm", "ffn_norm")])
    return Encoder(made, norms, 1e-5, threads, NO_DISTANCES, NO_TURNS)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    hidden=st.integers(1, 40),
    heads=st.integers(1, 3),
    size=st.integers(1, 20),
    neurons=st.integers(1, 40),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    threads=st.integers(1, 3),
    n_layers=st.integers(1, 2),
)
def test_encoder_of_any_shape(
    seed: int,
    hidden: int,
    heads: int,
    size: int,
    neurons: int,
    sparsity: float,
    lengths: list[int],
    threads: int,
    n_layers: int,
) -> None:
    rng = np.random.default_rng(seed)
    layers = [layer_of(rng, hidden, heads, size, neurons, sparsity) for _ in range(n_layers)]
    states = random(rng, len(lengths), max(lengths), hidden)
    real = np.arange(max(lengths)) < np.array(lengths)[:, None]
    found = encoder_of(layers, heads, size, threads)(states, real)
    wide = [{name: np.asarray(array, float) for name, array in layer.items()} for layer in layers]
    for text, n in enumerate(lengths):
        expected = slow_encoder.encoder(wide, states[text, :n].T.astype(float), heads, 1e-5)
        np.testing.assert_allclose(found[text, :n].T, expected, atol=1e-4)
        assert (found[text, n:] == 0).all()


@pytest.mark.parametrize(("batch", "length"), [(1, 512), (64, 9), (64, 64), (3, 300), (2, 65), (33, 1)])
@pytest.mark.parametrize("threads", [1, 2])
def test_encoder_of_any_batch(batch: int, length: int, threads: int) -> None:
    """Texts of many lengths answer as they do alone, whatever shares their tiles."""
    rng = np.random.default_rng(batch * length)
    layers = [layer_of(rng, 24, 3, 8, 40, 0.6) for _ in range(2)]
    encoder = encoder_of(layers, 3, 8, threads)
    lengths = rng.integers(1, length + 1, batch)
    lengths[0] = length
    states, real = random(rng, batch, length, 24), np.arange(length) < lengths[:, None]
    together = encoder(states, real)
    wide = [{name: np.asarray(array, float) for name, array in layer.items()} for layer in layers]
    for text in {0, batch // 2, batch - 1}:
        n = lengths[text]
        expected = slow_encoder.encoder(wide, states[text, :n].T.astype(float), 3, 1e-5)
        np.testing.assert_allclose(together[text, :n].T, expected, atol=1e-4)
    for text in range(batch):
        n = lengths[text]
        alone = encoder(states[text : text + 1, :n], real[text : text + 1, :n])
        np.testing.assert_allclose(together[text, :n], alone[0], atol=2e-5)


def test_the_first_place_is_computed_even_where_it_is_padding_and_nothing_attends_to_it() -> None:
    rng = np.random.default_rng(0)
    encoder = encoder_of([layer_of(rng, 24, 3, 8, 40, 0.6)], 3, 8, 1)
    states, real = random(rng, 1, 20, 24), np.zeros((1, 20), bool)
    real[0, [3, 4, 9]] = True
    found = encoder(states, real)
    changed = states.copy()
    changed[0, 0] += 1
    other = encoder(changed, real)
    assert np.abs(found[0, 0] - other[0, 0]).max() > 0.01
    assert (found[0, [3, 4, 9]] == other[0, [3, 4, 9]]).all()
    assert (found[0, [1, 2, 5, 19]] == 0).all()


@pytest.mark.parametrize(
    ("states", "real"), [((2, 9, 24), (2, 10)), ((2, 9, 24), (1, 9)), ((2, 9, 23), (2, 9)), ((2, 9, 24), (2, 1, 9, 9))]
)
def test_shapes_that_do_not_fit_are_refused(states: tuple[int, ...], real: tuple[int, ...]) -> None:
    encoder = encoder_of([layer_of(np.random.default_rng(0), 24, 3, 8, 40, 0.6)], 3, 8, 1)
    with pytest.raises(ValueError, match=r"^states \[2, 9, 2\d\] do not fit a mask \[.*\] of bool$"):
        encoder(np.zeros(states, np.float32), np.ones(real, bool))


def test_a_token_that_is_not_finite_spoils_its_text_alone() -> None:
    rng = np.random.default_rng(0)
    encoder = encoder_of([layer_of(rng, 24, 3, 8, 40, 0.5) for _ in range(2)], 3, 8, 1)
    states, real = random(rng, 3, 10, 24), np.ones((3, 10), bool)
    clean = encoder(states, real)
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = states.copy()
        spoilt[1, 4, 7] = bad
        found = encoder(spoilt, real)
        assert np.isnan(found[1]).all()
        assert (found[[0, 2]] == clean[[0, 2]]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_kept(bad: float) -> None:
    rng = np.random.default_rng(0)
    layer = layer_of(rng, 24, 3, 8, 40, 0.5)
    layer["up"][3, 5] = bad
    found = encoder_of([layer], 3, 8, 1)(random(rng, 1, 10, 24), np.ones((1, 10), bool))
    assert np.isnan(found).all()
