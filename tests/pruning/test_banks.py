"""Banks on disk and in a step: saved, mapped, gathered, drawn."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from capcli import files
from capcli.errors import FileError
from capcli.pruning import banks
from capcli.stored import read_json

CPU = torch.device("cpu")


def saved(folder: Path, n: int = 7, width: int = 4, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(n, width)).astype(np.float16)
    logits = rng.normal(size=(n, classes)).astype(np.float32)
    with files.publish(folder) as staging:
        banks.save(staging, torch.from_numpy(vectors), torch.from_numpy(logits), 1.5, {"stage": "bank"})
    return vectors, logits


def test_save_and_load_give_the_same_bits(tmp_path: Path) -> None:
    vectors, logits = saved(tmp_path / "bank")
    assert files.is_complete(tmp_path / "bank")
    assert read_json(tmp_path / "bank" / "stage.json") == {"seconds": 1.5, "of": {"stage": "bank"}}
    found, found_logits = banks.load(tmp_path / "bank", CPU, 7, 7)
    assert (found.dtype, found_logits.dtype) == (torch.float16, torch.float32)
    assert np.array_equal(found.numpy(), vectors)
    assert np.array_equal(found_logits.numpy(), logits)


def test_vectors_take_16_bits_on_disk(tmp_path: Path) -> None:
    saved(tmp_path / "bank", n=1000, width=64, classes=2)
    size = (tmp_path / "bank" / banks.FILE).stat().st_size
    assert 0 <= size - (1000 * 64 * 2 + 1000 * 2 * 4) < 1000


def test_loaded_vectors_are_mapped_from_their_file(tmp_path: Path) -> None:
    """Pages of the file stand in the process's memory map, so that the system may drop and re-read them."""
    saved(tmp_path / "bank", n=5000, width=64)
    before = Path("/proc/self/maps").read_text().count(banks.FILE)
    found, _ = banks.load(tmp_path / "bank", CPU, 5000, 5000)
    assert Path("/proc/self/maps").read_text().count(str(tmp_path / "bank" / banks.FILE)) > 0 == before
    assert found.shape == (5000, 64)


@pytest.mark.parametrize("n", [6, 8, 0])
def test_a_bank_of_another_size_is_refused(tmp_path: Path, n: int) -> None:
    saved(tmp_path / "bank")
    with pytest.raises(FileError, match=f"is not a bank of {n} examples"):
        banks.load(tmp_path / "bank", CPU, n, n)


def test_a_file_with_other_tensors_or_damage_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "bank")
    path = tmp_path / "bank" / banks.FILE
    whole = path.read_bytes()
    safetensors.torch.save_file({"vectors": torch.zeros(7, 4)}, path)
    with pytest.raises(FileError, match="is not a bank"):
        banks.load(tmp_path / "bank", CPU, 7, 7)
    path.write_bytes(whole[:-3])
    assert not files.is_complete(tmp_path / "bank")
    with pytest.raises(FileError, match=banks.FILE):
        banks.load(tmp_path / "bank", CPU, 7, 7)


@pytest.mark.parametrize("n_vectors", [1, 3])
def test_gather_addresses_by_id(n_vectors: int) -> None:
    parts = [torch.arange(20).view(5, 4).half() + 100 * k for k in range(n_vectors)]
    bank = banks.Bank(vectors=parts)
    assert bank.n_vectors == n_vectors
    found = bank.gather(torch.tensor([4, 0, 4]))
    assert found.shape == (3, n_vectors, 4)
    for k in range(n_vectors):
        assert found[:, k, 0].tolist() == [16 + 100 * k, 100 * k, 16 + 100 * k]
    assert bank.gather(torch.empty(0, dtype=torch.int64)).shape == (0, n_vectors, 4)


@given(n=st.integers(1, 300), k=st.integers(0, 9), extra=st.integers(0, 400), seed=st.integers(0, 99))
def test_draw_is_distinct_capped_and_seeded(n: int, k: int, extra: int, seed: int) -> None:
    found = banks.draw(n, k, extra, [seed, 3])
    assert len(found) == min(n, extra // max(1, k))  # floor(E / K), but never more than there are
    assert len(set(found.tolist())) == len(found)
    assert all(0 <= i < n for i in found)
    assert found.dtype == np.int64
    assert np.array_equal(found, banks.draw(n, k, extra, [seed, 3]))


def test_draw_changes_with_the_step_and_reaches_every_example() -> None:
    draws = [frozenset(banks.draw(50, 1, 10, [1, step]).tolist()) for step in range(60)]
    assert len(set(draws)) == 60
    assert frozenset.union(*draws) == frozenset(range(50))
