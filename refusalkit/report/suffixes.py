"""Show what suffixes do to the direction and to refusal."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from refusalkit.artifacts import SuffixesFound, SuffixGroup
from refusalkit.report import by_layer
from refusalkit.report.figure import Figure
from refusalkit.report.part import Part, Plain
from refusalkit.report.wording import NOTHING_TO_SHOW, bracketed, with_interval
from refusalkit.run_directory import Run

_TEXT = (
    "Harmful and harmless test requests, and harmful ones with something appended, in the unmodified model: the cosine "
    "of the residual stream at position {position} with the direction, and refusal. A suffix that works by way of the "
    "direction lowers both, and random tokens in its place (as many, drawn for every request) lower neither. Brackets "
    "and bands are 95% intervals over requests. The dashed line is the layer the direction comes from."
)
#: The mark and the dash of each series: as they are, with the suffix, with random tokens. The theme has three colours:
#: random tokens on harmful requests take that of harmful ones, dashed.
_SHAPES = ("circle", "diamond", "triangle-up", "square")
_DASHES = ((1, 0), (1, 0), (1, 0), (4, 3))


def suffixes(run: Run, found: SuffixesFound, name: str) -> Part:
    """Draw a figure for every suffix, and put all groups into one table."""
    plain = [group for group in found.groups if group.suffix is None]
    names = dict.fromkeys(group.suffix for group in found.groups if group.suffix is not None)
    figures = tuple(
        Figure(
            name=f"{name}-suffix-{number}",
            title=f"With the suffix “{suffix}”",
            description=f"Mean cosine with the direction by layer, with 95% intervals, of harmful and harmless "
            f"requests, and of harmful ones with the suffix {suffix} and with random tokens in its place.",
            chart=_chart([*plain, *(group for group in found.groups if group.suffix == suffix)], run.choice.layer),
            min_width=320,
        )
        for number, suffix in enumerate(names, start=1)
    )
    title = "What suffixes do to the direction"
    return Part(title, (_TEXT.format(position=found.position),), figures, (_table(found, run.choice.layer),))


def _table(found: SuffixesFound, layer: int) -> Plain:
    metrics = dict.fromkeys(result.metric for group in found.groups for result in group.results)
    rows = []
    for group in found.groups:
        results = {result.metric: result for result in group.results}
        shown = bracketed(group.mean[layer], group.low[layer], group.high[layer])
        rows.append(
            (
                group.label,
                _short(group.text),
                str(group.n),
                shown,
                *(with_interval(results.get(metric)) for metric in metrics),
            )
        )
    heads = ("requests", "appended", "n", f"cosine at layer {layer}", *(name.replace("_", " ") for name in metrics))
    return Plain("Suffixes: the direction and refusal", heads, tuple(rows), len(heads) - 2)


def _short(text: str, most: int = 48) -> str:
    shown = " ".join(text.split()) or NOTHING_TO_SHOW
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _chart(groups: Sequence[SuffixGroup], chosen: int) -> alt.LayerChart | alt.FacetChart:
    names = tuple(group.label for group in groups)
    rows = [row for group in groups for row in by_layer.rows_of(group.label, group.mean, group.low, group.high)]
    shapes, dashes = dict(zip(names, _SHAPES, strict=False)), dict(zip(names, _DASHES, strict=False))
    return by_layer.chart(rows, by_layer.Look(shapes, names, ("95% from", "95% to"), dashes), chosen)
