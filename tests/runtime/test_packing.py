"""Matrices as the kernels read them, whatever they were stored as."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capcli.artifact import reader, writer
from capcli.artifact.reader import Kept
from capcli.runtime.packing import MOST_INPUTS, Entries, Matrix, Unsupported, block_width, entries, pack, stacked


def unpacked(found: Matrix, inputs: int) -> np.ndarray:
    """The dense matrix, entry by entry."""
    dense = np.zeros((found.outputs, inputs), np.float32)
    for block in range(found.blocks):
        for row in range(found.outputs):
            i = block * found.outputs + row
            for p in range(found.starts[i], found.starts[i + 1]):
                assert dense[row, found.columns[p]] == 0
                dense[row, found.columns[p]] = found.values[p]
    return dense


@settings(max_examples=40)
@given(
    seed=st.integers(0, 999),
    outputs=st.integers(0, 20),
    inputs=st.integers(1, 300),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_packing_keeps_every_weight(seed: int, outputs: int, inputs: int, sparsity: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(outputs, inputs, generator=generator)
    matrix = torch.where(torch.rand(outputs, inputs, generator=generator) < sparsity, 0.0, matrix).to(dtype)
    found = pack(entries(matrix), None)
    assert (unpacked(found, inputs) == matrix.float().numpy()).all()
    assert len(found.values) == matrix.count_nonzero()
    assert (found.bias == 0).all() and len(found.bias) == outputs
    places = matrix.reshape(-1) != 0
    for positions in (places.numpy(), places.nonzero()[:, 0].numpy()):
        kept = Kept(shape=(outputs, inputs), positions=positions, values=matrix.reshape(-1)[places])
        assert (unpacked(pack(entries(kept), None), inputs) == matrix.float().numpy()).all()


def test_blocks_where_rows_hold_enough() -> None:
    assert block_width(768, 768 * 0.2) == 64
    assert block_width(768, 768 * 0.1) == 128
    assert block_width(768, 768 * 0.03) == 768
    assert block_width(48, 48) == 48


def test_stacked_are_one_below_the_other() -> None:
    parts = [torch.randn(rows, 7) for rows in (3, 0, 5)]
    assert (unpacked(pack(stacked([entries(part) for part in parts]), None), 7) == torch.cat(parts).numpy()).all()


def test_nan_and_infinity_are_weights() -> None:
    matrix = torch.tensor([[0.0, torch.nan], [torch.inf, -0.0]])
    assert entries(matrix).places.tolist() == [1, 2]


def test_more_inputs_than_numbers_of_16_bits_are_refused() -> None:
    last = np.array([MOST_INPUTS - 1])
    found = pack(Entries(shape=(1, MOST_INPUTS), places=last, values=np.ones(1, np.float32)), None)
    assert found.columns.tolist() == [65535]
    with pytest.raises(Unsupported, match=r"^a matrix has 65,537 inputs; the runtime for sparse weights takes 65,536$"):
        pack(Entries(shape=(1, MOST_INPUTS + 1), places=last, values=np.ones(1, np.float32)), None)


@pytest.mark.parametrize(
    ("sparsity", "dtype"),
    [(0.5, "float32"), (0.97, "float32"), (0.999, "float16"), (0.0, "float32"), (0.9, "bfloat16")],
)
@pytest.mark.parametrize("quantised", [False, True])
def test_kept_tensors_of_a_file_are_those_that_are_read_dense(
    tmp_path: Path, sparsity: float, dtype: str, quantised: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 60, generator=generator)
    matrix[torch.rand(40, 60, generator=generator) < sparsity] = 0
    tensors = {"matrix": matrix.to(getattr(torch, dtype)), "other": torch.arange(3)}
    path = tmp_path / "file"
    writer.save(path, tensors, ["matrix"], quantised=["matrix"] if quantised else [])
    dense, kept = reader.load(path), reader.load_kept(path, ["matrix"])
    assert (kept["other"] == dense["other"]).all()  # type: ignore[union-attr]
    assert isinstance(kept["matrix"], Kept) or not sparsity
    assert (unpacked(pack(entries(kept["matrix"]), None), 60) == dense["matrix"].float().numpy()).all()
    assert not isinstance(reader.load_kept(path, [])["matrix"], Kept)
