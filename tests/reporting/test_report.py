"""Documents: whatever the data holds, every sink parses, nothing acts, and no figure claims more than was measured."""

from __future__ import annotations

import copy
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import yaml
from rich.console import Console

from capcli.errors import FileError
from capcli.records.codec import from_json
from capcli.records.measured import EvalResult, ProbeResult
from capcli.records.parts import Gate, MatrixSparsity
from capcli.records.pruned import Report
from capcli.reporting import charts, documents, heat_map, terminal
from capcli.reporting.card import render_card
from capcli.reporting.run_page import view
from capcli.reporting.text import (
    byte_size,
    counted,
    duration,
    first_few,
    interval,
    markdown,
    milliseconds,
    number,
    percent,
    plain,
    times_faster,
)

NASTY = [
    "[/red]", "[link=http://x]y[/link]", "\x1b]0;title\x07", "\x1b[2J", "\r\n::error::x", "::add-mask::1",
    "##[error]x", "::stop-commands::x", "%0A", "<script>alert(1)</script>", '"><img src=x onerror=1>',
    "javascript:alert(1)", "]]>",
    "&lt;", '=HYPERLINK("http://x")', "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "../../x", "/etc/passwd", "C:\\x", "CON",
    "{{7*7}}", "---\nfoo: bar", "`a` ``b`` ```|c|", "_hidden", "$x_$", "a\u202eb\u2066c", "\udc80", "x" * 100_000, "",
    "\ufffe\uffff\x00\x7f\x85\u2028", "😀 \u4e2d\u6587 é", "yes", "null", "1e3", "No", "y", "~", "2026-11-21", "0x1f",
    ".inf", "a: b # c", "</style></svg>", "http://x www.x.y",
]  # fmt: skip


def full_report(name: str = "bert", n_layers: int = 12, n_history: int = 2000) -> dict[str, Any]:
    """A report with every part, in which `name` stands wherever a user's string can."""
    matrices = ("attention.self.query", "attention.self.key", "attention.output.dense", "intermediate.dense")
    per_matrix = [
        {
            "name": f"{name}.encoder.layer.{i}.{m}.weight",
            "shape": [64, 64],
            "kept": 41 + i,
            "sparsity": 1 - (41 + i) / 4096,
        }
        for i in range(n_layers)
        for m in matrices
    ]
    history = [
        {
            "phase": phase, "step": step, "epoch": step / 100, "sparsity": 0.97 * step / n_history * (phase == "prune"),
            "losses": {"ce": 0.5, "total": 9.0 - step / n_history, name: 1.0},
            "metrics": {name: 0.8, "f1": 0.7} if step % 100 == 99 else {},
        }
        for phase in ("teacher", "prune")
        for step in range(n_history // 2)
    ]  # fmt: skip
    return {
        "schema_version": 1, "status": "complete", "model": name, "task": name, "method": name, "losses": ["ce", name],
        "seed": 42, "command": name, "versions": {"cap": "0.1", name: name}, "device": name, "labels": [name, "b"],
        "sparsity": {
            "requested": 0.97, "achieved": 0.96996, "prunable_weights": 10**6, "kept_weights": 30_040, "encoder": 0.96,
            "whole_model": 0.75, "per_matrix": per_matrix,
        },
        "metrics": {
            "dense": {name: 0.9131, "f1": 0.8812}, "pruned": {name: 0.90596, "f1": 0.8723}, "n_examples": 40_430,
            "retention": {name: 0.99217, "f1": 0.98999}, "confidence_95": {name: [0.9031, 0.9088], "f1": [0.86, 0.88]},
            "primary": name, "chance": {name: 0.3545, "f1": 0.18}, "at_chance": {"dense": [], "pruned": ["f1"]},
        },
        "size": {
            "dense_bytes": 437_951_328, "artifact_bytes": 108_300_211, "weights_bytes": 107_100_311,
            "bound_bytes": 106_400_000, "codings": {"gaps": 70, name: 2},
        },
        "latency": {
            model: {
                "median_ms": 3.21, "batch": 1, "length": 128, "runtime": name, "threads": 2, "device": "cpu",
                "processor": name, "precision": name, "throughput": {"texts_per_second": 310.2, "batch": 32},
            }
            for model in ("dense", "pruned")
        },
        "timing": {
            "teacher_seconds": 1922.3, "banks_seconds": 3.21, "prune_seconds": 12_088.8, "total_seconds": 14_388.1,
            "examples_per_second": 288.31,
        },
        "memory": {"peak_host_bytes": 6_100_000_000, "peak_device_bytes": None},
        "history": history, "files": {name: {"bytes": 5, "sha256": "ab" * 32}},
        "teacher": {"source": name, "metrics": {name: 0.9}}, "notes": [name], "config": {"lr": 3e-5, name: name},
    }  # fmt: skip


MINIMAL = {
    "model": "mini",
    "task": "sst2",
    "sparsity": {"achieved": 0.5},
    "history": [{"step": 3, "losses": {"ce": 1.0}}],
}
REPORTS = {"full": full_report(), "minimal": MINIMAL, "empty": {}}


def read(data: dict[str, Any]) -> Report:
    return from_json(Report, data, "report.json")


class Page(HTMLParser):
    """Parses a page strictly enough to notice unbalanced tags and everything that could act or load."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def check_inert(html: str) -> Page:
    page = Page(html)
    assert page.open == []
    assert not {"script", "img", "link", "iframe", "object", "embed", "form", "base", "a"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "action")]
    assert "default-src 'none'" in html
    assert not re.search(r"(?i)url\(|@import", html.split("</style>")[0])
    html.encode("utf-8")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
    return page


# ----------------------------------------------------------------------------------------------------------------- HTML


@pytest.mark.parametrize("name", REPORTS)
def test_page_is_whole_inert_and_deterministic(name: str) -> None:
    html = documents.render_html(read(REPORTS[name]))
    check_inert(html)
    assert html == documents.render_html(read(json.loads(json.dumps(REPORTS[name]))))


def test_page_shows_the_figures() -> None:
    words = check_inert(documents.render_html(read(full_report()))).words()
    for text in (
        "97.00 %",
        "0.9060",
        "0.3545",
        "chance 0.3545",
        "99.22 %",
        "99.00 %",
        "108.4 MB",
        "3 h 59 min",
        "[0.9031, 0.9088]",
        "query",
    ):
        assert text in words


def test_long_histories_stay_small() -> None:
    assert len(documents.render_html(read(full_report()))) < 300_000
    many = full_report(n_layers=400, n_history=20_000)
    assert len(documents.render_html(read(many))) < 1_500_000


def test_empty_report_claims_nothing() -> None:
    words = check_inert(documents.render_html(Report())).words()
    assert "not measured" in words and "No metric was measured" in words and "No history was recorded" in words
    assert not re.search(r"\d", words.replace("95 %", "").replace("sha256", ""))


@pytest.mark.parametrize("nasty", NASTY, ids=lambda text: ascii(text[:12]))
def test_page_with_hostile_strings(nasty: str) -> None:
    page = check_inert(documents.render_html(read(full_report(nasty, n_layers=2, n_history=60))))
    shown = plain(nasty, 60) or "(empty)"
    assert any(shown == text.strip() for text in page.text) or shown.strip() in page.words()


@pytest.mark.parametrize(
    "junk", [None, [], {}, "text", 3, -1.5, True, float("nan"), float("inf"), 10**400, 1e308, -1e308, 5e-324]
)
def test_any_part_may_be_junk(junk: Any) -> None:
    """What is of another type is refused by its place; what is of the right type is shown, whatever its value."""
    whole = full_report(n_layers=1, n_history=20)
    for broken in _replaced(whole, junk):
        try:
            report = read(broken)
        except FileError as error:
            assert re.fullmatch(r"report\.json(: [\w.\[\]]+ is .+, not .+| has schema_version .+)", error.message)
            continue
        assert documents.render_html(report).endswith("</html>\n")
        render_card(report)
        Console(file=io.StringIO()).print(terminal.prune_summary(report))


def _replaced(whole: dict[str, Any], junk: Any) -> list[dict[str, Any]]:
    """Copies of a report with one part, or everything below one part, replaced by `junk`."""
    copies = [{**whole, key: junk} for key in whole]
    for key, part in whole.items():
        if isinstance(part, dict):
            copies.append({**whole, key: dict.fromkeys(part, junk)})
    history = copy.deepcopy(whole["history"])
    for i, row in enumerate(history):
        row[("step", "losses", "metrics", "sparsity", "phase")[i % 5]] = junk
        row["losses"] = {"ce": junk, "kd": 1.0} if i % 3 else row["losses"]
    matrices = [
        {**m, key: junk} for key in ("name", "shape", "kept", "sparsity") for m in whole["sparsity"]["per_matrix"]
    ]
    per_name = {key: {"bert": junk, "f1": junk} for key in ("dense", "pruned", "retention", "confidence_95", "chance")}
    return [
        *copies,
        {**whole, "history": [*history, junk]},
        {**whole, "sparsity": {"per_matrix": [*matrices, junk]}},
        {**whole, "metrics": {**per_name, "primary": junk}},
        {**whole, "files": {"a": {"bytes": junk, "sha256": junk}}, "notes": [junk], "labels": [junk], "losses": [junk]},
    ]


# -------------------------------------------------------------------------------------------------------------- figures


ARCHITECTURES = {
    "bert.encoder.layer.{}.attention.self.query.weight": "query",
    "bert.encoder.layer.{}.attention.self.key.weight": "key",
    "bert.encoder.layer.{}.attention.self.value.weight": "value",
    "bert.encoder.layer.{}.attention.output.dense.weight": "attention.output",
    "bert.encoder.layer.{}.intermediate.dense.weight": "intermediate",
    "bert.encoder.layer.{}.output.dense.weight": "output",
}


def labels(patterns: list[str], layers: int = 2) -> list[tuple[str, str]]:
    return heat_map.matrix_labels([pattern.format(i) for i in range(layers) for pattern in patterns])


def test_bert_labels() -> None:
    assert labels(list(ARCHITECTURES)) == [(str(i), place) for i in range(2) for place in ARCHITECTURES.values()]


@pytest.mark.parametrize(
    ("patterns", "places"),
    [
        (["distilbert.transformer.layer.{}.attention.q_lin.weight", "distilbert.transformer.layer.{}.ffn.lin1.weight"],
         ["q_lin", "lin1"]),
        (["deberta.encoder.layer.{}.attention.self.query_proj.weight", "deberta.encoder.layer.{}.output.dense.weight"],
         ["query_proj", "output"]),
        (["model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.self_attn.o_proj.weight",
          "model.layers.{}.mlp.down_proj.weight"], ["q_proj", "o_proj", "down_proj"]),
        (["transformer.h.{}.attn.c_attn.weight", "transformer.h.{}.attn.c_proj.weight",
          "transformer.h.{}.mlp.c_proj.weight"], ["c_attn", "attn.c_proj", "mlp.c_proj"]),
        (["albert.encoder.albert_layer_groups.{}.albert_layers.0.attention.dense.weight",
          "albert.encoder.albert_layer_groups.{}.albert_layers.0.ffn_output.weight"], ["dense", "ffn_output"]),
        (["model.layers.{}.experts.0.w1.weight", "model.layers.{}.experts.1.w1.weight"], ["0.w1", "1.w1"]),
    ],
)  # fmt: skip
def test_labels_of_other_architectures(patterns: list[str], places: list[str]) -> None:
    assert labels(patterns) == [(str(i), place) for i in range(2) for place in places]


def test_labels_tell_stacks_apart() -> None:
    names = [
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "decoder.block.0.layer.1.EncDecAttention.q.weight",
        "lm_head.weight",
    ]
    assert heat_map.matrix_labels(names) == [
        ("encoder 0", "SelfAttention.q"),
        ("decoder 0", "EncDecAttention.q"),
        ("other", "lm_head"),
    ]


def matrices(rows: list[dict[str, Any]]) -> list[MatrixSparsity]:
    return [from_json(MatrixSparsity, row, "report.json") for row in rows]


def test_heat_map_is_in_reading_order_and_pools_its_margins() -> None:
    rows = [
        {"name": name.format(i), "shape": [10, 10], "kept": 10 * i, "sparsity": 1 - i / 10}
        for name in sorted(ARCHITECTURES, reverse=True)
        for i in (10, 2, 0)
    ]
    heat = heat_map.heat_map(matrices(rows))
    assert heat is not None
    assert [label for _, label in heat.rows] == ["0", "2", "10", ""]
    assert [label for _, label in heat.columns] == [*ARCHITECTURES.values(), ""]
    assert heat.cells[-1].text == "60.00" and heat.cells[0].text == "100.00"
    assert len(heat.cells) == 4 * 7 and heat.n_hidden == 0


def test_heat_map_counts_what_it_does_not_draw() -> None:
    rows = [{"name": f"layer.{i}.q", "sparsity": 0.5} for i in range(heat_map.MAX_LAYERS + 7)]
    heat = heat_map.heat_map(matrices([*rows, {"name": "x"}, {}, {"name": "y", "sparsity": 1.5}]))
    assert heat is not None and heat.n_hidden == 10
    assert heat_map.heat_map([]) is None


def test_charts_keep_spikes_and_count_what_is_not_finite() -> None:
    points = [(float(i), 1000.0 if i == 777 else 1.0) for i in range(5000)]
    assert (777.0, 1000.0) in charts.thin(points) and len(charts.thin(points)) <= charts.MAX_POINTS
    rows = [{"step": 1, "losses": {"ce": 1.0}}, {"step": 2, "losses": {"ce": None}}]
    (phase,) = view(read({"history": rows}))["phases"]
    (chart,) = phase.charts
    assert chart.curves[0].dots and "1 value" in chart.notes[0]


@pytest.mark.parametrize(
    "values",
    [[0.0], [5.0, 5.0], [1e-300, 1e99], [-1e99, 1e99], [1.0, 1.0 + 1e-15], [5e-324, 1.0], [1e-99, 1.0], [1e99, 1e99]],
)
def test_charts_of_any_range_stay_inside(values: list[float]) -> None:
    chart = charts.line_chart("t", (0.0, 1.0), "y", {"a": [(float(i % 2), v) for i, v in enumerate(values)]})
    assert chart is not None and chart.y_ticks and len(chart.y_ticks) <= 15
    numbers = [float(n) for n in re.findall(r"[-\d.]+", chart.curves[0].path)]
    assert all(charts.TOP <= y <= charts.BOTTOM for y in numbers[1::2])
    assert all(charts.LEFT <= x <= charts.RIGHT for x in numbers[::2])


@pytest.mark.parametrize("width", [24, 40, 80, 200])
def test_no_number_breaks_on_a_narrow_terminal(width: int) -> None:
    out = io.StringIO()
    Console(file=out, width=width).print(terminal.prune_summary(read(full_report()), "runs/x"))
    for text in ("0.9060", "99.22 %", "[0.9031, 0.9088]" if width > 24 else "0.9088]"):
        assert text in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= width


# -------------------------------------------------------------------------------------------------------------- numbers


def test_percent_has_two_decimals_and_the_ends_are_exact() -> None:
    shown = {
        0.96994: "96.99 %",
        0.97: "97.00 %",
        0.29: "29.00 %",
        1 - 530_842 / 5_308_416: "90.00 %",
        1 - 0.9: "10.00 %",
        1.002: "100.20 %",
        0.999999999: "99.99 %",
        1.00001: "100.01 %",
        0.000004: "0.0004 %",
        -0.00123: "-0.12 %",
        1.0: "100.00 %",
        0: "0.00 %",
    }
    assert {value: percent(value) for value in shown} == shown
    assert percent(None) == percent(float("nan")) == percent("0.5") == percent(True) == "not measured"


def test_numbers_are_rounded_and_sizes_rounded_up() -> None:
    assert number(0.90596) == "0.9060" and number(0.99998) == "0.9999" and number(1.0) == "1.0000"
    assert (
        number(0.61538) == "0.6154"
        and number(-0.99999) == "-0.9999"
        and number(88.5) == "88.5000"
        and number(1234.5, 1) == "1,234.5"
    )
    assert byte_size(108_300_211) == "108.4 MB" and byte_size(999) == "999 B" and byte_size(0) == "0 B"
    assert byte_size(1_001) == "1.01 kB" and byte_size(1_000) == "1.00 kB" and byte_size(-1) == "not measured"
    assert (
        interval([0.83333, 0.87771]) == "[0.8333, 0.8778]" and interval([0.1]) == interval([None, 1]) == "not measured"
    )
    assert [duration(s) for s in (0.5, 59.9, 61, 14_388.1)] == ["0.500 s", "59.9 s", "1 min 01 s", "3 h 59 min"]
    times = (0.01234, 3.214, 29.64, 102.4, 999.7, 12_345.6)
    assert [milliseconds(ms) for ms in times] == ["0.0123 ms", "3.21 ms", "29.6 ms", "102 ms", "1,000 ms", "12,346 ms"]
    assert [counted(n, "thread") for n in (1, 2, 0)] == ["1 thread", "2 threads", "0 threads"]
    assert [times_faster(x) for x in (2.91, 1.04, 0.5)] == ["2.9× faster", "as fast", "2.0× slower"]
    for what in (milliseconds, times_faster, number, percent, duration):
        assert what(None) == what(float("nan")) == "not measured"


def test_the_first_few_names_say_how_many_more_there_are() -> None:
    assert first_few([]) == "" and first_few(["a", "b"], 2) == "a, b"
    assert first_few(["a", "b", "c"], 2) == "a, b and 1 more"
    assert first_few([str(n) for n in range(1234)], 1, "; ") == "0 and 1,233 more"
    assert first_few(["a\x1b", "b", "c"], 2, "; ") == "'a\\x1b'; b and 1 more"


# ----------------------------------------------------------------------------------------------------------- plain text


@pytest.mark.parametrize("nasty", NASTY, ids=lambda text: ascii(text[:12]))
def test_plain_is_one_safe_line(nasty: str) -> None:
    text = plain(nasty, 50)
    assert len(text) <= 50
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    assert plain(text, 50) == text


def test_plain_keeps_ordinary_text() -> None:
    for text in ("café", "\u4e2d\u6587", "a\u200db", "😀", "50 % [x] <b>"):
        assert plain(text) == text
    assert plain("\x1b[2J\n\u202e\udc80") == r"\x1b[2J\n\u202e\udc80"


# ----------------------------------------------------------------------------------------------------------- model card


def front_matter(card: str) -> tuple[dict[str, Any], str]:
    """Split as the hub does: the block ends at the first line that is `---`."""
    match = re.match(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\n|$))", card)
    assert match is not None
    return yaml.safe_load(match[2]), card[match.end() :]


@pytest.mark.parametrize("nasty", NASTY, ids=lambda text: ascii(text[:12]))
def test_card_front_matter_reads_back(nasty: str) -> None:
    card = render_card(
        read(full_report(nasty, n_history=2)), base_model=nasty, license=nasty, language=[nasty, "en"], datasets=[nasty]
    )
    data, body = front_matter(card)
    if nasty:
        assert data["base_model"] == data["license"] == data["model-index"][0]["results"][0]["task"]["name"] == nasty
        assert data["base_model_relation"] == "finetune" and nasty in data["tags"]
    assert data["language"] == [nasty, "en"] and data["datasets"] == [nasty] and data["metrics"] == [nasty, "f1"]
    assert data["model-index"][0]["results"][0]["metrics"][1] == {"type": "f1", "value": 0.8723}
    assert not re.search(
        r"(?<!\\)<(?!\\)|(?<!\\)\[(?=/?\w)", re.sub(r"```.*?```\n|\\.|`[^`\n]+`", "", body, flags=re.S)
    )


def test_card_is_read_by_the_hub_library() -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(
        render_card(read(full_report("acc")), base_model="a/b", license="mit", datasets=["nyu-mll/glue"])
    )
    assert card.data.base_model == "a/b" and card.data.eval_results[0].metric_value == 0.90596
    assert card.data.tags[:3] == ["pruned", "cap", "capcli"]


def test_card_leaves_out_what_is_not_known() -> None:
    data, body = front_matter(render_card(Report()))
    assert data == {"library_name": "capcli", "tags": ["pruned", "cap", "capcli"]}
    assert "No metric was measured" in body and "not measured" in body


def test_numbers_in_front_matter_stay_numbers() -> None:
    for value in (1e-5, 0.5, 1e20, -3.0, 7):
        card = render_card(read({"metrics": {"pruned": {"accuracy": value}}}))
        assert front_matter(card)[0]["model-index"][0]["results"][0]["metrics"][0]["value"] == value


@pytest.mark.parametrize(
    "text", ["1e5", "0o17", "y", "On", "~", "1:30", "a\n---\nb", "x " * 200 + "y"], ids=lambda t: t[:5]
)
def test_front_matter_strings_are_strings_for_every_reader(text: str) -> None:
    """Quoted and on one line: YAML 1.2 and 1.1 differ in which bare words are numbers or truth values."""
    (line,) = (line for line in render_card(Report(), license=text).splitlines() if line.startswith("license: "))
    assert line[9] in "\"'" and yaml.safe_load(line) == {"license": text}


def test_code_fence_cannot_be_closed() -> None:
    body = front_matter(render_card(Report(command="a ``` b ````` c")))[1]
    assert "\n``````\na ``` b ````` c\n``````\n" in body


# ------------------------------------------------------------------------------------------------------------- terminal


def printed(renderable: Any, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


GATES = [
    {
        "name": "quality",
        "metric": "accuracy",
        "op": ">=",
        "limit": 0.8,
        "value": 0.79996,
        "passed": False,
        "message": "low",
    },
    {"name": "size", "metric": "bytes", "op": "<=", "limit": 100, "value": None, "passed": False, "message": None},
    {"name": "fine", "metric": "f1", "op": ">=", "limit": 0.5, "value": 0.6, "passed": True, "message": ""},
]


def gates() -> tuple[Gate, ...]:
    return tuple(from_json(Gate, row, "result.json") for row in GATES)


@pytest.mark.parametrize("nasty", NASTY, ids=lambda text: ascii(text[:12]))
def test_terminal_shows_hostile_strings_as_they_are(nasty: str) -> None:
    text = printed(terminal.prune_summary(read(full_report(nasty, n_history=2)), nasty))
    assert (plain(nasty, 60) or "(empty)").rstrip() in text or len(nasty) > 60
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)


def test_terminal_colours_only_its_own_words() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="standard")
    console.print(terminal.result_summary(EvalResult(model="[bold red]x[/] http://x :smile:", gates=gates())))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold red]x[/] http://x :smile:" in text and "\x1b]8" not in text


def test_summaries_show_the_figures() -> None:
    text = printed(terminal.prune_summary(read(full_report()), "runs/x"))
    assert all(
        word in text
        for word in ("97.00 % (30,040 kept), requested 97.00 %", "0.9060", "99.22 %", "4.0× smaller", "runs/x")
    )
    text = printed(terminal.result_summary(EvalResult(metrics={"accuracy": 0.81678}, gates=gates())))
    assert all(word in text for word in ("0.8168", "failed  low", "failed  bytes <= 100, measured not measured"))


def test_summaries_of_nothing() -> None:
    assert printed(terminal.prune_summary(Report()))
    for result in (EvalResult(), ProbeResult(), EvalResult(gates=(Gate(),))):
        assert printed(terminal.result_summary(result))


def test_markdown_is_inert() -> None:
    assert markdown("a|b *c* [d](e) <f> @g http://h www.i.j") == (r"a\|b \*c\* \[d\]\(e\) \<f\> \@g http\://h www\.i.j")
    assert markdown("google-bert/bert-base_uncased") == r"google-bert/bert-base\_uncased"
