"""Reports on a terminal: summaries of runs, results, exports and plans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from capcli.records.exported import Check, ExportMetrics, ExportPlan, ExportRecord, FactorTable, Ladder, Speed
from capcli.records.measured import Result
from capcli.records.parts import LABELS, Gate
from capcli.records.predicted import Predictions
from capcli.records.pruned import Report
from capcli.records.pushed import Pushed
from capcli.records.swept import Sweep
from capcli.reporting import exits, ladders, latency, results, sweeps, tables
from capcli.reporting.budget import left_rows, requested
from capcli.reporting.headline import compared_with
from capcli.reporting.run_page import MAX_ROWS, Row, metric_rows
from capcli.reporting.text import (
    NOT_MEASURED,
    byte_size,
    count,
    counted,
    dense_sizes,
    duration,
    first_few,
    named,
    number,
    percent,
    plain,
    times_faster,
    times_smaller,
    times_smaller_than,
)
from capcli.stored import finite

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group
    from rich.table import Table
    from rich.text import Text

# ---------------------------------------------------------------------------------------------------------------- facts


def prune_rows(report: Report, path: str | PurePath | None = None) -> list[Row]:
    """The facts of one pruning run, in reading order, as (label, text); the metrics are `prune_summary`'s table."""
    metrics, sparsity, size = report.metrics, report.sparsity, report.size
    kept = "" if sparsity.kept_weights is None else f" ({count(sparsity.kept_weights)} kept)"
    rows = [
        ("model", named(report.model)),
        ("task", named(report.task)),
        ("method", named(report.method)),
        *([("structure", named(report.structure))] if report.structure else []),
        ("measured on", f"{count(metrics.n_examples)} examples, {named(metrics.split, 60)}"),
        *_reference_rows(metrics.reference),
        ("sparsity", f"{percent(sparsity.achieved)}{kept}, requested {requested(report)}"),
        *left_rows(report),
        ("whole model", percent(sparsity.whole_model)),
        ("dense size", dense_sizes(size)),
        ("pruned size", ", ".join([byte_size(size.artifact_bytes), *times_smaller_than(size)])),
        ("time", duration(report.timing.total_seconds)),
    ]
    return rows if path is None else [*rows, ("written to", plain(path, 4096))]


def _reference_rows(reference: str) -> list[Row]:
    """What was compared with, where that was not labels."""
    return [("compared with", compared_with(reference))] if compared_with(reference) else []


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


def _gate_lines(gates: Sequence[Gate]) -> Table | None:
    from rich.table import Table
    from rich.text import Text

    colours = {"passed": "green", "failed": "bold red"}
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for gate in map(results.gate, gates[:MAX_ROWS]):
        grid.add_row(Text(gate.outcome, style=colours[gate.outcome]), Text(gate.found))
    return grid if grid.row_count else None


def prune_summary(report: Report, path: str | PurePath | None = None) -> Group:
    """What `cap prune` shows at its end."""
    from rich.console import Group

    found = metric_rows(report.metrics)
    if report.metrics.reference == LABELS:
        metrics = [(m.name, m.dense, m.pruned, m.chance, m.retention, m.interval) for m in found]
        table = _table(("metric", "dense", "pruned", "chance", "retention", "95 % interval"), metrics)
    else:
        table = _table(
            ("metric", "pruned", "chance", "95 % interval"), [(m.name, m.pruned, m.chance, m.interval) for m in found]
        )
    gates = _gate_lines(report.gates or ())
    return Group(facts(prune_rows(report, path)), "", table, *_latency_lines(report), *(("", gates) if gates else ()))


def sweep_summary(found: Sweep, path: str | PurePath) -> Group:
    """What a sweep shows at its end: facts, a row for each configuration, why some do not pass."""
    from rich.console import Group
    from rich.text import Text

    about = facts([*sweeps.facts(found), ("written to", plain(path, 4096))])
    table = _table(sweeps.columns(found), sweeps.rows(found), n_text=sweeps.N_TEXT, narrow=True)
    shown: list[Any] = [about, "", table, Text(sweeps.HINT, style="dim")]
    if reasons := sweeps.reasons(found):
        shown += ["", facts(reasons)]
    return Group(*shown)


def _latency_lines(report: Report) -> list[Any]:
    """Latency of the dense and the pruned model, if it was measured, and how."""
    from rich.text import Text

    shown = latency.side_by_side(report)
    rows = [(line.label, line.values["dense"], line.values["pruned"]) for line in shown["lines"]]
    how = f"measured in turn: {shown['conditions']}. {shown['remark']}".rstrip()
    return ["", _table(("latency", "dense", "pruned"), rows), Text(how, style="dim")] if rows else []


def result_summary(result: Result) -> Group:
    """What `cap eval`, `cap probe` and `--compare` show: facts, tables, notes, gates."""
    from rich.console import Group
    from rich.text import Text

    shown: list[Any] = [facts(results.facts(result))]
    drawn = tables.tables(result)
    for table in drawn:
        shown += ["", Text(table.title, style="bold", overflow="fold")] if len(drawn) > 1 else [""]
        shown.append(_table(table.columns, table.rows, n_text=table.n_text, narrow=True))
    if notes := results.notes(result):
        shown += ["", *(Text(f"note: {note}") for note in notes)]
    gates = _gate_lines(result.gates)
    return Group(*shown, *(("", gates) if gates else ()))


def export_summary(found: ExportRecord) -> Group:
    """What `cap export` shows: what was written, what it gives, and how it was checked."""
    from rich.console import Group
    from rich.text import Text

    size = found.size
    rows = [
        ("format", named(found.format)),
        ("folder", named(found.out)),
        ("runtime", named(found.runtime)),
        ("smaller file", _gain(size.dense_bytes, size.weights_bytes)),
        ("less memory", _gain(size.dense_bytes, size.memory_bytes) + ", weights once loaded"),
        ("faster", EARLY if found.exits else _faster(found.speed)),
        ("checked", _checked(found.check)),
    ]
    if table := found.factors:
        rows.append(("factors", factors_line(table)))
    if words := found.vocabulary:
        rates = words.unknown_rate
        rows.append(
            (
                "vocabulary",
                f"{count(words.kept)} of {count(words.of)} tokens; unknown on {named(words.split, 40)}: "
                f"{percent(rates.after)}, {percent(rates.before)} before",
            )
        )
    metrics = found.metrics or ExportMetrics()
    rows += _reference_rows(metrics.reference)
    labelled = metrics.reference == LABELS  # or the model itself agrees with itself
    measured = [
        (named(name, 60), *([number(value)] * labelled), number(metrics.after.get(name)))
        for name, value in list(metrics.before.items())[:MAX_ROWS]
    ]
    columns = ("metric", *(["before"] * labelled), "after")
    shown: list[Any] = [ladder_summary(found.ladder), ""] if found.ladder else []
    shown += [facts(rows), *(["", _table(columns, measured)] if measured else [])]
    if early := found.exits:
        shown += ["", _table(exits.columns(early), exits.rows(early)), Text(exits.about(early))]
    return Group(*shown)


def _gain(dense: Any, ours: Any) -> str:
    """`yes: 12.3 MB, 7.4× smaller than dense`, or `no: 90.9 MB`."""
    times = _times(dense, ours)
    return f"yes: {byte_size(ours)}, {times} than dense" if times else f"no: {byte_size(ours)}"


EARLY = "with one text at a time, by the layers that it does not need; cap eval measures it"


def _faster(speed: Speed | None) -> str:
    """`yes: 1.8× faster at batch 1, …`, `no: …`, or `no` where nothing can be faster."""
    if not speed:
        return "no: as fast as the dense model in PyTorch"
    faster = any((finite(row.times) or 0) > 1.05 for row in speed.batches.values())
    return f"{'yes' if faster else 'no'}: {speed_lines(speed)}"


def factors_line(table: FactorTable) -> str:
    """What is left of the weights of the matrices, in which ranks, and what they were fitted and healed on."""
    ranks = [row.rank for row in table.matrices if row.rank is not None]
    whole = len(table.matrices) - len(ranks)
    parts = [
        f"{percent(table.left)} of the weights of the dense matrices",
        f"ranks {count(min(ranks, default=0))} to {count(max(ranks, default=0))} of {count(len(ranks))} matrices",
        *([f"{count(whole)} left whole"] * bool(whole)),
        f"fitted on {counted(table.texts, 'training text')}" if table.texts else "fitted to the weights alone",
        *([f"healed in {counted(table.healed, 'epoch')}"] * bool(table.healed)),
    ]
    return "; ".join(parts)


def speed_lines(speed: Speed) -> str:
    """How many times faster by batch size, and under which conditions."""
    rows = {name.removeprefix("batch_"): row for name, row in speed.batches.items()}
    times = ", ".join(f"{times_faster(row.times)} at batch {size}" for size, row in rows.items())
    return f"{times}; length {count(speed.length)}, {counted(speed.threads, 'thread')}"


def push_summary(found: Pushed) -> Group:
    """The files with their sizes and what they change, where they are now, and what to do with them."""
    from rich.console import Group

    total = byte_size(sum(file.bytes for file in found.files))
    files = [(plain(file.name), byte_size(file.bytes), file.change or "") for file in found.files]
    table = _table(("file", "size", "in the repository"), [*files, ("together", total, "")])
    rows = [("would go to" if found.dry_run else "is at", found.url + _visible(found))]
    rows += [("commit", found.commit)] if found.commit else []
    rows += [("left as it is", first_few(found.others))] if found.others else []
    rows += [("note", plain(note, 300)) for note in found.notes]
    if found.dry_run:
        return Group(table, facts([*rows, ("next", "the same command without --dry-run")]))
    commands = (f"cap eval {found.repo}@{found.commit}", f"cap predict {found.repo} texts.csv -o answers.jsonl")
    return Group(table, facts([*rows, *(("next", command) for command in commands)]))


def _visible(found: Pushed) -> str:
    """Who can see a repository, and whether it is there already, as far as that is known."""
    if found.private is None:
        return ""
    return f" ({'new, ' if found.created else ''}{'private' if found.private else 'public'})"


def predict_summary(found: Predictions) -> Table:
    """What `cap predict -o` shows."""
    rows = [("answers", f"{predict_line(found)}, in {named(found.out)}")]
    return facts([*rows, *(("note", named(note, 300)) for note in found.notes)])


def predict_line(found: Predictions) -> str:
    """How many texts were answered, how fast, and by what."""
    speed = f"{duration(found.seconds)}, {count(round(found.texts_per_second))} per second"
    return f"{counted(found.n_texts, 'text')} in {speed}, {named(found.runtime.described)}"


def _checked(check: Check) -> str:
    same = "" if check.argmax_agreement is None else f", {percent(check.argmax_agreement)} the same answer"
    gap = finite(check.largest_difference)
    shown = NOT_MEASURED if gap is None else f"{gap:.2g}"
    texts = f"{count(check.texts)} texts of {named(check.of, 80)}"
    return f"reopened; {texts}: outputs differ by {shown} at most{same}"


def plan_summary(found: ExportPlan) -> Group:
    """What `cap export --plan` shows: one row for each way to ship the model, and the command of each."""
    from rich.console import Group

    about = [("model", named(found.model)), ("dense", f"{byte_size(found.dense_bytes)} in 32 bits")]
    table = _table(ladders.PLAN, ladders.planned(found), n_text=ladders.N_TEXT, narrow=True)
    shown: list[Any] = [facts(about), "", table, "", facts(ladders.commands(found))]
    left_out = ladders.left_out(found.rungs)
    return Group(*shown, *(("", facts(left_out)) if left_out else ()))


def ladder_summary(found: Ladder) -> Group:
    """What was tried to keep to limits, from the most faithful on."""
    from rich.console import Group

    table = _table(ladders.columns(found), ladders.tried(found), n_text=ladders.N_TEXT - 1, narrow=True)
    left_out = ladders.left_out([rung for rung in found.rungs if rung.refused])
    return Group(table, *(("", facts(left_out)) if left_out else ()))


def _times(dense: Any, ours: Any) -> str:
    """How many times smaller, unless it is about the same."""
    large, small = finite(dense), finite(ours)
    return times_smaller(dense, ours) if large and small and large > 1.05 * small else ""
