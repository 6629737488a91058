"""What figures depend on besides the options: versions of libraries, processors, the memory of this process."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"cap": importlib.metadata.version("capcli"), "python": platform.python_version(), **found}


def own_python(module: str) -> list[str]:
    """The command of a process that calls `main` of a module of this same package, wherever others of its name are, and
    imports nothing else from where it lies."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import capcli; del sys.path[0]; "
    home = str(Path(__file__).resolve().parents[1])
    return [sys.executable, "-P", "-c", f"{code}from {module} import main; main()", home]


def processor() -> str:
    """What the processor is called."""
    named = _said("model name")  # not by all processors
    return named or platform.processor() or platform.machine()


def has_bf16(described: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bf16 numbers (AVX512-BF16 or AMX; BF16 of Arm); others emulate that."""
    flags = (_said("flags", described) or _said("Features", described)).split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def _said(name: str, described: Path = Path("/proc/cpuinfo")) -> str:
    """What the system says of the first processor under a name; empty on systems that do not say."""
    try:
        lines = described.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_threads(wanted: int) -> tuple[int, tuple[str, ...]]:
    """How many of the `wanted` threads have a processor, and a note where that is fewer."""
    there = processors()
    if wanted <= there:
        return wanted, ()
    return there, (f"{wanted:,} threads were asked for, this process may use {there:,}",)


def peak_bytes() -> int | None:
    """Peak resident memory of this process; None where the system does not tell.

    Not by `getrusage`, whose number begins with the peak of the parent.
    """
    try:
        status = Path("/proc/self/status").read_text("ascii", errors="replace")
    except OSError:
        return _peak_of_usage()
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), None)


def _peak_of_usage() -> int | None:
    """The same where there is no /proc: by `getrusage`, which is in bytes on macOS."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
