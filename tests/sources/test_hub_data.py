"""Sets of the hub in any layout that needs no code: which files are read, how, and what is refused."""

import bz2
import gzip
import json
import lzma
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import hub_server
import pytest
from tiny import ROOT, Tiny, environment, invoke

from capcli.config.task import TaskConfig
from capcli.data import library
from capcli.data import rows as text_rows
from capcli.errors import DataError
from capcli.models import artifact
from capcli.sources import hub_data

ROWS = {"train": [("NA", "no"), ("007", "yes"), ("a film, good", "yes"), ('say "x"', "no")], "test": [("b", "no")]}
# Opens each set in one process; of a set that is refused, the message and the hint.
DRIVER = """
import json, sys
from capcli.config.task import TaskConfig
from capcli.data import dataset
from capcli.errors import CapError
found = []
for name in json.loads(sys.argv[1]):
    try:
        data = dataset.load(TaskConfig(task="text-classification", data="hub:" + name))
        texts = {n: [b["text"] for b in s.table.batches(["text"], 3)] for n, s in data.evals.items()}
        train = sum((b["text"] for b in data.train.table.batches(["text"], 3)), [])
        found.append([list(data.labels), train, texts, data.train.fingerprint])
    except CapError as error:
        found.append(f"{error.exit_code} {error.message}; {error.hint}")
print(json.dumps(found))
"""


def comma(rows: list[tuple[str, str]], mark: str = ",") -> str:
    cells = [[f'"{text.replace(chr(34), chr(34) * 2)}"', label] for text, label in rows]
    return "".join(f"{mark.join(row)}\n" for row in [["text", "label"], *cells])


def objects(rows: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"text": text, "label": label} for text, label in rows]


def lines(rows: list[tuple[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in objects(rows))


def put(folder: Path, **contents: Any) -> None:
    """Files by name, dots written as `__` and slashes as `___`."""
    for name, content in contents.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def card(folder: Path, **about: Any) -> None:
    put(folder, README__md=f"---\n{json.dumps(about)}\n---\n# A set\n")


def zipped(folder: Path, name: str, **contents: str) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, text in contents.items():
            archive.writestr(member.replace("__", "."), text)


GOOD = ("csv", "tsv", "gz", "bz2", "xz", "json", "carded", "folders", "zip", "zipped", "parquet", "arrow", "two:b")


def write_sets(root: Path) -> None:
    """One set for each layout, all with the same rows; and those that are refused."""
    train, test = ROWS.values()
    put(root / "csv", train__csv=comma(train), test__csv=comma(test), csv__txt="notes", LICENSE="")
    put(root / "tsv", train__tsv=comma(train, "\t"), test__tsv=comma(test, "\t"))
    shards = {"data___train-00000-of-00002__jsonl__gz": train[:2], "data___train-00001-of-00002__jsonl__gz": train[2:]}
    shards["data___test-00000-of-00001__jsonl__gz"] = test
    put(root / "gz", **{name: gzip.compress(lines(rows).encode(), mtime=0) for name, rows in shards.items()})
    put(root / "bz2", **{f"{n}__csv__bz2": bz2.compress(comma(rows).encode()) for n, rows in ROWS.items()})
    put(root / "xz", **{f"{n}__jsonl__xz": lzma.compress(lines(rows).encode()) for n, rows in ROWS.items()})
    put(root / "json", **{f"{n}__json": json.dumps(objects(rows)) for n, rows in ROWS.items()})
    put(root / "carded", one__csv=comma(train, "|"), other__csv=comma(test, "|"))
    files = [{"split": "train", "path": "one.csv"}, {"split": "test", "path": ["other.csv"]}]
    names = {"class_label": {"names": {"0": "no", "1": "yes"}}}
    features = [{"name": "text", "dtype": "string"}, {"name": "label", "dtype": names}]
    info = {"config_name": "c", "features": features}
    card(root / "carded", configs=[{"config_name": "c", "data_files": files, "sep": "|"}], dataset_info=info)
    put(root / "folders", a___train___1__csv=comma(train[:2]), a___train___2__csv=comma(train[2:]))
    put(root / "folders", a___test___x__csv=comma(test))
    zipped(root / "zip", "train.zip", a__csv=comma(train))
    zipped(root / "zip", "test.zip", a__csv=comma(test))
    for name, rows in ROWS.items():
        zipped(root / "zipped", f"{name}.jsonl.zip", **{f"{name}__jsonl": lines(rows)})
        whole = datasets.Dataset.from_list(objects(rows))
        (root / "parquet").mkdir(exist_ok=True)
        whole.to_parquet(root / "parquet" / f"{name}.parquet")
        whole.save_to_disk(root / "saved" / name)
        part = root / "saved" / name / "data-00000-of-00001.arrow"
        put(root / "arrow", **{f"{name}__arrow": part.read_bytes()})
    for config in "ab":
        put(root / "two", **{f"{config}___{name}__csv": comma(rows) for name, rows in ROWS.items()})
    card(root / "two", configs=[{"config_name": config, "data_dir": config} for config in "ab"])
    put(root / "script", script__py="raise SystemExit('code of a data set ran')\n")
    put(root / "pickle", train__pkl=b"\x80\x04K\x01.", test__pkl=b"\x80\x04K\x01.")
    for name, place in (("outside", "/etc/pass*"), ("above", "../*.csv"), ("elsewhere", "http://127.0.0.1:9/a.csv")):
        put(root / name, train__csv=comma(train))
        card(root / name, configs=[{"config_name": "default", "data_files": place}])
    put(root / "broken", train__csv="text,label\na,b\nc,d,e\n", test__csv=comma(test))
    for name in ROWS:
        zipped(root / "mixed", f"{name}.zip", a__csv=comma(train), notes__txt="x")


REFUSED = {
    "two": "has several configurations: a, b; name one of them: --data hub:me/two:a",
    "two:c": "has no such configuration on the hub; it has a, b",
    "script": "is made by a script of its own, and capcli runs no code of others",
    "pickle": "has no files on the hub that are read: parquet, arrow, jsonl",
    "outside": "names files outside of it",
    "above": "names files outside of it",
    "elsewhere": "names files outside of it",
    "broken": "Expected 2 fields in line 3, saw 3",
    "mixed": "does not hold files of one format that is read",
    "none": "there is no data set 'me/none' on the hub",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[hub_server.Hub, Path, Path]]:
    """A hub with the sets, an empty cache, and the folder where commands are run."""
    root = tmp_path_factory.mktemp("sets")
    write_sets(root)
    with hub_server.serving() as server:
        for folder in root.iterdir():
            server.add(f"me/{folder.name}", folder, kind="datasets")
        yield server, tmp_path_factory.mktemp("hf-home"), tmp_path_factory.mktemp("here")


def opened(hub: tuple[hub_server.Hub, Path, Path], names: list[str], **changes: str) -> list[Any]:
    server, home, here = hub
    env = environment(
        **{
            "HF_ENDPOINT": server.address,
            "HF_HOME": str(home),
            "HF_HUB_ETAG_TIMEOUT": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "PYTHONPATH": str(ROOT),
            **changes,
        }
    )
    command = [sys.executable, "-c", DRIVER, json.dumps([f"me/{name}" for name in names])]
    done = subprocess.run(command, env=env, cwd=here, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found: list[Any] = json.loads(done.stdout)
    return found


def test_every_layout_gives_the_same_rows_and_later_from_the_cache(hub: tuple[hub_server.Hub, Path, Path]) -> None:
    server, home, here = hub
    first = opened(hub, list(GOOD))
    texts = [text for text, _ in ROWS["train"]]
    for name, found in zip(GOOD, first, strict=True):
        assert found[:3] == [["no", "yes"], texts, {"test": [["b"]]}], name
    n_asked = len(server.asked)
    known = ("/api/datasets/me/", "/resolve/", "/api/agent-harnesses")  # the last by huggingface_hub, once a day
    assert [line for line in server.asked if not any(part in line for part in known)] == [], "nothing else is asked"
    assert not [line for line in server.asked if "/two/resolve/" in line and "/a/" in line], "only what is read"
    again = opened(hub, list(GOOD), HF_HUB_OFFLINE="1", HF_ENDPOINT=hub_server.unused_address())
    assert again == first
    assert len(server.asked) == n_asked
    assert list(here.iterdir()) == []
    assert {path.name for path in home.iterdir()} <= {"hub", "datasets", "xet", "modules"}


def test_what_is_refused(hub: tuple[hub_server.Hub, Path, Path]) -> None:
    for (name, expected), found in zip(REFUSED.items(), opened(hub, list(REFUSED)), strict=True):
        assert isinstance(found, str) and found.startswith("2 "), (name, found)
        assert expected in found, (name, found)


def test_a_damaged_or_silent_download_ends_soon(hub: tuple[hub_server.Hub, Path, Path], tmp_path: Path) -> None:
    server, _, here = hub
    repo, fresh = server.repos["datasets", "me/csv"], (server, tmp_path, here)
    repo.flip = "train.csv"
    (damaged,) = opened(fresh, ["csv"])
    repo.flip, repo.silent_files = "", True
    (silent,) = opened(fresh, ["csv"])
    repo.silent_files = False
    (offline,) = opened(fresh, ["csv"], HF_DATASETS_OFFLINE="1")
    assert "broke off or was damaged" in damaged
    assert "cannot reach the hub at 127.0.0.1" in silent
    assert "offline mode is on" in offline
    assert isinstance(opened(fresh, ["csv"])[0], list)


def test_an_archive_that_unpacks_to_very_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "FREE_BYTES", 1000)
    zipped(tmp_path / "set", "train.zip", a__csv="text,label\n" + "a,b\n" * 100_000)
    paths = {"train": [tmp_path / "set" / "train.zip"]}
    found = hub_data.HubData(name="me/set", files=paths, reader="zip", options={}, features=None)
    with pytest.raises(DataError, match="unpacks to more than 100 times its size"):
        library.open_split(found, "train")


def test_a_model_remembers_the_set_and_not_a_path(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read again by `cap eval` wherever the model lies."""
    asked = []

    def fetched(*name: str | None) -> hub_data.HubData:
        asked.append(name)
        files = {}
        for split in ("train", "validation"):
            files[split] = [tmp_path / f"{split}.parquet"]
            datasets.Dataset.from_csv(f"{tiny.data}/{split}.csv", cache_dir=tmp_path / "hf").to_parquet(*files[split])
        return hub_data.HubData(name="me/set", files=files, reader="parquet", options={}, features=None)

    monkeypatch.setattr(hub_data, "fetched", fetched)
    tiny.prune(tmp_path / "out", data="hub:me/set:c@v1", max_train_samples=32)
    (tmp_path / "deep").mkdir()
    shutil.move(tmp_path / "out", tmp_path / "deep" / "er")
    assert artifact.stored_source(str(tmp_path / "deep" / "er"))["data"] == "hub:me/set:c@v1"
    result = invoke("eval", str(tmp_path / "deep" / "er"), "--json")
    assert result.exit_code == 0, result.stderr
    assert set(asked) == {("me/set", "c", "v1")} and len(asked) > 1


def test_an_output_folder_has_no_marks_of_a_name() -> None:
    name = TaskConfig(task="text-classification", data="hub:me/set:c@v1").name
    assert re.fullmatch(r"text-classification-set-c-v1-[0-9a-f]{6}", name)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("hub:me/set", ("me/set", "", None)),
        ("hub:set:part@v1.0", ("set", "part", "v1.0")),
        ("hub:me/set@refs/pr/3", ("me/set", "", "refs/pr/3")),
    ],
)
def test_names_of_sets(place: str, expected: tuple[str, str, str | None]) -> None:
    assert hub_data.named(place) == expected


@pytest.mark.parametrize("place", ["hub:", "hub:a/b/c", "hub:../x", "hub:a/b:", "hub:a/b@../c", "hub:/etc"])
def test_what_names_no_set(place: str) -> None:
    with pytest.raises(DataError, match="does not name a data set of the hub"):
        hub_data.named(place)
