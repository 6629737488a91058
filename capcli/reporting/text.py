"""Data as text: values that may be absent, strings that may be hostile, numbers that must not claim too much.

How numbers are written, everywhere: a metric with 4 decimals, a share in per cent with 2, both rounded to the nearest;
but what is not all or nothing is never shown as 1.0000, 100.00 % or 0.00 %. Times have 3 significant digits, a factor
has one decimal, and a size, which has at least 3 digits, is rounded up, never down. Intervals are widened outward.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from typing import Any

from capcli.config.layers import TOKEN
from capcli.records.pruned import Size
from capcli.stored import finite, sequence

NOT_MEASURED = "not measured"
NO_VALUE = "–"  # of what cannot have one here
# Name and password in an address; as a path it has one slash.
_USER = re.compile(r"(\b\w{2,}:/{1,2})[^\s/@\"'<>]+(?=@)")
_QUERY = re.compile(
    r"(?i)(?<=[?&])([\w.-]{0,60}(?:token|key|secret|password|signature|credential)[\w.-]{0,60}=)[^\s&#\"'<>]+"
)
_SECRET_NAME = re.compile(r"(?i)(?:token|key|secret|password|passwd)$")  # how the name of a variable ends
_SECRET_CHARS = 8  # of the shortest value that is looked for


def plain(text: object, limit: int = 200) -> str:
    r"""One line of at most `limit` characters without anything a terminal, editor or parser would act on.

    Controls, line breaks, invisible formatting and direction overrides, lone surrogates and non-characters become their
    Python escape (ESC is shown as `\x1b`). The joiners that scripts and emoji need stay. Tokens of the hub, and
    the passwords and keys in addresses, are cut.
    """
    shown = str(text)[: limit + 100]
    if "_" in shown or ":/" in shown:
        shown = _without_keys(shown)
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


def _without_keys(text: str) -> str:
    return _QUERY.sub(r"\1…", _USER.sub(r"\1…", TOKEN.sub("hf_…", text)))


def discreet(text: str) -> str:
    """Text from elsewhere, such as the error of a library, also without the values of the variables of the environment
    whose names say that they are secret."""
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _SECRET_CHARS}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "…")
    return _without_keys(text)


def named(text: object, limit: int = 200) -> str:
    """`plain`, with a stand-in for nothing at all."""
    return plain(text, limit) if text not in (None, "") else "not recorded" if text is None else "(empty)"


def first_few(names: Sequence[str], most: int = 10, separator: str = ", ") -> str:
    """The first names, for a message, and how many more there are; one that cannot be seen is as Python writes it."""
    visible = [name if name.isprintable() else repr(name) for name in names[:most]]
    return separator.join(visible) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _at(value: Decimal, digits: int, rounding: str = ROUND_HALF_EVEN) -> Decimal:
    """`value` at `digits` decimals."""
    return value.quantize(Decimal(1).scaleb(-digits), rounding)


def _decimal(value: float) -> Decimal:
    """The decimal a reader would write for `value`: without the noise in its last binary digits."""
    return Decimal(repr(round(value, 12)))


def _nearest(value: Decimal, whole: int, digits: int) -> str:
    """`value` rounded to `digits` decimals; what is not nothing or the `whole` is not written so."""
    near = _at(value, digits)
    if near == 0 != value:
        return f"{float(value):.1g}"
    if abs(near) == whole and near != value:
        near += Decimal(1).scaleb(-digits) * (1 if value > near else -1)
    return f"{near:,f}"


def in_percent(fraction: float, digits: int = 2) -> str:
    """A fraction in per cent, as digits."""
    return _nearest(_decimal(fraction) * 100, 100, digits)


def number(value: Any, digits: int = 4) -> str:
    """A metric or measurement with `digits` decimals; on the scale on which gates compare it."""
    real = finite(value)
    if real is None:
        return NOT_MEASURED
    return _rare(real, digits) or _nearest(_decimal(real), 1, digits)


def _rare(real: float, digits: int) -> str:
    """A number so large or so small that decimals do not serve; empty for the others."""
    return f"{real:.3g}" if abs(real) >= 1e9 or 0 < abs(real) < 10.0**-digits else ""


def bound(value: Any, *, up: bool, digits: int = 4) -> str:
    """An end of an interval, widened outward."""
    real = finite(value)
    if real is None:
        return NOT_MEASURED
    return _rare(real, digits) or f"{_at(_decimal(real), digits, ROUND_CEILING if up else ROUND_FLOOR):,f}"


def percent(fraction: Any) -> str:
    """A fraction in per cent; 100.00 % and 0.00 % mean exactly that."""
    real = finite(fraction)
    return NOT_MEASURED if real is None or abs(real) >= 1e9 else f"{in_percent(real)} %"


def byte_size(n_bytes: Any) -> str:
    """Bytes in decimal units with at least three significant digits, rounded up."""
    real = finite(n_bytes)
    if real is None or not 0 <= real < 1e24:
        return NOT_MEASURED
    unit = min(int(math.log10(max(real, 1)) // 3), 7)
    size = _decimal(real).scaleb(-3 * unit)
    digits = 0 if unit == 0 else 1 if size >= 10 else 2
    return f"{_at(size, digits, ROUND_CEILING):f} {('B', 'kB', 'MB', 'GB', 'TB', 'PB', 'EB', 'ZB')[unit]}"


def count(value: Any) -> str:
    """A whole number with separators of thousands."""
    real = finite(value)
    return NOT_MEASURED if real is None else f"{int(real):,}" if abs(real) < 1e18 else f"{real:.3g}"


def counted(value: Any, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count(value)} {noun}{'' if finite(value) == 1 else 's'}"


def milliseconds(value: Any) -> str:
    """Milliseconds with 3 significant digits."""
    real = finite(value)
    return NOT_MEASURED if real is None else f"{significant(real)} ms"


def significant(real: float) -> str:
    """A measured number with 3 significant digits, larger ones in full."""
    return f"{real:,.0f}" if 999.5 <= abs(real) < 1e9 else f"{real:#.3g}".rstrip(".")


def duration(seconds: Any) -> str:
    """Seconds in the two largest units that matter."""
    real = finite(seconds)
    if real is None or not 0 <= real < 1e12:
        return NOT_MEASURED
    if real < 60:
        return f"{significant(real)} s"
    hours, minutes, rest = int(real) // 3600, int(real) // 60 % 60, int(real) % 60
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def interval(bounds: Any) -> str:
    """[lo, hi], widened outward."""
    low_high = [finite(bound) for bound in sequence(bounds)]
    if len(low_high) != 2 or None in low_high:
        return NOT_MEASURED
    return f"[{bound(low_high[0], up=False)}, {bound(low_high[1], up=True)}]"


def signed(value: Any, text: str = "") -> str:
    """A difference with its sign; `text` is how its value is written, if not as a number."""
    real = finite(value)
    return ("+" if real is not None and real > 0 else "") + (text or number(value))


def signed_span(bounds: Any) -> str:
    """[lo, hi] of a difference, widened outward."""
    low_high = [finite(bound) for bound in sequence(bounds)]
    if len(low_high) != 2 or None in low_high:
        return NO_VALUE
    low, high = (signed(end, bound(end, up=up)) for end, up in zip(low_high, (False, True), strict=True))
    return f"[{low}, {high}]"


def times_smaller(large: Any, small: Any) -> str:
    """How many times smaller, such as `1.5× smaller`; empty when it is not."""
    large, small = finite(large), finite(small)
    return f"{large / small:,.1f}× smaller" if large and small and 0 < small < large else ""


def dense_sizes(size: Size) -> str:
    """`31.2 MB in 32 bits, 15.6 MB as given`; the second only where it is another size."""
    dense, given = byte_size(size.dense_bytes), size.given_bytes
    return f"{dense} in 32 bits, {byte_size(given)} as given" if _differs(size) else dense


def times_smaller_than(size: Size) -> list[str]:
    """How many times smaller the artefact is than the dense model in 32 bits, and than the file that was given."""
    ours = size.artifact_bytes
    of_dense, of_given = times_smaller(size.dense_bytes, ours), times_smaller(size.given_bytes, ours)
    of_given = f"{of_given} than the file given" if of_given and _differs(size) else ""
    return [text for text in (of_dense, of_given) if text]


def _differs(size: Size) -> bool:
    """Whether the model was given in another size than that of 32 bits; a head or names may make up to a twentieth."""
    dense, given = size.dense_bytes, size.given_bytes
    return bool(dense and given) and not 0.95 <= (given or 0) / (dense or 1) <= 1.05


def times_faster(times: Any) -> str:
    """`2.9× faster`, `1.3× slower`, or `as fast` where one decimal shows no difference."""
    real = finite(times)
    if real is None or real <= 0:
        return NOT_MEASURED
    factor = f"{max(real, 1 / real):,.1f}"
    return "as fast" if factor == "1.0" else f"{factor}× {'faster' if real > 1 else 'slower'}"


def markdown(text: object, limit: int = 200) -> str:
    """User text as inert Markdown, also inside a table: no markup, link, HTML or formula."""
    escaped = re.sub(r"([\\`*_{}\[\]()<>#|~&:@$=^!\"])", r"\\\1", named(text, limit))
    return re.sub(r"(?i)www\.", r"www\\.", escaped)
