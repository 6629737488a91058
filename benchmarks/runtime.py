"""Sparse weights on a CPU beside torch, onnxruntime and OpenVINO: time, memory and time to load.

    python benchmarks/runtime.py [MODEL] [--json runtime.json] [--threads 1,2] [--batches 1,8,32] [--lengths 16,128]
    python benchmarks/runtime.py --table runtime.json [--write docs/benchmarks.md]

Two networks: BERT-base with random weights, and MODEL, such as MiniLM, if one is given. Matrices of the
layers are pruned by magnitude; the other systems run the dense network, which costs them the same. All systems of a
network are loaded into one process for each number of threads and take turns, one call each, so that a busy machine is
busy for all of them. Wall and CPU milliseconds are medians, with quartiles in the file; on one thread read the CPU's.
× is how many times faster than torch in 32 bits, by CPU time on one thread, else by wall time. Memory and time to load
are of a process of its own for each system; beside it what the libraries take before anything is loaded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import table

from capcli.machine import peak_bytes

SPARSITIES = (80, 90, 95, 97)  # percent
DENSE = ("torch fp32", "torch bf16", "onnxruntime fp32", "onnxruntime int8")
OPENVINO = {"OpenVINO fp32": "f32", "OpenVINO bf16": "bf16", "OpenVINO int8": "f32"}
SPARSE = tuple(f"sparse {percent} %" for percent in SPARSITIES)
Call = Callable[[Any, Any], Any]
"""ids and mask [B, S] -> logits."""


def main() -> None:
    if table.handled("runtime", render):
        return
    args = arguments()
    if args.measure:
        print(json.dumps(timed(Path(args.measure), args)))
        return
    if args.load:
        print(json.dumps(loaded(Path(args.measure_in), args.load)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        networks: dict[str, str | None] = {} if args.without_base else {"BERT-base": None}
        networks |= {Path(args.model).name: args.model} if args.model else {}
        rows, loads = [], []
        for name, source in networks.items():
            folder = Path(scratch) / name
            say(f"{name}: files")
            prepare(folder, source)
            for threads in numbers(args.threads):
                rows += [
                    {"model": name, "threads": threads, **row}
                    for row in in_a_process(["--measure", str(folder), *passed(args)], threads)
                ]
            for system in systems():
                say(f"{name}: loading {system}")
                found = in_a_process(["--load", system, "--measure-in", str(folder)], 1)
                loads.append({"model": name, "system": system, **found})
        found = {
            "schema_version": 1,
            "command": shlex.join(["python", *sys.argv]),
            "device": processor(),
            "versions": versions(),
            "rows": rows,
            "loads": loads,
        }
    text = json.dumps(found, indent=1) + "\n"
    Path(args.json).write_text(text) if args.json else print(text)
    print(render(found))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="", help="a dense model")
    parser.add_argument("--without-base", action="store_true", help="MODEL alone")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--lengths", default="16,128")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each system at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a batch and length, after three rounds")
    parser.add_argument("--json", default="", help="where the figures are written")
    for hidden in ("--measure", "--measure-in", "--load"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def passed(args: argparse.Namespace) -> list[str]:
    """The options that the measuring process needs."""
    names = ("batches", "lengths", "rounds", "seconds")
    return [word for name in names for word in (f"--{name}", str(getattr(args, name)))]


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def systems() -> list[str]:
    return [*DENSE, *(OPENVINO if find_spec("openvino") else ()), *SPARSE]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def in_a_process(options: list[str], threads: int) -> Any:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "CAP_BENCHMARK_THREADS": str(threads)}
    done = subprocess.run([sys.executable, __file__, *options], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def threads_here() -> int:
    return int(os.environ["CAP_BENCHMARK_THREADS"])


# Files ---------------------------------------------------------------------------------------------------------------


def prepare(folder: Path, source: str | None) -> None:
    """Write the network dense, as graphs in 32 and 8 bits, and as an artefact of each sparsity."""
    import torch

    from capcli.exporting import onnx_model
    from capcli.models import artifact, loading, stock

    folder.mkdir()
    torch.manual_seed(0)
    if source is None:
        source = str(write_base(folder / "base"))
    model = loading.load_dense(source, ("no", "yes"), "classification", 0)
    stock.save_dense(model, folder / "dense")
    onnx_model.quantise(
        onnx_model.convert(model, folder / "onnx", model.net.config.max_position_embeddings), folder / "int8.onnx"
    )
    for percent in SPARSITIES:
        with torch.no_grad():
            for linear in model.prunable().values():
                size = linear.weight.abs().flatten()
                linear.weight[linear.weight.abs() <= size.kthvalue(size.numel() * percent // 100).values] = 0
        artifact.save_artifact(model, folder / str(percent), list(model.prunable()), {})


def write_base(folder: Path) -> Path:
    """BERT-base with random weights, large enough that activations keep their size when 97 % are gone."""
    import torch
    from transformers import BertConfig, BertModel

    import capcli

    net = BertModel(BertConfig())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
            elif name.startswith("encoder") and parameter.dim() == 2:
                parameter.normal_(0, 0.06)
    net.save_pretrained(folder)
    mini = Path(capcli.__file__).parent / "builtin" / "mini"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(mini / name, folder)
    return folder


def texts(folder: Path, batch: int, length: int, seed: int) -> Any:
    """Random ids [batch, length], no longer than the network can read."""
    import torch

    config = json.loads((folder / "dense" / "config.json").read_text())
    size = batch, min(length, config["max_position_embeddings"])
    return torch.randint(5, config["vocab_size"], size, generator=torch.Generator().manual_seed(seed))


# One system ----------------------------------------------------------------------------------------------------------


def opened(folder: Path, system: str) -> Call:
    """Load a system; what it needs is imported here."""
    kind, _, what = system.partition(" ")
    if kind == "torch":
        return of_torch(folder / "dense", what)
    if kind == "onnxruntime":
        return of_onnxruntime(folder / ("onnx/model.onnx" if what == "fp32" else "int8.onnx"))
    if kind == "OpenVINO":
        return of_openvino(folder / ("int8.onnx" if what == "int8" else "onnx/model.onnx"), OPENVINO[system])
    from capcli.runtime import sparse

    model = sparse.load(folder / what.split()[0], threads_here())
    run = model.run()
    return lambda ids, mask: run({"input_ids": ids, "attention_mask": mask})[0]


def of_torch(folder: Path, precision: str) -> Call:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(threads_here())
    net = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def run(ids: Any, mask: Any) -> Any:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return net(input_ids=ids, attention_mask=mask).logits.float()

    return run


def of_onnxruntime(path: Path) -> Call:
    from capcli.runtime.graph import Graph

    graph = Graph(path, threads_here())

    def run(ids: Any, mask: Any) -> Any:
        import torch

        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        return graph.logits({name: given[name] for name in graph.names})

    return run


def of_openvino(path: Path, precision: str) -> Call:
    import openvino
    import torch

    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": threads_here(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = core.compile_model(core.read_model(path), "CPU", options)
    names = [item.get_any_name() for item in compiled.inputs]

    def run(ids: Any, mask: Any) -> Any:
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        return torch.from_numpy(compiled({name: given[name].numpy() for name in names})[0])

    return run


def loaded(folder: Path, system: str) -> dict[str, Any]:
    """Seconds to load a system and to answer first, and the memory of the process."""
    import torch
    import transformers.models.auto.modeling_auto  # noqa: F401  what ours and torch's need, counted as a library

    before = peak_bytes()
    ids = texts(folder, 1, 128, 0)
    began = time.perf_counter()
    run = opened(folder, system)
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    run(ids, torch.ones_like(ids))
    first = time.perf_counter() - began
    return {"load_seconds": seconds, "first_seconds": first, "libraries_bytes": before, "peak_bytes": peak_bytes()}


# All of them, in turns -----------------------------------------------------------------------------------------------


def timed(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each system, batch and length."""
    calls: dict[str, Call] = {}
    for system in systems():
        try:
            calls[system] = opened(folder, system)
        except Exception as error:  # such as a graph that OpenVINO does not take
            say(f"{system} is left out: {str(error).splitlines()[0]}")
    differences = {system: difference(folder, system, calls[system]) for system in SPARSE}
    rows = []
    for batch in numbers(args.batches):
        for length in numbers(args.lengths):
            say(f"{folder.name}, {threads_here()} threads, {batch} x {length}")
            ids = texts(folder, batch, length, 1)
            for system, found in in_turns(calls, ids, args).items():
                known = {"difference": differences[system]} if system in SPARSE else {}
                rows.append({"system": system, "batch": batch, "length": length, **found, **known})
    return rows


def difference(folder: Path, system: str, call: Call) -> float:
    """The largest difference of logits to torch with the same weights, on texts of unlike length."""
    import torch

    import capcli

    net = capcli.load(folder / system.split()[1])
    ids = texts(folder, 4, 128, 2)
    mask = (torch.arange(ids.shape[1]) < torch.tensor([[128], [17], [64], [1]])).long()
    with torch.inference_mode():
        return float((net(input_ids=ids, attention_mask=mask).logits - call(ids, mask)).abs().max())


def in_turns(calls: dict[str, Call], ids: Any, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Quartiles of the milliseconds of each system, and the load of the machine."""
    import torch

    mask = torch.ones_like(ids)
    wall: dict[str, list[float]] = {system: [] for system in calls}
    cpu: dict[str, list[float]] = {system: [] for system in calls}
    for call in calls.values():
        call(ids, mask)
    began, rounds = time.perf_counter(), 0
    while rounds < 3 or (rounds < args.rounds and time.perf_counter() - began < args.seconds):
        for system, call in calls.items():
            time.sleep(0.004)  # threads that still spin for the last one go to sleep
            used, start = time.process_time(), time.perf_counter()
            call(ids, mask)
            wall[system].append(1000 * (time.perf_counter() - start))
            cpu[system].append(1000 * (time.process_time() - used))
        rounds += 1
    return {
        system: {
            "wall_ms": statistics.quantiles(wall[system], n=4, method="inclusive"),
            "cpu_ms": statistics.quantiles(cpu[system], n=4, method="inclusive"),
            "rounds": rounds,
            "load": os.getloadavg()[0],
        }
        for system in calls
    }


# The table -----------------------------------------------------------------------------------------------------------


def processor() -> str:
    from capcli.config.hardware import Hardware
    from capcli.models import devices
    from capcli.runtime.vectors import instructions

    return f"{devices.compute(Hardware(device='cpu')).name}, {instructions()}"


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "onnxruntime", "openvino", "numba", "capcli")
    return {name: importlib.metadata.version(name) for name in names if find_spec(name)}


def render(found: dict[str, Any]) -> str:
    about = f"`{found['command']}`\n\n{found['device']}; " + ", ".join(f"{n} {v}" for n, v in found["versions"].items())
    largest = max(row.get("difference", 0.0) for row in found["rows"])
    loads = [row["load"] for row in found["rows"]]
    parts = [
        f"{about}. Milliseconds, and × how many times faster than torch fp32: CPU time on one thread, wall time on "
        f"more. Load of the machine {min(loads):.1f} to {max(loads):.1f}. Logits differ from torch's by {largest:.0e} "
        "at most."
    ]
    for model, threads in dict.fromkeys((row["model"], row["threads"]) for row in found["rows"]):
        rows = [row for row in found["rows"] if (row["model"], row["threads"]) == (model, threads)]
        parts += [f"{model}, {threads} thread{'s' if threads > 1 else ''}, batch × length:", of_times(rows, threads)]
    for model in dict.fromkeys(row["model"] for row in found["loads"]):
        rows = [row for row in found["loads"] if row["model"] == model]
        parts += [f"{model}, a process of its own:", of_loads(rows)]
    return "\n\n".join(parts)


def of_times(rows: list[dict[str, Any]], threads: int) -> str:
    key = "cpu_ms" if threads == 1 else "wall_ms"
    cases = list(dict.fromkeys((row["batch"], row["length"]) for row in rows))
    median = {(row["system"], row["batch"], row["length"]): row[key][1] for row in rows}
    lines = []
    for system in dict.fromkeys(row["system"] for row in rows):
        cells = [(median[system, *case], median["torch fp32", *case]) for case in cases]
        lines.append([system, *(f"{ms:.1f}, {dense / ms:.1f}×" for ms, dense in cells)])
    return table.markdown(["system", *(f"{batch} × {length}" for batch, length in cases)], lines)


def of_loads(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            row["system"],
            f"{row['load_seconds']:.2f} s",
            f"{row['first_seconds']:.2f} s",
            f"{row['peak_bytes'] / 1e6:.0f} MB",
            f"{row['libraries_bytes'] / 1e6:.0f} MB",
        ]
        for row in rows
    ]
    return table.markdown(["system", "load", "first answer", "peak memory", "libraries"], lines)


if __name__ == "__main__":
    main()
