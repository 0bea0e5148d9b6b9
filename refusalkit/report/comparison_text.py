"""Write a comparison as plain text, 80 columns wide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from refusalkit.artifacts import Result
from refusalkit.metric import Side
from refusalkit.report.comparison import Comparison
from refusalkit.report.measured import BASELINE, costs_first, sides
from refusalkit.report.wording import count, with_interval, without_count

WIDTH = 80
#: Names are cut to no less than this.
_SHORTEST = 12
Row = tuple[str, ...]


def text(comparison: Comparison) -> str:
    """Return a table for each metric: runs and interventions in rows, sides in columns."""
    results = comparison.results
    rates = dict.fromkeys(row.metric for row in results if row.kind == "rate")
    means = costs_first(dict.fromkeys(row.metric for row in results if row.kind == "mean"))
    lines = [line for metric in (*rates, *means) for line in (*_table(comparison, metric), "")]
    return "\n".join([*lines, *_legend(comparison)])


def _table(comparison: Comparison, metric: str) -> Iterator[str]:
    results = [row for row in comparison.results if row.metric == metric]
    counts = {(row.n, row.missing) for row in results}
    n, missing = counts.pop() if len(counts) == 1 else (None, 0)
    said = "" if n is None else f", {n} a side, {missing} missing" if missing else f", {count(n, 'prompt')} a side"
    yield f"{metric}, {results[0].unit}, [95% interval]{said}"
    write = with_interval if n is None else without_count
    yield from _aligned(list(_rows(comparison, metric, sides(results, metric), write)))


def _rows(
    comparison: Comparison, metric: str, shown: Sequence[Side], write: Callable[[Result | None], str]
) -> Iterator[Row]:
    yield ("run", "under", *shown)
    for model, entry in comparison.unmodified:
        before = [entry.result(BASELINE, side, metric) for side in shown]
        if any(before):
            yield (model, "nothing", *map(write, before))
    for entry in comparison.entries:
        run = entry.label
        for label in comparison.labels:
            cells = [entry.result(label, side, metric) for side in shown]
            if any(cells):
                marks = [comparison.marks(entry.label, result) if result else "" for result in cells]
                yield (run, label, *(f"{write(one)} {mark}".rstrip() for one, mark in zip(cells, marks, strict=True)))
                run = ""


def _aligned(rows: Sequence[Row]) -> Iterator[str]:
    """Give numbers the room they need, and what is left of the line to the names."""
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    room = WIDTH - sum(widths[2:])
    widths[0] = min(widths[0], max(_SHORTEST, room - min(widths[1], 2 * _SHORTEST)))
    widths[1] = min(widths[1], max(_SHORTEST, room - widths[0]))
    for row in rows:
        yield "".join(_fit(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _fit(text: str, width: int) -> str:
    """Cut what is too long, keeping its end, which tells the runs of a sweep apart."""
    short = text if len(text) <= width - 2 else f"…{text[len(text) - width + 3 :]}"
    return short.ljust(width)


def _legend(comparison: Comparison) -> Iterator[str]:
    first = comparison.entries[0].label
    yield f"* differs from the unmodified model (paired, Holm over {count(len(comparison.from_unmodified), 'test')})"
    yield f"+ differs from {first} (paired, Holm over {count(len(comparison.from_first), 'test')})"
    yield from comparison.notes
