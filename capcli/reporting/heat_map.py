"""The heat map of sparsity: a row per kind of matrix, a column per layer."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from capcli.records.parts import MatrixSparsity
from capcli.reporting.text import count, in_percent, named, percent, plain
from capcli.stored import finite

MAX_MATRICES = 3000
MAX_WEIGHTS = 1e15  # of one matrix; more is a damaged report
MAX_LAYERS, MAX_PLACES = 100, 14  # rows and columns that are drawn

# --------------------------------------------------------------------------------------------------------- matrix names

Place = tuple[str, ...]

# The order in which a layer computes; a matrix that matches none comes last, in the order of the report.
READING_ORDER = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(^|\.)(q|query|q_lin|q_proj|query_proj|qkv|c_attn|query_key_value)$",
        r"(^|\.)(k|key|k_lin|k_proj|key_proj)$",
        r"(^|\.)(v|value|v_lin|v_proj|value_proj)$",
        r"att\w*\.(output|dense|out|o|c_proj|o_proj|out_proj)|(^|\.)(out_lin|o|o_proj|out_proj)$|^attention$",
        r"gate",
        r"intermediate|(^|\.)(up_proj|c_fc|fc1|lin1|wi\w*|ffn|w1)$",
        r"(^|\.)(output|down_proj|c_proj|fc2|lin2|wo|ffn_output|w2)$",
    )
)


def matrix_labels(names: Sequence[str]) -> list[tuple[str, str]]:
    """(layer, place in the layer) of each matrix, short but unambiguous among `names`; any architecture.

    `bert.encoder.layer.3.attention.self.query.weight` becomes ("3", "query"). The first number in a name is its layer;
    stacks are told apart by the words that differ ("decoder 3"). Names without a number are in the layer "other".
    """
    split = [_split(plain(name)) for name in names]
    stacks = sorted({stack for stack, layer, _ in split if layer})
    rows = [_row_label(stack, layer, stacks) for stack, layer, _ in split]
    places = [tuple(word for word in place if not word.isdecimal()) for _, _, place in split]
    if len(set(zip(rows, places, strict=True))) < len(set(split)):
        places = [place for _, _, place in split]
    short = _short_names(set(places))
    return [(row, short[place]) for row, place in zip(rows, places, strict=True)]


def _split(name: str) -> tuple[Place, str, Place]:
    """(words before the layer number, the number or "", words after it) of a parameter name."""
    words = [word for word in name.split(".") if word not in ("weight", "self")]
    if len(words) > 1 and words[-1] == "dense" and words[-2] != "attention":
        words.pop()
    at = next((i for i, word in enumerate(words) if re.fullmatch("[0-9]{1,6}", word)), None)
    return ((), "", tuple(words)) if at is None else (tuple(words[:at]), words[at], tuple(words[at + 1 :]))


def _row_label(stack: Place, layer: str, stacks: Sequence[Place]) -> str:
    own = [word for word in stack if not all(word in other for other in stacks)]
    return " ".join([*own, layer]) if layer else "other"


def _short_names(places: Iterable[Place]) -> dict[Place, str]:
    """The shortest ending of each place that no other place has."""
    places = list(places)
    endings = Counter(place[-n:] for place in places for n in range(1, len(place) + 1))
    unique = {p: next((n for n in range(1, len(p) + 1) if endings[p[-n:]] == 1), len(p)) for p in places}
    return {place: ".".join(place[-n:]) for place, n in unique.items()}


def _reading_rank(place: str) -> int:
    return next((i for i, pattern in enumerate(READING_ORDER) if pattern.search(place)), len(READING_ORDER))


# ------------------------------------------------------------------------------------------------------------- heat map

CELL_WIDTH, CELL_HEIGHT, HEAD_HEIGHT = 92, 26, 30
LETTER_WIDTH, LABEL_LETTERS = 7, 16

# Yellow to blue, even steps in lightness: tells apart with any colour vision and in grey print.
SCALE = (
    (237, 248, 177),
    (199, 233, 180),
    (127, 205, 187),
    (65, 182, 196),
    (29, 145, 192),
    (34, 94, 168),
    (12, 44, 132),
)


@dataclass(frozen=True)
class Cell:
    """One rectangle of the heat map."""

    x: int
    y: int
    text: str
    fill: str
    ink: str
    title: str


@dataclass(frozen=True)
class HeatMap:
    """A drawn heat map; `low` and `high` are the sparsities at the ends of the colour scale."""

    label_width: int
    rows: list[tuple[int, str]]
    columns: list[tuple[int, str]]
    cells: list[Cell]
    low: str
    high: str
    width: int
    height: int
    n_hidden: int


@dataclass(frozen=True)
class _Matrix:
    name: str
    sparsity: float
    kept: float | None
    n_weights: float | None

    @classmethod
    def read(cls, row: MatrixSparsity) -> _Matrix | None:
        """A row of `per_matrix`, or None when its sparsity is not a fraction."""
        sparsity = finite(row.sparsity)
        if sparsity is None or not 0 <= sparsity <= 1:
            return None
        n_weights = math.prod(map(float, row.shape))
        kept = finite(row.kept)
        if kept is None or not 0 <= kept <= n_weights <= MAX_WEIGHTS:
            return cls(named(row.name, 160), sparsity, None, None)
        return cls(named(row.name, 160), sparsity, kept, n_weights)

    def title(self) -> str:
        kept = f", {count(self.kept)} of {count(self.n_weights)} weights kept" if self.n_weights else ""
        return f"{self.name}: {percent(self.sparsity)} removed{kept}"


def heat_map(rows: Sequence[MatrixSparsity]) -> HeatMap | None:
    """Sparsity per layer (rows) and place in the layer (columns), with pooled margins; None if there is none."""
    matrices = [matrix for matrix in map(_Matrix.read, rows[:MAX_MATRICES]) if matrix]
    if not matrices:
        return None
    labels = matrix_labels([matrix.name for matrix in matrices])
    layers = list(dict.fromkeys(row for row, _ in sorted(labels, key=lambda label: _natural(label[0]))))[:MAX_LAYERS]
    places = list(dict.fromkeys(place for _, place in sorted(labels, key=lambda label: _reading_rank(label[1]))))
    places = places[:MAX_PLACES]
    groups: dict[tuple[str, str], list[_Matrix]] = {}
    for (layer, place), matrix in zip(labels, matrices, strict=True):
        for key in ((layer, place), (layer, ""), ("", place), ("", "")):
            groups.setdefault(key, []).append(matrix)
    return _drawn(groups, layers, places, len(rows) - len(matrices))


def _natural(label: str) -> tuple[bool, str, int]:
    stack, _, layer = label.rpartition(" ")
    return (label == "other", stack, int(layer) if layer.isdecimal() else 0)


def _pooled(group: Sequence[_Matrix]) -> float | None:
    """Sparsity of several matrices together, None unless the weights of all of them are known."""
    if len(group) == 1:
        return group[0].sparsity
    if any(matrix.kept is None or not matrix.n_weights for matrix in group):
        return None
    return 1 - sum(matrix.kept or 0 for matrix in group) / sum(matrix.n_weights or 0 for matrix in group)


def _drawn(
    groups: Mapping[tuple[str, str], Sequence[_Matrix]], layers: list[str], places: list[str], n_unreadable: int
) -> HeatMap:
    values = [matrix.sparsity for layer in layers for place in places for matrix in groups.get((layer, place), ())]
    low, high = _scale_ends(min(values), max(values))
    rows = [(HEAD_HEIGHT + i * CELL_HEIGHT + 8 * (not layer), layer) for i, layer in enumerate([*layers, ""])]
    label_width = 16 + LETTER_WIDTH * max(3, *(min(len(layer), LABEL_LETTERS) for layer in layers))
    columns = [(label_width + i * CELL_WIDTH + 8 * (not place), place) for i, place in enumerate([*places, ""])]
    cells = [
        _cell(x, y, groups[layer, place], low, high)
        for y, layer in rows
        for x, place in columns
        if (layer, place) in groups
    ]
    n_hidden = n_unreadable + len(groups["", ""]) - len(values)
    width, height = columns[-1][0] + CELL_WIDTH + 1, rows[-1][0] + CELL_HEIGHT + 1
    return HeatMap(label_width, rows, columns, cells, percent(low), percent(high), width, height, n_hidden)


def _scale_ends(low: float, high: float, least: float = 0.05) -> tuple[float, float]:
    """Ends of the colour scale, far enough apart that differences without meaning look the same."""
    if high - low < least:
        low = max(0.0, min((low + high - least) / 2, 1 - least))
        high = low + least
    return low, high


def _cell(x: int, y: int, group: Sequence[_Matrix], low: float, high: float) -> Cell:
    pooled = _pooled(group)
    title = group[0].title() if len(group) == 1 else f"{count(len(group))} matrices together: {percent(pooled)} removed"
    if pooled is None:
        return Cell(x, y, "–", "none", "currentColor", title)
    red, green, blue = _colour((pooled - low) / (high - low))
    ink = "#fff" if 0.299 * red + 0.587 * green + 0.114 * blue < 104 else "#10151c"
    return Cell(x, y, in_percent(pooled), f"#{red:02x}{green:02x}{blue:02x}", ink, title)


def gradient() -> str:
    """The colour scale as CSS colours."""
    return ", ".join(f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in SCALE)


def _colour(share: float) -> tuple[int, int, int]:
    place = max(0.0, min(share, 1.0)) * (len(SCALE) - 1)
    at = min(int(place), len(SCALE) - 2)
    mixed = [round(a + (b - a) * (place - at)) for a, b in zip(SCALE[at], SCALE[at + 1], strict=True)]
    return mixed[0], mixed[1], mixed[2]
