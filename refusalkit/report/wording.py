"""Write numbers, tokens and labels the way the page shows them."""

from __future__ import annotations

import math
import textwrap
from typing import Literal

from refusalkit.artifacts import Result, TaskScore
from refusalkit.metric import Side
from refusalkit.paired import Difference

NOTHING_TO_SHOW = "–"
MINUS = "\N{MINUS SIGN}"
# Byte-level and sentencepiece tokenizers spell whitespace with these letters.
_SPELLED = {"Ġ": " ", "▁": " ", "Ċ": "\n", "ĉ": "\t"}
_SHOWN = {" ": "␣", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def side_name(side: Side) -> str:
    """Write what prompts are: `over-refusal`."""
    return side.replace("_", "-")


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with `digits` significant digits and a real minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NOTHING_TO_SHOW
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(decimals, 6)}f}" if abs(value) >= 1e-4 else f"{value:.{digits - 1}e}"
    return text.replace("-", MINUS)


def percent(value: float) -> str:
    """Write a rate as a percentage, with a dash for not-a-number."""
    return f"{100 * value:.0f}%" if math.isfinite(value) else NOTHING_TO_SHOW


def with_interval(result: Result | None) -> str:
    """Write a result with its 95% interval: `98% [92, 100]`, `−7.10 [−7.62, −6.51]`, `50% [22, 78] (8 of 16 missing)`.

    A number that leaves prompts out never stands without saying how many.
    """
    missing = f" ({result.missing} of {len(result.values)} missing)" if result is not None and result.missing else ""
    return without_count(result) + missing


def without_count(result: Result | TaskScore | None) -> str:
    """Write a result with its interval alone, where what is missing stands beside it."""
    if result is None or not math.isfinite(result.value):
        return NOTHING_TO_SHOW
    if result.kind == "mean":
        return bracketed(result.value, result.low, result.high)
    known = math.isfinite(result.low) and math.isfinite(result.high)
    return percent(result.value) + (f" [{100 * result.low:.0f}, {100 * result.high:.0f}]" if known else "")


def bracketed(value: float, low: float, high: float, digits: int = 3) -> str:
    """Write a number with its interval, where it has one: `0.31 [0.2, 0.44]`."""
    known = math.isfinite(low) and math.isfinite(high)
    return number(value, digits) + (f" [{number(low, digits)}, {number(high, digits)}]" if known else "")


def points(change: float) -> str:
    """Write a difference of rates in percentage points."""
    rounded = round(100 * abs(change))
    return f"{rounded} point{'' if rounded == 1 else 's'}"


def difference(found: Difference, kind: Literal["rate", "mean"]) -> str:
    """Write a difference with its 95% interval: `−91 points [−97, −83]`, `0.31 [0.2, 0.44]`."""
    if kind == "mean":
        return bracketed(found.value, found.low, found.high)
    sign = MINUS if round(100 * found.value) < 0 else ""
    low, high = (percent(bound).replace("-", MINUS).rstrip("%") for bound in (found.low, found.high))
    return f"{sign}{points(found.value)} [{low}, {high}]"


def p_value(p: float) -> str:
    """Write a p-value; below a thousandth it says no more."""
    return number(p, 2) if p >= 0.001 else "< 0.001"


def count(n: int, noun: str) -> str:
    """Write a number of things: `1 word`, `12 words`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def duration(seconds: float | None) -> str:
    """Write a time a person can compare: `0.8 s`, `4 min 10 s`, `2 h 5 min`."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING_TO_SHOW
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def bytes_of(size: float) -> str:
    """Write a number of bytes: `18 B`, `1.25 MB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def token(text: str) -> str:
    """Make a token readable: whitespace as `␣`, `\\n` and `\\t`, and what does not print by its code point."""
    for spelled, character in _SPELLED.items():
        text = text.replace(spelled, character)
    return "".join(map(_letter, text)) or "(empty)"


def _letter(letter: str) -> str:
    return _SHOWN.get(letter) or (letter if letter.isprintable() else f"\\u{ord(letter):04x}")


def position(index: int, text: str) -> str:
    """Label a row of a heat map: `-1 \\n`."""
    shown = token(text)
    return f"{index} {shown if len(shown) <= 20 else shown[:19] + '…'}"


def lines(label: str, width: int = 20, most: int = 3) -> list[str]:
    """Break a long intervention label for an axis; what does not fit is in the tooltip and in the table."""
    broken = textwrap.wrap(label.replace("(", " (", 1) if len(label) > width else label, width)
    if len(broken) > most:
        broken = [*broken[: most - 1], broken[most - 1][: width - 1] + "…"]
    return broken or [label]
