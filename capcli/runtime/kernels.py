"""The forward pass of an encoder with sparse weights, on tiles of T tokens.

Layout. A tile is `[feature][T]`: T tokens stand beside one another, one in each lane, and everything that is done to a
token is done to T of them at once. It stays so through all layers; nothing is transposed but the way in and out. A row
of a sparse matrix is then, for each weight that is kept, one number times one row of the tile:

    y[r][:] = bias[r] + Σ_p value[p] · x[column[p]][:]

Tokens of several texts may share a tile, see `arrangement`. Only attention looks at more than one token, and only at
the real ones of its own text, so nothing is masked. It works on groups of 16 lanes, whose scores `[key][16]` fit the
first-level cache at any length: with the keys and values of a head as single floats, both of its products are
`dense_rows`.

NaN and infinities go through every step as in any other arithmetic; the comparisons are written so that NaN is kept.

Letters: T tokens of a tile, A width of attention (heads x D), D head size, F neurons, H hidden size, n keys of a text.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from capcli.runtime.compiling import Kernel, inner
from capcli.runtime.functions import NONE
from capcli.runtime.llvm import GROUP, GROUP_BYTES
from capcli.runtime.vectors import (
    OUTSIDE,
    ROWS_AT_ONCE,
    activate,
    current,
    dense_rows,
    fetch_add,
    give_way,
    normalise,
    pause,
    put,
    softmax,
    sparse_row,
)

Array = np.ndarray[Any, Any]
f32 = np.float32

# Columns of `Weights.matrices`, one row per matrix
FIRST_ROW, N_ROWS, N_BLOCKS, FIRST_BIAS = range(4)
# Columns of `Weights.layers`, one row per layer. The first six are indices of matrices and norms, -1 for no norm.
(QKV, OUT, UP, DOWN, ATTENTION_NORM, FFN_NORM, HEADS, HEAD_SIZE, NEURONS, ACTIVATION, GATED, NORM_FIRST, WINDOW,
 ROTARY, LAYER_COLUMNS) = range(15)  # fmt: skip
# Columns of `Batch.pieces`
TILE, LANE, N_LANES, KEY_TILE, KEY_LANE, N_KEYS, PIECE_COLUMNS = range(7)
# Counters of `Scratch.counters`, each in a cache line of its own
WAITING, ROUND, NEXT_BIN, N_COUNTERS = 0, 64, 128, 24
FAR = -1  # of a window: all keys are near


class Weights(NamedTuple):
    """All weights of an encoder. Row r of block b of a matrix is entries starts[i] to starts[i + 1] of `columns` and
    `values`, i = first row + b · rows + r."""

    matrices: Array  # int64 [matrices, 4]
    starts: Array  # int64
    columns: Array  # uint16 [kept]
    values: Array  # float32 [kept]
    biases: Array  # float32, the rows of all matrices
    norms: Array  # float32 [norms, 2, H], scale and shift
    layers: Array  # int64 [layers, LAYER_COLUMNS]
    distances: Array  # float32 [heads, 2·P - 1], a bias for each distance between two places; [0, 0] for none
    turns: Array  # float32 [tables, 2, places, D / 2], cosine and sine of rotary positions


class Batch(NamedTuple):
    """Where the tokens of a batch stand."""

    rows: Array  # int32 [tiles, T], which row of the input is in a lane; -1 for none
    places: Array  # int32 [tiles, T], the place of that token in its text
    pieces: Array  # int64 [pieces, PIECE_COLUMNS], the lanes of one text in one tile, and where its keys are
    first_piece: Array  # int64 [tiles + 1]
    bins: Array  # int64 [bins + 1], the first tile of each group of tiles that needs no other


class Scratch(NamedTuple):
    """Memory for the states of a run, of each thread (w) or of the group of tiles that it works on (g)."""

    x: Array  # [g, tiles, H, T], the states
    qkv: Array  # [g, 2, tiles · 3A + M, T], of this layer and the one before
    normed: Array  # [w, H, T]
    context: Array  # [w, A, T]
    hidden: Array  # [w, F or 2F, T]
    scores: Array  # [w, n + M, 16]
    head: Array  # [w, D + M, 16], the context of one head
    shares: Array  # [w, 16], of softmax
    counters: Array  # int64 [N_COUNTERS]


# Layers of a network, on one tile ------------------------------------------------------------------------------------


@inner
def linear(
    lanes: Any, weights: Weights, matrix: int, x: int, y: Array, more: bool, activation: int, until: int
) -> None:
    """y[r][T] = W x + b, added to y if `more`; the function of `activation` is applied to the first `until` rows.

    x: address of the tile. The columns of W are in blocks, so that the part of the tile that a block reads stays in the
    first-level cache; within a block all rows follow one another. Rows get their activation while they are there too.
    """
    width = GROUP * len(lanes)
    first, n, blocks, bias = weights.matrices[matrix]
    columns, values, out = weights.columns.ctypes.data, weights.values.ctypes.data, y.ctypes.data
    for block in range(blocks):
        starts = weights.starts[first + block * n : first + block * n + n + 1]
        last = block == blocks - 1
        for r in range(n):
            p = starts[r]
            b = weights.biases[bias + r] if block == 0 else f32(0.0)
            sparse_row(
                lanes, x, out + r * 4 * width, columns + 2 * p, values + 4 * p, starts[r + 1] - p, b, more or block > 0
            )
            if last and r < until:
                activate(lanes, out + r * 4 * width, activation)


@inner
def norm_tile(lanes: Any, weights: Weights, norm: int, epsilon: float, x: Array, y: Array) -> None:
    """The norm of that index of each token: from x [H][T] to y, which may be x."""
    normalise(lanes, x.ctypes.data, y.ctypes.data, weights.norms[norm].ctypes.data, x.shape[0], epsilon)


@inner
def rotate(lanes: Any, qkv: Array, layer: Array, turns: Array, places: Array) -> None:
    """Turn pairs of dimensions (i, i + D/2) of queries and keys by an angle that grows with the place of the token."""
    half = layer[HEAD_SIZE] // 2
    for part in range(2 * layer[HEADS]):  # the heads of the queries, then those of the keys
        for i in range(half):
            low, high = qkv[part * 2 * half + i], qkv[part * 2 * half + half + i]
            for t in range(GROUP * len(lanes)):
                cosine, sine = turns[0, places[t], i], turns[1, places[t], i]
                a, b = low[t], high[t]
                low[t] = a * cosine - b * sine
                high[t] = b * cosine + a * sine


@inner
def adjust(scores: Array, group: int, piece: Array, width: int, places: Array, distances: Array, window: int) -> None:
    """Add the bias of the distance between two places to each score, and take away keys outside of the window."""
    tile, lane = piece[KEY_TILE], piece[KEY_LANE]
    middle = distances.shape[0] // 2
    for j in range(piece[N_KEYS]):
        key = places[tile + (lane + j) // width, (lane + j) % width]
        for t in range(GROUP):
            away = key - places[piece[TILE], GROUP * group + t]
            if middle:
                scores[j, t] += distances[min(max(away + middle, 0), 2 * middle)]
            if window != FAR and abs(away) > window:
                scores[j, t] = f32(OUTSIDE)


@inner
def attend(
    lanes: Any, weights: Weights, layer: Array, qkv: Array, batch: Batch, piece: Array, lowest: int, scratch: Scratch,
    w: int,
) -> None:  # fmt: skip
    """The context of the queries of one text in one tile: softmax(QKᵀ) V of each head, 16 lanes at a time; zero where
    there is nothing to attend to, as `scaled_dot_product_attention` of torch has it.

    qkv: the tiles of the group that begins with tile `lowest`, each [3A][T]. 1/√D is part of the queries' weights.
    """
    width, heads, size, n = GROUP * len(lanes), layer[HEADS], layer[HEAD_SIZE], piece[N_KEYS]
    row_bytes, wide = 4 * width, heads * layer[HEAD_SIZE]
    tile_bytes = 3 * wide * row_bytes
    base = qkv.ctypes.data
    first, end = piece[LANE], piece[LANE] + piece[N_LANES]
    scores, own = scratch.scores[w], scratch.head[w]
    context, shares = scratch.context[w].ctypes.data, scratch.shares[w].ctypes.data
    if n == 0:
        scratch.context[w, :wide, first:end] = f32(0.0)
        return
    for head in range(heads):
        queries = base + (piece[TILE] - lowest) * tile_bytes + head * size * row_bytes
        keys = base + (piece[KEY_TILE] - lowest) * tile_bytes + (wide + head * size) * row_bytes
        for group in range(first // GROUP, (end - 1) // GROUP + 1):
            products(lanes, scores, keys, queries + group * GROUP_BYTES, piece, size, tile_bytes)
            if weights.distances.shape[0] or layer[WINDOW] != FAR:
                bias = weights.distances[head] if weights.distances.shape[0] else weights.distances[:0, 0]
                adjust(scores, group, piece, width, batch.places, bias, layer[WINDOW])
            softmax(scores.ctypes.data, n, shares)
            mixture(lanes, own, keys + wide * row_bytes, scores, piece, size, tile_bytes)
            put(context + head * size * row_bytes + group * GROUP_BYTES, row_bytes, own.ctypes.data, size, shares,
                first - GROUP * group, end - GROUP * group)  # fmt: skip


@inner
def products(lanes: Any, scores: Array, keys: int, queries: int, piece: Array, size: int, tile_bytes: int) -> None:
    """scores[j][16] = Σ_d keys[d][j] · queries[d][16] for the keys j of a text, which run on from tile to tile."""
    row_bytes, out = 4 * GROUP * len(lanes), scores.ctypes.data
    done, lane = 0, piece[KEY_LANE]
    while done < piece[N_KEYS]:
        here = min(GROUP * len(lanes) - lane, piece[N_KEYS] - done)
        for j in range(0, here, ROWS_AT_ONCE):  # those beyond `here` are overwritten or never read
            dense_rows(out + (done + j) * GROUP_BYTES, keys + 4 * (lane + j), queries, size, 4, row_bytes, row_bytes,
                       False)  # fmt: skip
        keys += tile_bytes
        done, lane = done + here, 0


@inner
def mixture(lanes: Any, own: Array, values: int, scores: Array, piece: Array, size: int, tile_bytes: int) -> None:
    """own[d][16] = Σ_j values[d][j] · scores[j][16] over the keys j of a text."""
    row_bytes, out, weights = 4 * GROUP * len(lanes), own.ctypes.data, scores.ctypes.data
    done, lane = 0, piece[KEY_LANE]
    while done < piece[N_KEYS]:
        here = min(GROUP * len(lanes) - lane, piece[N_KEYS] - done)
        for d in range(0, size, ROWS_AT_ONCE):
            dense_rows(out + d * GROUP_BYTES, values + d * row_bytes + 4 * lane, weights + done * GROUP_BYTES, here,
                       row_bytes, 4, GROUP_BYTES, done > 0)  # fmt: skip
        values += tile_bytes
        done, lane = done + here, 0


@inner
def feed_forward(lanes: Any, weights: Weights, layer: Array, source: int, hidden: Array, x: Array) -> None:
    """x += W₂ f(W₁ source), or W₂ (f(a) · b) with the halves a, b of W₁ source where gated."""
    neurons = layer[NEURONS]
    linear(lanes, weights, layer[UP], source, hidden, False, layer[ACTIVATION], neurons)
    if layer[GATED]:
        for r in range(neurons):
            a, b = hidden[r], hidden[neurons + r]
            for t in range(GROUP * len(lanes)):
                a[t] *= b[t]
    linear(lanes, weights, layer[DOWN], hidden.ctypes.data, x, True, NONE, 0)


# The whole -----------------------------------------------------------------------------------------------------------


@inner
def enter(lanes: Any, source: Array, rows: Array, x: Array) -> None:
    """x[h][t] = source[rows[t]][h]; zeros where there is no token. By parts, so that x stays in the first level."""
    size = x.shape[0]
    for start in range(0, size, GROUP):
        for t in range(GROUP * len(lanes)):
            row = rows[t]
            for h in range(start, min(start + GROUP, size)):
                x[h, t] = source[row, h] if row >= 0 else f32(0.0)


@inner
def leave(lanes: Any, x: Array, rows: Array, target: Array) -> None:
    """target[rows[t]][h] = x[h][t]."""
    size = x.shape[0]
    for start in range(0, size, GROUP):
        for t in range(GROUP * len(lanes)):
            row = rows[t]
            if row >= 0:
                for h in range(start, min(start + GROUP, size)):
                    target[row, h] = x[h, t]


@inner
def meet(counters: Array, team: int) -> None:
    """Wait until all threads of the team are here."""
    if team == 1:
        return
    waiting, turn = counters.ctypes.data + WAITING, counters.ctypes.data + ROUND
    before = current(turn)
    if fetch_add(waiting, 1) == team - 1:
        fetch_add(waiting, -team)
        fetch_add(turn, 1)
        return
    spins = 0
    while current(turn) == before:
        pause()
        spins += 1
        if spins > 2000:
            give_way()


@inner
def before_attention(
    lanes: Any, weights: Weights, layer: Array, epsilon: float, x: Array, qkv: Array, places: Array, scratch: Scratch,
    w: int,
) -> None:  # fmt: skip
    """Queries, keys and values of a tile: qkv[3A][T]."""
    source = x.ctypes.data
    if layer[NORM_FIRST] and layer[ATTENTION_NORM] >= 0:
        norm_tile(lanes, weights, layer[ATTENTION_NORM], epsilon, x, scratch.normed[w])
        source = scratch.normed[w].ctypes.data
    linear(lanes, weights, layer[QKV], source, qkv, False, NONE, 0)
    if layer[ROTARY] >= 0:
        rotate(lanes, qkv, layer, weights.turns[layer[ROTARY]], places)


@inner
def after_attention(
    lanes: Any, weights: Weights, layer: Array, epsilon: float, x: Array, scratch: Scratch, w: int
) -> None:
    """What follows attention in a tile, in place: output, feed-forward, and the norms where they stand."""
    normed, source = scratch.normed[w], x.ctypes.data
    linear(lanes, weights, layer[OUT], scratch.context[w].ctypes.data, x, True, NONE, 0)
    if layer[NORM_FIRST]:
        norm_tile(lanes, weights, layer[FFN_NORM], epsilon, x, normed)
        source = normed.ctypes.data
    else:
        norm_tile(lanes, weights, layer[ATTENTION_NORM], epsilon, x, x)
    feed_forward(lanes, weights, layer, source, scratch.hidden[w], x)
    if not layer[NORM_FIRST]:
        norm_tile(lanes, weights, layer[FFN_NORM], epsilon, x, x)


@inner
def encode_tiles(
    lanes: Any, me: int, team: int, w: int, g: int, layers: Array, lowest: int, end: int, weights: Weights,
    epsilon: float, batch: Batch, source: Array, target: Array, scratch: Scratch,
) -> None:  # fmt: skip
    """The tiles from `lowest` to `end` through the layers; of a team, each thread has every team-th tile.

    Keys and values of one layer are kept while the next ones are made, so threads meet once in a layer.
    """
    for tile in range(lowest + me, end, team):
        enter(lanes, source, batch.rows[tile], scratch.x[g, tile - lowest])
    for place in range(layers.shape[0]):
        layer = layers[place]
        qkv, wide = scratch.qkv[g, place & 1], 3 * layer[HEADS] * layer[HEAD_SIZE]
        for tile in range(lowest + me, end, team):
            at = tile - lowest
            own = qkv[at * wide : at * wide + wide]
            before_attention(lanes, weights, layer, epsilon, scratch.x[g, at], own, batch.places[tile], scratch, w)
        meet(scratch.counters, team)
        for tile in range(lowest + me, end, team):
            for piece in range(batch.first_piece[tile], batch.first_piece[tile + 1]):
                attend(lanes, weights, layer, qkv, batch, batch.pieces[piece], lowest, scratch, w)
            after_attention(lanes, weights, layer, epsilon, scratch.x[g, tile - lowest], scratch, w)
    for tile in range(lowest + me, end, team):
        leave(lanes, scratch.x[g, tile - lowest], batch.rows[tile], target)


@Kernel
def run(
    lanes: Any, me: int, team: int, layers: Array, weights: Weights, epsilon: float, batch: Batch, source: Array,
    target: Array, scratch: Scratch,
) -> None:  # fmt: skip
    """What thread `me` does: target[row][H] = encoder(source[row][H]) for the rows of the batch.

    A team of several threads goes through all tiles together. Without a team (1) each thread takes one bin of tiles
    after the other until none is left, and nobody waits. lanes: see `vectors`. layers: rows of `weights.layers`.
    """
    n = len(batch.bins) - 1
    if team > 1:
        encode_tiles(lanes, me, team, me, 0, layers, 0, batch.bins[n], weights, epsilon, batch, source, target, scratch)
        return
    while True:
        taken = fetch_add(scratch.counters.ctypes.data + NEXT_BIN, 1)
        if taken >= n:
            return
        encode_tiles(lanes, 0, 1, me, me, layers, batch.bins[taken], batch.bins[taken + 1], weights, epsilon, batch,
                     source, target, scratch)  # fmt: skip
