"""A tiny model and tiny tasks, made from a seed in a second: what the end-to-end tests run on. No network.

The word that stands in a sentence decides its class, so that a few dozen steps of a random network learn it.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the fault tests fork

ROOT = Path(__file__).parent.parent  # of the checkout
FILLERS = [
    "the",
    "a",
    "film",
    "story",
    "actor",
    "scene",
    "plot",
    "music",
    "was",
    "is",
    "seems",
    "very",
    "quite",
    "rather",
    "long",
    "short",
]
SOURCES = {  # a task of each kind, and which of the files of `Tiny` are for it
    "classification": ("text-classification", "data"),
    "regression": ("regression", "numbers"),
    "multilabel": ("multi-label-classification", "topics"),
    "tokens": ("ner", "tags"),
    "spans": ("question-answering", "answers"),
    "embedding": ("sentence-embedding", "scored"),
}
WORDS = {"negative": ("bad", "dull", "awful"), "positive": ("good", "bright", "great")}
HIDDEN, LAYERS, HEADS, FFN = 32, 2, 4, 64
Made = Callable[..., Path]  # what makes a folder
PRUNABLE = LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * FFN)
WEIGHTS = "model.cap.safetensors"
# A run of one to two seconds: 20 + 20 steps. Rates are high because the network is small and random.
SETTINGS: dict[str, Any] = {
    "method": "cap-soft",
    "sparsity": 0.7,
    "epochs": 4,
    "teacher_epochs": 6,
    "batch_size": 16,
    "lr": 5e-3,
    "teacher_lr": 5e-3,
    "max_length": 16,
    "extra_examples": 40,
    "threads": 1,
}


@dataclass(frozen=True)
class Tiny:
    """Folders of the tiny model and of its tasks."""

    root: Path

    @property
    def model(self) -> str:
        """A random BERT without a head, in Hugging Face layout."""
        return str(self.root / "tiny")

    @property
    def data(self) -> str:
        """Two classes, one text: train.csv and validation.csv."""
        return str(self.root / "words")

    @property
    def pairs(self) -> str:
        """Two classes, two texts: do both hold a word of the same class?"""
        return str(self.root / "pairs")

    @property
    def numbers(self) -> str:
        """Regression: how many good words stand in the text."""
        return str(self.root / "numbers")

    @property
    def topics(self) -> str:
        """Multi-label: which classes of words stand in the text, none to both."""
        return str(self.root / "topics")

    @property
    def tags(self) -> str:
        """Token classification: words of the two classes are entities, of one word or two."""
        return str(self.root / "tags")

    @property
    def answers(self) -> str:
        """Questions for the good or the bad word of a context; some have no answer."""
        return str(self.root / "answers")

    @property
    def scored(self) -> str:
        """Two texts and a score: how many of their words they share."""
        return str(self.root / "scored")

    def prune_config(self, out: Path, **chosen: Any) -> Any:
        """A configuration of `cap prune` on the two-class task, changed by `chosen`."""
        from capcli.config.layers import prune_config

        base = {"model": self.model, "task": "text-classification", "data": self.data, "out": str(out)}
        return prune_config({**base, **SETTINGS, **chosen})

    def prune(self, out: Path, **chosen: Any) -> dict[str, Any]:
        """Run `cap prune` in this process; returns the report."""
        import capcli

        return capcli.prune(self.prune_config(out, **chosen))

    def stop(self, out: Path, step: str, **chosen: Any) -> None:
        """Run `cap prune` and stop it at a step of the pruning, such as `8/20`, with a checkpoint."""
        from capcli.errors import Stopped
        from capcli.events import StopFlag
        from capcli.verbs.prune import prune

        flag = StopFlag()
        with pytest.raises(Stopped):
            for event in prune(self.prune_config(out, **chosen), flag=flag):
                if event.phase == "prune" and event.status.startswith(f"step {step}"):
                    flag.reason = "the test"

    def arguments(self, out: Path, **chosen: Any) -> list[str]:
        """The same run as arguments of `cap`."""
        base = {"task": "text-classification", "data": self.data, "out": str(out)}
        found = ["prune", str(chosen.pop("model", self.model))]
        for name, value in {**base, **SETTINGS, **chosen}.items():
            flag = "-o" if name == "out" else "--" + name.replace("_", "-")
            found += [flag] if value is True else [flag, str(value)]
        return found


def make(root: Path) -> Tiny:
    """Write the model and the tasks below `root`."""
    tiny = Tiny(root)
    write_model(Path(tiny.model))
    rng, scores = random.Random(7), random.Random(8)
    for split, n in (("train", 80), ("validation", 48)):
        write_csv(Path(tiny.data) / f"{split}.csv", ("text", "label"), [one_text(rng) for _ in range(n)])
        write_csv(Path(tiny.pairs) / f"{split}.csv", ("text", "pair", "label"), [one_pair(rng) for _ in range(n)])
        write_csv(Path(tiny.numbers) / f"{split}.csv", ("text", "label"), [one_number(rng) for _ in range(n)])
        write_csv(Path(tiny.scored) / f"{split}.csv", ("text", "pair", "score"), [one_score(scores) for _ in range(n)])
        write_jsonl(Path(tiny.topics) / f"{split}.jsonl", [one_topic(rng) for _ in range(n)])
        write_jsonl(Path(tiny.tags) / f"{split}.jsonl", [one_tagged(rng) for _ in range(n)])
        write_jsonl(Path(tiny.answers) / f"{split}.jsonl", [one_answer(rng, i) for i in range(n)])
    return tiny


def write_model(folder: Path, seed: int = 0, **changes: Any) -> None:
    """A random BERT and its word-piece tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    size = write_tokenizer(folder)
    torch.manual_seed(seed)
    shape = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": FFN}
    easy = {"initializer_range": 0.1, "hidden_dropout_prob": 0.0}  # attention keeps its dropout
    config = BertConfig(**{"vocab_size": size, "max_position_embeddings": 64, **shape, **easy, **changes})
    BertModel(config).save_pretrained(folder)


def write_tokenizer(folder: Path) -> int:
    """A word-piece tokenizer as BERT has it, with token types; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + sorted({*FILLERS, *WORDS["negative"], *WORDS["positive"]}) + ["##s", "##ly"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True)),
    ).save_pretrained(folder)
    return len(words)


def write_byte_tokenizer(folder: Path, padding: bool) -> int:
    """A byte-level BPE tokenizer: as RoBERTa has it, or as decoders do, without padding and special tokens around."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"] if padding else ["<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join([*FILLERS, *WORDS["negative"], *WORDS["positive"]])] * 5, trainer)
    if padding:
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
        names = {"bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        names |= {"eos_token": "</s>", "sep_token": "</s>"}
    else:
        names = {"eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, model_input_names=["input_ids", "attention_mask"], **names
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size()


TOKENIZERS = {
    "words": write_tokenizer,
    "bytes": functools.partial(write_byte_tokenizer, padding=True),
    "decoder": functools.partial(write_byte_tokenizer, padding=False),
}


def random_examples(n: int, length: int) -> Any:
    """Tokenised examples of two classes, `length` random words each."""
    import numpy as np

    from capcli.data.batches import Examples

    rng = np.random.default_rng(0)
    return Examples(
        tokens=rng.integers(5, 20, n * length, dtype=np.int32),
        types=np.zeros(n * length, dtype=np.uint8),
        offsets=np.arange(n + 1, dtype=np.int64) * length,
        labels=rng.integers(0, 2, n),
        pad_id=0,
    )


def one_text(rng: random.Random) -> tuple[str, str]:
    """A text and its label."""
    label = rng.choice(list(WORDS))
    words = rng.choices(FILLERS, k=rng.randint(1, 4))
    words.insert(rng.randrange(len(words) + 1), rng.choice(WORDS[label]))
    return " ".join(words), label


def one_pair(rng: random.Random) -> tuple[str, str, str]:
    """Two texts and whether their words are of one class."""
    (first, a), (second, b) = one_text(rng), one_text(rng)
    return first, second, "same" if a == b else "different"


def one_score(rng: random.Random) -> tuple[str, str, str]:
    """Two texts and the share of their words that both have."""
    (first, _), (second, _) = one_text(rng), one_text(rng)
    a, b = set(first.split()), set(second.split())
    return first, second, f"{len(a & b) / len(a | b):.2f}"


def one_number(rng: random.Random) -> tuple[str, str]:
    """A text and the number of good words in it."""
    n = rng.randint(0, 3)
    words = rng.choices(FILLERS, k=3) + rng.choices(WORDS["positive"], k=n)
    rng.shuffle(words)
    return " ".join(words), f"{n:.1f}"


def one_topic(rng: random.Random) -> dict[str, Any]:
    """A text and the classes of which it holds a word."""
    labels = [label for label in WORDS if rng.random() < 0.5]
    words = rng.choices(FILLERS, k=3) + [rng.choice(WORDS[label]) for label in labels]
    rng.shuffle(words)
    return {"text": " ".join(words), "labels": labels}


def one_tagged(rng: random.Random) -> dict[str, Any]:
    """Words and their tags."""
    words, tags = [], []
    for _ in range(rng.randint(2, 5)):
        words.append(rng.choice(FILLERS))
        tags.append("O")
        if rng.random() < 0.5:
            label, length = rng.choice(list(WORDS)), rng.randint(1, 2)
            words += rng.choices(WORDS[label], k=length)
            tags += ["B-" + label] + ["I-" + label] * (length - 1)
    return {"tokens": words, "ner_tags": tags}


def one_answer(rng: random.Random, number: int) -> dict[str, Any]:
    """A question in SQuAD's columns; one in five has no answer."""
    label = rng.choice(list(WORDS))
    words = rng.choices(FILLERS, k=rng.randint(3, 12))
    answer = rng.choice(WORDS[label])
    if number % 5:
        words.insert(rng.randrange(len(words)), answer)
    context = " ".join(words)
    found = {"text": [answer], "answer_start": [f" {context} ".index(f" {answer} ")]} if number % 5 else None
    question = f"is the film {'good' if label == 'positive' else 'bad'}"
    empty: dict[str, Any] = {"text": [], "answer_start": []}
    return {"id": str(number), "question": question, "context": context, "answers": found or empty}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A csv file with quotes where they are needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def digest(path: Path) -> str:
    """sha256 of a file, by other means than the package's."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outcome(out: Path) -> tuple[str, Any, Any]:
    """What two runs that are the same share: bytes of the weights, metrics, and the history of the losses."""
    report = json.loads((out / "report.json").read_text())
    assert report["status"] == "complete"
    return digest(out / WEIGHTS), report["metrics"], report["history"]


def environment(**changes: str | None) -> dict[str, str]:
    """The environment for a `cap` of our own: one thread, no colours, nothing from CI."""
    dropped = (
        "GITHUB_ACTIONS",
        "HF_DATASETS_OFFLINE",
        "GITHUB_STEP_SUMMARY",
        "NO_COLOR",
        "FORCE_COLOR",
        "HF_HUB_OFFLINE",
        "HF_ENDPOINT",
        "HF_HOME",
    )
    base = {name: value for name, value in os.environ.items() if name not in dropped}
    base |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random"}
    return {name: value for name, value in {**base, **changes}.items() if value is not None}


def with_cap(folder: Path, **changes: str) -> dict[str, str]:
    """An environment in which `cap` is on the PATH, as this checkout has it."""
    (folder / "bin").mkdir(exist_ok=True)
    script = folder / "bin" / "cap"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m capcli "$@"\n')
    script.chmod(0o755)
    paths = {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    return environment(**{**paths, **changes})


def cap(*arguments: str, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `cap` in a process of its own and wait for it."""
    command = [sys.executable, "-m", "capcli", *arguments]
    return subprocess.run(
        command,
        env=dict(env or environment()),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
        **options,
    )


def invoke(*arguments: str) -> Any:
    """Run `cap` in this process; the result has exit_code, stdout and stderr."""
    from typer.testing import CliRunner

    from capcli.cli.app import app

    return CliRunner().invoke(app, list(arguments))


def forked(action: Callable[[], Any]) -> int:
    """Run `action` in a fork of this process, which has torch loaded already; returns the pid to wait for.

    The child ends with code 0, or with 99 when `action` raised; nothing of pytest runs in it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        action()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Exit code of a fork; the negative signal number when it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny model and its tasks, once per session."""
    return make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def pruned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the default method, to read from."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    tiny.prune(out)
    return out


@pytest.fixture(scope="session")
def asked(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Makes `asked(kind, format)`: a finished run of this kind, `pairs` too, or an export of it, to read from; the same
    call, the same folder."""
    found: dict[tuple[str, str], Path] = {}

    def make(kind: str, to: str = "") -> Path:
        if (kind, to) not in found:
            out = tmp_path_factory.mktemp("asked") / "out"
            if to:
                done = invoke("export", str(make(kind)), "--to", to, "-o", str(out), "--threads", "1", "-q")
                assert done.exit_code == 0, done.stderr
            else:
                task, data = SOURCES.get(kind, ("text-pair-classification", "pairs"))
                tiny.prune(out, task=task, data=getattr(tiny, data))
            found[kind, to] = out
        return found[kind, to]

    return make
