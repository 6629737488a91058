"""The configuration of `cap prune`: which examples, where to compute, how to prune.

Each option is one dataclass field: its default and its help text are written once, here. The command line, the TOML
file, the docs and the stored configuration of a run are all derived from these fields.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from capcli.config import rises, target, validity
from capcli.config.hardware import COMPILE, TIMEOUT, TIMEOUT_MINUTES, Hardware
from capcli.config.losses import LossConfig
from capcli.config.names import (
    BASES,
    EMBEDDING_TASKS,
    LOSSES,
    METHODS,
    PRESETS,
    STRUCTURES,
    TRACKERS,
)
from capcli.config.options import check_name, check_names, option, split_list
from capcli.config.task import TaskConfig

SCOPES = ("auto", "matrix", "global", "type", "row")
SCORE_INITS = ("zero", "magnitude")
STORES = ("fp16", "fp32")
INITS = ("teacher", "pretrained", "fisher")
REFIT_TARGETS = ("student", "teacher")
LR_SCHEDULES = ("run", "cycle")


@dataclass(frozen=True, kw_only=True)
class PruneConfig(LossConfig):
    """Everything that determines a pruning run."""

    source: TaskConfig
    model: str = ""
    out: str = option(
        "",
        "output folder; by default runs/MODEL-TASK-METHOD-SPARSITY, with the name of --data after TASK, and of a sweep "
        "runs/MODEL-TASK-sweep",
        flag="-o",
        panel="Run",
        resumable=True,
        metavar="FOLDER",
    )
    sparsity: float = option(
        0.9,
        "fraction of the prunable weights to remove, in [0, 1); several, as 0.8,0.9, make a sweep",
        panel="Pruning",
        several="FLOAT,…",
    )
    target: str = option(
        "",
        "in place of --sparsity (structured; with dimensions also cap-f, first-order): macs=0.3 or params=0.3 keeps "
        "30 %, latency=2x aims at twice the speed",
        panel="Pruning",
        metavar="NAME=VALUE",
    )
    method: str = option(
        "fisher",
        f"pruning method: {', '.join(METHODS)}; several make a sweep",
        panel="Pruning",
        names=METHODS,
        several="NAME,…",
    )
    teacher: str = option(
        "", "fine-tuned model to learn from; by default the run fine-tunes one itself", panel="Pruning", metavar="MODEL"
    )
    preset: str = option(
        "default",
        "default (3 epochs cost MiniLM 2.8 points on SST-2 at 97 %), best (10: 2.2), minutes (1.2 at 80 %), quick, "
        "paper",
        resumable=True,
        panel="Pruning",
        names=PRESETS,
        metavar="NAME",
    )
    max_train_samples: int = option(0, "train on at most this many examples, 0 for all", panel="Task")
    holdout: float = option(
        0.0,
        "share of the training set held out to choose the best epoch, or to evaluate on if there is no such split",
        panel="Task",
    )
    seed: int = option(1, "random seed", panel="Training")
    epochs: int = option(
        4,
        "passes over the training set while pruning; with fisher, obert and structured, 0 to train nothing",
        panel="Training",
    )
    teacher_epochs: int = option(
        0,
        "passes over the training set for the teacher; 0 chooses: 2, or more to reach 150 steps and 20 for each class, "
        "at most 8",
        panel="Training",
        expert=True,
    )
    batch_size: int = option(32, "examples per step", panel="Training")
    micro_batch: int = option(
        0,
        "examples per forward pass, for steps that do not fit into memory; 0 for all, and fewer once memory runs out",
        resumable=True,
        panel="Training",
        expert=True,
    )
    lr: float = option(
        0.0,
        "peak learning rate of the weights; 0 chooses it: 1e-4 at a hidden size of 768, more for narrower models",
        panel="Training",
    )
    teacher_lr: float = option(
        0.0,
        "peak learning rate of the teacher; 0 chooses it: 5e-5 at a hidden size of 768, more for narrower models",
        panel="Training",
        expert=True,
    )
    lr_scale: float = option(
        1.0, "times the learning rates that are chosen by the hidden size", panel="Training", expert=True
    )
    score_lr: float = option(
        3e-2, "peak learning rate of the scores (movement methods, smp)", panel="Training", expert=True
    )
    weight_decay: float = option(0.01, "weight decay of AdamW", panel="Training", expert=True)
    lr_warmup: float = option(
        0.1, "share of the steps in which the learning rates rise to their peak", panel="Training", expert=True
    )
    init: str = option(
        "teacher",
        "weights the student starts from: teacher, pretrained, or fisher (the teacher's, pruned without training by "
        "--method fisher to --initial-sparsity, by default 0.8)",
        panel="Training",
        names=INITS,
        expert=True,
    )
    train_head: bool = option(False, "smp: also train the head and the norms, at --lr", panel="Training", expert=True)
    dense_share: float = option(0.05, "share of the steps before pruning begins", panel="Schedule", expert=True)
    final_share: float = option(0.4, "share of the steps at the final sparsity", panel="Schedule", expert=True)
    initial_sparsity: float = option(
        0.0,
        "fraction removed at once when pruning begins; the rest follows step by step",
        panel="Schedule",
        expert=True,
    )
    update_every: float = option(
        0.0,
        "share of the steps between two increases of the sparsity, 0 for as often as possible",
        panel="Schedule",
        expert=True,
    )
    lr_schedule: str = option(
        "run",
        "learning rates: run (rise and fall once), or cycle (again after each increase of the sparsity, as the paper "
        "has it for heads)",
        panel="Training",
        names=LR_SCHEDULES,
        expert=True,
    )
    stairs: str = option(
        "",
        "sparsities one after another (fisher, structured, magnitude), such as 0.8,0.9,0.95; auto: 0.8, of structured "
        "0.5, then what stays is about halved, the default of fisher and structured; once: --sparsity at once",
        panel="Schedule",
        expert=True,
        metavar="LIST",
    )
    mask_from: str = option(
        "",
        "fisher: take the masks of other runs of this model, separated by commas; weights that most of them kept stay",
        panel="Schedule",
        expert=True,
        metavar="RUN,…",
    )
    regrow: bool = option(
        False,
        "fisher: removed weights are trained as well, straight through, and may return at a later stair or selection",
        panel="Schedule",
        expert=True,
    )
    selections: int = option(
        1,
        "fisher, obert, structured: selections at each stair, each with new scores and no training between",
        panel="Calibration",
        expert=True,
    )
    calibration: int = option(
        512,
        "training examples that scores (fisher, structured, and the methods that train nothing) and --refit are "
        "measured on, anew at each stair, and --basis pca, once",
        panel="Calibration",
        expert=True,
    )
    fisher_block: int = option(
        1,
        "how many neighbouring weights are judged together: 1, the default of fisher, for the diagonal of the Fisher "
        "information, 50, that of obert, for blocks, which need more --calibration",
        panel="Calibration",
        expert=True,
    )
    refit: bool = option(
        False,
        "after a selection, fit the weights that stay to the layers' outputs before it; fisher, structured and the "
        "methods that train nothing do so unless told otherwise, magnitude, cap-f and first-order where asked for",
        panel="Calibration",
        expert=True,
    )
    heal: int = option(
        0,
        "without epochs: steps of distillation on the calibration examples afterwards, with fixed masks",
        panel="Calibration",
        expert=True,
    )
    refit_target: str = option(
        "student",
        "whose outputs the refit aims at: student (as it was before the selection), or teacher",
        panel="Calibration",
        expert=True,
        names=REFIT_TARGETS,
    )
    structure: str = option(
        "heads",
        "what is removed as a unit, of structured, cap-f and first-order heads, or dimensions inside heads, besides "
        "neurons; of the other methods single weights, or 4x1 (4 in a row), or 2:4 (keeps 2 of every 4, which fixes "
        "--sparsity)",
        panel="Pruning",
        metavar="NAME",
    )
    basis: str = option(
        "own",
        "dimensions inside heads: own, as they are, or pca: before pruning, heads are turned so that the first "
        "dimensions carry the most, which changes nothing that is computed (--structure dimensions)",
        panel="Calibration",
        names=BASES,
        expert=True,
    )
    importance_examples: int = option(
        0,
        "training examples that importance is measured on before each removal, without dropout (cap-f, first-order); a "
        "large number for all, 0 to add it up over the training steps instead",
        panel="Selection",
        expert=True,
    )
    scope: str = option(
        "auto",
        "rank weights within each matrix or over all matrices: auto, matrix, global; type (smp, movement methods): "
        "matrices of one kind share what stays, by their mean score; row (wanda, sparsegpt, sds, multiflow): as many "
        "stay in each row",
        panel="Selection",
        names=SCOPES,
        expert=True,
    )
    floor: float = option(
        0.005,
        "share of its weights that each matrix keeps at least when all are ranked together",
        unit="share",
        panel="Selection",
        expert=True,
    )
    score_init: str = option(
        "magnitude",
        "start value of the scores: zero, or the magnitude of the weights",
        panel="Selection",
        names=SCORE_INITS,
        expert=True,
    )
    checkpoint_seconds: float = option(120.0, "seconds between checkpoints", resumable=True, panel="Run", expert=True)
    max_time: float = option(
        0.0, "save a checkpoint and stop after this many minutes, 0 for never", resumable=True, panel="Run"
    )
    store: str = option(
        "fp16",
        "type of the weights in the file: fp16, or fp32 to keep all bits that were trained",
        panel="Run",
        names=STORES,
        expert=True,
    )
    track: str = option(
        "",
        f"log the run to an experiment tracker as well: {', '.join(TRACKERS)}",
        resumable=True,
        panel="Run",
        metavar="NAME",
    )
    keep_work: bool = option(False, "keep the work folder of a finished run", resumable=True, panel="Run", expert=True)
    compile: bool = option(False, COMPILE, resumable=True, panel="Hardware", expert=True)
    timeout: float = option(TIMEOUT_MINUTES, TIMEOUT, resumable=True, panel="Hardware", expert=True)
    hardware: Hardware = field(default_factory=Hardware)

    def __post_init__(self) -> None:
        check_names(self)
        if self.track:
            check_name("tracker", self.track, TRACKERS)
        validity.check(self)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher itself is asked while the student is pruned, not only what it once answered."""
        refitted = self.refit and self.refit_target == "teacher"
        return "hid" in self.loss_names or refitted or self.heal > 0 or (self.staged and bool(self.source.text))

    @property
    def uses_labels(self) -> bool:
        """Whether labels are learned, or else only the model's own answers or those of a teacher."""
        return not (self.source.text or self.source.task in EMBEDDING_TASKS)

    @property
    def stair_list(self) -> tuple[float, ...]:
        """See `rises.stairs`."""
        return rises.stairs(self)

    @property
    def counts_time(self) -> bool:
        """Whether the target is a time, which has to be measured first."""
        return bool(self.target) and target.parse(self.target).kind == "latency"

    @property
    def from_teacher(self) -> bool:
        """Whether the student starts from the teacher's weights, as they are or calibrated."""
        return self.init != "pretrained"

    @property
    def calibrated_start(self) -> tuple[float, ...]:
        """The stairs of the calibration from which training starts; none where it starts from dense weights."""
        return rises.halving(self.start_sparsity, rises.UNTRAINED_STAIR) if self.start_sparsity else ()

    @property
    def start_sparsity(self) -> float:
        """The sparsity before the first step."""
        return rises.start(self)

    @property
    def one_shot(self) -> bool:
        """Whether it never trains, and cuts at once."""
        return METHODS[self.method].one_shot

    @property
    def staged(self) -> bool:
        """Whether the sparsity rises in a few stairs, at each of which scores are measured anew."""
        return METHODS[self.method].staged

    @property
    def masks_only(self) -> bool:
        """Whether the weights stay as they were pre-trained, and only masks are learned."""
        return METHODS[self.method].masks_only

    @property
    def calibrated(self) -> bool:
        """Whether scores are measured on examples that are drawn for it; only then it can do without training."""
        return self.staged or self.one_shot

    @property
    def rises_often(self) -> bool:
        """Whether the sparsity rises all the time, unless `update_every` says otherwise."""
        return not self.stair_list and not (METHODS[self.method].structured and self.structure == STRUCTURES[0])

    def teacher_passes(self, n_examples: int, n_classes: int) -> int:
        """Passes over `n_examples` for the teacher: chosen, or enough for a small set, or many classes, to be learned;
        0 if given."""
        if self.teacher or self.teacher_epochs:
            return 0 if self.teacher else self.teacher_epochs
        return min(8, max(2, math.ceil(max(150, 20 * n_classes) * self.batch_size / max(1, n_examples))))

    @property
    def trains_weights(self) -> bool:
        """Whether weights are trained while the student is pruned, or afterwards to heal."""
        return bool(self.epochs or self.heal) and (self.train_head or not self.masks_only)

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
        usual = METHODS[self.method].losses if self.epochs else ("kd",)
        chosen = split_list(self.losses) or tuple(name for name in usual if self.uses_labels or name != "ce")
        return tuple(
            sorted(set(chosen), key=lambda name: (name not in LOSSES, LOSSES.index(name) if name in LOSSES else 0))
        )

    @property
    def out_folder(self) -> Path:
        """The output folder, given or derived."""
        structure = "" if self.structure == STRUCTURES[0] else f"-{self.structure.replace(':', '-')}"
        much = self.target.replace("=", "-") or f"{self.sparsity:g}"
        return Path(self.out or self.named(f"{self.method}{structure}-{much}"))

    def named(self, what: str) -> Path:
        """The folder of a run, or of several, that is not given: by model, task, and `what` it is."""
        name, _, revision = self.model.partition("@")
        model = "-".join([name.rstrip("/").rsplit("/", 1)[-1], *filter(None, revision.split("/"))])
        return Path("runs") / f"{model}-{self.source.name}-{what}"
