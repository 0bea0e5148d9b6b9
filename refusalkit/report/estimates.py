"""Draw what a screen estimated against what was then scored exactly, candidate by candidate."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import correlation
from typing import Any

import altair as alt

from refusalkit.artifacts import Choice
from refusalkit.report.heat_map import CAUSAL, ScoreKind
from refusalkit.report.wording import number

PREFIX = "estimated_"


def estimated_scores(choice: Choice) -> list[ScoreKind]:
    """Return the scores that some candidate has both estimated and exact."""
    return [score for score in CAUSAL if points(choice, score)]


def points(choice: Choice, score: ScoreKind) -> list[dict[str, Any]]:
    """Return one row of data for every candidate that has both numbers and is not zero, where both are trivial."""
    return [
        {
            "candidate": f"position {row.position}, layer {row.layer}",
            "exact": exact,
            "estimate": row.extra[PREFIX + score.name],
            "status": row.status,
        }
        for row in choice.scores
        if (exact := getattr(row, score.name)) is not None and PREFIX + score.name in row.extra and row.kl_nats != 0
    ]


def agreement(rows: Sequence[dict[str, Any]]) -> str:
    """Say over how many candidates the estimate keeps the order, and how well (Spearman's rank correlation)."""
    if len(rows) < 3:
        return f"{len(rows)} scored exactly"
    exact, estimate = (_ranks([row[key] for row in rows]) for key in ("exact", "estimate"))
    return f"{len(rows)} scored exactly, rank correlation {number(correlation(exact, estimate))}"


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    return [float(rank) for _, rank in sorted(zip(order, range(len(values)), strict=True))]


def chart(rows: Sequence[dict[str, Any]], unit: str) -> alt.LayerChart | alt.FacetChart:
    """Draw estimate over exact score; on the dashed line they are equal."""
    ends = [edge(row[key] for row in rows for key in ("exact", "estimate")) for edge in (min, max)]
    base = alt.Chart(alt.InlineData(list(rows))).encode(
        x=alt.X("exact:Q").title(f"exact, {unit}").axis(grid=False).scale(zero=False, nice=True),
        y=alt.Y("estimate:Q").title(f"estimate, {unit}").scale(zero=False, nice=True),
        tooltip=[
            alt.Tooltip("candidate:N"),
            alt.Tooltip("exact:Q", format=".3f"),
            alt.Tooltip("estimate:Q", format=".3f"),
            alt.Tooltip("status:N", title="what became of it"),
        ],
    )
    equal = alt.Chart(alt.InlineData([{"exact": end, "estimate": end} for end in ends]))
    return alt.layer(
        equal.mark_line(style="reference").encode(x="exact:Q", y="estimate:Q"),
        base.mark_circle(size=44, opacity=0.8, style="survivor"),
        base.transform_filter("datum.status == 'chosen'").mark_point(size=160, style="chosen", shape="square"),
    ).properties(width="container", height=220)
