"""Draw means layer by layer: a line, its band and its marks for each kind of request."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt


@dataclass(frozen=True)
class Look:
    """Say how the kinds of request are told apart."""

    shapes: Mapping[str, str]
    """The mark of each, in the order of their colours."""
    shown: tuple[str, ...]
    """Those that the legend lists."""
    bounds: tuple[str, str]
    """What the lower and the upper edge of the band are."""
    dashes: Mapping[str, tuple[int, int]] | None = None
    """The dash of each line; None where all are whole."""


def rows_of(
    requests: str, mean: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Yield a row for every layer whose numbers are known; each [layer]."""
    for layer, numbers in enumerate(zip(mean, low, high, strict=True)):
        if all(map(math.isfinite, numbers)):
            yield {"requests": requests, "layer": layer, **dict(zip(("mean", "low", "high"), numbers, strict=True))}


def chart(rows: Sequence[dict[str, Any]], look: Look, chosen: int) -> alt.LayerChart | alt.FacetChart:
    """Draw the rows, with a dashed line at the layer that was chosen."""
    names = list(look.shapes)
    # Long names fit beside each other on a narrow page where there are two in a row.
    columns = len(look.shown) if len(look.shown) <= 3 else 2
    legend = alt.Legend(orient="top", symbolOpacity=1, values=list(look.shown), columns=columns)
    base = alt.Chart(alt.InlineData(list(rows))).encode(
        x=alt.X("layer:Q").title("layer").axis(tickMinStep=1, format="d", grid=False).scale(nice=False, padding=4),
        color=alt.Color("requests:N").title(None).scale(domain=names, range="category").legend(legend),
    )
    title = "cosine with the direction"
    band = base.mark_area(opacity=0.18, line=False).encode(y=alt.Y("low:Q").title(title), y2="high:Q")
    line = base.mark_line(strokeWidth=2).encode(y=alt.Y("mean:Q").title(title))
    if look.dashes is not None:
        dashes = [list(dash) for dash in look.dashes.values()]
        line = line.encode(
            strokeDash=alt.StrokeDash("requests:N").title(None).scale(domain=names, range=dashes).legend(legend)
        )
    points = base.mark_point(filled=True, size=44, opacity=1).encode(
        shape=alt.Shape("requests:N").scale(domain=names, range=list(look.shapes.values())).title(None).legend(legend),
        y=alt.Y("mean:Q").title(title),
        tooltip=[
            alt.Tooltip("requests:N", title="requests"),
            alt.Tooltip("layer:Q", title="layer"),
            alt.Tooltip("mean:Q", title="mean cosine", format=".3f"),
            alt.Tooltip("low:Q", title=look.bounds[0], format=".3f"),
            alt.Tooltip("high:Q", title=look.bounds[1], format=".3f"),
        ],
    )
    mark = alt.Chart(alt.InlineData([{"layer": chosen}])).mark_rule(style="reference").encode(x="layer:Q")
    return alt.layer(mark, band, line, points).properties(width="container", height=280)
