"""The model card: Markdown, with the metadata that the hub reads."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from capcli.records.exported import ExportRecord
from capcli.records.parts import LABELS
from capcli.records.pruned import Report
from capcli.reporting import exits
from capcli.reporting.run_page import template, view
from capcli.reporting.terminal import factors_line, speed_lines
from capcli.reporting.text import named, plain

WORD = re.compile("[A-Za-z][A-Za-z0-9_./-]+")


def _fenced(text: object) -> str:
    """User text as a fenced code block whose fence the text cannot close."""
    shown = plain(text, 8000)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}\n{shown}\n{fence}"


class _OneLine(yaml.SafeDumper):  # type: ignore[misc]
    """YAML in which a string takes one line: nothing in it can end the front matter of a card."""


def _string(dumper: _OneLine, text: str) -> Any:
    """Quoted, unless no version of YAML can take it for anything but a string."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if WORD.fullmatch(text) else '"')


_OneLine.add_representer(str, _string)


def _yaml(data: Any) -> str:
    """YAML in ASCII, in the order of `data`, that reads back unchanged."""
    return str(yaml.dump(data, Dumper=_OneLine, sort_keys=False, width=math.inf))


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How the snippets of a card ask the model, as Python source.

    tag: how the hub calls the task; head: the class of transformers that makes the network; piped: whether transformers
    has a pipeline for the task, and options: what that is told besides. inputs: two inputs of a pipeline, of different
    lengths; texts: the same as arguments of a tokenizer. vectors: the model gives vectors, and a plain folder
    of it is one of sentence-transformers.
    """

    tag: str
    head: str
    piped: bool
    options: str
    inputs: str
    texts: str
    vectors: bool = False


def render_card(
    report: Report,
    *,
    usage: Usage | None = None,
    base_model: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    datasets: Sequence[str] = (),
    form: str = "",
    exported: ExportRecord | None = None,
) -> str:
    """The model card (README.md) of an artefact; a field of the front matter that is not known is left out.

    `usage` is about the snippets; without it there are none. `base_model` and `datasets` are hub ids, `license` a name
    in the hub's list, `language` codes; `form` is the format of an export, empty for what `cap prune` wrote;
    `exported` what `export.json` says of it.
    """
    from markupsafe import Markup

    metrics, pipeline_tag = _finite(report.metrics.pruned), usage.tag if usage else None
    data = {
        "license": license,
        "language": language if language is None or isinstance(language, str) else list(language),
        "library_name": _libraries(usage).get(form, "capcli"),
        "base_model": base_model,
        "base_model_relation": "finetune" if base_model else None,
        "pipeline_tag": pipeline_tag,
        "tags": ["pruned", "cap", "capcli", *filter(None, (report.method, report.task))],
        "datasets": list(datasets),
        "metrics": list(metrics),
        "model-index": _model_index(report, metrics, datasets, pipeline_tag) if metrics else None,
    }
    command = report.command or "(not recorded)"
    front = _yaml({key: value for key, value in data.items() if value})
    shown = {**view(report), **_export_view(exported), "form": form, "usage": _source(usage)}
    shown["structured"] = report.reached is not None
    return template("card.md.j2").render(front=Markup(front), fenced=Markup(_fenced(command)), **shown)


def _libraries(usage: Usage | None) -> dict[str, str]:
    """What reads an export, by its format."""
    return {"dense": "sentence-transformers" if usage and usage.vectors else "transformers", "onnx": "onnx"}


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those that were measured."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _source(usage: Usage | None) -> dict[str, Any] | None:
    """What the snippets say, which is ours and is written as it is."""
    from markupsafe import Markup

    return (
        {name: Markup(text) if isinstance(text, str) else text for name, text in vars(usage).items()} if usage else None
    )


def _export_view(exported: ExportRecord | None) -> dict[str, Any]:
    """What the card of an export shows beside the rest."""
    from markupsafe import Markup

    speed = exported.speed if exported else None
    return {
        "exact": not (exported and exported.metrics),
        "int8": bool(exported and exported.int8),
        "speed": speed_lines(speed) if speed else "",
        "exits": _exits_view(exported),
        "factors": factors_line(exported.factors) if exported and exported.factors else "",
        "runtime": Markup(f', runtime="{"sparse" if exported and exported.runtime == "sparse" else "auto"}"'),
    }


def _exits_view(exported: ExportRecord | None) -> dict[str, Any] | None:
    """The table of an export with exits."""
    found = exported.exits if exported else None
    if found is None:
        return None
    return {"columns": exits.columns(found), "rows": exits.rows(found), "about": exits.about(found)}


def _model_index(
    report: Report, metrics: Mapping[str, float], datasets: Sequence[str], pipeline_tag: str | None
) -> list[dict[str, Any]]:
    task, reference = report.task or "task", report.metrics.reference
    about = {} if reference == LABELS else {"name": f"agreement with the {named(reference, 20)}, without labels"}
    result = {
        "task": {"type": pipeline_tag or task, "name": task},
        "dataset": {
            "type": datasets[0] if datasets else task,
            "name": task,
            **({"split": report.metrics.split} if report.metrics.split else {}),
        },
        "metrics": [{"type": name, **about, "value": float(value)} for name, value in metrics.items()],
    }
    return [{"name": f"{report.model} pruned for {task}", "results": [result]}]


def for_hub(card: str, repo: str) -> str:
    """A card whose snippets name a repository of the hub, in place of the folder that it lies in."""
    before, use, rest = card.partition("\n## Use\n")
    snippets, end, after = rest.partition("\n## ")
    for here, there in (
        ("In the folder of this card:", "By its name on the hub:"),
        ('"."', f'"{repo}"'),
        ("FOLDER", repo),
        ("The tokenizer files are in the same folder.", "The tokenizer files are beside it."),
        ("import onnxruntime\n", "import onnxruntime\nfrom huggingface_hub import snapshot_download\n"),
        ('("model.onnx")', f'(snapshot_download("{repo}") + "/model.onnx")'),
    ):
        snippets = snippets.replace(here, there)
    return f"{before}{use}{snippets}{end}{after}"


def eval_results(report: Report, dataset: str, config: str) -> dict[str, str]:
    """The metrics as the hub's `.eval_results` files, by name: one score of one benchmark in each.

    `dataset` is a hub id, `config` its part that the task is about.
    """
    metrics, found = report.metrics, {}
    for name, value in _finite(metrics.pruned).items():
        notes = f"{name} on {metrics.split}, {metrics.n_examples} examples, measured by capcli"
        row = {"dataset": {"id": dataset, "task_id": config}, "value": float(value), "notes": notes}
        found[f"{config}-{name}.yaml"] = _yaml([row])
    return found
