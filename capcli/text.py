"""Data as text: values that may be absent, strings that may be hostile, numbers that must not claim too much.

How numbers are written: a figure that is a claim (a metric, a sparsity, a retention) is cut, never rounded up, and a
size is rounded up, never down. So 96.996 % is shown as 96.99 %, and 97.00 % means at least that. Where a cut would hide
that a value misses the next step by a hair, more digits are shown: 96.99998 % becomes 96.9999 %. Intervals are widened
outward.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from numbers import Real
from typing import Any

from capcli.config import TOKEN

NOT_MEASURED = "not measured"

# ------------------------------------------------------------------------------------------- reading what may be absent


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def part(data: Any, *keys: str) -> Mapping[str, Any]:
    """The mapping at `keys` inside `data`, or an empty one."""
    for key in keys:
        data = mapping(data).get(key)
    return mapping(data)


def finite(value: Any) -> float | None:
    """A finite number, or None for whatever else a JSON file may hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


# ----------------------------------------------------------------------------------------------------- text and numbers


def plain(text: object, limit: int = 200) -> str:
    r"""One line of at most `limit` characters without anything a terminal, editor or parser would act on.

    Controls, line breaks, invisible formatting and direction overrides, lone surrogates and non-characters become their
    Python escape (ESC is shown as `\x1b`). The joiners that scripts and emoji need stay. Tokens of the hub are cut.
    """
    shown = str(text)[: limit + 100]
    if "_" in shown:
        shown = TOKEN.sub("hf_…", shown)
    shown = shown[: limit + 1]
    if not (shown.isascii() and shown.isprintable()):
        shown = "".join(_escaped(char) if _is_active(char) else char for char in shown)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _is_active(char: str) -> bool:
    if char in "\u200c\u200d":
        return False
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") or ord(char) & 0xFFFE == 0xFFFE


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", errors="surrogatepass").decode("ascii")


def named(text: object, limit: int = 200) -> str:
    """`plain`, with a stand-in for nothing at all."""
    return plain(text, limit) if text not in (None, "") else "not recorded" if text is None else "(empty)"


def _cut(value: Decimal, digits: int, up: bool = False) -> Decimal:
    """`value` at `digits` decimals, towards minus or plus infinity."""
    return value.quantize(Decimal(1).scaleb(-digits), ROUND_CEILING if up else ROUND_FLOOR)


def _decimal(value: float) -> Decimal:
    """The decimal a reader would write for `value`: without the noise in its last binary digits."""
    return Decimal(repr(round(value, 12)))


def cut(value: float, digits: int) -> str:
    """`value` cut to `digits` decimals, as digits."""
    return f"{_cut(_decimal(value), digits):f}"


def number(value: Any, digits: int = 4, up: bool = False) -> str:
    """A metric or measurement, cut (or rounded up) to `digits` decimals; on the scale on which gates compare it."""
    real = finite(value)
    if real is None:
        return NOT_MEASURED
    if abs(real) >= 1e9 or 0 < abs(real) < 10.0**-digits:
        return f"{real:.3g}"
    return f"{_cut(_decimal(real), digits, up):,f}"


def percent(fraction: Any) -> str:
    """A fraction as a percentage that is never larger than the fraction."""
    real = finite(fraction)
    if real is None or abs(real) >= 1e9:
        return NOT_MEASURED
    exact = _decimal(real) * 100
    digits = next((d for d in (2, 3, 4) if exact - _cut(exact, d) < Decimal("0.9").scaleb(-d)), 4)
    return f"{_cut(exact, digits):,f} %"


def byte_size(n_bytes: Any) -> str:
    """Bytes in decimal units with at least three significant digits, rounded up."""
    real = finite(n_bytes)
    if real is None or not 0 <= real < 1e24:
        return NOT_MEASURED
    unit = min(int(math.log10(max(real, 1)) // 3), 7)
    size = _decimal(real).scaleb(-3 * unit)
    digits = 0 if unit == 0 else 1 if size >= 10 else 2
    return f"{_cut(size, digits, up=True):f} {('B', 'kB', 'MB', 'GB', 'TB', 'PB', 'EB', 'ZB')[unit]}"


def count(value: Any) -> str:
    """A whole number with separators of thousands."""
    real = finite(value)
    return NOT_MEASURED if real is None else f"{int(real):,}" if abs(real) < 1e18 else f"{real:.3g}"


def duration(seconds: Any) -> str:
    """Seconds in the two largest units that matter."""
    real = finite(seconds)
    if real is None or not 0 <= real < 1e12:
        return NOT_MEASURED
    if real < 60:
        return f"{real:.3g} s"
    hours, minutes, rest = int(real) // 3600, int(real) // 60 % 60, int(real) % 60
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def interval(bounds: Any) -> str:
    """[lo, hi], widened outward."""
    low_high = [finite(bound) for bound in sequence(bounds)]
    if len(low_high) != 2 or None in low_high:
        return NOT_MEASURED
    return f"[{number(low_high[0])}, {number(low_high[1], up=True)}]"


def times_smaller(large: Any, small: Any) -> str:
    large, small = finite(large), finite(small)
    return f"{number(large / small, 1)}× smaller" if large and small and 0 < small < large else ""


def markdown(text: object, limit: int = 200) -> str:
    """User text as inert Markdown, also inside a table: no markup, link, HTML or formula."""
    escaped = re.sub(r"([\\`*_{}\[\]()<>#|~&:@$=^!\"])", r"\\\1", named(text, limit))
    return re.sub(r"(?i)www\.", r"www\\.", escaped)
