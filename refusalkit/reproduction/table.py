"""Write a comparison as Markdown: ours, the authors' artefact, the paper, a verdict a row, and the reasons."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence

from refusalkit.reproduction.compare import Row
from refusalkit.reproduction.published import Published, Quantity
from refusalkit.reproduction.quantity import ELSEWHERE, MEASURED
from refusalkit.reproduction.reasons import Reason

_UNDER = {
    "none": "unmodified",
    "ablate": "ablated",
    "steer": "added",
    "steer(scale=-1.0)": "subtracted",
    "orthogonalize": "orthogonalized",
}
_EXPLAINED = ("close", "differs", "not scored", "not compared")


def markdown(published: Published, rows: Sequence[Row], reasons: Sequence[Reason]) -> str:
    """Return the comparison; a letter behind a verdict leads to a reason why the number may differ."""
    shown = [reason for reason in reasons if any(_touches(reason, row) for row in rows)]
    letters = dict(zip(shown, _letters(), strict=False))
    lines = [
        f"# {published.name}",
        "",
        f"Authors: `{published.run}` of andyrdt/refusal_direction. Paper: arXiv 2406.11717.",
        "",
        "| quantity | ours | authors | paper | verdict |",
        "|---|---:|---:|---:|---|",
    ]
    for row in rows:
        why = [letter for reason, letter in letters.items() if _touches(reason, row)]
        verdict = f"{row.verdict} ({', '.join(why)})" if why else row.verdict
        numbers = (row.ours, row.quantity.authors, row.quantity.paper)
        cells = [_label(row.quantity), *[_number(number, row.quantity) for number in numbers], verdict]
        lines.append(f"| {' | '.join(cells)} |")
    counts = Counter(row.verdict for row in rows)
    lines += ["", ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + "."]
    if shown:
        lines += ["", "Why a number may differ:", "", *[f"- {letters[reason]}. {reason.text}" for reason in shown]]
    return "\n".join(lines)


def _touches(reason: Reason, row: Row) -> bool:
    return row.verdict in _EXPLAINED and row.quantity.what in reason.whats


def _letters() -> list[str]:
    singles = list(string.ascii_lowercase)
    return singles + [first + second for first in singles for second in singles]


def _label(row: Quantity) -> str:
    label = MEASURED[row.what].label if row.what in MEASURED else ELSEWHERE[row.what]
    details = [row.side, _UNDER[row.under] if row.under else None]
    return ", ".join([label, *[detail for detail in details if detail]])


def _number(number: float | None, row: Quantity) -> str:
    if number is None:
        return ""
    if row.what in MEASURED:
        return f"{number:.{MEASURED[row.what].decimals}f}"
    return f"{number:.3f}" if row.what.endswith("_loss") else f"{number:g}"
