"""`cap predict`: what is written for texts of every kind, where, and what happens when something is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tiny import Made, Tiny, environment, invoke

import capcli
from capcli import files
from capcli.data.incoming import CHUNK
from capcli.errors import ConfigError

TEXTS = ["a bad film", "the story was very good", "great"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def predicted(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run `cap predict` to stdout."""
    done = invoke("predict", str(folder), *arguments, "--threads", "1", "-q")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def refused(code: int, *arguments: str) -> str:
    """Run `cap predict`, expect this exit code, one line of error and nothing on stdout; returns the message."""
    done = invoke("predict", *arguments, "-q")
    assert done.exit_code == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    return str(done.stderr).removeprefix("error: ").splitlines()[0]


def text_file(path: Path, texts: list[str]) -> str:
    path.write_text("".join(f"{text}\n" for text in texts))
    return str(path)


# What is written -----------------------------------------------------------------------------------------------------


def test_the_answers_are_those_that_were_measured(asked: Made, tiny: Tiny, tmp_path: Path) -> None:
    """Over the evaluation set they give the accuracy of the report, in the order of the rows."""
    out = tmp_path / "out.jsonl"
    data = Path(tiny.data) / "validation.csv"
    done = invoke("predict", str(asked("classification")), str(data), "-o", str(out), "--threads", "1", "--json")
    assert done.exit_code == 0, done.stderr
    rows, labels = lines(out), [line.split(",") for line in data.read_text().splitlines()[1:]]
    assert [row["text"] for row in rows] == [text for text, _ in labels]
    right = sum(row["label"] == label for row, (_, label) in zip(rows, labels, strict=True))
    report = json.loads((asked("classification") / "report.json").read_text())
    assert right / len(rows) == pytest.approx(report["metrics"]["pruned"]["accuracy"])
    found = json.loads(done.stdout)
    assert (found["n_texts"], found["kind"], found["labels"]) == (48, "classification", ["negative", "positive"])
    assert (found["max_length"], found["runtime"]["name"], found["notes"]) == (16, "torch", [])
    assert found["out"] == "…/out.jsonl", "no path of this machine"


def test_a_row_of_each_kind(asked: Made, tmp_path: Path) -> None:
    """The same values as those of the pipeline, with six digits."""
    file = text_file(tmp_path / "t.txt", TEXTS)
    for kind, name in (("regression", ""), ("multilabel", "labels"), ("tokens", "entities"), ("classification", "")):
        answers = capcli.pipeline(asked(kind), threads=1)(TEXTS)
        for text, row, answer in zip(TEXTS, predicted(asked(kind), file), answers, strict=True):
            assert row.pop("text") == text
            shown = row[name] if name else row
            for one, two in zip(*(part if name else [part] for part in (shown, answer)), strict=True):
                assert one == pytest.approx(two, rel=1e-5) if "score" not in one else one.keys() == two.keys()
                assert one["score"] == pytest.approx(two["score"], rel=1e-5)
    (row, *_) = predicted(asked("classification"), file, "--top-k", "2")
    assert list(row) == ["text", "label", "score", "top_k"]
    assert row["top_k"][0] == {"label": row["label"], "score": row["score"]}
    assert [one["label"] for one in row["top_k"]] == ["negative", "positive"]


def test_pairs_and_questions_by_the_usual_columns(asked: Made, tmp_path: Path, tiny: Tiny) -> None:
    (row, *rest) = predicted(asked("pairs"), str(Path(tiny.pairs) / "validation.csv"))
    assert list(row) == ["text", "pair", "label", "score"]
    assert len(rest) == 47
    questions = tmp_path / "q.parquet"
    table = {"q": ["is the film good"] * 2, "context": ["the great film", "film bad"], "question": ["x", "y"]}
    pyarrow.parquet.write_table(pyarrow.table(table), questions)
    found = predicted(asked("spans"), str(questions), "--text-column", "q")
    assert [list(row) for row in found] == [["question", "answer", "score", "start", "end"]] * 2
    assert found[0]["question"] == "is the film good"
    tabbed = text_file(tmp_path / "t.txt", ["a good film\tgreat", "bad\tgood"])
    answers = capcli.pipeline(asked("pairs"), threads=1)([("a good film", "great"), ("bad", "good")])
    assert [row["label"] for row in predicted(asked("pairs"), tabbed)] == [one["label"] for one in answers]


def test_words_that_are_lists(asked: Made, tiny: Tiny) -> None:
    rows = predicted(asked("tokens"), str(Path(tiny.tags) / "validation.jsonl"))
    source = [json.loads(line) for line in (Path(tiny.tags) / "validation.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [" ".join(one["tokens"]) for one in source]
    assert all(row["text"][one["start"] : one["end"]] == one["word"] for row in rows for one in row["entities"])


def test_the_only_column_needs_no_name(asked: Made, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("review\na bad film\ngreat\n")
    assert [row["label"] for row in predicted(asked("classification"), str(tmp_path / "t.csv"))] == [
        "negative",
        "positive",
    ]


@pytest.mark.parametrize("to", ["dense", "sparse", "sliced", "onnx"])
def test_every_export_answers(asked: Made, tmp_path: Path, to: str) -> None:
    file = text_file(tmp_path / "t.txt", TEXTS)
    assert [row["label"] for row in predicted(asked("classification", to), file)] == [
        "negative",
        "positive",
        "positive",
    ]


def test_long_texts_are_noted(asked: Made, tmp_path: Path) -> None:
    file = text_file(tmp_path / "t.txt", ["good " * 30, "bad"])
    done = invoke("predict", str(asked("classification")), file, "-o", str(tmp_path / "o.jsonl"), "--threads", "1")
    note = "longer than 16 tokens, so their ends were truncated: 1 of 2 texts of the input"
    assert note in done.stderr and note in done.stdout


def test_letters_of_every_language_are_ascii(asked: Made, tmp_path: Path) -> None:
    """JSON escapes, so that nothing acts on a terminal or in a log of GitHub."""
    texts = ["né ☃ \u202e \x9b2J", "##[command] good"]
    file = text_file(tmp_path / "t.txt", texts)
    done = invoke("predict", str(asked("classification")), file, "-q")
    assert done.stdout.isascii() and "##[" not in done.stdout
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == texts


# Where it goes -------------------------------------------------------------------------------------------------------


def cap(*arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "capcli", "predict", *arguments, "--threads", "1"]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, **options)


def test_what_came_before_a_wrong_line_of_a_pipe_is_answered(asked: Made) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "capcli", "predict", str(asked("classification")), "-", "-q"],
        input=b"a good film\n\nbad\n", env=environment(), capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and b"line 2 of stdin has no text" in done.stderr
    (row,) = map(json.loads, done.stdout.splitlines())
    assert row["text"] == "a good film"


def test_a_pipe_is_answered_line_by_line(asked: Made) -> None:
    """The next line is only sent when the answer to the last has come; then the pipe is closed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with cap(str(asked("classification")), "-", **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        for text, label in (("a bad film", "negative"), ("great", "positive")):
            process.stdin.write(f"{text}\n".encode())
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["label"] == label
        process.stdin.close()
        assert process.stdout.read() == b""
        assert process.wait(60) == 0


def test_a_reader_that_has_gone_ends_it_quietly(asked: Made, tmp_path: Path) -> None:
    file = text_file(tmp_path / "t.txt", ["a bad film"] * (30 * CHUNK))
    with cap(str(asked("classification")), file, "-q", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert json.loads(process.stdout.readline())["label"] == "negative"
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_file", [True, False])
def test_a_signal_leaves_nothing_half_written(asked: Made, tmp_path: Path, number: int, to_file: bool) -> None:
    """Also while it waits for a line that never comes."""
    out = tmp_path / "out.jsonl"
    arguments = ["-o", str(out)] if to_file else []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with cap(str(asked("classification")), "-", *arguments, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(b"a bad film\n")
        process.stdin.flush()
        if to_file:
            wait_for(lambda: any(path.name.startswith(".out.jsonl.") for path in tmp_path.iterdir()))
        else:
            process.stdout.readline()
        process.send_signal(number)
        assert process.wait(60) == 75
        kept = "nothing was written" if to_file else "the answers so far were written"
        assert f"error: stopped by {signal.Signals(number).name}; {kept}" in process.stderr.read().decode()
    assert list(tmp_path.iterdir()) == []


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        os.sched_yield()


def test_a_fault_in_the_middle_leaves_the_old_file(
    asked: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o" / "out.jsonl"
    out.parent.mkdir()
    out.write_text("old")
    arguments = [str(asked("classification")), text_file(tmp_path / "t.txt", TEXTS), "-o", str(out)]

    def full(operation: str, path: Path) -> None:
        if operation == "sync" and path == out:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "fault_hook", full)
    assert refused(3, *arguments) == f"cannot write {out}: no space left"
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]
    assert out.read_text() == "old"
    monkeypatch.setattr(files, "fault_hook", None)
    assert invoke("predict", *arguments).exit_code == 0
    assert len(lines(out)) == 3


# What is refused -----------------------------------------------------------------------------------------------------


def test_a_row_without_text_is_refused_before_anything_is_computed(asked: Made, tmp_path: Path) -> None:
    file, model = tmp_path / "t.txt", str(asked("classification"))
    text_file(file, [*["good"] * (2 * CHUNK), " ", "bad"])
    assert refused(2, model, str(file)) == f"line {2 * CHUNK + 1} of {file} has no text"
    rows = tmp_path / "t.jsonl"
    rows.write_text('{"text": "a"}\n{"text": null}\n')
    assert refused(2, model, str(rows)) == f"row 1 of {rows} has no text"
    rows.write_text('{"text": "a"}\n{"text": 7}\n')
    assert refused(2, model, str(rows)) == f"row 1 of {rows} is of type int, not text"


def test_columns_that_are_not_there(asked: Made, tmp_path: Path) -> None:
    file, model = tmp_path / "t.csv", str(asked("classification"))
    file.write_text("txt,label\na,b\n")
    assert refused(2, model, str(file)) == f"{file} has no text column 'text'; its columns: 'txt', 'label'"
    assert "no text column 'nope'" in refused(2, model, str(file), "--text-column", "nope")
    assert refused(2, model, str(file), "--pair-column", "label") == f"{model} reads a single text"
    file.write_text("text\na\n")
    assert refused(2, str(asked("pairs")), str(file)) == f"{file} has no pair column 'pair'; its columns: 'text'"
    twice = ("--text-column", "text", "--pair-column", "text")
    assert refused(2, str(asked("pairs")), str(file), *twice) == f"column 'text' of {file} is named for two purposes"
    plain = text_file(tmp_path / "t.txt", ["a"])
    assert refused(2, model, plain, "--text-column", "a") == f"{plain} has lines of text, without columns"
    assert (
        refused(2, str(asked("pairs")), plain) == f"line 1 of {plain} has 0 tabs, where 2 texts need one between them"
    )


def test_files_that_cannot_be_written(asked: Made, tmp_path: Path) -> None:
    model, file = str(asked("classification")), text_file(tmp_path / "t.txt", TEXTS)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "other.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n')
    for out, message in (
        ("out.csv", "JSON lines are written, not .csv"),
        ("link.jsonl", "is a link, and nothing is written through one"),
        ("folder.jsonl", "is not a file"),
    ):
        assert message in refused(2, model, file, "-o", str(tmp_path / out))
    assert refused(2, model, str(source), "-o", str(source)) == f"-o {source} is the file that is read"
    assert refused(2, model, file, "-o", str(Path(file) / "o.jsonl")).startswith("cannot write to ")
    assert source.read_text() == '{"text": "a"}\n'


def test_options_that_mean_nothing(asked: Made, tmp_path: Path) -> None:
    file = text_file(tmp_path / "t.txt", TEXTS)
    assert "top-k is for models that choose among labels" in refused(2, str(asked("regression")), file, "--top-k", "2")
    model = str(asked("classification"))
    assert refused(2, model, file, "--max-length", "4") == "--max-length must be at least 8, got 4"
    assert refused(2, model, file, "--batch-size", "-1") == "--batch-size must be at least 0, got -1"
    assert refused(2, model, file, "--runtime", "fast") == "unknown runtime 'fast'"
    assert refused(2, str(tmp_path / "nowhere"), file)
    with pytest.raises(ConfigError, match=r"^no file to write the answers to$"):
        capcli.predict(capcli.PredictConfig(model=model, file=file))


def test_python_writes_a_file(asked: Made, tmp_path: Path) -> None:
    file, out = text_file(tmp_path / "t.txt", TEXTS), tmp_path / "out.jsonl"
    found = capcli.predict(capcli.PredictConfig(model=str(asked("classification")), file=file, out=str(out)))
    assert found["n_texts"] == 3 and [row["label"] for row in lines(out)] == ["negative", "positive", "positive"]
