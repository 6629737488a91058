"""`--target`: what it may be and stands for, which methods it fits, and that it replaces the sparsity."""

from pathlib import Path
from typing import Any

import pytest
import typer

from capcli.cli import app
from capcli.config import target
from capcli.config.grid import sweep_config
from capcli.config.layers import prune_config
from capcli.config.options import flatten
from capcli.errors import ConfigError

BASE = {"model": "mini", "task": "mr", "method": "structured"}


@pytest.mark.parametrize(
    ("text", "kind", "keeps"),
    [
        ("macs=0.3", "macs", 0.3),
        (" params = 30% ", "params", 0.3),
        ("macs=1", "macs", 1.0),
        ("latency=2x", "latency", 0.5),
        ("latency=1.6×", "latency", 0.625),
    ],
)
def test_what_a_target_stands_for(text: str, kind: str, keeps: float) -> None:
    found = target.parse(text)
    assert (found.kind, found.keeps) == (kind, pytest.approx(keeps))
    config = prune_config({**BASE, "target": text})
    assert config.sparsity == found.removed == pytest.approx(1 - keeps)
    assert config.stair_list[-1] == config.sparsity


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"target": "0.3"}, "--target needs NAME=VALUE, got '0.3'", "for example --target macs=0.3"),
        ({"target": "macs="}, "--target needs NAME=VALUE, got 'macs='", "for example"),
        ({"target": "foo=1"}, "unknown target 'foo'", "valid: macs, params, latency"),
        ({"target": "mac=0.5"}, "unknown target 'mac'", "did you mean macs?"),
        ({"target": "macs=0"}, "--target macs is the share that stays, above 0 and at most 1, got 0", "for example"),
        ({"target": "params=30"}, "--target params is the share that stays", "did you mean 0.30 or 30%?"),
        ({"target": "params=-0.5"}, "--target params is the share that stays", "for example"),
        ({"target": "macs=nan"}, "--target macs is the share that stays", "for example"),
        ({"target": "macs=half"}, "--target macs is the share that stays", "for example"),
        ({"target": "latency=0.5x"}, "--target latency is how many times as fast, from 1x on, got 0.5x", "latency=2x"),
        ({"target": "latency=2"}, "--target latency is how many times as fast, from 1x on, got 2", "latency=2x"),
        ({"target": "latency=infx"}, "--target latency is how many times as fast", "latency=2x"),
        ({"target": "macs=0.5", "sparsity": 0.5}, "--target takes the place of --sparsity", "leave one of them out"),
        (
            {"target": "macs=0.5", "method": "fisher"},
            "--target is for methods that remove heads, neurons or dimensions, fisher removes single weights",
            "--method structured",
        ),
        (
            {"target": "macs=0.5", "method": "cap-f"},
            "--target needs a budget to be split between heads and neurons, and cap-f removes both alike",
            "use --method structured, or --structure dimensions",
        ),
        (
            {"target": "latency=2x", "structure": "dimensions"},
            "--target latency is measured with fewer heads and neurons, not with smaller heads",
            "--target macs",
        ),
        ({"importance_examples": 9}, "--importance-examples has no effect on structured", "use --calibration"),
        ({"target": "macs=0.6", "stairs": "0.3,0.6"}, "0.4, which is what --target macs=0.6 removes", "0.4"),
        ({"fisher_block": 4}, "--fisher-block has no effect on structured", "leave it out"),
        ({"mask_from": "a"}, "--mask-from fixes the masks, and structured chooses its own", "--method fisher"),
        ({"init": "fisher"}, "--init fisher is what structured does itself", "leave it out"),
    ],
    ids=str,
)
def test_bad_targets_say_what_and_how_to_go_on(options: dict[str, Any], message: str, hint: str) -> None:
    for make in (prune_config, sweep_config):
        with pytest.raises(ConfigError) as caught:
            make({**BASE, **options})
        assert message in caught.value.message
        assert hint in caught.value.hint
        assert caught.value.exit_code == 2


def test_a_target_in_a_file_and_a_sparsity_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "cap.toml"
    file.write_text('[prune]\ntarget = "macs=40%"\n')
    assert prune_config(BASE, str(file)).sparsity == 0.6
    with pytest.raises(ConfigError, match="--target takes the place of --sparsity"):
        prune_config({**BASE, "sparsity": 0.5}, str(file))


def test_the_folder_has_the_target_in_its_name() -> None:
    assert prune_config({**BASE, "target": "latency=2x"}).out_folder == Path("runs/mini-mr-structured-latency-2x")
    assert prune_config({**BASE, "sparsity": 0.5}).out_folder == Path("runs/mini-mr-structured-0.5")


def test_the_words_of_a_run_of_a_sweep_with_a_target() -> None:
    """They name no sparsity beside it, and mean the same run."""
    found = sweep_config({**BASE, "target": "macs=0.3", "seeds": "2"})
    command: Any = typer.main.get_command(app.app).commands["prune"]  # type: ignore[attr-defined]
    for cell in found.cells:
        with command.make_context("prune", list(cell.words[1:])) as context:
            parsed = sweep_config({name: value for name, value in context.params.items() if name != "config"})
        assert flatten(parsed.run) == flatten(cell.run)
        assert cell.run.sparsity == 0.7


def test_dimensions_take_a_target_with_first_order_too() -> None:
    for method in ("cap-f", "first-order", "structured"):
        found = prune_config({**BASE, "method": method, "target": "params=0.25", "structure": "dimensions"})
        assert found.sparsity == 0.75


def test_stairs_of_heads_begin_lower_than_those_of_weights() -> None:
    assert prune_config({**BASE, "sparsity": 0.4}).stair_list == (0.4,)
    assert prune_config({**BASE, "sparsity": 0.75}).stair_list == (0.5, 0.75)
    assert prune_config({**BASE, "sparsity": 0.75, "stairs": "0.3,0.75"}).stair_list == (0.3, 0.75)
    assert prune_config({**BASE, "sparsity": 0.75, "stairs": "once"}).stair_list == (0.75,)
