"""The names that a user can choose from: models, tasks, methods, presets, formats."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

ALIASES = {
    "bert-base": "google-bert/bert-base-uncased",
    "bert-base-cased": "google-bert/bert-base-cased",
    "bert-large": "google-bert/bert-large-uncased",
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "xlm-roberta-base": "FacebookAI/xlm-roberta-base",
    "distilbert-base": "distilbert/distilbert-base-uncased",
    "electra-small": "google/electra-small-discriminator",
    "electra-base": "google/electra-base-discriminator",
    "deberta-v3-base": "microsoft/deberta-v3-base",
    "deberta-v3-small": "microsoft/deberta-v3-small",
    "albert-base": "albert/albert-base-v2",
    "mpnet-base": "microsoft/mpnet-base",
    "modernbert-base": "answerdotai/ModernBERT-base",
    "minilm": "nreimers/MiniLM-L6-H384-uncased",
}
BUILTIN_MODEL = "mini"
TRACKERS = ("trackio", "wandb", "tensorboard", "mlflow")  # names of packages
HUB_PREFIX = "hub:"  # of data that are a set of the hub
CONFIG_FILE = "cap.toml"  # read by eval and probe where they are run
TEXT_FILES = (".parquet", ".arrow", ".csv", ".tsv", ".jsonl", ".json", ".txt")  # that cap predict reads
BUILTIN_TASKS = ("banking77", "mr", "subj", "wnut17")
PROBE_TASKS = ("banking77", "mr", "subj")  # the built-in ones about whole sentences
GLUE_TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
SQUAD_TASKS = ("squad", "squad_v2")
GENERIC_TASKS = (
    "text-classification",
    "text-pair-classification",
    "multi-label-classification",
    "regression",
    "token-classification",
    "ner",
    "question-answering",
    "sentence-embedding",
)
EMBEDDING_TASKS = ("sentence-embedding",)  # that learn from the model's own vectors and need no labels
QUESTION_TASKS = (*SQUAD_TASKS, "question-answering")
TASK_NAMES = (*BUILTIN_TASKS, *GLUE_TASKS, *SQUAD_TASKS, *GENERIC_TASKS)
LOSSES = ("ce", "kd", "prc", "snc", "fic", "hid")
STRUCTURES = ("heads", "dimensions")
AUTO, ONCE = "auto", "once"  # names of stairs that follow from the sparsity
TARGETS = ("macs", "params", "latency")  # what a budget of a structured run counts
BASES = ("own", "pca")
PERTURBATIONS = ("typos", "case", "order")
PROBES = ("linear", "head")
EXPORT_FORMATS = ("dense", "sparse", "sliced", "onnx", "exits", "mask", "lowrank")
# In our own file format, which can store weights in other ways
ARTEFACT_FORMATS = ("sparse", "sliced", "exits", "lowrank")
RUNTIMES = ("auto", "torch", "sparse", "onnx")
DEVICES = ("auto", "cpu", "cuda", "mps")
MOST = 2**63 - 1  # the largest whole number of every library and of TOML
MOST_RETENTION = 2.0  # twice the metric of a baseline; who asks for more means per cent
NUMERIC_GATES = ("min_retention", "max_bytes", "max_latency_ms", "fit")  # of which 0 is the default, and no limit


@dataclass(frozen=True, kw_only=True)
class Method:
    """A pruning method: a criterion that says what a weight is worth, and the losses it is trained with.

    structured: whole units are removed (`STRUCTURES`), not single weights. staged: the sparsity rises in a few stairs,
    at each of which scores are measured anew; can also do without training. one_shot: never trains, cuts at once.
    steady: masks stay as they are from one rise of the sparsity to the next, so that what stays can be fitted.
    masks_only: the weights stay as they were pre-trained, and only masks are learned.
    """

    criterion: str
    losses: tuple[str, ...]
    structured: bool = False
    staged: bool = False
    one_shot: bool = False
    steady: bool = False
    masks_only: bool = False


_CAP, _PLAIN = ("ce", "kd", "prc", "snc", "fic"), ("ce", "kd")
METHODS = {
    "cap-soft": Method(criterion="soft-movement", losses=_CAP),
    "cap-m": Method(criterion="movement", losses=_CAP),
    "cap-f": Method(criterion="first-order", losses=_CAP, structured=True, steady=True),
    "soft-movement": Method(criterion="soft-movement", losses=_PLAIN),
    "movement": Method(criterion="movement", losses=_PLAIN),
    "first-order": Method(criterion="first-order", losses=_PLAIN, structured=True, steady=True),
    "smp": Method(criterion="smp", losses=_PLAIN, masks_only=True),
    "magnitude": Method(criterion="magnitude", losses=_PLAIN, steady=True),
    "cap-fisher": Method(criterion="fisher", losses=_CAP, staged=True, steady=True),
    "fisher": Method(criterion="fisher", losses=_PLAIN, staged=True, steady=True),
    "obert": Method(criterion="obert", losses=_PLAIN, staged=True, steady=True),
    "structured": Method(criterion="kwon", losses=_PLAIN, structured=True, staged=True, steady=True),
    "cap-pins": Method(criterion="pins", losses=_CAP),
    "pins": Method(criterion="pins", losses=_PLAIN),
    "platon": Method(criterion="platon", losses=_PLAIN),
    "wanda": Method(criterion="wanda", losses=("kd",), one_shot=True, steady=True),
    "sparsegpt": Method(criterion="sparsegpt", losses=("kd",), one_shot=True, steady=True),
    "multiflow": Method(criterion="multiflow", losses=("kd",), one_shot=True, steady=True),
    "sds": Method(criterion="sds", losses=("kd",), one_shot=True, steady=True),
}

LEARNED = ("movement", "soft-movement", "smp")  # criteria whose scores are trained

# Defaults of a criterion that differ from those of the options. A preset goes over them where it names the criterion.
OF_CRITERION: dict[str, dict[str, Any]] = {
    "fisher": {"dense_share": 0.0, "final_share": 0.5, "lr_schedule": "cycle", "refit": True},
    "obert": {"dense_share": 0.0, "final_share": 0.5, "lr_schedule": "cycle", "fisher_block": 50},
    "kwon": {"dense_share": 0.0, "final_share": 0.5, "lr_schedule": "cycle", "refit": True},
    "smp": {
        "init": "pretrained",
        "score_init": "zero",
        "score_lr": 2e-2,
        "dense_share": 0.0,
        "final_share": 0.4,
        "ce_weight": 0.5,
        "kd_weight": 0.5,
        "reg_weight": 400.0,
    },
    **{method.criterion: {"epochs": 0, "refit": True} for method in METHODS.values() if method.one_shot},
}

# Section 5 of the design's ALGORITHM: the reference's values on GLUE. Warm-up lengths are shares of the run, so that
# they scale: 11,000 of 122,720 steps, dense twice and final three times as long.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "minutes": {"*": {"method": "fisher", "epochs": 0}},
    "best": {"*": {"epochs": 10}},
    "quick": {"*": {"epochs": 2, "teacher_epochs": 2, "lr_scale": 2.0}},
    "paper": {
        "*": {
            "method": "cap-soft",
            "epochs": 10,
            "teacher_epochs": 3,
            "teacher_lr": 2e-5,
            "batch_size": 32,
            "lr": 3e-5,
            "score_lr": 1e-2,
            "weight_decay": 0.0,
            "lr_warmup": 0.09,
            "dense_share": 0.18,
            "final_share": 0.27,
            "tau": 0.1,
            "extra_examples": 4096,
            "unsupervised_weight": 0.1,
            "supervised_weight": 10.0,
            "ce_weight": 0.1,
            "kd_weight": 0.9,
            "kd_temperature": 2.0,
            "normalization": "reference",
            "init": "pretrained",
            "score_init": "zero",
        },
        "first-order": {
            "batch_size": 16,
            "lr": 2e-5,
            "weight_decay": 0.01,
            "lr_warmup": 0.1,
            "unsupervised_weight": 0.3,
            "supervised_weight": 3.0,
            "kd_temperature": 1.0,
        },
        "movement": {"scope": "matrix"},
    },
}


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint that names the nearest valid names, or all of them."""
    choices = list(valid)
    close = difflib.get_close_matches(name.lower(), choices, n=1, cutoff=0.55)
    close = close or [choice for choice in choices if len(name) > 1 and choice.lower().startswith(name.lower())]
    return (f"did you mean {close[0]}? " if close else "") + "valid: " + ", ".join(choices)
