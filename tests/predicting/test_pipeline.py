"""Answers of every kind: those of an evaluation, in each runtime, with the scores of the definition."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Made, Tiny, one_answer, one_tagged

import capcli
from capcli.errors import ConfigError, DataError, FileError, ModelError, RunFailed
from capcli.predicting.pipeline import CHUNK

TEXTS = ["a bad film", "the story was very good and bright", "great"]


def logits_of(folder: Path, *texts: Any) -> Any:
    """Logits of transformers, one input at a time, without our batches."""
    net, tokenizer = capcli.load(folder), capcli.load_tokenizer(folder)
    with torch.inference_mode():
        return net(**tokenizer(*texts, return_tensors="pt"))


def test_classes_have_probabilities(asked: Made) -> None:
    ask = capcli.pipeline(asked("classification"), threads=1)
    found = ask(TEXTS)
    for text, answer in zip(TEXTS, found, strict=True):
        expected = logits_of(asked("classification"), text).logits[0].softmax(-1)
        assert answer["label"] == ("negative", "positive")[int(expected.argmax())]
        assert answer["score"] == pytest.approx(float(expected.max()), abs=1e-5)
    assert [one["label"] for one in found] == ["negative", "positive", "positive"]
    assert ask(TEXTS[0]) == pytest.approx(found[0], abs=1e-6)
    ranked = ask(TEXTS[0], top_k=2)
    assert [one["label"] for one in ranked] == ["negative", "positive"]
    assert sum(one["score"] for one in ranked) == pytest.approx(1)
    assert ask(TEXTS, top_k=1) == [[one] for one in found]
    assert ask([]) == []
    assert ask(iter(TEXTS)) == found


def test_order_stays_over_chunks_and_batches(asked: Made) -> None:
    """Texts of many lengths, sorted in their chunk, each with the answer that it gets alone."""
    rng = random.Random(1)
    words = ["good", "bad", "film", "the", "story"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(CHUNK + 40)]
    ask = capcli.pipeline(asked("classification"), threads=1)
    found = ask(texts)
    assert len(found) == len(texts)
    for index in (0, 7, CHUNK - 1, CHUNK, CHUNK + 39):
        assert found[index] == pytest.approx(ask(texts[index]), abs=1e-5)
    small = ask(texts[:40], batch_size=3)
    assert [one["label"] for one in small] == [one["label"] for one in found[:40]]


def test_pairs_are_read_as_pairs(asked: Made) -> None:
    ask = capcli.pipeline(asked("pairs"), threads=1)
    found = ask(("a good film", "great"))
    expected = logits_of(asked("pairs"), "a good film", "great").logits[0].softmax(-1)
    assert found["score"] == pytest.approx(float(expected.max()), abs=1e-5)
    assert ask({"text": "a good film", "text_pair": "great"}) == found
    assert ask([("a good film", "great"), ["bad", "good"]])[0] == pytest.approx(found, abs=1e-5)
    with pytest.raises(DataError, match=r"^input 1 is one text: the model reads two$"):
        ask([("a", "b"), "c"])


def test_numbers_are_those_of_the_network(asked: Made) -> None:
    found = capcli.pipeline(asked("regression"), threads=1)(TEXTS)
    for text, answer in zip(TEXTS, found, strict=True):
        assert answer == {"score": pytest.approx(float(logits_of(asked("regression"), text).logits), abs=1e-5)}


def test_several_labels_are_those_above_one_half(asked: Made) -> None:
    folder = asked("multilabel")
    ask, names = capcli.pipeline(folder, threads=1), json.loads((folder / "cap_config.json").read_text())["labels"]
    texts = ["the film", "good bad", "very great plot"]
    for text, answer, ranked in zip(texts, ask(texts), ask(texts, top_k=2), strict=True):
        scores = dict(zip(names, logits_of(folder, text).logits[0].sigmoid().tolist(), strict=True))
        assert {one["label"]: one["score"] for one in ranked} == pytest.approx(scores, abs=1e-5)
        assert [one["score"] for one in ranked] == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-5)
        assert {one["label"] for one in answer} == {name for name, score in scores.items() if score > 0.5}


def test_entities_have_places(asked: Made) -> None:
    """Of words that are given the tags are those of an evaluation; of a text punctuation is apart."""
    folder = asked("tokens")
    ask = capcli.pipeline(folder, threads=1)
    text = "The film was bad, dull. A great actor"
    found = ask(text)
    assert all(text[one["start"] : one["end"]] == one["word"] for one in found)
    assert [(one["entity_group"], one["word"]) for one in found if one["word"] == "great"] == [("positive", "great")]
    labels = json.loads((folder / "cap_config.json").read_text())["labels"]
    rows = [one_tagged(random.Random(seed)) for seed in range(20)]
    for row, answer in zip(rows, ask([row["tokens"] for row in rows]), strict=True):
        scores = logits_of(folder, " ".join(row["tokens"])).logits[0, 1:-1].softmax(-1)
        assert len(scores) == len(row["tokens"]), "each word is one token"
        tags = [labels[i] for i in scores.argmax(-1)]
        spoken = {word for one in answer for word in one["word"].split()}
        assert spoken == {word for word, tag in zip(row["tokens"], tags, strict=True) if tag != "O"}
        if answer:
            first = row["tokens"].index(answer[0]["word"].split()[0])
            n = len(answer[0]["word"].split())
            mean = float(scores.max(-1).values[first : first + n].mean())
            assert answer[0]["score"] == pytest.approx(mean, abs=1e-5)


def test_words_that_are_no_entities_each_have_a_label(tiny: Tiny, tmp_path: Path) -> None:
    data = tmp_path / "tags"
    data.mkdir()
    for split in ("train", "validation"):
        text = (Path(tiny.tags) / f"{split}.jsonl").read_text()
        (data / f"{split}.jsonl").write_text(text.replace('"O"', '"rest"').replace("B-", "").replace("I-", ""))
    tiny.prune(tmp_path / "out", task="token-classification", data=str(data), epochs=1, teacher_epochs=1)
    ask = capcli.pipeline(tmp_path / "out", threads=1)
    (found,) = ask([["the", "film", "was", "good"]])
    assert [(one["word"], one["start"], one["end"]) for one in found] == [
        ("the", 0, 3), ("film", 4, 8), ("was", 9, 12), ("good", 13, 17),
    ]  # fmt: skip
    assert {one["entity"] for one in found} <= {"rest", "negative", "positive"}
    cut = ask("the film " * 20)
    assert len(cut) == 14, "16 tokens, two of them special: what was truncated has no label"


def test_questions_are_answered_as_in_an_evaluation(asked: Made, tiny: Tiny) -> None:
    folder = asked("spans")
    rows = [json.loads(line) for line in (Path(tiny.answers) / "validation.jsonl").read_text().splitlines()]
    ask = capcli.pipeline(folder, threads=1)
    found = ask([{"question": row["question"], "context": row["context"]} for row in rows])
    for row, answer in zip(rows, found, strict=True):
        assert row["context"][answer["start"] : answer["end"]] == answer["answer"]
        assert 0 < answer["score"] <= 1
    right = [answer["answer"] in (row["answers"]["text"] or [""]) for row, answer in zip(rows, found, strict=True)]
    report = json.loads((folder / "report.json").read_text())
    assert 100 * np.mean(right) == pytest.approx(100 * report["metrics"]["pruned"]["exact_match"])
    assert ask.no_answer, "the data have questions without an answer"


def test_a_long_context_is_read_in_windows(asked: Made) -> None:
    ask = capcli.pipeline(asked("spans"), threads=1)
    context = "the film was quite long " * 30 + "great"
    answer = ask(("is the film good", context))
    assert context[answer["start"] : answer["end"]] == answer["answer"]
    found = ask([("is the film good", context), ("is the film good", "great film")])
    assert found[0] == pytest.approx(answer, abs=1e-5) and len(found) == 2


@pytest.mark.parametrize("kind", ["classification", "tokens", "spans"])
@pytest.mark.parametrize(("to", "runtime"), [("", "sparse"), ("", "auto"), ("dense", ""), ("sliced", ""), ("onnx", "")])
def test_every_runtime_gives_the_same_answers(asked: Made, kind: str, to: str, runtime: str) -> None:
    inputs: Any = TEXTS
    if kind == "spans":
        rows = [one_answer(random.Random(seed), seed) for seed in range(6)]
        inputs = [(row["question"], row["context"]) for row in rows]
    ours = capcli.pipeline(asked(kind), threads=1)(inputs)
    other = capcli.pipeline(asked(kind, to), runtime=runtime, threads=1)
    found = other(inputs)
    assert other.model.runtime == (
        "onnx" if to == "onnx" else other.model.runtime if runtime == "auto" else runtime or "torch"
    )
    for one, two in zip(flat(ours), flat(found), strict=True):
        assert one.keys() == two.keys()
        assert {k: v for k, v in one.items() if k != "score"} == {k: v for k, v in two.items() if k != "score"}
        assert one["score"] == pytest.approx(two["score"], abs=1e-3)


def flat(answers: list[Any]) -> list[dict[str, Any]]:
    return [one for answer in answers for one in (answer if isinstance(answer, list) else [answer])]


def test_long_texts_are_truncated_as_in_the_run(asked: Made) -> None:
    """The run read 16 tokens: what is behind them does not change an answer."""
    ask = capcli.pipeline(asked("classification"), threads=1)
    assert ask.length == 16
    begin = "good " * 14
    assert ask(begin + "bad " * 9) == pytest.approx(ask(begin))
    whole = capcli.pipeline(asked("classification"), threads=1, max_length=40)
    assert whole.length == 40
    assert whole(begin + "bad " * 9)["score"] != pytest.approx(ask(begin)["score"], abs=1e-6)


def test_a_model_that_capcli_did_not_write_says_what_it_is_for(checkpoint: Any) -> None:
    ask = capcli.pipeline(checkpoint("bert"))
    assert (ask.kind, ask.paired, ask.length) == ("classification", None, 66)
    one, two = ask(["a film", "a longer text about a film"]), ask([("a", "b")])
    assert {answer["label"] for answer in (*one, *two)} <= {"negative", "positive"}


def test_what_is_refused(asked: Made, tiny: Tiny, tmp_path: Path) -> None:
    ask = capcli.pipeline(asked("classification"), threads=1)
    with pytest.raises(DataError, match=r"^input 1 has no text$"):
        ask(["a", ""])
    with pytest.raises(ConfigError, match=r"^--top-k must be at least 0"):
        ask("a", top_k=-1)
    with pytest.raises(ConfigError, match=r"^top-k is for models that choose among labels; .* gives regression$"):
        capcli.pipeline(asked("regression"))("a", top_k=2)
    masked = shutil.copytree(tiny.model, tmp_path / "masked")
    config = json.loads((masked / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (masked / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"names no network for a task: 'BertForMaskedLM'$"):
        capcli.pipeline(masked)
    with pytest.raises(ConfigError, match=r"^unknown runtime 'fast'$"):
        capcli.pipeline(asked("classification"), runtime="fast")
    (tmp_path / "export.json").write_text(json.dumps({"settings": {"kind": "poems"}}))
    with pytest.raises((ModelError, FileError), match="poems"):
        capcli.pipeline(tmp_path)


def test_logits_that_are_not_finite_are_no_answer(asked: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = capcli.pipeline(asked("classification"), threads=1)
    net = ask.model.model.net  # type: ignore[union-attr]
    row = capcli.load_tokenizer(asked("classification")).convert_tokens_to_ids("great")
    with torch.no_grad():
        net.get_input_embeddings().weight[row] = math.nan
    assert ask("a bad film")["label"] == "negative"
    with pytest.raises(RunFailed, match=r"^the logits of input 2 are not finite$"):
        ask(["a bad film", "a film", "a great film"])
