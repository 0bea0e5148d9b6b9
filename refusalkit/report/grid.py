"""Draw numbers in a grid: rows by layers, or rows by columns with the numbers written in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import altair as alt

from refusalkit.report.heat_map import LEGEND, ticks
from refusalkit.report.wording import number


class Square(NamedTuple):
    """Hold one cell of a grid; a value that is no number is drawn as missing."""

    row: str
    column: str | int
    value: float


def grid(
    squares: Sequence[Square], legend: str, *, most: float, layer: int | None = None
) -> alt.LayerChart | alt.FacetChart:
    """Draw squares from `-most` to `most`. Columns are layers where `layer`, which is framed, is given; otherwise the
    numbers are written into the squares.
    """
    rows, columns = (list(dict.fromkeys(square[axis] for square in squares)) for axis in (0, 1))
    cells = [_cell(square) for square in squares]
    if layer is None:
        x = alt.X("column:N").title(None).axis(labelAngle=-40, grid=False)
    else:
        x = (
            alt.X("column:O")
            .title("layer")
            .axis(labelAngle=0, values=ticks([int(each) for each in columns]), grid=False)
        )
    height = 26 if len(rows) <= 16 else 14
    base = alt.Chart(alt.InlineData(cells)).encode(
        x=x.scale(domain=columns, padding=0),
        y=alt.Y("row:N").title(None).scale(domain=rows, padding=0).axis(grid=False, labelLimit=200, labelOverlap=True),
        tooltip=[
            alt.Tooltip("row:N", title="row"),
            alt.Tooltip("column:N", title="column" if layer is None else "layer"),
            alt.Tooltip("shown:N", title=legend),
        ],
    )
    colour = (
        alt.Color("value:Q").title(legend).scale(domain=[-most, most], range="diverging").legend(**LEGEND, tickCount=3)
    )
    drawn = [
        base.transform_filter("!isValid(datum.value)").mark_rect(style="missing"),
        base.transform_filter("isValid(datum.value)").mark_rect().encode(color=colour),
    ]
    if layer is None:
        strong = f"abs(datum.value) > {most / 2}"
        for style, where in (("on-pale", f"!({strong})"), ("on-strong", strong)):
            drawn.append(base.transform_filter(where).mark_text(style=style, aria=False).encode(text="written:N"))
    else:
        base = alt.Chart(alt.InlineData([{"column": layer}])).encode(x="column:O")
        drawn.append(base.mark_rect(style="chosen", filled=False, aria=False))
    return alt.layer(*drawn).properties(width="container", height=height * len(rows))


def _cell(square: Square) -> dict[str, str | int | float | None]:
    known = math.isfinite(square.value)
    return {
        "row": square.row,
        "column": square.column,
        "value": square.value if known else None,
        "shown": number(square.value),
        "written": number(square.value, 2),
    }
