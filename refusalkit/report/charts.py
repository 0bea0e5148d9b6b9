"""Draw the figures of a run: pure functions from a `Run` to Altair charts, which give HTML and SVG alike."""

from __future__ import annotations

import re
from dataclasses import replace

from refusalkit.report import by_layer, estimates, heat_map, intervals
from refusalkit.report.analyses import parts
from refusalkit.report.figure import Figure
from refusalkit.report.measured import costs_first, metrics
from refusalkit.report.theme import SHAPES, Mode, config
from refusalkit.report.wording import position, side_name
from refusalkit.run_directory import Run


def figures(run: Run) -> tuple[Figure, ...]:
    """Draw every figure of a run."""
    return (*own_figures(run), *(figure for part in parts(run) for figure in part.figures))


def own_figures(run: Run) -> tuple[Figure, ...]:
    """Draw every figure but those of the analyses, in the order of the page."""
    drawn = (*rate_figures(run), *heat_maps(run), *estimate_figures(run), *separation_figures(run), *mean_figures(run))
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

    # Labels may come out wider where the picture is opened than with the fonts it is measured with here.
    document = {**figure.specification, "width": figure.saved_width, "padding": 14}
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
    rows = [
        row
        for band in run.evaluation.separation
        for row in by_layer.rows_of(side_name(band.prompts), band.mean, band.low, band.high)
    ]
    if not rows:
        return []
    shapes = {side_name(side): shape for side, shape in SHAPES.items()}
    shown = tuple(dict.fromkeys(row["requests"] for row in rows))
    look = by_layer.Look(shapes, shown, ("5th percentile", "95th percentile"))
    return [
        Figure(
            name="separation",
            title="Cosine with the direction, layer by layer",
            description="Mean and 5th to 95th percentile of the cosine between the residual stream and the direction, "
            "for every kind of request, by layer.",
            chart=by_layer.chart(rows, look, run.choice.layer),
            min_width=320,
        )
    ]


def words(metric: str) -> str:
    """Write a metric's name as words; short names are abbreviations."""
    return metric.upper() if len(metric) <= 2 else metric.replace("_", " ").replace("(", " (")


def file_name(*parts: str) -> str:
    """Name a figure in letters that file systems take."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-")
