"""The headline of a run: a share where it says something, else the values; the same on page, card and terminal."""

import io
import math
from typing import Any

import pytest
from rich.console import Console
from test_report import check_inert, full_report, read

from capcli.records.codec import from_json
from capcli.records.pruned import Metrics
from capcli.reporting import documents, terminal
from capcli.reporting.card import render_card
from capcli.reporting.headline import Headline, headline
from capcli.reporting.run_page import metric_rows

BOTH = {"dense": ["accuracy"], "pruned": ["accuracy"]}
DENSE, PRUNED = {"dense": ["accuracy"]}, {"pruned": ["accuracy"]}


def run(dense: Any, pruned: Any, chance: Any = 0.5, at_chance: Any = None) -> dict[str, Any]:
    """The metrics of a report; the share is left out as `cap prune` leaves it out."""
    guessed = at_chance or {}
    share = {"accuracy": pruned / dense} if dense and dense > 0 and "dense" not in guessed else {}
    found = {"primary": "accuracy", "dense": {"accuracy": dense}, "pruned": {"accuracy": pruned}, "retention": share}
    return {**found, "chance": {} if chance is None else {"accuracy": chance}, "at_chance": guessed, "n_examples": 100}


CASES: list[tuple[dict[str, Any], str, str, str]] = [
    # metrics, share, sentence, cell of the table
    (run(0.8, 0.76), "95.00 %", "", "95.00 %"),
    (run(0.8, 0.8), "100.00 %", "", "100.00 %"),
    (run(0.8, 0.76, None), "95.00 %", "", "95.00 %"),  # of an older report
    (run(0.8, 0.82), "", "It is as good as the dense model: accuracy 0.8200, dense 0.8000", "as good"),
    (run(0.54, 0.53), "", "The dense model learned little: accuracy 0.5300, dense 0.5400, chance 0.5000", "98.15 %"),
    (run(0.55, 0.55), "100.00 %", "", "100.00 %"),  # a tenth of the way from 0.5 to 1
    (run(0.04, 0.03, None), "", "The dense model learned little: accuracy 0.0300, dense 0.0400", "75.00 %"),
    (
        run(0.51, 0.52, 0.5, BOTH),
        "",
        "Neither it nor the dense model is better than guessing: accuracy 0.5200, dense 0.5100, chance 0.5000",
        "–",
    ),
    (
        run(0.8, 0.52, 0.5, PRUNED),
        "",
        "It is no better than guessing: accuracy 0.5200, dense 0.8000, chance 0.5000",
        "65.00 %",
    ),
    (
        run(0.51, 0.6, 0.5, DENSE),
        "",
        "The dense model is no better than guessing: accuracy 0.6000, dense 0.5100, chance 0.5000",
        "–",
    ),
    (run(None, 0.6), "", "", "not measured"),
    (
        {**run(0.8, math.nan, 0.0, PRUNED), "retention": {}},  # a correlation with the same answer to everything
        "",
        "It is no better than guessing: accuracy not measured, dense 0.8000, chance 0.0000",
        "not measured",
    ),
]


def metrics(data: dict[str, Any]) -> Metrics:
    return from_json(Metrics, data, "report.json")


@pytest.mark.parametrize(("data", "kept", "said", "cell"), CASES)
def test_a_share_is_the_headline_only_where_it_says_something(
    data: dict[str, Any], kept: str, said: str, cell: str
) -> None:
    assert headline(metrics(data), "accuracy") == Headline(kept=kept, said=said)
    assert metric_rows(metrics(data))[0].retention == cell


def test_nothing_is_said_of_what_was_not_measured() -> None:
    assert headline(Metrics(), "accuracy") == Headline()
    assert headline(metrics({"dense": {"accuracy": 0.8}}), "accuracy") == Headline()


@pytest.mark.parametrize(("data", "kept", "said", "cell"), CASES)
def test_page_card_and_terminal_have_the_same_headline(data: dict[str, Any], kept: str, said: str, cell: str) -> None:
    report = read({**full_report("m"), "metrics": data})
    page = check_inert(documents.render_html(report)).words()
    card = render_card(report).replace("\\", "")
    console = Console(file=io.StringIO(), width=120)
    console.print(terminal.prune_summary(report))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert (f"and kept {kept} of the dense model’s accuracy." in page) == bool(kept)
    assert (f"keeps {kept} of the dense model's accuracy" in card) == bool(kept)
    assert not said or (f"{said}." in page and f"{said}." in card)
    dense, pruned, chance = (data[name].get("accuracy") for name in ("dense", "pruned", "chance"))
    figures = ["not measured" if dense is None else f"{dense:.4f}", f"{pruned:.4f}".replace("nan", "not measured")]
    figures.append("–" if chance is None else f"{chance:.4f}")
    assert " ".join(["accuracy", *figures, cell]) in " ".join(shown.split())
    assert f"| accuracy | {' | '.join(figures)} |" in card and "Chance: what the best answer" in card
    has_difference = bool(said) and not math.isnan(pruned)
    assert ("from the dense model's accuracy" in page) == has_difference
    assert ("of the dense model's accuracy" in page) == (not has_difference)
