"""The same arithmetic as loops in 64 bits: one text, one head, one token after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

Array = NDArray[np.float64]


def linear(matrix: Array, bias: Array, x: Array) -> Array:
    """y[r] = bias[r] + Σ_c matrix[r][c] · x[c] over the weights that are not zero, for each token x [inputs, T]."""
    y = np.zeros((len(matrix), x.shape[1]))
    for r in range(len(matrix)):
        y[r] = bias[r]
        for c in np.flatnonzero(matrix[r]):
            y[r] += matrix[r, c] * x[c]
    return y


def gelu(x: Array) -> Array:
    return x * (1 + erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: Array) -> Array:
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x.clip(-700)))


def relu(x: Array) -> Array:
    return np.where(x < 0, 0, x)


def norm(x: Array, scale: Array, shift: Array, epsilon: float) -> Array:
    """Of each token: x [H, T]."""
    mean = x.mean(axis=0)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(axis=0) + epsilon) * scale[:, None] + shift[:, None]


def attention(q: Array, k: Array, v: Array, heads: int) -> Array:
    """Context [A, T] of queries [A, T] with keys and values [A, n]."""
    out = np.zeros_like(q)
    size = len(q) // heads
    for head in range(heads):
        rows = slice(head * size, head * size + size)
        for t in range(q.shape[1]):
            scores = q[rows, t] @ k[rows] / math.sqrt(size)
            weights = np.exp(scores - scores.max())
            out[rows, t] = v[rows] @ (weights / weights.sum())
    return out


def encoder(layers: list[Mapping[str, Any]], x: Array, heads: int, epsilon: float) -> Array:
    """States [H, n] of one text after layers with norms behind the sums, neurons with `gelu`."""
    for layer in layers:
        q, k, v = (linear(layer[name], layer[name + "_bias"], x) for name in ("query", "key", "value"))
        x = x + linear(layer["out"], layer["out_bias"], attention(q, k, v, heads))
        x = norm(x, *layer["attention_norm"], epsilon)
        hidden = gelu(linear(layer["up"], layer["up_bias"], x))
        x = norm(x + linear(layer["down"], layer["down_bias"], hidden), *layer["ffn_norm"], epsilon)
    return x
