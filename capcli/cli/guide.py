"""The help of a command: what most people need, with examples; `--help-all` lists all options."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperCommand

# Panels in the order of the help; others stand in the middle, as they come.
FIRST, LAST = ("Task", "Pruning", "Training", "Sweep", "Gates", "Limits"), ("Hardware", "Run", "Options", "Output")
DOCS = "docs/index.md"
EXAMPLES = {
    "prune": (
        ("a first look, without a network", "cap prune mini --task banking77 --preset quick"),
        (
            "your own labels",
            "cap prune bert-base --task text-classification --data reviews.csv --sparsity 0.97",
        ),
        ("without training, in minutes", "cap prune ./fine-tuned --task sst2 --preset minutes --sparsity 0.8"),
        (
            "whole heads and neurons, aiming at twice the speed",
            "cap prune ./fine-tuned --task sst2 --method structured --epochs 0 --target latency=2x",
        ),
        ("what it would take", "cap prune bert-base --task mnli --sparsity 0.97 --plan"),
    ),
    "eval": (
        ("the run's own task and data", "cap eval runs/mini-banking77-fisher-0.9"),
        ("a gate for a CI job", "cap eval RUN --baseline bert-base-finetuned --max-drop accuracy=1% --junit gate.xml"),
        ("the faster of two runtimes", "cap eval RUN --runtime auto"),
    ),
    "export": (
        ("what would fit", "cap export RUN --plan"),
        ("the best that fits", "cap export RUN --fit 5MB --max-drop accuracy=0.01 -o small"),
        ("for onnxruntime, in 8 bits", "cap export RUN --to onnx --int8 -o int8"),
    ),
    "probe": (
        ("what is left beside the dense model", "cap probe RUN --baseline bert-base --tasks subj,mr"),
        ("layer by layer, as a page", "cap probe RUN --tasks subj --layer all --html layers.html"),
    ),
    "predict": (
        ("a file", "cap predict RUN texts.csv -o answers.jsonl"),
        ("a stream", "tail -f log.txt | cap predict RUN -"),
    ),
    "push": (
        ("what would be sent", "cap push RUN me/sst2-small --dry-run"),
        ("to a private repository", "cap push RUN me/sst2-small --private"),
    ),
    "config": (("where values come from", "cap config --task mnli --method cap-f --preset paper"),),
    "tasks": (),
    "doctor": (),
}


class Command(TyperCommand):
    """A command whose short help leaves out what experts need, and ends with examples."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help; see `show_all`."""
        everything = ctx.meta.get("everything", False)
        experts: list[Any] = [] if everything else [item for item in self.params if item.name in self.experts]
        for item in experts:
            item.hidden = True
        try:
            super().format_help(ctx, formatter)
        finally:
            for item in experts:
                item.hidden = False
        sys.stdout.write(after(ctx.info_name, bool(self.experts) and not everything))

    def get_help_option(self, ctx: Any) -> Any:
        """`--help`, beside the other switches."""
        found: Any = super().get_help_option(ctx)
        found.rich_help_panel, found.metavar = LAST[-1], " "
        return found

    @property
    def experts(self) -> frozenset[str]:
        """The options that the short help leaves out."""
        found: frozenset[str] = getattr(self.callback, "experts", frozenset())
        return found


def after(command: str, short: bool) -> str:
    """What stands below the options: examples, and where there is more."""
    examples = EXAMPLES.get(command, ())
    lines = ["Examples:"] * bool(examples)
    lines += [f"  {line}\n      {what}" for what, line in examples]
    more = [f"cap {command} --help-all lists all options"] if short else []
    lines += ["", "Learn more: " + "; ".join([*more, f"{DOCS} in capcli's repository"]), ""]
    return "\n".join(lines)


def show_all(ctx: typer.Context, asked: bool) -> None:
    """What `--help-all` does."""
    if asked:
        ctx.meta["everything"] = True
        ctx.command.format_help(ctx, ctx.make_formatter())
        raise typer.Exit


def placed(panels: list[str]) -> list[str]:
    """The panels in the order of the help."""
    seen = list(dict.fromkeys(panels))
    middle = [panel for panel in seen if panel not in (*FIRST, *LAST)]
    return [*(one for one in FIRST if one in seen), *middle, *(one for one in LAST if one in seen)]
