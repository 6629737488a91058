"""The configuration of `cap prune`: which examples, where to compute, how to prune.

Each option is one dataclass field: its default and its help text are written once, here. The command line, the TOML
file, the docs and the stored configuration of a run are all derived from these fields.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from capcli.config import rises
from capcli.config.names import (
    DEVICES,
    LOSSES,
    METHODS,
    PRESETS,
    STRUCTURES,
)
from capcli.config.options import at_least, check_name, flag_name, option, split_list
from capcli.config.task import TaskConfig
from capcli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Where and in which precision to compute."""

    device: str = option("auto", "where to compute: auto, cpu, cuda, cuda:N or mps", panel="Hardware")
    precision: str = option(
        "auto", "precision: auto, fp32, bf16 or fp16; auto is bf16 on a GPU, fp32 elsewhere", panel="Hardware"
    )
    threads: int = option(
        0, "CPU threads, 0 for all cores; results are reproducible only with the same number", panel="Hardware"
    )

    def __post_init__(self) -> None:
        check_name("device", self.device.split(":")[0], DEVICES)
        check_name("precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        at_least(0, threads=self.threads)


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Everything that determines a pruning run."""

    source: TaskConfig
    model: str = ""
    out: str = option(
        "",
        "output folder; by default runs/MODEL-TASK-METHOD-SPARSITY, with the name of --data after TASK, and of a sweep "
        "runs/MODEL-TASK-sweep",
        flag="-o",
        resumable=True,
    )
    sparsity: float = option(
        0.9, "fraction of the prunable weights to remove, in [0, 1); several, as 0.8,0.9, make a sweep", several="X,…"
    )
    method: str = option(
        "cap-soft", f"pruning method: {', '.join(METHODS)}; several, as fisher,cap-f, make a sweep", several="NAME,…"
    )
    losses: str = option("", "losses to train with, from ce,kd,prc,snc,fic,hid; by default those of the method")
    teacher: str = option("", "fine-tuned model to learn from; by default the run fine-tunes one itself")
    preset: str = option("default", "set of default values: " + ", ".join(PRESETS), resumable=True)
    max_train_samples: int = option(0, "train on at most this many examples, 0 for all", panel="Task")
    holdout: float = option(
        0.0,
        "share of the training set held out to choose the best epoch, or to evaluate on if there is no such split",
        panel="Task",
    )
    seed: int = option(1, "random seed", panel="Training")
    epochs: int = option(
        4,
        "passes over the training set while pruning; with fisher, 0 for calibration without training; "
        "wanda, sparsegpt, multiflow and sds never train",
        panel="Training",
    )
    teacher_epochs: int = option(
        0,
        "passes over the training set for the teacher; 0 for 2, or on small sets enough for 150 steps, at most 8",
        panel="Training",
    )
    batch_size: int = option(32, "examples per step", panel="Training")
    lr: float = option(1e-4, "peak learning rate of the weights", panel="Training")
    teacher_lr: float = option(5e-5, "peak learning rate of the teacher", panel="Training")
    score_lr: float = option(3e-2, "peak learning rate of the scores (movement methods)", panel="Training")
    weight_decay: float = option(0.01, "weight decay of AdamW", panel="Training")
    lr_warmup: float = option(
        0.1, "share of the steps in which the learning rates rise to their peak", panel="Training"
    )
    init: str = option("teacher", "weights the student starts from: teacher or pretrained", panel="Training")
    dense_share: float = option(0.05, "share of the steps before pruning begins", panel="Pruning")
    final_share: float = option(0.4, "share of the steps at the final sparsity", panel="Pruning")
    initial_sparsity: float = option(
        0.0, "fraction removed at once when pruning begins; the rest follows step by step", panel="Pruning"
    )
    update_every: float = option(
        0.0, "share of the steps between two increases of the sparsity, 0 for as often as possible", panel="Pruning"
    )
    lr_schedule: str = option(
        "run",
        "learning rates: run (rise and fall once), or cycle (again after each increase of the sparsity, as the paper "
        "has it for heads)",
        panel="Training",
    )
    stairs: str = option(
        "",
        "sparsities one after another (fisher), such as 0.8,0.9,0.95; by default 0.8, then what stays is about halved",
        panel="Pruning",
    )
    calibration: int = option(
        512,
        "training examples that scores and refit are measured on, anew at each stair (fisher, and the methods that "
        "train nothing)",
        panel="Pruning",
    )
    text: str = option(
        "",
        "calibrate on texts without labels, and on no training set: a .txt with one per line, or a file with a text "
        "column; MODEL or --teacher must be fine-tuned for the task",
        panel="Pruning",
    )
    refit: bool = option(
        True,
        "after a selection, fit the weights that stay to the layers' outputs before it (the methods of --calibration)",
        panel="Pruning",
    )
    heal: int = option(
        0,
        "without epochs: steps of distillation on the calibration examples afterwards, with fixed masks",
        panel="Pruning",
    )
    refit_target: str = option(
        "student",
        "whose outputs the refit aims at: student (as it was before the selection), or teacher",
        panel="Pruning",
    )
    structure: str = option(
        "heads",
        "what cap-f and first-order remove besides neurons: whole heads, or dimensions inside heads",
        panel="Pruning",
    )
    importance_examples: int = option(
        0,
        "training examples that importance is measured on before each removal, without dropout (cap-f, first-order); a "
        "large number for all, 0 to add it up over the training steps instead",
        panel="Pruning",
    )
    scope: str = option(
        "auto",
        "rank weights within each matrix or over all matrices: auto, matrix, global; or row (wanda, sparsegpt, sds, "
        "multiflow): as many stay in each row",
        panel="Pruning",
    )
    floor: float = option(
        0.005,
        "share of its weights that each matrix keeps at least when all are ranked together",
        panel="Pruning",
        unit="share",
    )
    score_init: str = option(
        "magnitude", "start value of the scores: zero, or the magnitude of the weights", panel="Pruning"
    )
    pooling: str = option(
        "auto",
        "sentence vector: head (what enters the classifier), cls, mean, or auto: head where that part of the model is "
        "pre-trained, cls where it is drawn at random",
        panel="Losses",
    )
    tau: float = option(0.1, "temperature of the contrastive terms", panel="Losses")
    extra_examples: int = option(4096, "stored vectors drawn per step for each contrastive term", panel="Losses")
    normalization: str = option(
        "mean", "scaling of the contrastive terms: mean, or reference for that of the reference code", panel="Losses"
    )
    unsupervised_weight: float = option(
        0.005,
        "weight of the unsupervised contrastive terms; on the scale of --normalization mean the paper's is 0.1, of snc "
        "that divided by the number of snapshots",
        panel="Losses",
    )
    supervised_weight: float = option(
        0.02,
        "weight of the supervised contrastive terms; on the scale of --normalization mean the paper's 10 is about "
        "0.005, so the default is another mixture of the two; --preset paper has the paper's",
        panel="Losses",
    )
    ce_weight: float = option(0.1, "weight of the task loss (1 when it is the only loss)", panel="Losses")
    kd_weight: float = option(0.9, "weight of distillation", panel="Losses")
    kd_temperature: float = option(2.0, "temperature of distillation", panel="Losses")
    kd_scale: str = option(
        "t2",
        "scale of distillation: t2 (times the square of the temperature), or none, which GRAIN uses at temperature 8",
        panel="Losses",
    )
    hidden_weight: float = option(
        10.0,
        "weight of the hidden-state distillation (hid); GRAIN's ratio to distillation is 64 with --kd-scale t2, and 1 "
        "with none",
        panel="Losses",
    )
    reg_weight: float = option(
        0.0,
        "weight of the score regulariser (soft movement), which grows with the sparsity; with 0 soft-movement is "
        "movement with --scope global",
        panel="Losses",
    )
    checkpoint_seconds: float = option(120.0, "seconds between checkpoints", panel="Run", resumable=True)
    max_time: float = option(
        0.0, "save a checkpoint and stop after this many minutes, 0 for never", panel="Run", resumable=True
    )
    store: str = option(
        "fp16", "type of the weights in the file: fp16, or fp32 to keep all bits that were trained", panel="Run"
    )
    keep_work: bool = option(False, "keep the work folder of a finished run", panel="Run", resumable=True)
    hardware: Hardware = field(default_factory=Hardware)

    def __post_init__(self) -> None:
        check_name("method", self.method, METHODS)
        check_name("preset", self.preset, PRESETS)
        check_name("normalization", self.normalization, ("mean", "reference"))
        check_name("pooling", self.pooling, ("auto", "head", "cls", "mean"))
        check_name("kd-scale", self.kd_scale, ("t2", "none"))
        check_name("scope", self.scope, ("auto", "matrix", "global", "row"))
        check_name("structure", self.structure, STRUCTURES)
        check_name("score-init", self.score_init, ("zero", "magnitude"))
        check_name("store", self.store, ("fp16", "fp32"))
        check_name("init", self.init, ("teacher", "pretrained"))
        check_name("refit-target", self.refit_target, ("student", "teacher"))
        check_name("lr-schedule", self.lr_schedule, ("run", "cycle"))
        for name in self.loss_names:
            check_name("loss", name, LOSSES)
        if self.refit_target == "teacher" and self.init != "teacher":
            raise ConfigError(
                "--refit-target teacher needs a student that starts from the teacher's weights",
                "use --init teacher, or --refit-target student",
            )
        if self.epochs and not {"ce", "kd"} & set(self.loss_names):
            raise ConfigError("--losses must include ce or kd: the other terms alone do not teach the task")
        if self.structure != STRUCTURES[0] and not METHODS[self.method].structured:
            raise ConfigError(
                f"--structure {self.structure} is for structured methods, {self.method} removes single weights",
                "leave it out, or use --method cap-f",
            )
        if not 0 <= self.sparsity < 1:
            hint = f"did you mean --sparsity {self.sparsity / 100:g}?" if 1 < self.sparsity < 100 else ""
            raise ConfigError(f"sparsity is the fraction of weights removed, in [0, 1), got {self.sparsity:g}", hint)
        at_least(
            0, max_train_samples=self.max_train_samples, teacher_epochs=self.teacher_epochs, max_time=self.max_time
        )
        at_least(0, extra_examples=self.extra_examples, seed=self.seed, checkpoint_seconds=self.checkpoint_seconds)
        at_least(1, batch_size=self.batch_size, calibration=self.calibration)
        at_least(0, importance_examples=self.importance_examples)
        if self.importance_examples and not METHODS[self.method].structured:
            raise ConfigError(
                f"--importance-examples has no effect on {self.method}, which removes single weights",
                "leave it out, or use --method cap-f",
            )
        at_least(0 if self.calibrated else 1, epochs=self.epochs)
        positive = {
            "lr": self.lr,
            "teacher_lr": self.teacher_lr,
            "tau": self.tau,
            "kd_temperature": self.kd_temperature,
        }
        for name, value in positive.items():
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{flag_name(name)} must be a positive number, got {value}")
        at_least(0, score_lr=self.score_lr, weight_decay=self.weight_decay, reg_weight=self.reg_weight)
        at_least(0, unsupervised_weight=self.unsupervised_weight, supervised_weight=self.supervised_weight)
        at_least(0, ce_weight=self.ce_weight, kd_weight=self.kd_weight, hidden_weight=self.hidden_weight)
        shares = {"lr_warmup": self.lr_warmup, "dense_share": self.dense_share, "final_share": self.final_share}
        shares |= {"initial_sparsity": self.initial_sparsity, "update_every": self.update_every}
        for name, value in {**shares, "holdout": self.holdout, "floor": self.floor}.items():
            if not 0 <= value < 1:
                raise ConfigError(f"{flag_name(name)} is a share in [0, 1), got {value:g}")
        if self.lr_schedule == "cycle" and self.rises_often and not self.update_every:
            structured = METHODS[self.method].structured
            method = f"--structure {self.structure}" if structured else self.method
            raise ConfigError(
                f"--lr-schedule cycle restarts at each rise of the sparsity, which with {method} is every few steps",
                "set --update-every as well, such as 0.05",
            )
        if self.dense_share + self.final_share > 1:
            raise ConfigError("--dense-share and --final-share together exceed 1, which leaves no steps for pruning")
        rises.check(self)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher itself is asked while the student is pruned, not only what it once answered."""
        refitted = self.calibrated and self.refit and self.refit_target == "teacher"
        return "hid" in self.loss_names or refitted or self.heal > 0 or (self.staged and bool(self.text))

    @property
    def stair_list(self) -> tuple[float, ...]:
        """The sparsities of a staged method one after another, the last of them `sparsity`; of other methods none."""
        if not self.calibrated:
            return ()
        if METHODS[self.method].one_shot:
            return (self.sparsity,)
        if not self.stairs:
            return rises.halving(self.sparsity, rises.FIRST_STAIR if self.epochs else rises.UNTRAINED_STAIR)
        try:
            return tuple(float(part) for part in self.stairs.split(",") if part.strip())
        except ValueError as error:
            raise ConfigError(f"--stairs needs numbers, got {self.stairs!r}", "for example --stairs 0.8,0.9") from error

    @property
    def staged(self) -> bool:
        """Whether the sparsity rises in a few stairs, at each of which scores are measured anew."""
        return METHODS[self.method].staged

    @property
    def calibrated(self) -> bool:
        """Whether scores are measured on examples that are drawn for it; only then it can do without training."""
        return self.staged or METHODS[self.method].one_shot

    @property
    def rises_often(self) -> bool:
        """Whether the sparsity rises all the time, unless `update_every` says otherwise."""
        return not self.calibrated and not (METHODS[self.method].structured and self.structure == STRUCTURES[0])

    def teacher_passes(self, n_examples: int) -> int:
        """Passes over `n_examples` for the teacher: chosen, or enough for a small set to be learned; 0 if given."""
        if self.teacher or self.teacher_epochs:
            return 0 if self.teacher else self.teacher_epochs
        return min(8, max(2, math.ceil(150 * self.batch_size / max(1, n_examples))))

    @property
    def criterion(self) -> str:
        """Name of the method's criterion, a key of `pruning.criteria.CRITERIA`."""
        return METHODS[self.method].criterion

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses in the order of `LOSSES`, each once; to heal only kd, which needs no labels; else none without
        epochs."""
        if not (self.epochs or self.heal):
            return ()
        chosen = split_list(self.losses) or (METHODS[self.method].losses if self.epochs else ("kd",))
        return tuple(
            sorted(set(chosen), key=lambda name: (name not in LOSSES, LOSSES.index(name) if name in LOSSES else 0))
        )

    @property
    def out_folder(self) -> Path:
        """The output folder, given or derived."""
        return Path(self.out or self.named(f"{self.method}-{self.sparsity:g}"))

    def named(self, what: str) -> Path:
        """The folder of a run, or of several, that is not given: by model, task, and `what` it is."""
        name, _, revision = self.model.partition("@")
        model = "-".join([name.rstrip("/").rsplit("/", 1)[-1], *filter(None, revision.split("/"))])
        return Path("runs") / f"{model}-{self.source.name}-{what}"
