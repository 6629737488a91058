"""Records to JSON and back: nothing is lost, what is newer is left out, what is older gets its default, the rest is
refused by its place."""

import dataclasses
import inspect
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from capcli.errors import FileError
from capcli.files import json_text
from capcli.records import codec, exported, measured, parts, pruned
from capcli.records.codec import SCHEMA_VERSION, Versioned, from_json, read, to_json
from capcli.records.exported import ExportRecord, RunFacts
from capcli.records.measured import EvalResult, ProbeResult, stored_scores
from capcli.records.parts import Scores
from capcli.records.pruned import Report

RECORDS = [
    kind
    for module in (parts, pruned, measured, exported)
    for _, kind in inspect.getmembers(module, dataclasses.is_dataclass)
    if kind.__module__ == module.__name__
]
FILES = [kind for kind in RECORDS if issubclass(kind, Versioned) and not kind.__name__.endswith("Plan")]


def example(hint: Any) -> Any:
    """A value of a type that no default has."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return example(args[0])
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return filled(hint)
    if origin is Mapping:
        return {"a name": example(args[1])}
    if origin is tuple:
        return tuple(example(one) for one in args if one is not Ellipsis)
    return {int: 7, float: 0.25, str: "text", bool: True, Any: {"any": [1, None]}}[hint]


def filled(kind: type[Any]) -> Any:
    values = {name: example(hint) for name, hint in typing.get_type_hints(kind).items()}
    return kind(**{**values, **({"schema_version": SCHEMA_VERSION} if issubclass(kind, Versioned) else {})})


def through(record: Any, **changes: Any) -> Any:
    """The record as it is read from the file that it was written to."""
    return from_json(type(record), json.loads(json_text(to_json(record) | changes)), "a.json")


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_a_record_survives_its_file(kind: type[Any]) -> None:
    record = filled(kind)
    assert through(record) == record
    assert list(to_json(record)) == [one.name for one in dataclasses.fields(kind)]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, dataclasses.fields(kind)[0].name, None)


@pytest.mark.parametrize("kind", FILES, ids=lambda kind: kind.__name__)
def test_an_older_file_gets_the_defaults_and_a_newer_field_is_left_out(kind: type[Any]) -> None:
    assert from_json(kind, {}, "a.json") == kind()
    record = filled(kind)
    assert through(record, a_name_of_tomorrow={"x": [1]}) == record
    inner = to_json(record)
    inner["gates" if "gates" in inner else "files"] = [{"tomorrow": 1}] if "gates" in inner else {"f": {"tomorrow": 1}}
    assert "tomorrow" not in json.dumps(to_json(from_json(kind, inner, "a.json")))


def test_none_is_absent_empty_or_null() -> None:
    assert "n_examples" not in to_json(Scores()) and to_json(Scores(n_examples=3))["n_examples"] == 3
    assert to_json(ProbeResult())["latency"] == {} and through(ProbeResult()).latency is None
    assert to_json(EvalResult())["baseline"] is None
    assert to_json(ExportRecord())["run"] == {}
    assert to_json(RunFacts(task="mr")) == {"base_model": None, "task": "mr"}


def test_what_is_not_finite_is_null_in_the_file_and_nan_again() -> None:
    record = EvalResult(metrics={"a": math.nan, "b": math.inf}, confidence_95={"a": (math.nan, 1.0)})
    assert json.loads(json_text(to_json(record)))["metrics"] == {"a": None, "b": None}
    found = through(record)
    assert all(map(math.isnan, found.metrics.values())) and math.isnan(found.confidence_95["a"][0])


def test_whole_numbers_stay_whole() -> None:
    found = from_json(EvalResult, {"n_examples": 3.0, "metrics": {"a": 1}}, "a.json")
    assert isinstance(found.n_examples, int) and found.n_examples == 3
    assert json_text(to_json(found)["metrics"]) == '{\n  "a": 1\n}\n'


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "a.json contains a list, not a JSON object"),
        (None, "a.json contains null, not a JSON object"),
        ({"model": 3}, "a.json: model is the number 3, not a text"),
        ({"passed": "yes"}, "a.json: passed is a text, not true or false"),
        ({"metrics": {"f1": "high"}}, "a.json: metrics.f1 is a text, not a number"),
        ({"metrics": {"f1": True}}, "a.json: metrics.f1 is true, not a number"),
        ({"metrics": {"x" * 500: {}}}, f"a.json: metrics.{'x' * 60} is a JSON object, not a number"),
        ({"metrics": None}, "a.json: metrics is null, not a JSON object"),
        ({"n_examples": 1.5}, "a.json: n_examples is the number 1.5, not a whole number"),
        ({"n_examples": math.inf}, "a.json: n_examples is the number inf, not a whole number"),
        ({"n_examples": 10**400}, f"a.json: n_examples is the number 1{'0' * 19}, not a number that can be computed"),
        ({"confidence_95": {"f1": [1, 2, 3]}}, "a.json: confidence_95.f1 is a list, not a list of 2"),
        ({"gates": [{}, {"passed": None}]}, "a.json: gates[1].passed is null, not true or false"),
        ({"gates": {}}, "a.json: gates is a JSON object, not a list"),
        ({"schema_version": SCHEMA_VERSION + 1}, f"a.json has schema_version {SCHEMA_VERSION + 1}, this cap reads"),
        ({"schema_version": 0}, "a.json: schema_version is the number 0, not a number from 1 on"),
        ({"schema_version": None}, "a.json: schema_version is null, not a number from 1 on"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_does_not_fit_is_named(data: Any, said: str) -> None:
    with pytest.raises(FileError) as caught:
        from_json(EvalResult, data, "a.json", "the hint")
    assert caught.value.message.startswith(said) and len(caught.value.message) < 200
    assert caught.value.hint == ("the hint" if "this cap reads" not in said else caught.value.hint) != ""


def test_a_field_without_a_default_must_be_there() -> None:
    with pytest.raises(FileError, match=r"a\.json has no rungs"):
        from_json(exported.ExportPlan, {"model": "m", "dense_bytes": 1}, "a.json")


def test_the_scores_of_a_report_and_of_a_result(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    metrics = {"split": "test", "pruned": {"f1": 0.5}, "n_examples": 9, "confidence_95": {"f1": [0.4, 0.6]}}
    path.write_text(json.dumps({"task": "mr", "metrics": metrics}))
    found = stored_scores(str(path), "")
    assert (found.task, found.split, found.n_examples, found.metrics) == ("mr", "test", 9, {"f1": 0.5})
    assert found.confidence_95 == {"f1": (0.4, 0.6)} and read(Report, path).metrics.pruned == {"f1": 0.5}
    path.write_text(json_text(to_json(found)))
    assert stored_scores(str(path), "") == found


def test_there_is_one_version() -> None:
    """No other module names the version."""
    house = Path(codec.__file__).parent.parent
    named = [path.name for path in house.rglob("*.py") if "SCHEMA_VERSION" in path.read_text("utf-8")]
    assert named == ["codec.py"]
