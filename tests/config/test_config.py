"""What a user can choose: every refusal, the layers of presets, files and options, and the tables behind the names."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capcli.config import options
from capcli.config.export import ExportConfig
from capcli.config.hardware import Hardware
from capcli.config.layers import build, differences, layered, options_file, prune_config
from capcli.config.measure import EvalConfig, Gates, ProbeConfig
from capcli.config.names import (
    BUILTIN_TASKS,
    EXPORT_FORMATS,
    LOSSES,
    METHODS,
    NUMERIC_GATES,
    OF_CRITERION,
    PRESETS,
    PROBE_TASKS,
    QUESTION_TASKS,
    TASK_NAMES,
    nearest,
)
from capcli.config.options import flatten, leaves, parse_limits
from capcli.config.presets import PRESET_ROWS
from capcli.config.prune import PruneConfig
from capcli.config.task import TaskConfig
from capcli.errors import ConfigError

SOURCE = TaskConfig(task="mr")


def prune(**options: Any) -> PruneConfig:
    return PruneConfig(source=SOURCE, model="mini", **options)


REFUSED: list[tuple[Callable[[], Any], str, str]] = [
    (lambda: TaskConfig(task=""), "no task given", "valid: banking77"),
    (lambda: TaskConfig(task="sst-2"), "unknown task 'sst-2'", "did you mean sst2?"),
    (lambda: TaskConfig(task="mr", max_length=7), "--max-length must be at least 8, got 7", ""),
    (lambda: TaskConfig(task="mr", max_eval_samples=-1), "--max-eval-samples must be at least 0, got -1", ""),
    (lambda: TaskConfig(task="regression"), "task regression needs your own data", "--data"),
    (lambda: Hardware(device="gpu"), "unknown device 'gpu'", "valid: auto, cpu, cuda, mps"),
    (lambda: Hardware(precision="fp61"), "unknown precision 'fp61'", "did you mean fp16?"),
    (lambda: Hardware(threads=-1), "--threads must be at least 0, got -1", ""),
    (lambda: prune(method="cap_soft"), "unknown method 'cap_soft'", "did you mean cap-soft?"),
    (lambda: prune(preset="papr"), "unknown preset 'papr'", "did you mean paper?"),
    (lambda: prune(normalization="means"), "unknown normalization 'means'", "did you mean mean?"),
    (lambda: prune(pooling="max"), "unknown pooling 'max'", "valid: auto, head, cls, mean"),
    (lambda: prune(kd_scale="t"), "unknown kd-scale 't'", "did you mean t2?"),
    (lambda: prune(floor=1.0), "--floor is a share in [0, 1), got 1", ""),
    (lambda: prune(importance_examples=64), "--importance-examples has no effect on fisher", "--method cap-f"),
    (lambda: prune(scope="matrices"), "unknown scope 'matrices'", "did you mean matrix?"),
    (lambda: prune(score_init="zeros"), "unknown score-init 'zeros'", "did you mean zero?"),
    (lambda: prune(init="teachers"), "unknown init 'teachers'", "did you mean teacher?"),
    (lambda: prune(losses="ce,prk"), "unknown loss 'prk'", "did you mean prc?"),
    (lambda: prune(losses="prc,snc"), "--losses must include ce or kd", ""),
    (lambda: prune(sparsity=1.0), "in [0, 1), got 1", ""),
    (lambda: prune(sparsity=-0.1), "in [0, 1), got -0.1", ""),
    (lambda: prune(sparsity=97), "in [0, 1), got 97", "did you mean --sparsity 0.97?"),
    (lambda: prune(sparsity=float("nan")), "in [0, 1), got nan", ""),
    (lambda: prune(structure="head"), "unknown structure 'head'", "did you mean heads?"),
    (
        lambda: prune(method="cap-soft", structure="dimensions"),
        "--structure dimensions is for structured methods, cap-soft removes single weights",
        "--method cap-f",
    ),
    (lambda: prune(losses="hid,prc"), "--losses must include ce or kd", ""),
    (lambda: prune(teacher_epochs=-1), "--teacher-epochs must be at least 0", ""),
    (lambda: prune(dense_share=0.7, final_share=0.4), "together exceed 1", ""),
    *[
        (lambda n=name: prune(method="cap-m", **{n: 0}), f"--{name.replace('_', '-')} must be at least 1, got 0", "")
        for name in ("batch_size", "selections")
    ],
    (lambda: prune(method="cap-f", epochs=0), "--epochs must be at least 1: cap-f chooses", "--method structured"),
    *[
        (lambda n=name, v=value: prune(**{n: v}), f"--{name.replace('_', '-')} must be a positive number", "")
        for name in ("tau", "kd_temperature")
        for value in (0.0, -1.0, float("inf"), float("nan"))
    ],
    *[
        (lambda n=name: prune(**{n: -1}), f"--{name.replace('_', '-')} must be at least 0, got -1", "")
        for name in (
            "max_train_samples",
            "teacher_epochs",
            "max_time",
            "extra_examples",
            "seed",
            "checkpoint_seconds",
            "lr",
            "teacher_lr",
            "score_lr",
            "weight_decay",
            "reg_weight",
            "unsupervised_weight",
            "supervised_weight",
            "ce_weight",
            "kd_weight",
            "hidden_weight",
        )
    ],
    *[
        (lambda n=name, v=value: prune(**{n: v}), f"--{name.replace('_', '-')} is a share in [0, 1)", "")
        for name in ("lr_warmup", "dense_share", "final_share", "holdout")
        for value in (1.0, -0.1, float("nan"))
    ],
    (lambda: Gates(min=" , "), "--min needs METRIC=NUMBER, got ' , '", "--min accuracy=0.8"),
    (lambda: Gates(max_drop=","), "--max-drop needs METRIC=NUMBER, got ','", "--max-drop accuracy=0.8"),
    (lambda: Gates(min="accuracy"), "--min needs METRIC=NUMBER, got 'accuracy'", "--min accuracy=0.8"),
    (lambda: Gates(max_drop="f1=x"), "--max-drop needs METRIC=NUMBER, got 'f1=x'", ""),
    (lambda: Gates(min="=0.5"), "--min needs METRIC=NUMBER", ""),
    (lambda: Gates(min="f1=nan"), "--min needs METRIC=NUMBER", ""),
    *[
        (lambda t=text: Gates(min=t), f"--min needs METRIC=NUMBER, got {text!r}", "--min accuracy=0.8")
        for text in ("f1>=0.5", "f1<0.5", "f1==0.5", "f1=80%%", "f1=%", "f1")
    ],
    (lambda: Gates(min_retention=90), "--min-retention 90 can never pass", "did you mean 0.90 or 90%?"),
    (lambda: Gates(min_retention=99.5), "--min-retention 99.5 can never pass", "did you mean 0.995 or 99.5%?"),
    (lambda: Gates(confidence=95), "--confidence is a probability", "did you mean 0.95 or 95%?"),
    *[
        (lambda n=name: layered("eval", {n: 0}), f"--{name.replace('_', '-')} 0 sets no limit", "leave it out")
        for name in NUMERIC_GATES
    ],
    *[
        (lambda n=name, v=value: Gates(**{n: v}), f"--{name.replace('_', '-')} has two limits for 'f1'", "remove one")
        for name, value in (("min", "f1=0.5,f1=0.9"), ("max", "f1=1, f1=1"), ("max_drop", "f1=1%,a=1,f1=2%"))
    ],
    *[
        (lambda m=make: m(seed=10**22), "--seed must be below 2**63", "smaller")
        for make in (prune, ProbeConfig, lambda **options: EvalConfig(source=SOURCE, **options))
    ],
    (lambda: prune(seed=10**400), "--seed must be below 2**63", ""),
    (lambda: EvalConfig(source=SOURCE, seed=-1), "--seed must be at least 0", ""),
    *[
        (lambda m=make, n=name: m(n), f"--baseline {name.rpartition(',')[2]}: no such file", "--json")
        for make in (
            lambda name: EvalConfig(source=SOURCE, baseline=name),
            lambda name: ProbeConfig(baseline=name),
            lambda name: ProbeConfig(baseline=f"bert-base,{name}"),
        )
        for name in ("old.jsn", "old.json", "no/old.JSON", "./old", "../none", "/no/such", "./" + "x" * 10_000, "./\0")
    ],
    (lambda: Gates(max_bytes=-1), "--max-bytes must be at least 0, got -1", ""),
    (
        lambda: EvalConfig(source=SOURCE, gates=Gates(max_drop="f1=1")),
        "--max-drop compares with a baseline",
        "--baseline",
    ),
    (lambda: EvalConfig(source=SOURCE, gates=Gates(min_retention=0.9)), "--min-retention compares", "--baseline"),
    (lambda: EvalConfig(source=SOURCE, latency_batch=0), "--latency-batch must be at least 1, got 0", ""),
    (lambda: ExportConfig(to="dens"), "unknown format 'dens'", "did you mean dense?"),
    (
        lambda: ExportConfig().check_asked(),
        "no format given",
        "name one with --to: dense, sparse, sliced, onnx, exits, mask",
    ),
    (lambda: ExportConfig(to="sparse", fit=9), "--to sparse and --fit both choose the format", "leave one of them out"),
    (lambda: ExportConfig(fit=9, vocab="task"), "--vocab needs --to: --fit chooses it", "name the format with --to"),
    (lambda: ExportConfig(max_latency_ms=9, int8=True), "--int8 needs --to: --max-latency-ms chooses it", ""),
    (lambda: ExportConfig(embeddings="int8"), "--embeddings needs --to: it is for one format", ""),
    (lambda: ExportConfig(max_drop="accuracy=0.01"), "--max-drop alone chooses nothing", "add --fit SIZE"),
    (lambda: ExportConfig(fit=9, max_drop="accuracy"), "--max-drop needs METRIC=NUMBER", ""),
    (lambda: ExportConfig(fit=-9), "--fit must be at least 0, got -9", ""),
    (lambda: ExportConfig(max_latency_ms=math.nan), "--max-latency-ms must be at least 0, got nan", ""),
    (lambda: ExportConfig(dtype="fp8"), "unknown dtype 'fp8'", "did you mean fp"),
    (lambda: ProbeConfig(tasks="mr,sub"), "unknown task 'sub'", "did you mean subj?"),
    (lambda: ProbeConfig(pooling="first"), "unknown pooling 'first'", "valid: head, cls, mean"),
    (lambda: ProbeConfig(max_train_samples=-1), "--max-train-samples must be at least 0", ""),
    (lambda: prune_config({"task": "mr", "preset": "qick"}), "unknown preset 'qick'", "did you mean quick?"),
    (lambda: prune_config({"task": "mr", "method": "capm"}), "unknown method 'capm'", "did you mean cap-m?"),
]


@pytest.mark.parametrize(("make", "message", "hint"), REFUSED, ids=range(len(REFUSED)))
def test_refusals_say_what_and_how_to_go_on(make: Callable[[], Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2


def test_what_is_valid_is_accepted() -> None:
    prune(sparsity=0.0)
    prune(sparsity=0.999999)
    prune(losses="kd", teacher="x", teacher_epochs=0)
    prune(dense_share=0.5, final_share=0.5)
    Hardware(device="cuda:3", precision="bf16")
    prune(seed=2**63 - 1)
    for name in ("gpt2", "owner/name-v1.5", "a.b/c.d@main"):
        assert ProbeConfig(baseline=name).baselines == (name,)
    Gates(max_drop="f1=1,f1=2%", min_retention=1.01)
    EvalConfig(source=SOURCE, baseline="x", gates=Gates(max_drop="accuracy=0.01", min_retention=0.9))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", ("ce", "kd")),
        ("fic,ce", ("ce", "fic")),
        (" kd , ce,kd ", ("ce", "kd")),
        ("kd,", ("kd",)),
    ],
)
def test_losses_stand_in_one_order(given: str, expected: tuple[str, ...]) -> None:
    assert prune(losses=given).loss_names == expected


@pytest.mark.parametrize(
    ("n", "classes", "passes"),
    [
        *((100_000, 2, 2), (2_400, 7, 2), (2_399, 2, 3), (512, 2, 8), (1, 2, 8)),
        *((10_003, 77, 5), (24_640, 77, 2), (24_639, 77, 3), (2_399, 8, 3), (400_000, 0, 2)),
    ],
)
def test_a_teacher_of_a_small_set_or_of_many_classes_gets_more_passes(n: int, classes: int, passes: int) -> None:
    """150 steps of 32, and 20 for each class."""
    assert prune().teacher_passes(n, classes) == passes
    assert prune(teacher_epochs=5).teacher_passes(n, classes) == 5
    assert prune(teacher="x").teacher_passes(n, classes) == 0


def test_limits_and_folders(tmp_path: Path) -> None:
    assert parse_limits("--min", "accuracy=0.9, f1 = .8,") == {"accuracy": 0.9, "f1": 0.8}
    assert parse_limits("--min", "accuracy=80%,f1 = 7.5 %") == {"accuracy": 0.8, "f1": 0.075}
    assert parse_limits("--min", "") == {}
    assert prune(sparsity=0.97).out_folder == Path("runs/mini-mr-fisher-0.97")
    assert dataclasses.replace(prune(), model="a/b@v1/").out_folder == Path("runs/b-v1-mr-fisher-0.9")
    assert prune(out="x/y").out_folder == Path("x/y")
    source = {"task": "text-classification", "model": "mini"}
    own = [prune_config({**source, "data": data}).out_folder for data in ("a/set", "b/set", "./a/set/", "a/set.csv")]
    assert own[0] == own[2]
    assert len(set(own)) == 3
    assert all(re.fullmatch(r"runs/mini-text-classification-set-[0-9a-f]{6}-fisher-0.9", str(one)) for one in own)
    (tmp_path / "x").mkdir()
    assert ExportConfig(model=f"{tmp_path}/x/").out_folder == tmp_path / "x-fit"
    assert ExportConfig(model="owner/name", to="sparse").out_folder == Path("name-sparse")
    assert ProbeConfig(tasks="mr, subj,mr").task_names == ("mr", "subj")


def test_a_path_may_hold_a_comma(tmp_path: Path) -> None:
    path = tmp_path / "a,b.json"
    path.write_text("{}")
    assert ProbeConfig(baseline=str(path)).baselines == (str(path),)
    assert ProbeConfig(baseline="a, b,a").baselines == ("a", "b")
    assert ProbeConfig().baselines == ()


def test_data_of_several_tasks_are_folders_of_theirs(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("text,label\n")
    for data, said in (
        (file, "is not a folder"),
        (tmp_path / "typo", "is not a folder"),
        (tmp_path, "has no subfolder for any"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            ProbeConfig(tasks="mr,subj", data=str(data)).source("subj")
        assert str(data / "mr") in caught.value.hint
        assert ProbeConfig(tasks="mr", data=str(data)).source("mr").data == str(data)
    (tmp_path / "mr").mkdir()
    assert ProbeConfig(label_map="0=a").source("mr").label_names == {"0": "a"}
    with pytest.raises(ConfigError, match="--label-map has two names for '0'"):
        TaskConfig(task="mr", label_map="0=a,1=b,0=c")
    config = ProbeConfig(tasks="mr,subj", data=str(tmp_path))
    assert [config.source(task).data for task in ("mr", "subj")] == [str(tmp_path / "mr"), ""]


def test_a_probe_reads_its_tasks_as_it_was_told() -> None:
    """Every option of a task that the command has but its data, see above."""
    chosen: dict[str, Any] = {"text_column": "t", "pair_column": "p", "label_column": "l", "label_map": "0=a"}
    chosen |= {"max_length": 40, "max_eval_samples": 7}
    assert flatten(ProbeConfig(**chosen).source("mr")) == {
        "task": "mr",
        "data": "",
        "stride": 0,
        "group_column": "",
        "text": "",
        **chosen,
    }
    columns = ("text_column", "pair_column", "label_column", "label_map")
    ours, theirs = ({item.name: item.metadata for item, _ in leaves(cls)} for cls in (ProbeConfig, TaskConfig))
    assert [ours[name] for name in columns] == [theirs[name] for name in columns]


# Layers --------------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_fields() -> None:
    """But for those of a criterion, of which soft movement has none."""
    made = prune_config({"task": "mr", "model": "mini", "method": "cap-soft"})
    assert made == prune(method="cap-soft")
    assert prune_config({"task": "mr", "model": "mini", "method": "cap-soft", "lr": None}) == made
    assert prune_config({"task": "mr"}).method == PruneConfig.method


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_preset_makes_a_valid_configuration_of_every_method(preset: str, method: str) -> None:
    table = PRESETS[preset]
    if table.get("*", {}).get("epochs") == 0 and not (METHODS[method].staged or METHODS[method].one_shot):
        with pytest.raises(ConfigError, match="--epochs must be at least 1"):
            prune_config({"task": "mr", "preset": preset, "method": method})
        return
    made = flatten(prune_config({"task": "mr", "preset": preset, "method": method}))
    criterion = METHODS[method].criterion
    wanted = table.get("*", {}) | {"method": method} | OF_CRITERION.get(criterion, {}) | table.get(criterion, {})
    for row in PRESET_ROWS.get(preset, ()):
        wanted |= row.values if row.holds("mr", criterion, "heads", 0.9) else {}
    assert {name: made[name] for name in wanted} == wanted
    names = {item.name for item, _ in leaves(PruneConfig)}
    for values in table.values():
        assert set(values) <= names
    assert set(table) <= {"*", *(m.criterion for m in METHODS.values())}


PAPER = [  # task, method, sparsity -> what the sources say of it
    ("mnli", "cap-m", 0.9, {"batch_size": 32, "lr": 3e-5, "tau": 0.1, "unsupervised_weight": 0.1, "reg_weight": 0.0}),
    ("mnli", "cap-m", 0.9, {"epochs": 10, "lr_warmup": 0.09, "dense_share": 0.18, "final_share": 0.27}),
    ("mnli", "cap-m", 0.9, {"supervised_weight": 10.0, "scope": "matrix", "lr_schedule": "run"}),
    ("mnli", "cap-soft", 0.9, {"reg_weight": 290.0, "scope": "auto"}),
    ("mnli", "cap-soft", 0.97, {"reg_weight": 680.0}),
    ("qqp", "cap-soft", 0.9, {"reg_weight": 190.0}),
    ("qqp", "cap-soft", 0.97, {"reg_weight": 550.0}),
    ("squad", "cap-soft", 0.9, {"reg_weight": 600.0, "batch_size": 16, "unsupervised_weight": 0.5, "tau": 0.1}),
    ("squad", "cap-soft", 0.97, {"reg_weight": 2000.0, "supervised_weight": 0.0}),
    ("squad_v2", "cap-m", 0.9, {"lr": 3e-5, "dense_share": 0.1, "final_share": 0.2, "lr_warmup": 0.1}),
    ("sst2", "cap-f", 0.9, {"epochs": 18, "lr": 2e-5, "batch_size": 16, "tau": 0.1, "kd_temperature": 1.0}),
    ("sst2", "cap-f", 0.9, {"unsupervised_weight": 0.3, "supervised_weight": 3.0, "weight_decay": 0.01}),
    ("sst2", "cap-f", 0.9, {"lr_schedule": "cycle", "importance_examples": 1_000_000, "dense_share": 0.0}),
    ("sst2", "cap-f", 0.5, {"epochs": 10}),
    ("sst2", "first-order", 0.3, {"epochs": 6, "final_share": 0.0}),
    ("squad", "cap-f", 0.9, {"tau": 0.3, "unsupervised_weight": 0.3, "supervised_weight": 0.0, "lr": 3e-5}),
    ("squad", "cap-f", 0.9, {"epochs": 18, "batch_size": 16, "dense_share": 0.0}),
]


@pytest.mark.parametrize(("task", "method", "sparsity", "values"), PAPER)
def test_the_preset_of_the_paper_by_task_method_and_sparsity(
    task: str, method: str, sparsity: float, values: dict[str, Any]
) -> None:
    made = flatten(prune_config({"task": task, "method": method, "sparsity": sparsity, "preset": "paper"}))
    assert {name: made[name] for name in values} == values


def test_dimensions_have_no_stairs_to_restart_at() -> None:
    made = prune_config({"task": "mr", "method": "cap-f", "structure": "dimensions", "preset": "paper"})
    assert (made.lr_schedule, made.importance_examples, made.epochs, made.final_share) == ("run", 0, 20, 0.6)
    with pytest.raises(ConfigError, match=r"--lr-schedule cycle .* with --structure dimensions it rises every few"):
        prune(method="cap-f", structure="dimensions", lr_schedule="cycle")


def test_later_layers_win(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('preset = "paper"\nmethod = "cap-f"\nlr = 1e-3\nbatch-size = 5\nepochs = 7\nkeep_work = true\n')
    made = prune_config({"task": "mr", "epochs": 3, "seed": None}, str(file))
    assert (made.epochs, made.batch_size, made.lr, made.keep_work) == (3, 5, 1e-3, True)  # option, file
    assert (made.unsupervised_weight, made.kd_temperature) == (0.3, 1.0)  # preset for the criterion
    assert (made.score_lr, made.normalization) == (1e-2, "reference")  # preset
    assert made.seed == 1  # default
    assert prune_config({"task": "mr", "preset": "default"}, str(file)).kd_temperature == 2.0


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("learning-rate = 1", "unknown option in", "valid: "),
        ("epoch = 1", "unknown option in", "did you mean epochs?"),
        ("epochs = 1.5", "epochs in", ""),
        ("epochs = true", "epochs in", ""),
        ('lr = "high"', "lr in", ""),
        ("keep-work = 1", "keep_work in", ""),
        ("[lr]\nx = 1", "lr in", ""),
        ("lr = = 1", "cannot read", "TOML"),
        ('epochs = 0\nmethod = "cap-m"', "--epochs must be at least 1", ""),
    ],
)
def test_damaged_toml_is_refused(tmp_path: Path, text: str, message: str, hint: str) -> None:
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        prune_config({"task": "mr"}, str(file))
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_toml_integers_serve_as_floats_and_a_missing_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('lr = 1\ntask = "subj"\ndevice = "cpu"\n')
    made = prune_config({}, str(file))
    assert (made.lr, type(made.lr), made.source.task, made.hardware.device) == (1.0, float, "subj", "cpu")
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read"):
            prune_config({"task": "mr"}, str(path))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-16"):
        prune_config({"task": "mr"}, str(file))


# Files of eval and probe ---------------------------------------------------------------------------------------------

FILE = """
model = "m"
seed = 5
max-length = 32
min_retention = 1

[eval]
task = "subj"
seed = 6

[probe]
tasks = "subj"

[prune]
sparsity = 0.5
"""


def test_a_table_wins_over_the_top_and_the_command_line_over_both(tmp_path: Path) -> None:
    file = tmp_path / "cap.toml"
    file.write_text(FILE)
    both = {"model": "m", "max_length": 32, "min_retention": 1.0}
    assert layered("eval", {"baseline": "b"}, str(file)) == {**both, "seed": 6, "task": "subj", "baseline": "b"}
    assert layered("probe", {"seed": 7, "min": None}, str(file)) == {**both, "seed": 7, "tasks": "subj"}
    assert layered("eval", {"seed": 7, "min": None}) == {"seed": 7}


def test_a_byte_order_mark_is_no_name(tmp_path: Path) -> None:
    file = tmp_path / "cap.toml"
    file.write_text("\ufeffseed = 3\n", "utf-8")
    assert layered("eval", {}, str(file)) == {"seed": 3}


def test_prune_takes_a_table_too(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('task = "mr"\nsparsity = 0.5\nlr = 1e-3\n[prune]\nsparsity = 0.6\n[eval]\nlatency-batch = 2\n')
    made = prune_config({"model": "m"}, str(file))
    assert (made.source.task, made.sparsity, made.lr) == ("mr", 0.6, 1e-3)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('modell = "m"', "unknown option in FILE 'modell'", "did you mean model?"),
        ("[eval]\nlatency-btch = 1", "unknown option in FILE [eval] 'latency_btch'", "did you mean latency_batch?"),
        ("[probe]\nlatency-batch = 1", "unknown option in FILE [probe]", "valid: "),
        ("[prune]\nsparsety = 1", "unknown option in FILE [prune]", "did you mean sparsity?"),
        ("[evall]\nseed = 1", "unknown table in FILE [evall]", "[prune], [eval], [probe]"),
        ('[gates]\nmin = "a=1"', "unknown table in FILE [gates]", "all options, gates included, are plain keys"),
        ('task = "mr"', "task in FILE is an option of eval only", "put it below [eval]"),
        ('tasks = "mr"', "tasks in FILE is an option of probe only", "put it below [probe]"),
        ("sparsity = 0.5", "unknown option in FILE 'sparsity'", ""),
        ('junit = "x.xml"', "unknown option in FILE 'junit'", ""),
        ("seed = 1.5", "seed in FILE must be a whole number, got 1.5", ""),
        ("seed = true", "seed in FILE must be a whole number", ""),
        ("model = 3", "model in FILE must be text in quotes", ""),
        ("max-latency-ms = true", "max_latency_ms in FILE must be a number", ""),
        ('max-latency-ms = "1m"', "max_latency_ms in FILE: '1m' is not a time such as 10, 10ms or 0.5s", ""),
        ('max-bytes = "5 apples"', "max_bytes in FILE: '5 apples' is not a size such as 5MB", ""),
        (f"max-latency-ms = 1{'0' * 400}", "max_latency_ms in FILE must be a number", ""),
        ('[probe]\ntasks = ["mr", "subj"]', "tasks in FILE [probe] must be text", "separated by commas"),
        ("min = {accuracy = 0.8}", "min in FILE must be text", "separated by commas"),
        ("[[eval]]\nseed = 1", "unknown option in FILE 'eval'", ""),
        ("model = ", "cannot read FILE", "TOML"),
        ("model = 1\nmodel = 2", "cannot read FILE", "TOML"),
        ("a = " + "[" * 3000, "cannot read FILE", "TOML"),
    ],
    ids=lambda text: text[:30],
)
@pytest.mark.parametrize("command", ["eval", "probe"])
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, command: str, text: str, message: str, hint: str) -> None:
    file = tmp_path / "cap.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        layered(command, {}, str(file))
    assert message.replace("FILE", str(file)) in caught.value.message
    assert hint in caught.value.hint


def test_the_file_of_the_folder_and_the_one_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert options_file("") == ""
    (tmp_path / "cap.toml").write_text("")
    assert options_file("") == "cap.toml"
    assert options_file("/dev/null") == "/dev/null"
    assert layered("probe", {}, "/dev/null") == {}


@pytest.mark.parametrize("cls", [PruneConfig, EvalConfig, ProbeConfig, ExportConfig])
def test_build_is_the_inverse_of_flatten(cls: type) -> None:
    flat = {"task": "sst2", "model": "m", "seed": 9, "device": "cpu", "max_length": 64, "min": "accuracy=0.5"}
    made = build(cls, flat)
    again = flatten(made)
    assert build(cls, again) == made
    names = [item.name for item, _ in leaves(cls)]
    assert list(again) == names
    assert len(names) == len(set(names))  # flat names are unique over nested groups
    assert all(again[name] == value for name, value in flat.items() if name in names)


def test_differences_are_named_and_resumable_ones_are_not() -> None:
    ours = flatten(prune(lr=1e-3, out="a", max_time=5, keep_work=True, checkpoint_seconds=1))
    theirs = flatten(prune(out="b"))
    assert differences(ours, theirs) == {"lr": "lr: 0.0, now 0.001"}
    assert differences(theirs, theirs) == {}
    del theirs["seed"]
    assert differences(ours, theirs)["seed"] == "seed: None, now 1"


def test_nearest_names_all_when_nothing_is_near() -> None:
    assert nearest("zzz", ["a", "b"]) == "valid: a, b"
    assert nearest("SST2", TASK_NAMES).startswith("did you mean sst2? valid: ")


# Tables --------------------------------------------------------------------------------------------------------------


def test_tables_agree_with_their_modules() -> None:
    from capcli.data import tasks
    from capcli.exporting import formats
    from capcli.pruning import criteria
    from capcli.sources import hub

    assert {method.criterion for method in METHODS.values()} == set(criteria.CRITERIA)
    assert set(TASK_NAMES) == set(tasks.TASKS)
    kinds = {name: task.kind for name, task in tasks.TASKS.items()}
    assert {name for name, kind in kinds.items() if kind == "spans"} == set(QUESTION_TASKS)
    assert set(EXPORT_FORMATS) == set(formats.FORMATS)
    assert len(TASK_NAMES) == len(set(TASK_NAMES))
    assert ProbeConfig().task_names == PROBE_TASKS
    assert {tasks.TASKS[name].kind for name in PROBE_TASKS} == {"classification"}
    assert set(PROBE_TASKS) < set(BUILTIN_TASKS)
    assert set(BUILTIN_TASKS) == {p.name for p in tasks.BUILTIN_FOLDER.iterdir() if p.is_dir()}
    assert (hub.BUILTIN_FOLDER / "config.json").is_file()
    for method in METHODS.values():
        assert set(method.losses) <= set(LOSSES)


def test_every_option_has_a_help_text() -> None:
    for cls in (PruneConfig, EvalConfig, ExportConfig, ProbeConfig):
        for item, kind in leaves(cls):
            assert kind in (str, int, float, bool)
            assert item.name == "model" or item.metadata["help"], item.name
            assert item.name == "model" or type(item.default) is kind, item.name


SIZES = {
    "5MB": 5_000_000,
    "5m": 5_000_000,
    "800k": 800_000,
    "1.5 MiB": 1_572_864,
    "2GiB": 2 * 1024**3,
    "1.1GB": 1_100_000_000,
    "120000000": 120_000_000,
    "12_000_000 B": 12_000_000,
    "1e6": 1_000_000,
    "999.9": 999,
}
TIMES = {"10": 10.0, "10ms": 10.0, "0.01s": 10.0, "1 S": 1000.0, "500us": 0.5, "500µs": 0.5, ".5": 0.5}


def test_sizes_and_times_have_units() -> None:
    """Decimal units are of 1000, those with an i of 1024; a number alone is bytes or milliseconds."""
    assert {text: options.measured("bytes", text) for text in SIZES} == SIZES
    assert {text: options.measured("ms", text) for text in TIMES} == TIMES
    for unit, wrong in {"bytes": "5XB,nan,inf,-5MB,,MB,5 M B,1e999MB,5MB5,0x10,_,٣MB", "ms": "10m,nan,-1,1h,s"}.items():
        for text in wrong.split(","):
            with pytest.raises(
                ValueError, match=re.escape(f"{text!r} is not a {'size' if unit == 'bytes' else 'time'}")
            ):
                options.measured(unit, text)


def test_gates_in_a_file_have_units(tmp_path: Path) -> None:
    (tmp_path / "cap.toml").write_text('max-bytes = "5MB"\nmax-latency-ms = "0.5s"')
    assert layered("eval", {}, str(tmp_path / "cap.toml")) == {"max_bytes": 5_000_000, "max_latency_ms": 500.0}


def test_shares_in_a_file_can_be_in_per_cent(tmp_path: Path) -> None:
    (tmp_path / "cap.toml").write_text('min-retention = "98%"\nconfidence = 0.95\nmin = "accuracy=80%"')
    found = layered("eval", {}, str(tmp_path / "cap.toml"))
    assert found == {"min_retention": 0.98, "confidence": 0.95, "min": "accuracy=80%"}
    (tmp_path / "cap.toml").write_text('min-retention = "most"')
    with pytest.raises(ConfigError, match=r"min_retention in .*: 'most' is not a number or a percentage"):
        layered("eval", {}, str(tmp_path / "cap.toml"))
