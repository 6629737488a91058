"""From options with lists to the runs of a sweep: which there are, each as it would be by itself; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from capcli import machine
from capcli.cli import app
from capcli.config.grid import sweep_config
from capcli.config.layers import prune_config
from capcli.config.options import flatten
from capcli.config.sweep import SweepConfig
from capcli.errors import ConfigError


def swept(**chosen: Any) -> SweepConfig:
    return sweep_config({"model": "mini", "task": "mr", **chosen})


def test_the_grid() -> None:
    """Seed by seed, and in each method by method."""
    found = swept(sparsity="0.5, 0.95", method="fisher,cap-f", seeds="2", out="runs/x")
    assert [(cell.run.seed, cell.run.method, cell.run.sparsity) for cell in found.cells] == [
        (seed, method, sparsity) for seed in (1, 2) for method in ("fisher", "cap-f") for sparsity in (0.5, 0.95)
    ]
    assert [cell.name for cell in found.cells[:2]] == ["fisher-0.5-seed1", "fisher-0.95-seed1"]
    assert found.cells[0].run.out_folder == Path("runs/x/fisher-0.5-seed1")
    assert found.out_folder == Path("runs/x")
    assert [len(cells) for cells in found.configurations.values()] == [2, 2, 2, 2]
    assert swept(sparsity="0.5,0.8").out_folder == Path("runs/mini-mr-sweep")


@pytest.mark.parametrize(
    ("chosen", "seeds"),
    [
        ({"seeds": "3"}, [1, 2, 3]),
        ({"seeds": 2, "seed": 7}, [7, 8]),
        ({"seeds": "5,1,5"}, [5, 1]),
        ({"seeds": [4, 6]}, [4, 6]),
        ({"seed": 9}, [9, 9]),
    ],
)
def test_seeds(chosen: dict[str, Any], seeds: list[int]) -> None:
    found = swept(**chosen, **({"sparsity": [0.5, 0.6]} if "seeds" not in chosen else {}))
    assert [cell.run.seed for cell in found.cells] == seeds


def test_what_is_given_twice_counts_once() -> None:
    assert len(swept(sparsity="0.5,0.50,.5,0.6", method="fisher,fisher").cells) == 2


def test_each_run_is_what_it_would_be_by_itself() -> None:
    """Presets depend on method and sparsity: paper has other batch sizes for cap-f, and other weights above 93.5 %."""
    found = swept(sparsity="0.9,0.97", method="soft-movement,cap-f", seeds=2, preset="paper", epochs=3, max_time=5)
    for cell in found.cells:
        axes = {"method": cell.run.method, "sparsity": cell.run.sparsity, "seed": cell.run.seed}
        alone = prune_config({"model": "mini", "task": "mr", "preset": "paper", "epochs": 3, **axes})
        assert {**flatten(cell.run), "out": ""} == flatten(alone)
    assert len({(cell.run.batch_size, cell.run.reg_weight) for cell in found.cells}) == 3
    assert found.max_time == 5


def test_the_words_of_a_run_are_its_command() -> None:
    found = swept(sparsity="0.9,0.97", method="fisher", refit=False, text_column="-x", lr=1e-5, seeds="1,3")
    command: Any = typer.main.get_command(app.app).commands["prune"]  # type: ignore[attr-defined]
    for cell in found.cells:
        assert cell.words[0] == "prune"
        with command.make_context("prune", list(cell.words[1:])) as context:
            parsed = sweep_config({name: value for name, value in context.params.items() if name != "config"})
        assert parsed.run == cell.run


def test_one_value_of_each_is_no_sweep() -> None:
    for chosen in ({"sparsity": "0.8", "method": "fisher"}, {"sparsity": 0.8, "method": ["fisher"], "seeds": "1"}):
        found = swept(**chosen, max_bytes=100)
        assert (found.cells, found.gates.max_bytes) == ((), 100)
        assert found.run == prune_config({"model": "mini", "task": "mr", "sparsity": 0.8, "method": "fisher"})
        assert found.out_folder == Path("runs/mini-mr-fisher-0.8")
    assert swept(seeds="5,").run.seed == 5, "a list of one"


def test_lists_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    text = '[prune]\nmodel = "mini"\ntask = "mr"\n'
    lists = (
        'sparsity = [0.5, 0.8]\nmethod = ["fisher", "cap-f"]\nseeds = 2\nmax-bytes = "5MB"\n',
        'sparsity = "0.5,0.8"\nmethod = "fisher,cap-f"\nseeds = "1,2"\nmax-bytes = 5000000\n',
    )
    expected = swept(sparsity="0.5,0.8", method="fisher,cap-f", seeds=2, max_bytes=5_000_000)
    for lines in lists:
        file.write_text(text.replace('model = "mini"\n', "") + lines)
        assert sweep_config({"model": "mini"}, str(file)) == expected
        with pytest.raises(ConfigError, match="--max-bytes is for a sweep or its gates"):
            prune_config({"model": "mini"}, str(file))
    file.write_text(text.replace('model = "mini"\n', "") + 'sparsity = ["0.5", true]\n')
    with pytest.raises(ConfigError, match=r"sparsity in .* must be a number"):
        sweep_config({"model": "mini"}, str(file))


def test_threads_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """And there are no more runs at a time than processors, or runs."""
    monkeypatch.setattr(machine, "processors", lambda: 6)
    cases = {
        (1, 0): (1, 0),
        (2, 0): (2, 3),
        (4, 0): (4, 1),
        (9, 0): (6, 1),
        (3, 4): (3, 1),
        (2, 8): (2, 4),
        (1, 8): (1, 8),
    }
    for (jobs, threads), expected in cases.items():
        found = swept(sparsity="0.1,0.2,0.3,0.4,0.5,0.6,0.7", jobs=jobs, threads=threads)
        assert (found.at_once, found.cells[0].run.hardware.threads) == expected
        words = " ".join(found.cells[0].words)
        assert f"--threads {expected[1]} " in words


@pytest.mark.parametrize(("stairs", "found"), [("once", [(0.9,), (0.95,)]), ("auto", [(0.8, 0.9), (0.8, 0.9, 0.95)])])
def test_stairs_by_name_fit_each_sparsity(stairs: str, found: list[tuple[float, ...]]) -> None:
    runs = [cell.run for cell in swept(method="magnitude", sparsity="0.9,0.95", stairs=stairs).cells]
    assert [run.stair_list for run in runs] == [pytest.approx(one) for one in found]


@pytest.mark.parametrize(
    ("chosen", "said", "hint"),
    [
        ({"sparsity": "0.5,x"}, "--sparsity needs numbers, got '0.5,x'", "for example --sparsity 0.8,0.9"),
        ({"sparsity": ","}, "--sparsity needs numbers", ""),
        ({"sparsity": "0.5,1.2"}, "sparsity 1.2: sparsity is the fraction of weights", "--sparsity 0.012"),
        ({"method": "fisher,fishr"}, "fishr at sparsity 0.9: unknown method 'fishr'", "did you mean fisher?"),
        ({"method": "fisher,cap-f", "stairs": "0.8,0.9"}, "cap-f at sparsity 0.9: --stairs has no effect", "leave it"),
        ({"sparsity": "0.8,0.9", "stairs": "0.5,0.8"}, "--stairs leads to one sparsity, but", "--stairs auto or once"),
        ({"sparsity": "0.8,0.9", "task": "nothing"}, "unknown task 'nothing'", "valid:"),
        ({"method": "fisher,magnitude", "epochs": 0}, "magnitude at sparsity 0.9: --epochs must be", ""),
        ({"sparsity": "0.5,0.8", "initial_sparsity": 0.6}, "sparsity 0.5: --initial-sparsity 0.6 is more", ""),
        ({"seeds": "0"}, "--seeds is a number of seeds from 1 to 1,000, got 0", ""),
        ({"seeds": "two"}, "--seeds needs a number, or several, got 'two'", "--seeds 3"),
        ({"seeds": "1,2", "seed": 3}, "--seed and the list of --seeds both choose", "leave one"),
        ({"seeds": "200", "sparsity": "0.1,0.2,0.3,0.4,0.5,0.6"}, "at most 1,000 runs, this has 1,200", "shorter"),
        ({"jobs": 0, "seeds": "2"}, "--jobs must be at least 1", ""),
        ({"jobs": 2}, "--jobs is for a sweep, this is one run", "--seeds"),
        ({"max_bytes": 0}, "--max-bytes 0 sets no limit", ""),
        ({"seeds": "2", "max_drop": "accuracy"}, "--max-drop needs METRIC=NUMBER", ""),
    ],
)
def test_what_is_refused(chosen: dict[str, Any], said: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        swept(**chosen)
    assert said in caught.value.message
    assert hint in caught.value.hint


def test_what_all_runs_share() -> None:
    found = swept(sparsity="0.5,0.97", method="wanda,fisher", preset="paper", lr=1e-5).shared()
    assert (found["model"], found["task"], found["lr"]) == ("mini", "mr", 1e-5)
    assert not {"sparsity", "method", "seed", "out", "keep_work", "max_time", "preset"} & found.keys()
    assert "epochs" not in found, "wanda has none"
