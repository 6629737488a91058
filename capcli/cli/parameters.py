"""From the fields of a configuration to the options of a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import MISSING
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capcli import parallel
from capcli.cli.guide import Command, placed, show_all
from capcli.cli.output import guarded
from capcli.config.export import LIMITS
from capcli.config.names import BUILTIN_MODEL, CONFIG_FILE, TEXT_FILES
from capcli.config.options import UNITS, leaves, measured

if TYPE_CHECKING:
    from capcli.events import Event
    from capcli.records.measured import EvalResult, ProbeResult

FROM_FILE = f"; can also be set in {CONFIG_FILE}"
MODEL_HELP = {
    "prune": f"hub id, folder, the built-in {BUILTIN_MODEL!r}, or a short name such as bert-base",
    "eval": "output of cap prune or cap export, a hub id of one, or any fine-tuned model" + FROM_FILE,
    "export": "output of cap prune, a sparse checkpoint of another tool, or, for onnx and exits, any fine-tuned model",
    "probe": "output of cap prune, a hub id of one, or any model" + FROM_FILE,
    "predict": "output of cap prune or cap export, a hub id of one, or any fine-tuned model",
}
ARGUMENTS = {
    "file": ("FILE", f"texts, one per row: {', '.join(TEXT_FILES)}; or - for lines or JSON lines on stdin"),
    "folder": ("FOLDER", "output of cap prune or cap export"),
    "repo": ("OWNER/NAME", "repository of the hub; OWNER is you or an organisation of yours"),
}
CONFIG_HELP = "TOML file with options; the command line overrides it."
FILE_HELP = f"{CONFIG_HELP} Instead of {CONFIG_FILE}."
COMPARE_HELP = (
    "Measure nothing; compare two or more results stored with --json (cap eval: also folders of runs) and show what "
    "changed from the first by more than the noise: --compare OLD NEW. Gates apply to all but the first."
)
OTHERS = "others"  # the argument for all names that --compare takes but the first
OTHERS_HELP = "with --compare: the other results"
REPORTS = {
    "junit": "Write the gates, or the error, as JUnit XML.",
    "csv": "Write the measurements as a CSV table.",
    "markdown": "Write the result as Markdown.",
    "html": "Write the result as a single HTML page that works offline.",
}
SWITCHES: dict[str, tuple[Any, Any]] = {
    "overwrite": (bool, typer.Option("--overwrite", help="Start over, even if the run is finished.")),
    "plan": (bool, typer.Option("--plan", help="Print the expected time, disk, memory and sizes, and do nothing.")),
    "config": (str, typer.Option("--config", metavar="FILE", help=CONFIG_HELP, rich_help_panel="Run")),
    "file": (str, typer.Option("--config", metavar="FILE", help=FILE_HELP, rich_help_panel="Options")),
    "compare": (bool, typer.Option("--compare", help=COMPARE_HELP, rich_help_panel="Options")),
    **{name: (str, typer.Option(f"--{name}", metavar="FILE", help=text)) for name, text in REPORTS.items()},
    "output": (str, typer.Option("--format", help="Format of stdout: human or json.")),
    "as_json": (bool, typer.Option("--json", help="Short for --format json.")),
    "quiet": (bool, typer.Option("--quiet", "-q", help="Show no progress on stderr.")),
    "debug": (bool, typer.Option("--debug", help="Show the traceback after an error.")),
    "all_options": (
        bool,
        typer.Option("--help-all", is_eager=True, callback=show_all, expose_value=False, help="Show all options."),
    ),
}
COMMON = ("output", "as_json", "quiet", "debug")
MOST_NAMES = 4  # of an option that are listed where its value stands
NOTHING = " "  # stands for the value of a switch, where Typer would write its type
MEASURES = ("file", "compare", *REPORTS)  # switches of the commands that measure, whose MODEL may stand in a file

PARALLEL = ("prune", "eval", "probe")  # commands that several processes make together

Start = Callable[[dict[str, Any]], "Generator[Event, None, EvalResult | ProbeResult]"]

app = typer.Typer(
    name="cap",
    help="Make a pre-trained language model small for one task, and prove that it still works.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def options(
    name: str, configs: Sequence[type], *switches: str, model: bool = True, rare: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command that takes MODEL, unless it needs no `model`, the fields of `configs` as options, and
    `switches`. rare: options that its short help leaves out beside those for experts.

    The command is called with the options that the user chose, by field name, and the switches by keyword.
    """
    found = [one for config in configs for one in leaves(config)]
    known = [(item, kind) for item, kind in found if item.metadata]
    fields = [_parameter(item, kind) for item, kind in known]
    arguments = [_model(name, optional="compare" in switches)] if model else []
    arguments += [_argument(item.name, *ARGUMENTS[item.name]) for item, _ in found if item.name in ARGUMENTS]
    if "compare" in switches:
        arguments.append(_others())
    chosen = {item.name for item in (*arguments, *fields)}
    experts = frozenset([*rare, *(item.name for item, _ in known if item.metadata["expert"])])
    fields += [_switch(switch) for switch in (*switches, *COMMON)]
    fields = _in_order(fields + [_switch("all_options")] * bool(experts))

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            given = {key: value for key, value in values.items() if key in chosen and value not in (None, [])}
            with guarded(values["debug"]):
                if name not in PARALLEL:
                    parallel.refuse(f"cap {name}")
                function(given, **{s: values[s] for s in (*switches, *COMMON[:3])})

        command.experts = experts  # type: ignore[attr-defined]
        signature = inspect.Signature([*arguments, *fields])
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {item.name: item.annotation for item in signature.parameters.values()}
        command.__doc__ = function.__doc__
        app.command(name, cls=Command)(command)
        return function

    return register


def _in_order(fields: list[inspect.Parameter]) -> list[inspect.Parameter]:
    """The options by panel, as `guide.placed` has them."""

    def panel(item: inspect.Parameter) -> str:
        found: str = item.annotation.__metadata__[0].rich_help_panel
        return found

    order = placed([panel(item) for item in fields])
    return sorted(fields, key=lambda item: order.index(panel(item)))


def _model(command: str, optional: bool) -> inspect.Parameter:
    return _argument("model", "FOLDER" if command == "predict" else "MODEL", MODEL_HELP[command], optional)


def _argument(name: str, metavar: str, help: str, optional: bool = False) -> inspect.Parameter:
    info = typer.Argument(metavar=metavar, help=help, show_default=False)
    kind, default = (str | None, None) if optional else (str, inspect.Parameter.empty)
    return inspect.Parameter(
        name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=Annotated[kind, info]
    )


def _others() -> inspect.Parameter:
    info = typer.Argument(metavar="RESULT…", help=OTHERS_HELP, show_default=False)
    return inspect.Parameter(
        OTHERS, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=Annotated[list[str] | None, info]
    )


def _parameter(item: Any, kind: Any) -> inspect.Parameter:
    """One field as a Typer option; the default is shown but not filled in, so that a preset can stand below it."""
    meta, default, unit = item.metadata, item.default, item.metadata["unit"]
    kind = str if meta["several"] else kind  # a list is read where that of a file is
    unset = default in ("", MISSING) or default is False or meta["panel"] in ("Gates", LIMITS)  # there 0 is no limit
    flag = "--" + item.name.replace("_", "-")
    info = typer.Option(
        *filter(None, (f"{flag}/--no-{flag[2:]}" if kind is bool else flag, meta["flag"])),
        help=meta["help"][:1].upper() + meta["help"][1:] + ("." if unset else f" (default {default})."),
        show_default=False,
        rich_help_panel=meta["panel"] or "Options",
        metavar=NOTHING if kind is bool else _metavar(meta, kind),
        parser=partial(_measured, unit) if unit else None,
    )
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def _metavar(meta: Any, kind: type) -> str:
    """What stands for the value of an option: several, its names, its unit, or its type."""
    if meta["several"]:
        return str(meta["several"])
    if meta["names"] and not meta["metavar"]:
        names = meta["names"]
        shown = names if len(names) <= MOST_NAMES else (*names[: MOST_NAMES // 2], "…")
        return "{" + "|".join(shown) + "}"
    if meta["metavar"] or meta["unit"]:
        return str(meta["metavar"] or UNITS[meta["unit"]][1])
    return {str: "TEXT", int: "INT", float: "FLOAT"}[kind]


def _measured(unit: str, text: str) -> float:
    """What a number with a unit is on the command line. Raises `typer.BadParameter`."""
    try:
        return measured(unit, text)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.") from error


def _switch(name: str) -> inspect.Parameter:
    kind, info = SWITCHES[name]
    default = {bool: False, str: ""}.get(kind)
    info.show_default, info.rich_help_panel = False, info.rich_help_panel or "Output"
    info.metavar = info.metavar or (NOTHING if kind is bool else "TEXT")
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])
