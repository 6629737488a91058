"""Benchmark results as Markdown tables between markers of a document.

    python benchmarks/table.py docs/benchmarks.md                    add the sections that are missing
    python benchmarks/NAME.py --table FILE.json [--write DOCUMENT]   print the table of NAME, or put it into DOCUMENT

In the document, `<!-- NAME:begin -->` and `<!-- NAME:end -->` stand on lines of their own; what is between them is
replaced, the rest is left as it is. A file that is called like another section goes there: contrastive.json of
quality.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

SECTIONS = {
    "quality": "Quality after pruning",
    "contrastive": "Do the contrastive terms help?",
    "staged": "Staged Fisher, movement and the contrastive methods",
    "classes": "Many classes",
    "longer": "Learning rate",
    "untrained": "Without training",
    "neighbours": "The methods of the paper's neighbourhood",
    "transfer": "Knowledge that is left",
    "tasks": "Every kind of task",
    "data": "Reading, tokenising, encoding, training",
    "step": "Time of a training step",
    "sparse": "Size and speed of the file format",
    "export": "Export formats",
    "runtime": "Speed of sparse weights on a CPU",
    "sizes": "Size of a whole model",
    "gpu": "On a GPU",
    "memory": "Memory and throughput",
    "ranks": "Several processes",
    "thin": "Ranks of pruned matrices",
}
MISSING = "not measured yet"


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def handled(name: str, render: Callable[[Any], str]) -> bool:
    """Serve `--table FILE [--write DOCUMENT]` if the command line says so; a missing file is "not measured yet"."""
    words = sys.argv[1:]
    if "--table" not in words:
        return False
    if len(words) not in (2, 4) or words[0] != "--table" or words[2:3] not in ([], ["--write"]):
        raise SystemExit("usage: --table FILE.json [--write DOCUMENT]")
    path = Path(words[1])
    text = render(json.loads(path.read_text())) if path.is_file() else MISSING
    if len(words) == 4:
        write(Path(words[3]), path.stem if path.stem in SECTIONS else name, text)
    else:
        print(text)
    return True


def write(document: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of `name`, after adding the sections that the document lacks."""
    old = document.read_text() if document.is_file() else "# Benchmarks\n"
    new = replaced(with_sections(old), name, text)
    if new != old:
        document.write_text(new)


def with_sections(page: str) -> str:
    """The page with a section for every benchmark that has no markers yet."""
    for name, title in SECTIONS.items():
        if _begin(name) not in page:
            page = f"{page.rstrip()}\n\n## {title}\n\n{_begin(name)}\n{MISSING}\n{_end(name)}\n"
    return page


def replaced(page: str, name: str, text: str) -> str:
    """The page with `text` between the markers of `name`."""
    pattern = re.escape(_begin(name)) + ".*?" + re.escape(_end(name))
    page, count = re.subn(pattern, lambda _: f"{_begin(name)}\n{text.strip()}\n{_end(name)}", page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"the page needs one pair of markers {_begin(name)} and {_end(name)}, found {count}")
    return page


def _begin(name: str) -> str:
    return f"<!-- {name}:begin -->"


def _end(name: str) -> str:
    return f"<!-- {name}:end -->"


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    document = Path(sys.argv[1])
    document.write_text(with_sections(document.read_text() if document.is_file() else "# Benchmarks\n"))


if __name__ == "__main__":
    main()
