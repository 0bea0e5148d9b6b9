"""Show which heads and MLPs write the direction."""

from __future__ import annotations

import math

from refusalkit.artifacts import AttributionFound, AttributionGroup, HeadFound
from refusalkit.report.figure import Figure
from refusalkit.report.grid import Square, grid
from refusalkit.report.part import Part, Plain
from refusalkit.report.wording import NOTHING_TO_SHOW, bracketed, percent
from refusalkit.run_directory import Run

_WHAT = (
    "What every attention head and every MLP adds to the residual stream at the last position, along the unit "
    "direction, in the unmodified model: means over {n} harmful and {n_harmless} harmless test requests, in the units "
    "of the stream. The frame marks the layer whose input the direction was read at: what layers before it write is in "
    "it."
)
_TABLE = (
    "The heads that write most on harmful requests, with 95% intervals, and the share of their attention from the last "
    "position to the instruction and to what is appended to it; the rest goes to the template."
)


def attribution(run: Run, found: AttributionFound, name: str) -> Part:
    """Draw heads by layers for every group, in one range of colour, and put the top heads into a table."""
    shown = [group for group in found.groups if not group.random]
    squares = [_squares(group) for group in shown]
    most = max((abs(each.value) for part in squares for each in part if math.isfinite(each.value)), default=1.0) or 1.0
    n_layers = len(found.groups[0].mlp)
    figures = tuple(
        Figure(
            name=f"{name}-writes-{index}",
            title=f"Written along the direction: {group.label}",
            description=f"What every head and MLP writes along the direction on {group.label} requests, by layer.",
            chart=grid(part, "along the direction", most=most, layer=run.choice.layer),
            min_width=90 + 11 * n_layers,
            saved_width=max(180, min(24 * n_layers, 960)),
        )
        for index, (group, part) in enumerate(zip(shown, squares, strict=True), start=1)
    )
    n, n_harmless = (group.n for group in found.groups[:2])
    text = (_WHAT.format(n=n, n_harmless=n_harmless), _TABLE)
    narrow = all(figure.min_width <= 340 for figure in figures)
    return Part("What writes the direction", text, figures, (_table(found),), side_by_side=narrow)


def _squares(group: AttributionGroup) -> list[Square]:
    n_heads = len(group.heads[0])
    squares = [
        Square(f"head {head}", layer, row[head]) for head in range(n_heads) for layer, row in enumerate(group.heads)
    ]
    return squares + [Square("MLP", layer, value) for layer, value in enumerate(group.mlp)]


def _table(found: AttributionFound) -> Plain:
    suffixed = any(group.suffix is not None for group in found.groups)
    heads = ("head", "requests", "along the direction", "to the instruction", *(["to the suffix"] if suffixed else []))
    rows = [_row(head)[: len(heads)] for head in found.top]
    return Plain("The heads that write most", heads, tuple(rows), len(heads) - 2)


def _row(head: HeadFound) -> tuple[str, ...]:
    return (
        f"layer {head.layer}, head {head.head}",
        head.label,
        bracketed(head.value, head.low, head.high),
        _share(head.on_instruction),
        _share(head.on_suffix),
    )


def _share(value: float) -> str:
    return percent(value) if math.isfinite(value) else NOTHING_TO_SHOW
