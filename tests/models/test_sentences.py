"""How the folders of sentence-transformers are read and written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Tiny, write_model

from capcli.errors import ModelError
from capcli.models import loading, sentences, stock
from capcli.models.sentences import FLAGS, POOLINGS, Embedding

STATES = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
LATER = "sentence_transformers.sentence_transformer.modules."


def slow(pooling: str, states: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """One text: for each dimension, over its real tokens."""
    real = [row.tolist() for row, one in zip(states, mask, strict=True) if one]
    columns = list(zip(*real, strict=True))
    pick = {"cls": lambda c: c[0], "lasttoken": lambda c: c[-1], "max": max, "mean": lambda c: sum(c) / len(c)}
    return [pick[pooling](column) for column in columns]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("normalize", [False, True])
def test_poolings_against_a_slow_loop(pooling: str, normalize: bool) -> None:
    found = Embedding(pooling=pooling, normalize=normalize)(STATES, MASK)
    for row, states, mask in zip(found.tolist(), STATES, MASK, strict=True):
        expected = slow(pooling, states, mask)
        length = math.sqrt(sum(x * x for x in expected)) if normalize else 1
        assert row == pytest.approx([x / length for x in expected], rel=1e-5)


def folder(root: Path, pooling: Any, modules: tuple[str, ...] = ("Transformer", "Pooling", "Normalize")) -> Path:
    """A model with the files that later versions write beside it."""
    root.mkdir(exist_ok=True)
    write_model(root)
    places = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
    table = [{"idx": i, "name": str(i), "path": places[n], "type": LATER + n} for i, n in enumerate(modules)]
    (root / "modules.json").write_text(json.dumps(table))
    (root / "1_Pooling").mkdir(exist_ok=True)
    (root / "1_Pooling" / "config.json").write_text(json.dumps({"embedding_dimension": 32, **pooling}))
    (root / "sentence_bert_config.json").write_text('{"max_seq_length": 24, "do_lower_case": false}')
    (root / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "q: "}, "similarity_fn_name": "dot"}'
    )
    return root


@pytest.mark.parametrize(
    ("stated", "pooling"),
    [
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["max"]}, "max"),
        ({FLAGS["mean"]: False, FLAGS["lasttoken"]: True}, "lasttoken"),
        ({}, "mean"),
    ],
)
def test_the_round_trip_keeps_what_the_folder_says(tmp_path: Path, stated: dict[str, Any], pooling: str) -> None:
    model = loading.load_dense(str(folder(tmp_path / "in", stated)), None, "embedding", 1, need_head=True)
    found = model.embedding
    assert found is not None
    assert (found.pooling, found.normalize, found.longest) == (pooling, True, 24)
    (tmp_path / "out").mkdir()
    stock.save_dense(model, tmp_path / "out")
    assert sentences.read(tmp_path / "out", "out") == found
    assert sentences.recorded(json.loads(json.dumps(sentences.record(found))), "it") == found
    written = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
    assert [name for name, flag in FLAGS.items() if written[flag]] == [pooling]
    assert written["word_embedding_dimension"] == 32
    assert json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())["prompts"] == {
        "query": "q: "
    }
    assert [path.name for path in sentences.paths(tmp_path / "out")] == [
        "modules.json",
        "config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    ]


def test_a_plain_encoder_is_pooled_by_the_mean(tiny: Tiny, tmp_path: Path) -> None:
    model = loading.load_dense(tiny.model, None, "embedding", 1)
    assert model.embedding == Embedding()
    stock.save_dense(model, tmp_path)
    table = json.loads((tmp_path / "modules.json").read_text())
    assert [(one["path"], one["type"]) for one in table] == [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
    ]
    assert json.loads((tmp_path / "sentence_bert_config.json").read_text()) == {
        "max_seq_length": 64,
        "do_lower_case": False,
    }


def test_an_older_folder_has_its_network_in_one_below(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", {"pooling_mode": "max"})
    (root / "0_Transformer").mkdir()
    for path in root.iterdir():
        if path.is_file() and path.name != "modules.json":
            path.rename(root / "0_Transformer" / path.name)
    table = json.loads((root / "modules.json").read_text())
    table[0]["path"] = "0_Transformer"
    (root / "modules.json").write_text(json.dumps(table))
    with pytest.raises(ModelError, match=r"has no config\.json") as refused:
        loading.load_dense(str(root), None, "embedding", 1)
    assert "0_Transformer" in refused.value.hint
    model = loading.load_dense(str(root / "0_Transformer"), None, "embedding", 1)
    assert model.embedding is not None
    assert (model.embedding.pooling, model.embedding.longest) == ("max", 24)


@pytest.mark.parametrize(
    ("stated", "what"),
    [
        ({"pooling_mode": "weightedmean"}, "pools by weightedmean; capcli reads mean, cls, max, lasttoken"),
        ({"pooling_mode": ["cls", "mean"]}, "pools by cls, mean"),
        ({FLAGS["mean"]: True, FLAGS["max"]: True}, "pools by mean, max"),
        ({"pooling_mode": "\x1b[31m"}, "pools by "),
    ],
)
def test_another_pooling_is_refused(tmp_path: Path, stated: dict[str, Any], what: str) -> None:
    with pytest.raises(ModelError) as refused:
        loading.load_dense(str(folder(tmp_path / "in", stated)), None, "embedding", 1)
    assert what in refused.value.message


def test_another_module_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", {}, ("Transformer", "Pooling", "Dense"))
    with pytest.raises(ModelError) as refused:
        loading.load_dense(str(root), None, "embedding", 1)
    assert "the modules of" in refused.value.message
    assert "are Transformer, Pooling, Dense; capcli reads" in refused.value.message


@pytest.mark.parametrize("path", ["../other", "/etc", "..", "a/b", 3, None])
def test_a_module_outside_of_the_folder_is_refused(tmp_path: Path, path: Any) -> None:
    root = folder(tmp_path / "in", {})
    table = json.loads((root / "modules.json").read_text())
    table[1]["path"] = path
    (root / "modules.json").write_text(json.dumps(table))
    with pytest.raises(ModelError, match="expected the name of a folder in path"):
        loading.load_dense(str(root), None, "embedding", 1)


def test_what_is_done_to_texts_before_is_said(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", {})
    (root / "config_sentence_transformers.json").write_text('{"default_prompt_name": "query"}')
    (root / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    notes = loading.load_dense(str(root), None, "embedding", 1).notes
    assert any("'query' before each text" in note for note in notes)
    assert any("lower case" in note for note in notes)
