"""What a preset means for one run: by criterion, and in the preset `paper` by task and sparsity as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from capcli.config.names import EMBEDDING_TASKS, OF_CRITERION, PRESETS, QUESTION_TASKS
from capcli.config.patterns import BLOCK, BLOCKS

ALL_EXAMPLES = 1_000_000  # more than any task of the paper has


@dataclass(frozen=True, kw_only=True)
class PresetRow:
    """Values of a preset for some runs only: those that have each of these things; what is empty holds for all.

    tasks: names. criteria: of the method. structure: what is removed together. above: the sparsity is more than this.
    """

    values: dict[str, Any]
    tasks: tuple[str, ...] = ()
    criteria: tuple[str, ...] = ()
    structure: str = ""
    above: float | None = None

    def holds(self, task: str, criterion: str, structure: str, sparsity: float) -> bool:
        """Whether a run is one of these."""
        named = all(not some or name in some for name, some in ((task, self.tasks), (criterion, self.criteria)))
        return named and structure == (self.structure or structure) and (self.above is None or sparsity > self.above)


_FIRST, _MOVING, _SOFT = ("first-order",), ("movement", "soft-movement"), ("soft-movement",)
_NEARER_TO_97 = 0.935  # than to 90 %; the sources name the weight of the regulariser for these two


def _lambdas(tasks: tuple[str, ...], at_90: float, at_97: float) -> tuple[PresetRow, PresetRow]:
    """The weight of the score regulariser."""
    return (
        PresetRow(values={"reg_weight": at_90}, criteria=_SOFT, tasks=tasks),
        PresetRow(values={"reg_weight": at_97}, criteria=_SOFT, tasks=tasks, above=_NEARER_TO_97),
    )


# With every preset. A model that learns its own vectors begins with a loss of 0, which adds up to no importance.
OF_TASK = (PresetRow(values={"importance_examples": 512}, tasks=EMBEDDING_TASKS, criteria=_FIRST),)
# The block of oBERT that is nearest to its usual one and cuts no block of 4 into pieces.
OF_STRUCTURE = (
    PresetRow(
        values={"fisher_block": OF_CRITERION["obert"]["fisher_block"] // BLOCK * BLOCK},
        criteria=("obert",),
        structure=BLOCKS,
    ),
)
# Over `PRESETS`; later rows go over earlier ones.
PRESET_ROWS: dict[str, tuple[PresetRow, ...]] = {
    "paper": (
        # Classification; the weights of MNLI for all sets that the paper does not have.
        *_lambdas((), 290.0, 680.0),
        *_lambdas(("qqp",), 190.0, 550.0),
        # SQuAD: warm-up 5,400 of about 55,300 steps, dense as long, final twice as long.
        PresetRow(
            values={"batch_size": 16, "lr": 3e-5, "unsupervised_weight": 0.5, "supervised_weight": 0.0},
            tasks=QUESTION_TASKS,
        ),
        PresetRow(
            values={"lr_warmup": 0.1, "dense_share": 0.1, "final_share": 0.2}, tasks=QUESTION_TASKS, criteria=_MOVING
        ),
        *_lambdas(QUESTION_TASKS, 600.0, 2000.0),
        PresetRow(values={"tau": 0.3, "unsupervised_weight": 0.3}, tasks=QUESTION_TASKS, criteria=_FIRST),
        # Heads: a tenth is removed at once and two epochs follow, so that 90 % takes 18.
        PresetRow(
            values={
                "dense_share": 0.0,
                "final_share": 0.0,
                "lr_schedule": "cycle",
                "importance_examples": ALL_EXAMPLES,
            },
            criteria=_FIRST,
            structure="heads",
        ),
        *(
            PresetRow(values={"epochs": 2 * n}, criteria=_FIRST, structure="heads", above=(n - 1) / 10)
            for n in range(1, 11)
        ),
        # Dimensions are not in the paper: the schedule of GRAIN.
        PresetRow(
            values={"epochs": 20, "lr": 3e-5, "dense_share": 0.2, "final_share": 0.6},
            criteria=_FIRST,
            structure="dimensions",
        ),
    ),
}


def preset_values(preset: str, *, task: str, criterion: str, structure: str, sparsity: float) -> dict[str, Any]:
    """The defaults of a run with this preset, where they differ from those of the options; of its criterion as well."""
    table = PRESETS[preset]
    found = {**table.get("*", {}), **OF_CRITERION.get(criterion, {}), **table.get(criterion, {})}
    for row in (*OF_TASK, *OF_STRUCTURE, *PRESET_ROWS.get(preset, ())):
        if row.holds(task, criterion, structure, sparsity):
            found |= row.values
    return found
