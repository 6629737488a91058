"""Which token stands where: the texts of a batch in tiles of T lanes, short texts side by side.

A bin is a number of tiles that holds whole texts. A long text has a bin of its own, of as many tiles as it needs; short
texts fill what is left of it, and then bins of one tile, the longest first (first fit). Nothing but the end of a bin
stays empty. Texts need only the tiles of their bin, so bins are what threads share out.

Letters: B texts, S places of a text, T lanes of a tile.
"""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capcli.runtime import kernels
from capcli.runtime.kernels import Batch

Array = NDArray[Any]
WIDTHS = (16, 32, 64)
# What a tile costs beside one of 64 lanes, for all of which a weight is loaded once: 0.37 to 0.6 and 0.5 to 0.7, the
# sparser the less (BERT-base and MiniLM at 97 and 90 %, AVX-512).
COST = {16: 0.45, 32: 0.60, 64: 1.0}
MEETING = 1.05  # what a team costs beside threads that do not wait for each other


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """Tokens in tiles of `width` lanes. team: threads that go through all tiles together, 1 for each bin alone."""

    width: int
    team: int
    batch: Batch
    tiles_at_once: int
    """Tiles that the states of one bin take, or of all where a team works on them."""

    @property
    def longest(self) -> int:
        """Keys of the text that has most."""
        return int(self.batch.pieces[:, kernels.N_KEYS].max(initial=0))


def arrange(real: Array, threads: int) -> Arrangement:
    """Arrange the tokens of a batch; real [B, S] says which are tokens, and not padding.

    The first place of a text is computed even where it is padding, because classifiers read it; nothing attends to it.
    """
    real = np.ascontiguousarray(real)
    return _arranged(real.tobytes(), real.shape, threads)


@functools.lru_cache(maxsize=32)
def _arranged(real: bytes, shape: tuple[int, int], threads: int) -> Arrangement:
    mask = np.frombuffer(real, bool).reshape(shape)
    keys = mask.sum(axis=1)
    sizes = keys + ~mask[:, 0]
    options = [_option(sizes, width, threads) for width in WIDTHS]
    _, width, team, bins = min(options, key=lambda option: option[0])
    batch = _placed(mask, keys, sizes, width, bins)
    tiles = np.diff(batch.bins)
    return Arrangement(
        width=width, team=team, batch=batch, tiles_at_once=int(tiles.sum() if team > 1 else tiles.max(initial=0))
    )


def _option(sizes: Array, width: int, threads: int) -> tuple[float, int, int, list[tuple[int, list[int]]]]:
    """(cost, width, team, bins) of tiles of this width."""
    bins = fill(sizes.tolist(), width)
    tiles = [n for n, _ in bins]
    alone, together = _longest_of(tiles, threads), -(-sum(tiles) // threads) * MEETING
    team = threads if threads > 1 and together < alone else 1
    return COST[width] * min(alone, together if team > 1 else alone), width, team, bins


def _longest_of(tiles: list[int], threads: int) -> int:
    """How many tiles the busiest of the threads has, when each takes the next bin as soon as it is free."""
    loads = [0] * min(threads, len(tiles))
    for n in tiles:
        heapq.heapreplace(loads, loads[0] + n)
    return max(loads)


def fill(sizes: list[int], width: int) -> list[tuple[int, list[int]]]:
    """Bins as (tiles, texts), those with most tiles first: each text with the longest before it, into the first bin
    that has room."""
    bins: list[tuple[int, list[int]]] = []
    room: list[int] = []
    for text in sorted(range(len(sizes)), key=lambda text: -sizes[text]):
        size = sizes[text]
        at = next((i for i, free in enumerate(room) if free >= size), None) if size <= width else None
        if at is None:
            tiles = -(-size // width)
            bins.append((tiles, [text]))
            room.append(tiles * width - size)
        else:
            bins[at][1].append(text)
            room[at] -= size
    return bins


def _placed(mask: Array, keys: Array, sizes: Array, width: int, bins: list[tuple[int, list[int]]]) -> Batch:
    """The tables of the kernels."""
    first_tiles = np.cumsum([0, *(n for n, _ in bins)])
    rows = np.full((first_tiles[-1], width), -1, np.int32)
    places = np.zeros((first_tiles[-1], width), np.int32)
    pieces: list[tuple[int, ...]] = []
    length = mask.shape[1]
    for first_tile, (_, texts) in zip(first_tiles, bins, strict=False):
        start = int(first_tile) * width
        for text in texts:
            here = np.flatnonzero(mask[text])
            if not mask[text, 0]:
                here = np.append(here, 0)  # after the keys
            rows.reshape(-1)[start : start + len(here)] = text * length + here
            places.reshape(-1)[start : start + len(here)] = here
            pieces += _pieces(start, int(sizes[text]), int(keys[text]), width)
            start += len(here)
    pieces.sort()
    table = np.array(pieces, np.int64).reshape(-1, kernels.PIECE_COLUMNS)
    first_piece = np.searchsorted(table[:, kernels.TILE], np.arange(len(rows) + 1))
    return Batch(rows, places, table, first_piece, first_tiles.astype(np.int64))


def _pieces(start: int, size: int, keys: int, width: int) -> list[tuple[int, ...]]:
    """Rows of `Batch.pieces` for a text of `size` tokens from lane `start` of all lanes on, the first of them keys."""
    found: list[tuple[int, ...]] = []
    for tile in range(start // width, (start + size - 1) // width + 1):
        lane = max(start - tile * width, 0)
        end = min(start + size - tile * width, width)
        found.append((tile, lane, end - lane, *divmod(start, width), keys))
    return found
