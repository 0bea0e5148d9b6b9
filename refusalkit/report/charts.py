"""Draw the figures of a run: pure functions from a `Run` to Altair charts, which give HTML and SVG alike."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import altair as alt

from refusalkit.artifacts import Evaluation
from refusalkit.metric import SIDES
from refusalkit.report import estimates, heat_map, intervals
from refusalkit.report.analyses import parts
from refusalkit.report.figure import Figure
from refusalkit.report.measured import costs_first, metrics
from refusalkit.report.theme import SHAPES, Mode, config
from refusalkit.report.wording import position, side_name
from refusalkit.run_directory import Run


def figures(run: Run) -> tuple[Figure, ...]:
    """Draw every figure of a run, in the order of the page."""
    drawn = (*rate_figures(run), *heat_maps(run), *estimate_figures(run), *separation_figures(run), *mean_figures(run))
    drawn = (*drawn, *(figure for part in parts(run) for figure in part.figures))
    seen: dict[str, int] = {}
    unique = []
    for figure in drawn:
        seen[figure.name] = seen.get(figure.name, 0) + 1
        repeated = seen[figure.name] > 1
        unique.append(replace(figure, name=f"{figure.name}-{seen[figure.name]}") if repeated else figure)
    return tuple(unique)


def chart_names(run: Run) -> tuple[str, ...]:
    """Name every figure of a run."""
    return tuple(figure.name for figure in figures(run))


def chart_svg(run: Run, name: str, mode: Mode = "light") -> str:
    """Draw one figure of a run as SVG, from the chart the page shows."""
    named = {figure.name: figure for figure in figures(run)}
    if name not in named:
        raise ValueError(f"no figure {name!r} in this run; there are {', '.join(named)}")
    return svg(named[name], mode)


def svg(figure: Figure, mode: Mode = "light") -> str:
    """Draw a figure as SVG."""
    import vl_convert

    document = figure.specification()
    document["width"] = figure.saved_width
    # Labels may come out wider where the picture is opened than with the fonts it is measured with here.
    document["padding"] = 14
    return str(vl_convert.vegalite_to_svg(document, config=config(mode)))


def rate_figures(run: Run) -> list[Figure]:
    """Draw every rate, the sides next to each other."""
    return [
        Figure(
            name=file_name("rate", metric),
            title=f"{words(metric)[0].upper()}{words(metric)[1:]} by intervention",
            description=f"{words(metric)} with 95% intervals, for every kind of request, by intervention.",
            chart=intervals.chart(run.evaluation.results, metric, "share of held-out requests"),
            min_width=320,
        )
        for metric in metrics(run.evaluation, "rate")
    ]


def mean_figures(run: Run) -> list[Figure]:
    """Draw every mean: what the interventions cost, and whatever else was measured."""
    drawn = []
    for metric in costs_first(metrics(run.evaluation, "mean")):
        unit = next(row.unit for row in run.evaluation.results if row.metric == metric)
        drawn.append(
            Figure(
                name=file_name("mean", metric),
                title=f"{words(metric)[0].upper()}{words(metric)[1:]} by intervention",
                description=f"Mean {words(metric)} in {unit} with 95% intervals, by intervention.",
                chart=intervals.chart(run.evaluation.results, metric, unit),
                min_width=320,
            )
        )
    return drawn


def heat_maps(run: Run) -> list[Figure]:
    """Draw every score over position and layer, the choice marked."""
    tokens = dict(zip(run.prompts.positions, run.prompts.position_tokens, strict=False))
    labels = {index: position(index, tokens.get(index, "…")) for index in run.candidates.positions}
    cells = heat_map.cells(run.choice, run.candidates, labels)
    n_layers = 1 + max((row.layer for row in run.choice.scores), default=0)
    return [
        Figure(
            name=f"candidates-{score.name}",
            title=score.title,
            description=f"{score.title} of every candidate over position and layer. {score.meaning} "
            f"Chosen: layer {run.choice.layer}, position {run.choice.position}.",
            note=score.meaning,
            chart=heat_map.chart(cells, score, [labels[index] for index in sorted(labels)]),
            min_width=40 + 7 * max(map(len, labels.values())) + 11 * n_layers,
            saved_width=max(180, min(24 * n_layers, 960)),
        )
        for score in heat_map.scores(run.choice) + heat_map.compared(run.candidates)
    ]


def estimate_figures(run: Run) -> list[Figure]:
    """Draw the screen's estimates against the exact scores; nothing where there was no screen."""
    return [
        Figure(
            name=f"estimate-{score.name}",
            title=score.title,
            description=f"{score.title}: the gradient estimate against the exact score, candidate by candidate.",
            note=estimates.agreement(rows),
            chart=estimates.chart(rows, "nats"),
            saved_width=320,
        )
        for score in estimates.estimated_scores(run.choice)
        for rows in [estimates.points(run.choice, score)]
    ]


def separation_figures(run: Run) -> list[Figure]:
    """Draw how the prompts of every side lie along the direction, layer by layer."""
    rows = _separation_rows(run.evaluation)
    if not rows:
        return []
    return [
        Figure(
            name="separation",
            title="Cosine with the direction, layer by layer",
            description="Mean and 5th to 95th percentile of the cosine between the residual stream and the direction, "
            "for every kind of request, by layer.",
            chart=_separation_chart(rows, run.choice.layer),
            min_width=320,
        )
    ]


def _separation_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    return [
        {"side": side_name(band.prompts), "layer": layer, "mean": mean, "low": low, "high": high}
        for band in evaluation.separation
        for layer, (mean, low, high) in enumerate(zip(band.mean, band.low, band.high, strict=True))
        if all(map(math.isfinite, (mean, low, high)))
    ]


def _separation_chart(rows: Sequence[dict[str, Any]], chosen: int) -> alt.LayerChart | alt.FacetChart:
    every, shown = [side_name(side) for side in SIDES], list(dict.fromkeys(row["side"] for row in rows))
    base = alt.Chart(alt.InlineData(list(rows))).encode(
        x=alt.X("layer:Q").title("layer").axis(tickMinStep=1, format="d", grid=False).scale(nice=False, padding=4),
        color=alt.Color("side:N")
        .title(None)
        .scale(domain=every, range="category")
        .legend(orient="top", symbolOpacity=1, values=shown),
    )
    title = "cosine with the direction"
    band = base.mark_area(opacity=0.18, line=False).encode(y=alt.Y("low:Q").title(title), y2="high:Q")
    line = base.mark_line(strokeWidth=2).encode(y=alt.Y("mean:Q").title(title))
    points = base.mark_point(filled=True, size=44, opacity=1).encode(
        shape=alt.Shape("side:N")
        .scale(domain=every, range=list(SHAPES.values()))
        .title(None)
        .legend(orient="top", symbolOpacity=1, values=shown),
        y=alt.Y("mean:Q").title(title),
        tooltip=[
            alt.Tooltip("side:N", title="requests"),
            alt.Tooltip("layer:Q", title="layer"),
            alt.Tooltip("mean:Q", title="mean cosine", format=".3f"),
            alt.Tooltip("low:Q", title="5th percentile", format=".3f"),
            alt.Tooltip("high:Q", title="95th percentile", format=".3f"),
        ],
    )
    mark = alt.Chart(alt.InlineData([{"layer": chosen}])).mark_rule(style="reference").encode(x="layer:Q")
    return alt.layer(mark, band, line, points).properties(width="container", height=280)


def words(metric: str) -> str:
    """Write a metric's name as words; short names are abbreviations."""
    return metric.upper() if len(metric) <= 2 else metric.replace("_", " ").replace("(", " (")


def file_name(*parts: str) -> str:
    """Name a figure in letters that file systems take."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-")
