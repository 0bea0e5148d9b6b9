"""Draw one metric by intervention: a dot and its 95% interval for each side, controls quieter than the rest."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from refusalkit.artifacts import Result
from refusalkit.metric import SIDES
from refusalkit.report.measured import in_order, is_control, is_cost, sides
from refusalkit.report.theme import SHAPES
from refusalkit.report.wording import lines, side_name, with_interval

STEP = 18
LINE = 14
QUIET = 0.5


def chart(
    results: Sequence[Result], metric: str, unit: str, rows: str = "intervention"
) -> alt.LayerChart | alt.FacetChart:
    """Draw `metric` for every intervention, one row an intervention and one line a side; `rows` says what rows are."""
    measured = [row for row in results if row.metric == metric]
    order = in_order([row.intervention for row in measured])
    shown, every = ([side_name(side) for side in listed] for listed in (sides(measured, metric), SIDES))
    # Three side by side are wider than the plot beside long labels.
    key: dict[str, Any] = {"orient": "top", "values": shown, "columns": 2}
    rate = measured[0].kind == "rate"
    base = alt.Chart(alt.InlineData([_row(row) for row in measured if math.isfinite(row.value)])).encode(
        y=alt.Y("intervention:N")
        .title(None)
        .sort(list(order))
        .scale(domain=list(order), paddingInner=0.25)
        .axis(**_row_axis(order)),
        yOffset=alt.YOffset("side:N").sort(every).scale(domain=shown),
        color=alt.Color("side:N").scale(domain=every, range="category").title(None).legend(**key),
        opacity=alt.condition("datum.control", alt.value(QUIET), alt.value(1)),
        tooltip=[
            alt.Tooltip("intervention:N", title=rows),
            alt.Tooltip("side:N", title="requests"),
            alt.Tooltip("shown:N", title=f"{metric} [95%]"),
            alt.Tooltip("n:Q", title="n"),
        ],
    )
    across = alt.X("value:Q").title(unit)
    if rate:
        across = across.scale(domain=[0, 1]).axis(format="%", values=[0, 0.25, 0.5, 0.75, 1], labelFlush=False)
    else:
        across = across.scale(zero=is_cost(metric)).axis(tickCount=5, labelFlush=False)
    interval = base.mark_rule(strokeWidth=2, strokeCap="round").encode(x=alt.X("low:Q").title(unit), x2="high:Q")
    dot = base.mark_point(filled=True, size=80).encode(
        x=across,
        shape=alt.Shape("side:N").scale(domain=every, range=list(SHAPES.values())).title(None).legend(**key),
    )
    row = max(34, len(shown) * STEP + 10, max(len(lines(label)) for label in order) * LINE + 8)
    return alt.layer(interval, dot).properties(width="container", height=row * len(order))


def _row(row: Result) -> dict[str, Any]:
    known = math.isfinite(row.low) and math.isfinite(row.high)
    return {
        "intervention": row.intervention,
        "side": side_name(row.prompts),
        "value": row.value,
        "low": row.low if known else row.value,
        "high": row.high if known else row.value,
        "n": row.n,
        "shown": with_interval(row),
        "control": is_control(row.intervention),
    }


def _row_axis(order: Sequence[str]) -> dict[str, Any]:
    """Break long labels into lines and let controls stand back."""
    broken = {label: lines(label) for label in order}
    tall = any(len(parts) > 1 for parts in broken.values())
    if tall:
        broken = {label: _centred(parts) for label, parts in broken.items()}
    quiet = json.dumps([label for label in order if is_control(label)])
    return {
        "labelExpr": f"({json.dumps(broken)})[datum.value]",
        "labelOpacity": {"condition": {"test": f"indexof({quiet}, datum.value) >= 0", "value": 0.65}, "value": 1},
        "labelLineHeight": LINE,
        "labelOffset": -LINE if tall else 0,
    }


def _centred(parts: list[str]) -> list[str]:
    """Fill up to three lines: Vega hangs several lines from the middle of the row, so all are moved up by one."""
    return ["", *parts, ""][:3] if len(parts) < 3 else parts
