"""Show how alike directions are, beside what noise allows."""

from __future__ import annotations

from refusalkit.artifacts import DirectionPair, DirectionsFound
from refusalkit.report.figure import Figure
from refusalkit.report.grid import Square, grid
from refusalkit.report.part import Part, Plain
from refusalkit.report.wording import number
from refusalkit.run_directory import Run

_WHAT = (
    "Each direction is the mean of a group of harmful requests minus that of {n_harmless} harmless training requests, "
    "in the unmodified model, at {place}."
)
_HOW = (
    "A cosine of two estimates is below 1 by their noise alone. In the figures each is between directions of halves, "
    "which share no request, averaged over {n} divisions; of a direction with itself it is its reliability. The "
    "ceiling is what a cosine between halves would be if the two directions were the same and only noise told them "
    "apart; divided by it, 1 means the same and 0 at right angles."
)


def directions(run: Run, found: DirectionsFound, name: str) -> Part:
    """Draw the cosines as a matrix at the chosen layer and by layer, and put them into a table."""
    layer = run.choice.layer
    positions = sorted({row.position for row in found.rows})
    place = f"position {positions[0]}" if len(positions) == 1 else f"positions {', '.join(map(str, positions))}"
    labels = [row.label for row in found.rows]
    pairs = {(pair.first, pair.second): pair for pair in found.pairs}
    matrix = [
        Square(one, other, (pairs.get((one, other)) or pairs[other, one]).between_halves[layer])
        for one in labels
        for other in labels
    ]
    by_layer = [
        Square(_label(pair), number, value) for pair in found.pairs for number, value in enumerate(pair.between_halves)
    ]
    widest = 7 * max(map(len, labels))
    figures = (
        Figure(
            name=f"{name}-matrix",
            title=f"Cosine between halves, layer {layer}",
            description=f"Cosine between the directions of {', '.join(labels)} from halves that share no request, at "
            f"layer {layer}.",
            chart=grid(matrix, "cosine between halves", most=1),
            min_width=60 + widest + 40 * len(labels),
            saved_width=max(180, 70 * len(labels)),
        ),
        Figure(
            name=f"{name}-layers",
            title="Cosine between halves, layer by layer",
            description="The same in every layer; the chosen layer is framed.",
            chart=grid(by_layer, "cosine between halves", most=1, layer=layer),
            min_width=60 + 2 * widest + 11 * len(found.pairs[0].cosine),
        ),
    )
    text = (_WHAT.format(n_harmless=found.n_harmless, place=place), _HOW.format(n=found.n_divisions))
    return Part("How alike directions are", text, figures, (_table(found, layer),))


def _label(pair: DirectionPair) -> str:
    return pair.first if pair.first == pair.second else f"{pair.first} × {pair.second}"


def _table(found: DirectionsFound, layer: int) -> Plain:
    counts = {row.label: row.n for row in found.rows}
    rows = []
    for pair in found.pairs:
        if pair.first == pair.second:
            continue
        halves, ceiling = pair.between_halves[layer], pair.ceiling[layer]
        rows.append(
            (
                _label(pair),
                f"{counts[pair.first]}, {counts[pair.second]}",
                *map(number, (pair.cosine[layer], halves, ceiling, halves / ceiling)),
            )
        )
    heads = ("directions", "n", "cosine", "between halves", "ceiling", "of the ceiling")
    return Plain(f"Directions at layer {layer}", heads, tuple(rows), 5)
