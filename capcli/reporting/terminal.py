"""Reports on a terminal: summaries of runs, results, exports and plans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from capcli.reporting import results, tables
from capcli.reporting.run_page import MAX_ROWS, Row, metric_rows
from capcli.reporting.text import (
    NOT_MEASURED,
    byte_size,
    count,
    counted,
    duration,
    named,
    number,
    percent,
    plain,
    times_faster,
    times_smaller,
)
from capcli.stored import finite, mapping, part, sequence

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group
    from rich.table import Table
    from rich.text import Text

# ---------------------------------------------------------------------------------------------------------------- facts


def prune_rows(report: Mapping[str, Any], path: str | PurePath | None = None) -> list[Row]:
    """The facts of one pruning run, in reading order, as (label, text); the metrics are `prune_summary`'s table."""
    sparsity, size = part(report, "sparsity"), part(report, "size")
    smaller = times_smaller(size.get("dense_bytes"), size.get("artifact_bytes"))
    rows = [
        ("model", named(report.get("model"))),
        ("task", named(report.get("task"))),
        ("method", named(report.get("method"))),
        ("measured on", _measured_on(part(report, "metrics"))),
        ("sparsity", f"{_removed(sparsity)}, requested {percent(sparsity.get('requested'))}"),
        ("whole model", percent(sparsity.get("whole_model"))),
        ("dense size", byte_size(size.get("dense_bytes"))),
        ("pruned size", byte_size(size.get("artifact_bytes")) + (f", {smaller}" if smaller else "")),
        ("time", duration(part(report, "timing").get("total_seconds"))),
    ]
    return rows if path is None else [*rows, ("written to", plain(path, 4096))]


def _removed(sparsity: Mapping[str, Any]) -> str:
    """`90.00 % (530,842 kept)`."""
    kept = sparsity.get("kept_weights")
    return percent(sparsity.get("achieved")) + (f" ({count(kept)} kept)" if finite(kept) is not None else "")


def _measured_on(metrics: Mapping[str, Any]) -> str:
    """Examples and split of the metrics."""
    return f"{count(metrics.get('n_examples'))} examples, {named(metrics.get('split'), 60)}"


# ------------------------------------------------------------------------------------------------------------- terminal


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """A table where it fits, else each of its rows as a list: no number breaks on a narrow terminal."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    n_text: int
    narrow: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        from rich.measure import Measurement
        from rich.text import Text

        table = _drawn(self.columns, self.rows, self.n_text, self.narrow)
        if Measurement.get(console, options.update(max_width=10_000), table).maximum <= options.max_width:
            yield table
            return
        for row in self.rows:
            yield Text(" ".join(filter(None, row[: self.n_text])), style="bold", overflow="fold")
            cells = list(zip(self.columns, row, strict=True))[self.n_text :]
            yield facts((f"  {name}", text) for name, text in cells)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, n_text: int = 1, narrow: bool = False) -> _Rows:
    """Rows of text, of whose columns the first `n_text` are words."""
    return _Rows(columns=columns, rows=list(rows), n_text=n_text, narrow=narrow)


def _drawn(columns: Sequence[str], rows: Iterable[Sequence[str]], n_text: int, narrow: bool) -> Table:
    """A plain table, the first `n_text` columns flush left. Every cell is a `Text`: rich never reads markup in it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=narrow)
    for place, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if place < n_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def facts(rows: Iterable[Row]) -> Table:
    """Names and values in two columns."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(Text(label), Text(text))
    return grid


def _gate_lines(result: Mapping[str, Any]) -> Table | None:
    from rich.table import Table
    from rich.text import Text

    colours = {"passed": "green", "failed": "bold red"}
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for gate in results.gates_of(result):
        grid.add_row(Text(gate.outcome, style=colours[gate.outcome]), Text(gate.found))
    return grid if grid.row_count else None


def prune_summary(report: Mapping[str, Any], path: str | PurePath | None = None) -> Group:
    """What `cap prune` shows at its end."""
    from rich.console import Group

    metrics = [(m.name, m.dense, m.pruned, m.retention, m.interval) for m in metric_rows(part(report, "metrics"))]
    table = _table(("metric", "dense", "pruned", "retention", "95 % interval"), metrics)
    return Group(facts(prune_rows(report, path)), "", table)


def eval_summary(result: Mapping[str, Any]) -> Group:
    """What `cap eval` shows: facts, metrics, differences from the baseline, changed texts, gates."""
    return _summary("eval", result)


def probe_summary(result: Mapping[str, Any]) -> Group:
    """What `cap probe` shows: facts, one row per task, differences from each baseline, layers, gates."""
    return _summary("probe", result)


def moves_summary(found: Mapping[str, Any]) -> Group:
    """What `--compare` shows: what moved beyond the noise, what was counted, gates."""
    return _summary("compare", found)


def _summary(command: str, result: Mapping[str, Any]) -> Group:
    from rich.console import Group
    from rich.text import Text

    shown: list[Any] = [facts(results.facts(command, result))]
    drawn = tables.tables(command, result)
    for table in drawn:
        shown += ["", Text(table.title, style="bold", overflow="fold")] if len(drawn) > 1 else [""]
        shown.append(_table(table.columns, table.rows, n_text=table.n_text, narrow=True))
    if notes := results.notes(result):
        shown += ["", *(Text(f"note: {note}", overflow="fold") for note in notes)]
    gates = _gate_lines(result)
    return Group(*shown, *(("", gates) if gates else ()))


def export_summary(found: Mapping[str, Any]) -> Group:
    """What `cap export` shows: what was written, what it gives, and how it was checked."""
    from rich.console import Group

    size, check, words = part(found, "size"), part(found, "check"), part(found, "vocabulary")
    rows = [
        ("format", named(found.get("format"))),
        ("folder", named(found.get("out"))),
        ("smaller file", _gain(size.get("dense_bytes"), size.get("weights_bytes"))),
        ("less memory", _gain(size.get("dense_bytes"), size.get("memory_bytes")) + ", weights once loaded"),
        ("faster", _faster(part(found, "speed"))),
        ("checked", _checked(check)),
    ]
    if words:
        rates = part(words, "unknown_rate")
        rows.append(
            (
                "vocabulary",
                f"{count(words.get('kept'))} of {count(words.get('of'))} tokens; unknown on "
                + f"{named(words.get('split'), 40)}: {percent(rates.get('after'))}, "
                + f"{percent(rates.get('before'))} before",
            )
        )
    metrics = part(found, "metrics")
    table = [
        (named(name, 60), number(value), number(part(metrics, "after").get(name)))
        for name, value in list(part(metrics, "before").items())[:MAX_ROWS]
    ]
    shown = _table(("metric", "before", "after"), table)
    return Group(facts(rows), "", shown) if table else Group(facts(rows))


def _gain(dense: Any, ours: Any) -> str:
    """`yes: 12.3 MB, 7.4× smaller than dense`, or `no: 90.9 MB`."""
    times = _times(dense, ours)
    return f"yes: {byte_size(ours)}, {times} than dense" if times else f"no: {byte_size(ours)}"


def _faster(speed: Mapping[str, Any]) -> str:
    """`yes: 1.8× faster at batch 1, …`, `no: …`, or `no` where nothing can be faster."""
    if not speed:
        return "no: as fast as the dense model"
    faster = any((finite(part(speed, name).get("times")) or 0) > 1.05 for name in speed if "batch" in name)
    return f"{'yes' if faster else 'no'}: {speed_lines(speed)}"


def speed_lines(speed: Mapping[str, Any]) -> str:
    """How many times faster by batch size, and under which conditions."""
    found = {name.removeprefix("batch_"): part(speed, name).get("times") for name in speed if "batch" in name}
    times = ", ".join(f"{times_faster(value)} at batch {size}" for size, value in found.items())
    return f"{times}; length {count(speed.get('length'))}, {counted(speed.get('threads'), 'thread')}"


def predict_summary(found: Mapping[str, Any]) -> Table:
    """What `cap predict -o` shows."""
    notes = [("note", named(note, 300)) for note in sequence(found.get("notes"))]
    return facts([("answers", f"{predict_line(found)}, in {named(found.get('out'))}"), *notes])


def predict_line(found: Mapping[str, Any]) -> str:
    """How many texts were answered, how fast, and by what."""
    runtime, rate = part(found, "runtime"), finite(found.get("texts_per_second"))
    speed = f"{duration(found.get('seconds'))}, {count(round(rate)) if rate else 'not measured'} per second"
    return f"{counted(found.get('n_texts'), 'text')} in {speed}, {named(runtime.get('described'))}"


def _checked(check: Mapping[str, Any]) -> str:
    agreement = finite(check.get("argmax_agreement"))
    same = "" if agreement is None else f", {percent(agreement)} the same answer"
    gap = finite(check.get("largest_difference"))
    shown = NOT_MEASURED if gap is None else f"{gap:.2g}"
    texts = f"{count(check.get('texts'))} texts of {named(check.get('of'), 80)}"
    return f"reopened; {texts}: largest logit difference {shown}{same}"


def plan_summary(found: Mapping[str, Any]) -> Group:
    """What `cap export --plan` shows: one row per format."""
    from rich.console import Group

    dense = found.get("dense_bytes")
    rows: list[tuple[str, ...]] = []
    for row in map(mapping, sequence(found.get("formats"))):
        name = named(row.get("format"), 20)
        if row.get("refused"):
            rows.append((name, "not possible", "", named(row["refused"], 200)))
            continue
        cells = []
        for key in ("weights_bytes", "memory_bytes"):
            times = _times(dense, row.get(key))
            cells.append(byte_size(row.get(key)) + (f", {times}" if times else ""))
        left = finite(row.get("matrices_left"))
        faster = left is not None and left < 0.999
        rows.append((name, *cells, f"computes {percent(left)} of the matrices" if faster else "no"))
    table = _table(("format", "file", "memory", "faster"), rows)
    return Group(facts([("model", named(found.get("model"))), ("dense", byte_size(dense))]), "", table)


def _times(dense: Any, ours: Any) -> str:
    """How many times smaller, unless it is about the same."""
    large, small = finite(dense), finite(ours)
    return times_smaller(dense, ours) if large and small and large > 1.05 * small else ""
