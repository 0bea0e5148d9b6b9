"""Draw a score of every candidate over position and layer: rows are positions, columns are layers.

A candidate without the score is hatched, survivors carry a dot, the choice a frame. Every cell's tooltip has all the
scores and the reason the candidate fell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import altair as alt

from refusalkit.artifacts import Candidates, Choice, ScoreRow
from refusalkit.report.wording import number

Scale = Literal["diverging", "ramp", "plain"]
ROW_HEIGHT = 26
MOST_EXTRA = 6
# One diagonal across the cell.
HATCH = "M-0.7,0.7L0.7,-0.7"
# As wide as the cells above it, within reason.
LEGEND: dict[str, Any] = {
    "orient": "bottom",
    "direction": "horizontal",
    "gradientLength": alt.ExprRef("clamp(width, 80, 220)"),
    "gradientThickness": 8,
}
TICK_EVERY = (1, 2, 5, 10, 20)


@dataclass(frozen=True)
class ScoreKind:
    """Say how one score is shown."""

    name: str
    title: str
    legend: str
    meaning: str
    scale: Scale


CAUSAL = (
    ScoreKind(
        "refusal_score",
        "Refusal score when ablated",
        "nats",
        "Harmful requests, direction removed: the lower, the less is refused.",
        "diverging",
    ),
    ScoreKind(
        "induced_score",
        "Refusal score when added",
        "nats",
        "Harmless requests, direction added: the higher, the more is refused.",
        "diverging",
    ),
    ScoreKind(
        "kl_nats",
        "KL when ablated",
        "nats (log above 0.1)",
        "Harmless requests, direction removed: the lower, the less is broken.",
        "ramp",
    ),
)


#: What every other strategy is compared with.
BASELINE_STRATEGY = "difference_in_means"
COSINE = ScoreKind(
    "cosine",
    "Cosine with the difference in means",
    "cosine",
    "Between what the strategy found and the difference in means at the same place.",
    "diverging",
)


def compared(candidates: Candidates) -> list[ScoreKind]:
    """Return the comparison with the difference in means, where it is one."""
    return [] if candidates.cosines is None or candidates.strategy == BASELINE_STRATEGY else [COSINE]


def scores(choice: Choice) -> list[ScoreKind]:
    """Return the scores this run has: the paper's three where they were taken, then what the selector adds."""
    causal = [score for score in CAUSAL if any(_finite(getattr(row, score.name)) is not None for row in choice.scores)]
    names = dict.fromkeys(name for row in choice.scores for name in row.extra)
    unsaid = f"A further score of the selector {choice.selector}."
    extra = [ScoreKind(name, name.replace("_", " "), name, unsaid, "plain") for name in list(names)[:MOST_EXTRA]]
    return [_in_its_words(score, choice) for score in causal + extra]


def _in_its_words(score: ScoreKind, choice: Choice) -> ScoreKind:
    title, meaning = choice.meanings.get(score.name, (score.title, score.meaning))
    return replace(score, title=title, meaning=meaning)


def cells(choice: Choice, candidates: Candidates, labels: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return one row of data a candidate, with everything the tooltip says."""
    norms = candidates.directions.double().flatten(start_dim=2).norm(dim=-1)
    places = {position: row for row, position in enumerate(candidates.positions)}
    found = []
    for row in choice.scores:
        place = places[row.position], row.layer
        further = dict(row.extra)
        if candidates.cosines is not None and compared(candidates):
            # What is orthogonal but for rounding is drawn as orthogonal.
            further[COSINE.name] = round(candidates.cosines[place].item(), 6)
        found.append(_cell(row, labels, norms[place].item(), further))
    return found


def _cell(row: ScoreRow, labels: Mapping[int, str], norm: float, further: Mapping[str, float]) -> dict[str, Any]:
    values = {score.name: _finite(getattr(row, score.name)) for score in CAUSAL}
    values |= {name: _finite(value) for name, value in further.items()}
    return {
        "position": labels[row.position],
        "layer": row.layer,
        "status": row.status,
        "norm": number(norm),
        **values,
        **{f"{name} shown": number(value) for name, value in values.items()},
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def chart(cells: Sequence[Mapping[str, Any]], score: ScoreKind, rows: Sequence[str]) -> alt.LayerChart | alt.FacetChart:
    """Draw one score."""
    layers = sorted({cell["layer"] for cell in cells})
    base = alt.Chart(alt.InlineData([dict(cell) for cell in cells])).encode(
        x=alt.X("layer:O")
        .title("layer")
        .scale(domain=layers, padding=0)
        .axis(labelAngle=0, values=ticks(layers), grid=False),
        y=alt.Y("position:N").title(None).scale(domain=list(rows), padding=0).axis(grid=False, labelFont="monospace"),
        tooltip=_tooltip(cells),
    )
    scored = f"isValid(datum[{json.dumps(score.name)}])"
    passed = base.transform_filter("datum.status == 'survivor' || datum.status == 'chosen'")
    chosen = base.transform_filter("datum.status == 'chosen'")
    drawn = [
        base.transform_filter(f"!{scored}").mark_rect(style="missing"),
        base.transform_filter(f"!{scored}").mark_point(shape=HATCH, size=120, style="hatch", aria=False),
        base.transform_filter(scored).mark_rect().encode(color=_colour(cells, score)),
        chosen.mark_rect(style="halo", filled=False, aria=False),
        chosen.mark_rect(style="chosen", filled=False, aria=False),
        passed.mark_circle(size=56, opacity=1, style="halo", aria=False),
        passed.mark_circle(size=22, opacity=1, style="survivor", aria=False),
    ]
    return alt.layer(*drawn).properties(width="container", height=ROW_HEIGHT * len(rows))


def ticks(layers: Sequence[int]) -> list[int]:
    """Choose layers to label so that at most about twenty are."""
    step = next((step for step in TICK_EVERY if len(layers) / step <= 20), 50)
    return [layer for layer in layers if layer % step == 0]


def _tooltip(cells: Sequence[Mapping[str, Any]]) -> list[alt.Tooltip]:
    shown = dict.fromkeys(key for cell in cells for key in cell if key.endswith(" shown"))
    titles = {f"{score.name} shown": f"{score.name.replace('_nats', '')}, nats" for score in CAUSAL}
    return [
        alt.Tooltip("position:N", title="position"),
        alt.Tooltip("layer:O", title="layer"),
        alt.Tooltip("status:N", title="status"),
        *(alt.Tooltip(f"{_path(key)}:N", title=titles.get(key, key.removesuffix(" shown"))) for key in shown),
        alt.Tooltip("norm:N", title="norm"),
    ]


def _path(name: str) -> str:
    """Name a field whose letters Vega would read as a path."""
    return "".join(f"\\{letter}" if letter in ".[]\\:" else letter for letter in name)


def _colour(cells: Sequence[Mapping[str, Any]], score: ScoreKind) -> alt.Color:
    values = [value for cell in cells if (value := cell.get(score.name)) is not None]
    most = max((abs(value) for value in values), default=1.0) or 1.0
    colour = alt.Color(f"{_path(score.name)}:Q").title(score.legend).legend(**LEGEND, tickCount=3)
    if score.scale == "diverging":
        return colour.scale(domain=[-most, most], range="diverging")
    if score.scale == "ramp":
        # Linear below the paper's threshold of 0.1 nats, logarithmic above it.
        colour = colour.scale(type="symlog", constant=0.1, domain=[0, most], range="ramp")
        return colour.legend(**LEGEND, values=[0, 0.1, most] if most > 0.5 else [0, most], format=".2~g")
    ends = [min(values), max(values)] if values else [0, 1]
    return colour.scale(domain=ends, range="ramp").legend(**LEGEND, values=ends, format=".2~g")
