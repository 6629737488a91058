"""What the functions of the commands return: the names that `--json` prints, with attributes, a table and a page."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from capcli.records.codec import Versioned, to_json

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = 100
_HTML = '<pre style="font-family: monospace; line-height: 1.3">{code}</pre>'


class Result(dict[str, Any]):
    """A result as the dictionary that `--json` prints. Its record has the same names as attributes:
    `found["metrics"]["pruned"]` is `found.metrics.pruned`.

    `table()` is what the command prints on a terminal; a notebook shows the same.
    """

    def __init__(self, record: Versioned, rendered: Callable[[], Any]) -> None:
        super().__init__(to_json(record))
        self._record, self._rendered = record, rendered

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._record, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *vars(self._record)})

    def table(self) -> str:
        """The facts as plain text, at most 100 columns wide."""
        console = self._console(record=False)
        console.print(self._rendered())
        file = console.file
        assert isinstance(file, io.StringIO)
        return file.getvalue()

    def _repr_html_(self) -> str:
        console = self._console(record=True)
        console.print(self._rendered())
        return console.export_html(inline_styles=True, code_format=_HTML)

    @staticmethod
    def _console(record: bool) -> Console:
        from rich.console import Console

        return Console(
            file=io.StringIO(), width=COLUMNS, record=record, markup=False, highlight=False, force_jupyter=False
        )
