"""The drawing of the house, pinned: which folder may import which, what loads nothing heavy, what no module may do."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import capcli

HOUSE = Path(capcli.__file__).parent
# Bottom to top: a folder, or a file beside the folders, imports what stands before it. docs/explanation/architecture.md
# draws the same.
ORDER = [
    "errors",
    "parallel",
    "stored",
    "files",
    "events",
    "machine",
    "timing",
    "config",
    "records",
    "reporting",
    "progress",
    "trackers",
    "tracking",
    "outcome",
    "sources",
    "stages",
    "run",
    "artifact",
    "data",
    "models",
    "runtime",
    "measuring",
    "predicting",
    "pruning",
    "exporting",
    "verbs",
    "sweeping",
    "api",
    "hub",
    "cli",
    "__main__",
]
# What `cap --help` and a report need, and what reads and writes files: imported without torch and transformers.
LIGHT = [*ORDER[: ORDER.index("data")], "cli", "__init__", "__main__"]
NEVER_TORCH = ("errors", "events", "config", "records", "reporting")
MOST_LINES = 400
HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "sklearn",
    "scipy",
    "pandas",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "numba",
    "llvmlite",
)
ONNX = {"onnx", "onnx_ir", "onnxruntime", "onnxscript"}
ONNX_MODEL = "exporting.onnx_model"
TREES = {
    ".".join(path.relative_to(HOUSE).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
    for path in sorted(HOUSE.rglob("*.py"))
}


def folder(module: str) -> str:
    """The folder of a module, or the module itself beside the folders."""
    return module.split(".")[0]


def imports(tree: ast.AST, *, eager: bool = False) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """(line, module, names) of every import; with `eager` only of those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or ""), tuple(alias.name for alias in node.names)
        elif not (eager and (isinstance(node, ast.FunctionDef) or is_type_checking(node))):
            yield from imports(node, eager=eager)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def ours(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module of capcli) of every import of our own, also inside functions."""
    for line, module, names in imports(tree):
        assert not module.startswith("."), f"line {line}: a relative import"
        if module.split(".")[0] != "capcli":
            continue
        inside = module.removeprefix("capcli").removeprefix(".")
        for name in names or ("",):
            whole = ".".join(part for part in (inside, name) if part)
            found = next((known for known in (whole, inside, f"{whole}.__init__") if known in TREES), None)
            assert found or f"{inside}.__init__" in TREES, f"line {line}: {module} {name}"
            yield line, found or f"{inside}.__init__"


def ours_when_imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The same of the imports that run when the module is imported."""
    eager = {line for line, _, _ in imports(tree, eager=True)}
    return ((line, name) for line, name in ours(tree) if line in eager)


def reaches_numba(name: str) -> bool:
    """Whether importing a module imports numba."""
    if {module.split(".")[0] for _, module, _ in imports(TREES[name], eager=True)} & {"numba", "llvmlite"}:
        return True
    return any(reaches_numba(other) for _, other in ours_when_imported(TREES[name]) if folder(other) == folder(name))


def calls(tree: ast.AST) -> Iterator[tuple[int, str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), node


def test_every_folder_has_its_place() -> None:
    assert sorted({folder(name) for name in TREES} - {"__init__"}) == sorted(ORDER)


@pytest.mark.parametrize("name", [name for name in TREES if name != "__init__"])
def test_a_folder_imports_only_what_stands_before_it(name: str) -> None:
    before = ORDER[: ORDER.index(folder(name)) + 1]
    assert [f"line {line}: {other}" for line, other in ours(TREES[name]) if folder(other) not in before] == []


def test_no_folder_has_an_inner_cycle() -> None:
    inner = {
        name: {other for _, other in ours(tree) if folder(other) == folder(name) and other != name}
        for name, tree in TREES.items()
    }
    while free := [name for name, others in inner.items() if not others & inner.keys()]:
        for name in free:
            del inner[name]
    assert inner == {}


def test_no_verb_imports_another_verb() -> None:
    for name, tree in TREES.items():
        if folder(name) == "verbs":
            assert [other for _, other in ours(tree) if folder(other) == "verbs" and other != name] == [], name


def test_only_verbs_and_their_phases_make_events() -> None:
    """What measures and computes yields how much is done, of how much."""
    nouns = [name for name in TREES if folder(name) in ("artifact", "data", "models", "measuring", "sources")]
    assert [name for name in nouns if any("Event" in names for _, _, names in imports(TREES[name]))] == []


def test_no_file_is_long() -> None:
    lengths = {name: len((HOUSE / f"{name.replace('.', '/')}.py").read_text("utf-8").splitlines()) for name in TREES}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


@pytest.mark.parametrize("name", [name for name in TREES if folder(name) in LIGHT])
def test_light_modules_import_nothing_heavy_when_they_are_imported(name: str) -> None:
    found = [module for _, module, _ in imports(TREES[name], eager=True) if module.split(".")[0] in HEAVY]
    assert found == []


@pytest.mark.parametrize("name", [name for name in TREES if folder(name) in NEVER_TORCH])
def test_what_shows_and_configures_never_imports_torch(name: str) -> None:
    found = [module for _, module, _ in imports(TREES[name]) if module.split(".")[0] in HEAVY]
    assert found == []


def test_boundaries_to_transformers_and_data_files() -> None:
    for name, tree in TREES.items():
        used = {module.split(".")[0] for _, module, _ in imports(tree)}
        assert "transformers" not in used or folder(name) == "models" or name == ONNX_MODEL, name
        assert not used & ONNX or name == ONNX_MODEL or (name, used & ONNX) == ("runtime.graph", {"onnxruntime"}), name
        assert "pyarrow" not in used or name in ("data.tables", "data.packed"), name
        assert "datasets" not in used or name in ("sources.hub_data", "data.library"), name
        assert not used & {"numba", "llvmlite"} or folder(name) == "runtime", name
        assert "click" not in used, name  # typer vendors its own


def test_the_library_datasets_is_loaded_only_where_it_reads() -> None:
    """It takes more than a second to import: a command on local files or on parquet never waits for it there."""
    for name in ("sources.hub_data", "data.library"):
        assert "datasets" not in {module.split(".")[0] for _, module, _ in imports(TREES[name], eager=True)}


def test_the_onnx_model_imports_the_exporter_alone_and_only_when_it_converts() -> None:
    found = [module for _, module, _ in imports(TREES[ONNX_MODEL]) if module.split(".")[0] in {"transformers", *ONNX}]
    assert {module for module in found if module.startswith("transformers")} == {"transformers.exporters.exporter_onnx"}
    for name in (ONNX_MODEL, "runtime.graph"):
        eager = {module.split(".")[0] for _, module, _ in imports(TREES[name], eager=True)}
        assert not eager & {"transformers", *ONNX}


def test_numba_is_loaded_only_when_a_model_runs_on_it() -> None:
    """Other modules import `runtime.sparse`, which is there without numba and says that it is missing."""
    (interface,) = [name for name in TREES if name == "runtime.sparse"]
    inside = {name for name, tree in TREES.items() if folder(name) == "runtime" and name != interface}
    needing = {name for name in inside if reaches_numba(name)}
    assert not {other for _, other in ours_when_imported(TREES[interface])} & needing
    for name, tree in TREES.items():
        if folder(name) != "runtime":
            assert not {other for _, other in ours(tree)} & needing, name


def test_nobody_loads_a_library_of_operators_into_onnxruntime() -> None:
    text = "".join(path.read_text("utf-8") for path in HOUSE.rglob("*.py"))
    assert "register_custom_ops" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement", ["import capcli", "import capcli.config.layers", "import capcli.cli.app, capcli.__main__"]
)
def test_importing_loads_nothing_heavy(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint(sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


@pytest.mark.parametrize("name", TREES)
def test_only_the_command_line_prints_or_exits(name: str) -> None:
    if folder(name) == "cli":
        return
    banned = {"print", "exit", "quit", "sys.exit", "os._exit", "input", "breakpoint", "sys.stdout.write"}
    assert [f"line {line}: {call}" for line, call, _ in calls(TREES[name]) if call in banned] == []


@pytest.mark.parametrize("name", TREES)
def test_nothing_runs_what_a_file_or_a_user_names(name: str) -> None:
    tree = TREES[name]
    modules = {module.split(".")[0] for _, module, _ in imports(tree)}
    assert not modules & {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
    banned = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "np.load", "numpy.load", "os.system"}
    found = [f"line {line}: {call}" for line, call, _ in calls(tree) if call in banned]
    assert found == []
    for line, call, node in calls(tree):
        if call.endswith("import_module"):
            assert name == "__init__" or isinstance(node.args[0], ast.Constant), f"line {line}"
        if call.split(".")[0] == "subprocess":
            assert not any(keyword.arg == "shell" for keyword in node.keywords), f"line {line}"
        for keyword in node.keywords:
            if keyword.arg in ("trust_remote_code", "allow_pickle"):
                assert isinstance(keyword.value, ast.Constant), f"line {line}"
                assert keyword.value.value is False, f"line {line}"


def test_the_lazy_table_is_closed() -> None:
    for name in capcli.__all__:
        assert getattr(capcli, name) is not None
    for name in ("os", "nothing", "__path"):
        with pytest.raises(AttributeError):
            getattr(capcli, name + "_")


@pytest.mark.parametrize("name", TREES)
def test_no_wildcards_no_globals_no_bare_excepts(name: str) -> None:
    for node in ast.walk(TREES[name]):
        assert not isinstance(node, ast.Global), f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}"


def test_every_module_says_what_it_is() -> None:
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []
