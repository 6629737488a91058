"""Where tokens stand: every one in one lane, texts whole in their bins, few lanes empty."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from capcli.runtime import kernels
from capcli.runtime.arrangement import WIDTHS, arrange, fill


@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=64),
    threads=st.integers(1, 4),
    holes=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_token_has_one_lane_and_its_keys(lengths: list[int], threads: int, holes: bool, seed: int) -> None:
    real = np.arange(max(*lengths, 1)) < np.array(lengths)[:, None]
    if holes:
        real &= np.random.default_rng(seed).random(real.shape) < 0.7
    placed = arrange(real, threads)
    wanted = real.copy()
    wanted[:, 0] = True
    rows = placed.batch.rows[placed.batch.rows >= 0]
    assert sorted(rows) == np.flatnonzero(wanted).tolist()
    flat, width, length = placed.batch.rows.reshape(-1), placed.width, real.shape[1]
    assert (placed.batch.places.reshape(-1)[flat >= 0] == flat[flat >= 0] % length).all()
    seen = np.zeros(len(flat), int)
    for tile, lane, n, key_tile, key_lane, n_keys in placed.batch.pieces:
        start, keys = tile * width + lane, key_tile * width + key_lane
        seen[start : start + n] += 1
        (text,) = set(flat[start : start + n] // length)
        assert flat[keys : keys + n_keys].tolist() == (text * length + np.flatnonzero(real[text])).tolist()
        assert lane + n <= width
        bins = placed.batch.bins
        assert np.searchsorted(bins, tile, "right") == np.searchsorted(bins, key_tile, "right")
    assert (seen == (flat >= 0)).all()
    first = placed.batch.first_piece
    assert first[0] == 0 and first[-1] == len(placed.batch.pieces)
    for tile, (begin, end) in enumerate(itertools.pairwise(first)):
        assert (placed.batch.pieces[begin:end, kernels.TILE] == tile).all()
    assert placed.team in (1, threads)


@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=64), width=st.sampled_from(WIDTHS))
def test_bins_hold_whole_texts_and_few_are_half_empty(sizes: list[int], width: int) -> None:
    bins = fill(sizes, width)
    assert sorted(text for _, texts in bins for text in texts) == list(range(len(sizes)))
    assert all(sum(sizes[text] for text in texts) <= n * width for n, texts in bins)
    single = [sum(sizes[text] for text in texts) for n, texts in bins if n == 1]
    assert sum(2 * load <= width for load in single) <= 1  # two of them would have shared a tile


def test_short_texts_share_tiles() -> None:
    placed = arrange(np.ones((8, 8), bool), threads=1)
    assert placed.batch.rows.shape == (1, 64)
    assert (placed.batch.rows == np.arange(64)).all()


def test_a_short_text_alone_takes_a_narrow_tile_and_a_long_one_is_shared_by_threads() -> None:
    assert arrange(np.ones((1, 10), bool), threads=1).width == 16
    long = arrange(np.ones((1, 128), bool), threads=2)
    assert (long.width, long.team) == (64, 2)
    assert arrange(np.ones((8, 128), bool), threads=2).team == 1
