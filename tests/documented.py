"""What pages of the documentation presuppose: files, models and runs, made small, and a hub that has the rest.

The pages speak of `mini`, `bert-base`, `runs/mnli`, `reviews.csv`. All models here are one small network with the
tokenizer of `mini`; all data are the sentences of `tiny`. Commands run as they are printed, followed by options that
make them small.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hub_server
import tiny
from tiny import ROOT, one_answer, one_number, one_pair, one_text, write_csv

# Options behind those of the page; of an option that is there twice the last counts.
LIMITS = {
    "prune": "--max-train-samples 64 --max-eval-samples 32 --max-length 16 --batch-size 16 --lr 5e-3 --teacher-lr 5e-3 "
    "--calibration 32 --threads 1",
    "eval": "--max-eval-samples 32 --threads 1",
    "export": "--max-eval-samples 32 --samples 8 --threads 1",
    "predict": "--threads 1",
    "probe": "--max-train-samples 60 --max-eval-samples 24 --seeds 1 --max-length 16 --threads 1",
}
TRAINING = "--epochs 4 --teacher-epochs 4"
UNTRAINED = {"minutes", "wanda", "sparsegpt", "multiflow", "sds"}  # presets and methods without epochs
SWEEP = "--sparsity 0.5,0.9 --seeds 1"  # each run is a process
# A `cap`, or a worker of a sweep, in a process of its own whose `mini` is the small network.
PROCESS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import pathlib
from capcli.sources import hub
hub.BUILTIN_FOLDER = pathlib.Path({mini!r})
"""
CLI = "import documented\nsys.argv[1:] = documented.limited(sys.argv[1:])\n"


def limited(arguments: Sequence[str]) -> list[str]:
    """The arguments of a `cap`, and behind them those that make it small."""
    command, *given = arguments
    if "--compare" in given:  # measures nothing
        return list(arguments)
    added = [LIMITS.get(command, "")]
    if command == "prune":
        added += [] if UNTRAINED & {*given} else [TRAINING]
        added += [SWEEP] if "--seeds" in given else []
    return [*arguments, *" ".join(added).split()]


def process(mini: str, rest: str) -> str:
    """Code for a Python process that sees the small network as `mini`."""
    return PROCESS.format(root=str(ROOT), tests=str(ROOT / "tests"), mini=mini) + rest


# Data ----------------------------------------------------------------------------------------------------------------

SPLITS = (("train", 64), ("validation", 32))
Rows = list[tuple[str, ...]]


def some(make: Callable[[random.Random], tuple[str, ...]], n: int, seed: int = 3) -> Rows:
    rng = random.Random(seed)
    return [make(rng) for _ in range(n)]


def review(rng: random.Random) -> tuple[str, ...]:
    text, label = one_text(rng)
    return text, label, text, "good" if label == "positive" else "bad"


def entailed(rng: random.Random) -> tuple[str, ...]:
    """Premise, hypothesis, and a class that the hypothesis tells."""
    label = rng.choice(("entailment", "neutral", "contradiction"))
    return one_text(rng)[0], {"entailment": "good", "neutral": "the film", "contradiction": "bad"}[label], label


def coded(rng: random.Random) -> tuple[str, ...]:
    text, label = one_text(rng)
    return text, str(int(label == "positive"))


def scored(rng: random.Random) -> tuple[str, ...]:
    (text, score), (other, _) = one_number(rng), one_text(rng)
    return text, other, score


def topical(rng: random.Random) -> tuple[str, ...]:
    row = tiny.one_topic(rng)
    return row["text"], *(str(int(label in row["labels"])) for label in tiny.WORDS)


def paired(rng: random.Random) -> tuple[str, ...]:
    first, second, label = one_pair(rng)
    return first, second, str(int(label == "same"))


def split_files(folder: Path, header: tuple[str, ...], make: Callable[[random.Random], tuple[str, ...]]) -> None:
    for seed, (split, n) in enumerate(SPLITS):
        write_csv(folder / f"{split}.csv", header, some(make, n, seed))


REVIEW = ("text", "label", "body", "stars")


def write_pairs(path: Path) -> None:
    split_files(path, ("a", "b", "label"), one_pair)


def write_mnli(path: Path) -> None:
    """The tsv files that GLUE itself distributes."""
    path.mkdir(parents=True)
    for seed, (split, n) in enumerate((("train", 64), ("dev_matched", 16), ("dev_mismatched", 16))):
        rows = [("sentence1", "sentence2", "gold_label"), *some(entailed, n, seed)]
        (path / f"{split}.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))


def write_squad(path: Path) -> None:
    path.mkdir(parents=True)
    rng = random.Random(3)
    for name, n in (("train-v1.1", 32), ("dev-v1.1", 16)):
        articles = []
        for i in range(n):
            row = one_answer(rng, 5 * i + 1)
            text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
            question = {"id": str(i), "question": row["question"], "answers": [{"text": text, "answer_start": start}]}
            articles.append({"title": "a", "paragraphs": [{"context": row["context"], "qas": [question]}]})
        (path / f"{name}.json").write_text(json.dumps({"version": "1.1", "data": articles}))


def write_entities(path: Path) -> None:
    for seed, (split, n) in enumerate(SPLITS):
        rng = random.Random(seed)
        tiny.write_jsonl(path / f"{split}.jsonl", [tiny.one_tagged(rng) for _ in range(n)])


def write_ranked(path: Path) -> None:
    """Documents with more or fewer good words, four to a query."""
    rng = random.Random(3)
    for split, n in (("train", 24), ("validation", 12)):
        rows = [(f"q{query}", "the film", *one_number(rng)) for query in range(n) for _ in range(4)]
        write_csv(path / f"{split}.csv", ("query_id", "query", "document", "relevance"), rows)


def write_parquet(path: Path, header: tuple[str, ...], rows: Rows, names: Sequence[str] = ()) -> None:
    """With `names` the last column is a ClassLabel."""
    from datasets import ClassLabel, Dataset

    table = Dataset.from_dict({name: [row[i] for row in rows] for i, name in enumerate(header)})
    path.parent.mkdir(parents=True, exist_ok=True)
    (table.cast_column(header[-1], ClassLabel(names=list(names))) if names else table).to_parquet(path)


def write_text(path: Path, columns: tuple[str, ...] = ()) -> None:
    """Texts alone: a line each, or a table."""
    rows = [row[:1] for row in some(one_text, 64, 5)]
    if columns:
        return write_csv(path, columns, rows)
    path.write_text("".join(f"{row[0]}\n" for row in rows))
    return None


def write_my_data(path: Path) -> None:
    split_files(path / "sst2", ("sentence", "label"), coded)
    split_files(path / "mrpc", ("sentence1", "sentence2", "label"), paired)


DATA: dict[str, Callable[[Path], None]] = {
    "reviews": lambda path: split_files(path, REVIEW, review),
    "reviews-2027": lambda path: split_files(path, REVIEW, review),
    "reviews.csv": lambda path: write_csv(path, REVIEW, some(review, 96)),
    "reviews.parquet": lambda path: write_parquet(path, REVIEW, some(review, 16)),
    "reviews.txt": write_text,
    "lines.txt": write_text,
    "texts.csv": lambda path: write_text(path, ("text",)),
    "other.csv": lambda path: write_text(path, ("text",)),
    "labelled": lambda path: split_files(path, ("text", "label"), one_text),
    "pairs": write_pairs,
    "pairs.csv": lambda path: write_csv(path, ("premise", "hypothesis"), [row[:2] for row in some(entailed, 8)]),
    "scores": lambda path: split_files(path, ("text", "other", "label"), scored),
    "topics": lambda path: split_files(path, ("text", "sports", "politics"), topical),
    "MNLI": write_mnli,
    "squad-files": write_squad,
    "tickets.csv": lambda path: write_csv(path, ("text", "label"), some(one_text, 96)),
    "my-data": write_my_data,
    "ranked": write_ranked,
    "entities": write_entities,
    "sts": lambda path: split_files(path, ("sentence1", "sentence2", "score"), scored),
    "all-MiniLM-L6-v2": lambda path: shutil.copytree(path.parent / "network", path) and None,
}


# Models and runs -----------------------------------------------------------------------------------------------------

# How what a page takes for granted was made. Runs come from commands; teachers are what their runs fine-tuned.
RUNS = {
    "runs/sst2": "prune bert-base --task sst2 --keep-work -o runs/sst2",
    "runs/mnli": "prune bert-base --task mnli --keep-work -o runs/mnli",
    "runs/magnitude": "prune bert-base --task mnli --method magnitude -o runs/magnitude",
    "runs/mr": "prune mini --task mr -o runs/mr",
    "runs/mr-onnx": "export runs/mr --to onnx -o runs/mr-onnx",
    "runs/ranked": "prune mini --task regression --data ranked --text-column query --pair-column document "
    "--label-column relevance --group-column query_id --keep-work -o runs/ranked",
}
RESTS_ON = {"runs/mr-onnx": "runs/mr", "runs/ranked": "ranked"}
TEACHER_OF = {
    "my-bert-sst2": "runs/sst2",
    "fine-tuned": "runs/sst2",
    "some-folder": "runs/sst2",
    "LEGACY": "runs/sst2",
    "bert-base-mnli": "runs/mnli",
    "reranker": "runs/ranked",
}
COPIES = {"runs/a": "runs/mnli", "runs/b": "runs/magnitude", "runs/c": "runs/mnli"}


def write_network(folder: Path, tokenizer: Any) -> None:
    """A random BERT with the tokenizer of `mini`: wide enough for every rank on the pages."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = {"hidden_size": 160, "num_hidden_layers": 1, "num_attention_heads": 10, "intermediate_size": 256}
    easy = {"initializer_range": 0.1, "hidden_dropout_prob": 0.0}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **shape, **easy)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def nameless(folder: Path) -> None:
    edit(folder, id2label={"0": "LABEL_0", "1": "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1})


def masked(folder: Path) -> None:
    """As movement pruning left it: whole weights and scores, of L0 regularisation, which need no threshold."""
    import torch
    from safetensors.torch import load_file, save_file

    nameless(folder)
    edit(folder, model_type="masked_bert", pruning_method="l0", mask_init="constant", mask_scale=0.0,
         architectures=["MaskedBertForSequenceClassification"])  # fmt: skip
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(9)
    for name in [name for name in tensors if re.search(r"encoder.*(?<!LayerNorm)\.weight$", name)]:
        scores = torch.randn(tensors[name].shape, generator=generator) * 4
        tensors[name.removesuffix("weight") + "mask_scores"] = scores
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


CHANGES = {"some-folder": nameless, "LEGACY": masked}


@dataclass(frozen=True)
class World:
    """Makes what pages presuppose, each once, below `home`; `run` is how a `cap` is run in the current folder."""

    home: Path
    server: hub_server.Hub
    run: Callable[[Sequence[str]], Any]

    def lend(self, name: str, folder: Path) -> None:
        """Put a copy of `name` into the folder of a page."""
        found, to = self.made(name), folder / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if found.is_dir():
            shutil.copytree(found, to, ignore=shutil.ignore_patterns("work") if name in RUNS else None)
        else:
            shutil.copy(found, to)

    def made(self, name: str) -> Path:
        """The file or folder `name`, made if it is not there yet. Call it with `home` as the current folder."""
        name = COPIES.get(name, name)
        path = self.home / name
        if path.exists():
            return path
        if name in DATA:
            DATA[name](path)
        elif name in RUNS:
            if name in RESTS_ON:
                self.made(RESTS_ON[name])
            self.run(limited(RUNS[name].split()))
        else:
            shutil.copytree(self.made(TEACHER_OF[name]) / "work" / "teacher", path)
            CHANGES.get(name, lambda folder: None)(path)
        return path


def fill(server: hub_server.Hub, home: Path, model: Path) -> None:
    """Models and data that the pages have from the hub; those of `me` are added by the page that pushes."""
    for name in ("google-bert/bert-base-uncased", "nreimers/MiniLM-L6-H384-uncased", "someone/model"):
        server.add(name, model, revisions={"v1.0": model, "refs/pr/3": model})
    glue = home / "glue"
    words = {"sst2": (("sentence", "label"), coded, ("negative", "positive"), ("train", "validation"))}
    nli = ("entailment", "neutral", "contradiction")
    splits = ("train", "validation_matched", "validation_mismatched")
    words["mnli"] = (("premise", "hypothesis", "label"), entailed, nli, splits)
    configs = []
    for task, (header, make, names, parts) in words.items():
        for seed, split in enumerate(parts):
            rows = [
                (*row[:-1], int(row[-1]) if row[-1].isdigit() else names.index(row[-1]))
                for row in some(make, 64 if split == "train" else 32, seed)
            ]
            write_parquet(glue / task / f"{split}-00000-of-00001.parquet", header, rows, names)
        files = [{"split": split, "path": f"{task}/{split}-*"} for split in parts]
        configs.append({"config_name": task, "data_files": files})
    (glue / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")
    server.add("nyu-mll/glue", glue, kind="datasets")
    reviews = home / "hub-reviews"
    for part in ("default", "english"):
        split_files(reviews / part, REVIEW, review)
    configs = [
        {"config_name": part, "data_files": [{"split": split, "path": f"{part}/{split}.csv"} for split, _ in SPLITS]}
        for part in ("default", "english")
    ]
    (reviews / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")
    server.add("someone/reviews", reviews, kind="datasets", revisions={"v1.0": reviews})


def publish(server: hub_server.Hub, small: Path, dense: Path) -> None:
    """The repositories of `me`, as they are after a push."""
    server.add("me/sst2-small", small, revisions={"v1.0": small}, private=True)
    server.add("me/sst2-dense", dense)


def own_cap(folder: Path, mini: str, **changes: str) -> dict[str, str]:
    """An environment whose `cap` is that of `limited`, for the lines that only a shell can run."""
    env = tiny.with_cap(folder, **changes)
    code = process(mini, CLI + "from capcli.cli.app import main\nmain()\n")
    (folder / "cap.py").write_text(code)
    (folder / "bin" / "cap").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder / "cap.py"}" "$@"\n')
    return env
