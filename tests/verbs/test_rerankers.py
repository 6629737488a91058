"""Rerankers: rows of query, document and relevance, measured by the order of the documents of each query."""

import csv
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import ndcg_score
from tiny import SETTINGS, WORDS, Tiny, invoke, one_number, write_csv

import capcli
from capcli.config.task import TaskConfig
from capcli.data import dataset
from capcli.errors import CapError

COLUMNS = ("query", "document", "query_id", "relevance")
OPTIONS = {
    "task": "regression",
    "text_column": "query",
    "pair_column": "document",
    "label_column": "relevance",
    "group_column": "query_id",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents with more or fewer good words, four to a query, in no order."""
    home, rng = tmp_path_factory.mktemp("ranked"), random.Random(3)
    for split, n in (("train", 20), ("validation", 12)):
        rows = [
            (f"the film {rng.choice(WORDS['positive'])}", document, f"q{query}", relevance)
            for query in range(n)
            for document, relevance in [one_number(rng) for _ in range(4)]
        ]
        rng.shuffle(rows)
        write_csv(home / f"{split}.csv", COLUMNS, rows)
    return str(home)


@pytest.fixture(scope="module")
def reranker(tiny: Tiny, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reranker") / "out"
    settings = {**SETTINGS, "method": "movement", "sparsity": 0.3, "epochs": 2, "keep_work": True}
    capcli.prune(model=tiny.model, data=data, out=str(out), **OPTIONS, **settings)
    return out


@pytest.fixture(scope="module")
def cross_encoder(reranker: Path) -> str:
    """The dense reranker as sentence-transformers saves one: another name of its label, and a table of its own."""
    folder = reranker / "work" / "teacher"
    config = json.loads((folder / "config.json").read_text())
    own = {"activation_fn": "torch.nn.modules.activation.Sigmoid", "version": "5.1.0"}
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "sentence_transformers": own}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_reranker_is_measured_by_the_order_of_its_documents(reranker: Path, data: str) -> None:
    """The values are those of scikit-learn for scores that were asked for one by one."""
    metrics = json.loads((reranker / "report.json").read_text())["metrics"]
    assert metrics["primary"] == "ndcg"
    assert list(metrics["pruned"]) == ["ndcg", "mrr", "pearson", "spearman"]
    assert metrics["n_examples"] == 12, "queries"
    assert metrics["chance"]["ndcg"] < metrics["dense"]["ndcg"] <= 1
    with (Path(data) / "validation.csv").open() as file:
        rows = list(csv.DictReader(file))
    answers = capcli.pipeline(reranker)([(row["query"], row["document"]) for row in rows])
    gains, firsts = [], []
    for query in {row["query_id"] for row in rows}:
        some = [i for i, row in enumerate(rows) if row["query_id"] == query]
        truth = np.array([[float(rows[i]["relevance"]) for i in some]])
        scores = np.array([[answers[i]["score"] for i in some]])
        gains.append(ndcg_score(truth, scores, k=10))
        order = truth[0][np.argsort(-scores[0])]
        firsts.append(next((1 / rank for rank, one in enumerate(order, 1) if one > 0), 0.0))
    assert metrics["pruned"]["ndcg"] == pytest.approx(np.mean(gains))
    assert metrics["pruned"]["mrr"] == pytest.approx(np.mean(firsts))


def test_evaluations_know_the_groups_of_the_run(reranker: Path, cross_encoder: str, data: str) -> None:
    report = json.loads((reranker / "report.json").read_text())["metrics"]
    gates = ("--min", "ndcg=0.9999999", "--max-drop", "mrr=0.9")
    done = invoke("eval", str(reranker), "--baseline", cross_encoder, *gates, "--threads", "1", "-q", "--json")
    found = json.loads(done.stdout)
    assert found["metrics"]["ndcg"] == report["pruned"]["ndcg"]
    assert found["baseline"]["metrics"]["ndcg"] == report["dense"]["ndcg"]
    assert [gate["metric"] for gate in found["gates"]] == ["ndcg", "drop of mrr"]
    assert found["gates"][0]["passed"] == (report["pruned"]["ndcg"] >= 0.9999999)
    stored = capcli.evaluate(model=str(reranker), baseline=str(reranker / "report.json"), threads=1)
    assert stored["differences"]["ndcg"]["value"] == 0
    plain = {name: value for name, value in OPTIONS.items() if name != "group_column"}
    numbers = capcli.evaluate(model=cross_encoder, data=data, threads=1, **plain)
    assert list(numbers["metrics"]) == ["pearson", "spearman"]


def test_queries_stay_whole_in_subsets(data: str) -> None:
    chosen = {"data": str(Path(data) / "train.csv"), **OPTIONS}
    found = dataset.load(TaskConfig(**chosen), holdout=0.3, seed=2)
    assert found.train is not None
    assert found.train.groups is not None
    held = next(iter(found.evals.values()))
    assert held.groups is not None
    assert not {*held.groups.tolist()} & {*found.train.groups.tolist()}
    assert (len(held), len(found.train), held.n_measured) == (24, 56, 6)
    few = dataset.load(TaskConfig(**{**chosen, "max_eval_samples": 10}), holdout=0.3, seed=2)
    assert len(next(iter(few.evals.values()))) == 8
    one = dataset.load(TaskConfig(**{**chosen, "max_eval_samples": 1}), holdout=0.3, seed=2)
    assert len(next(iter(one.evals.values()))) == 4, "the first query is there as a whole"


ROWS = [("a", "b", "1", "1"), ("a", "c", "1", "0"), ("d", "e", "2", "0"), ("d", "f", "2", "0"), ("g", "h", "3", "2")]


def load(folder: Path, rows: list[tuple[str, ...]], **chosen: str) -> tuple[str, ...]:
    """The notes on an evaluation of these rows."""
    write_csv(folder / "validation.csv", COLUMNS, rows)
    return dataset.load(TaskConfig(data=str(folder), **{**OPTIONS, **chosen}), train=False).notes


def test_queries_that_tell_nothing_are_counted(tmp_path: Path) -> None:
    notes = load(tmp_path, ROWS)
    assert "validation: 1 of 3 queries have a single row, which any model ranks right" in notes
    assert "validation: 1 of 3 queries have no relevant row, so that every model scores 0" in notes


@pytest.mark.parametrize(
    ("rows", "chosen", "said"),
    [
        (ROWS, {"group_column": "topic"}, "the validation split has no group column 'topic'; its columns: 'query'"),
        (ROWS[:1] + ROWS[-1:], {}, "each value of column 'query_id' is in one row of the validation split"),
        (
            [*ROWS, ("a", "x", "1", "-1")],
            {},
            "row 5 of column 'relevance' of the validation split holds the relevance -1",
        ),
        ([*ROWS, ("a", "x", "", "1")], {}, "row 5 of column 'query_id' of the validation split is missing"),
        (ROWS, {"task": "text-pair-classification"}, "--group-column ranks by a number for each row"),
    ],
)
def test_what_cannot_be_ranked(tmp_path: Path, rows: list[tuple[str, ...]], chosen: dict[str, str], said: str) -> None:
    with pytest.raises(CapError, match=re.escape(said)):
        load(tmp_path, rows, **chosen)
