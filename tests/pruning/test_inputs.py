"""R13: a run is bound to what it read: fingerprints of data, model and teacher, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny import Tiny, invoke, write_model

from capcli.config.layers import prune_config
from capcli.config.prune import PruneConfig
from capcli.data import dataset
from capcli.errors import Stopped
from capcli.events import StopFlag
from capcli.pruning import inputs
from capcli.verbs import prune

QUICK: dict[str, Any] = {"epochs": 1, "teacher_epochs": 1, "max_train_samples": 32, "max_eval_samples": 16}


def config(**chosen: Any) -> PruneConfig:
    """A run in the current folder, all names relative."""
    base = {"model": "model", "task": "text-classification", "data": "data", "out": "out", "sparsity": 0.5}
    return prune_config({**base, "batch_size": 8, "max_length": 16, "threads": 1, **QUICK, **chosen})


def arguments(**chosen: Any) -> list[str]:
    base = {"task": "text-classification", "data": "data", "out": "out", "sparsity": 0.5}
    options = {**base, "batch_size": 8, "max_length": 16, "threads": 1, **QUICK, **chosen}
    return ["prune", "model", *(text for n, v in options.items() for text in ("--" + n.replace("_", "-"), str(v)))]


def stop(when: str = "bank finetuned", **chosen: Any) -> None:
    """Run until the first event of a phase, and stop there."""
    flag = StopFlag()
    with pytest.raises(Stopped):
        for event in prune.prune(config(**chosen), flag=flag):
            flag.reason = "the test" if event.phase == when else ""


@pytest.fixture(scope="module")
def places(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with model and data, one with a stopped run in `out` as well, and one with a finished run."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("new", "stopped", "finished")}
    for place in found.values():
        shutil.copytree(tiny.model, place / "model")
        shutil.copytree(tiny.data, place / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(found["stopped"])
        stop()
        patch.chdir(found["finished"])
        list(prune.prune(config()))
    return found


@pytest.fixture
def here(places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a copy of one of the places the current folder."""

    def go(name: str) -> Path:
        monkeypatch.chdir(shutil.copytree(places[name], tmp_path / name))
        return tmp_path / name

    return go


def relabel(place: Path, split: str = "train") -> None:
    path = place / "data" / f"{split}.csv"
    path.write_text(path.read_text().replace("negative", "?").replace("positive", "negative").replace("?", "positive"))


def reword(place: Path) -> None:
    path = place / "data" / "train.csv"
    path.write_text(path.read_text().replace("good", "fine"))


def relabel_validation(place: Path) -> None:
    relabel(place, "validation")


def other_validation(place: Path) -> None:
    shutil.copy(place / "data" / "train.csv", place / "data" / "validation.csv")


def other_weights(place: Path) -> None:
    path = place / "model" / "model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    save_file({**tensors, first: tensors[first] + 0.25}, path, {"format": "pt"})


def other_words(place: Path) -> None:
    path = place / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace('"lowercase": true', '"lowercase": false'))


def other_settings(place: Path) -> None:
    path = place / "model" / "config.json"
    path.write_text(path.read_text().replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-9'))


CHANGES = {
    relabel: "labels of train",
    relabel_validation: "labels of validation",
    other_settings: "config.json of the model",
    reword: "texts of train",
    other_validation: "texts of validation",
    other_weights: "model.safetensors of the model",
    other_words: "tokenizer.json of the model",
}


@pytest.mark.parametrize("name", ["stopped", "finished"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_other_inputs_are_refused_by_name(
    here: Callable[[str], Path], name: str, change: Callable[[Path], None]
) -> None:
    """Exit 2 for a stopped run and for a finished one, and nothing is touched; --overwrite starts anew."""
    place = here(name)
    change(place)
    before = {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()}
    result = invoke(*arguments())
    assert result.exit_code == 2, result.stderr
    assert "the inputs of the run in out have changed" in result.stderr
    assert CHANGES[change] in result.stderr
    assert "--overwrite" in result.stderr
    assert before == {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()}
    assert invoke(*arguments(), "--overwrite").exit_code == 0


@pytest.mark.parametrize("name", ["stopped", "finished"])
def test_the_same_inputs_in_other_files_are_no_other_inputs(here: Callable[[str], Path], name: str) -> None:
    """Texts and labels count as they are read: another column or other quotes change nothing."""
    place = here(name)
    path = place / "data" / "train.csv"
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([f'"{head.split(",")[0]}",label,note', *(f"{row},x" for row in rows)]) + "\n")
    result = invoke(*arguments())
    assert result.exit_code == 0, result.stderr


@pytest.fixture(scope="module")
def taught(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a fine-tuned teacher and a file of texts as well."""
    place = Path(shutil.copytree(places["new"], tmp_path_factory.mktemp("taught") / "place"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        stop("prune", keep_work=True)
    shutil.copytree(place / "out" / "work" / "teacher", place / "teacher")
    shutil.rmtree(place / "out")
    rows = (place / "data" / "train.csv").read_text().splitlines()[1:]
    (place / "texts.txt").write_text("".join(f"{row.rpartition(',')[0]}\n" for row in rows))
    return place


def other_teacher(place: Path) -> None:
    path = place / "teacher" / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def other_texts(place: Path) -> None:
    path = place / "texts.txt"
    path.write_text(path.read_text().replace("good", "fine"))


TAUGHT: dict[str, tuple[dict[str, Any], Callable[[Path], None]]] = {
    "model.safetensors of the teacher": ({"teacher": "teacher"}, other_teacher),
    "calibration texts": ({"teacher": "teacher", "text": "texts.txt", "method": "cap-fisher"}, other_texts),
}


@pytest.mark.parametrize("name", TAUGHT)
@pytest.mark.parametrize("finished", [False, True])
def test_a_teacher_and_texts_are_inputs(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, *, finished: bool
) -> None:
    """R13, as above: exit 2 naming it, of a stopped and of a finished run."""
    chosen, change = TAUGHT[name]
    monkeypatch.chdir(place := shutil.copytree(taught, tmp_path / "place"))
    if finished:
        list(prune.prune(config(**chosen)))
    else:
        stop("prune", **chosen)
    path = place / "out" / ("report.json" if finished else "work/config.json")
    assert {name, "config.json of the teacher"} <= set(json.loads(path.read_text())["fingerprints"])
    change(place)
    result = invoke(*arguments(**chosen))
    assert result.exit_code == 2, result.stderr
    assert "the inputs of the run in out have changed" in result.stderr and name in result.stderr


def test_the_report_holds_the_fingerprints(here: Callable[[str], Path]) -> None:
    place = here("finished")
    found = json.loads((place / "out" / "report.json").read_text())["fingerprints"]
    texts = {f"{what} of {split}" for what in ("texts", "labels") for split in ("train", "validation")}
    model = {f"{name} of the model" for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert texts | model <= set(found)
    assert all(len(value) == 64 for value in found.values())


@pytest.mark.parametrize("name", ["stopped", "finished"])
def test_other_versions_are_a_warning(here: Callable[[str], Path], name: str) -> None:
    place = here(name)
    path = place / "out" / {"stopped": "work/config.json", "finished": "report.json"}[name]
    path.write_text(path.read_text().replace('"torch": "', '"torch": "0.'))
    result = invoke(*arguments())
    assert result.exit_code == 0, result.stderr
    assert "the run began with torch 0." in result.stderr


def test_a_finished_run_whose_data_are_gone_says_so(here: Callable[[str], Path]) -> None:
    shutil.rmtree(here("finished") / "data")
    result = invoke(*arguments())
    assert result.exit_code == 0, result.stderr
    assert "cannot check whether its inputs are still the same" in result.stderr


def test_a_finished_run_whose_data_are_damaged_is_refused(here: Callable[[str], Path]) -> None:
    (here("finished") / "data" / "train.csv").write_text("text,label\n")
    assert invoke(*arguments()).exit_code == 2


@pytest.mark.parametrize("name", ["tags", "answers", "topics", "numbers"])
def test_every_kind_of_label_counts(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """One label of the training set changes, and its fingerprint alone."""
    task = {"tags": "ner", "answers": "question-answering", "topics": "multi-label-classification"}
    folder = Path(shutil.copytree(getattr(tiny, name), tmp_path / name))
    chosen = prune_config({"model": tiny.model, "task": task.get(name, "regression"), "data": str(folder)})

    def found() -> dict[str, str]:
        return inputs.fingerprints(chosen, dataset.load(chosen.source))

    before = found()
    path = next(folder.glob("train.*"))
    swaps = {
        "numbers": ("1.0", "1.5"),
        "topics": ('["positive"]', '["negative"]'),
        "tags": ("B-positive", "B-negative"),
    }
    text = path.read_text()
    if name == "answers":
        answered = next(line for line in text.splitlines() if '"text": []' not in line)
        row = json.loads(answered) | {"answers": {"text": [], "answer_start": []}}
        swaps[name] = (answered, json.dumps(row))
    path.write_text(text.replace(*swaps[name], 1))
    after = found()
    assert {key for key in before if before[key] != after[key]} == {"labels of train"}


def test_another_model_has_other_fingerprints(tiny: Tiny, tmp_path: Path) -> None:
    write_model(tmp_path / "model", seed=5)
    chosen = [tiny.prune_config(tmp_path / "out", model=model) for model in (tiny.model, str(tmp_path / "model"))]
    first, second = (inputs.fingerprints(one, dataset.load(one.source)) for one in chosen)
    assert {key for key in first if first[key] != second[key]} == {"model.safetensors of the model"}
