"""Gather what the page says of chance: paired tests of every effect, and how small a difference they can see."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from refusalkit.artifacts import Evaluation
from refusalkit.metric import SIDES
from refusalkit.paired import detectable
from refusalkit.report.changes import Change, Effects, effects
from refusalkit.report.measured import interventions
from refusalkit.report.tables import ChangeRow, change_row
from refusalkit.report.wording import points, side_name


@dataclass(frozen=True)
class Chance:
    """Hold the tests of one run as the page shows them."""

    rates: tuple[ChangeRow, ...]
    """Rates against the unmodified model and against controls."""
    others: tuple[ChangeRow, ...]
    """Means against the same, and interventions against each other."""
    corrected_over: str
    """Which tests are corrected together, and how many they are."""
    power: tuple[str, ...]


def chance(evaluation: Evaluation) -> Chance:
    """Test every effect of a run."""
    found = effects(evaluation)
    order = interventions(evaluation)
    first = sorted(
        (*found.from_unmodified, *found.from_controls),
        key=lambda change: (
            order.index(change.second.intervention),
            SIDES.index(change.second.prompts),
            order.index(change.first.intervention),
        ),
    )
    return Chance(
        _rows(change for change in first if change.second.kind == "rate"),
        _rows([*(change for change in first if change.second.kind == "mean"), *found.between]),
        _families(found),
        tuple(_power(evaluation)),
    )


def _families(found: Effects) -> str:
    counts = {
        "against the unmodified model": len(found.from_unmodified),
        "against controls": len(found.from_controls),
        "between interventions": len(found.between),
    }
    return " and the ".join(f"{count} {what}" for what, count in counts.items() if count)


def _rows(changes: Iterable[Change]) -> tuple[ChangeRow, ...]:
    return tuple(change_row(change, change.second.intervention, change.first.intervention) for change in changes)


def _power(evaluation: Evaluation) -> Iterator[str]:
    """Say of every side how small a difference of rates its number of prompts can show."""
    counts = {row.prompts: row.n for row in reversed(evaluation.results) if row.kind == "rate" and row.n}
    for n in sorted(set(counts.values())):
        named = " and ".join(side_name(side) for side in SIDES if counts.get(side) == n)
        least, likely = detectable(n)
        if math.isnan(least):
            yield f"With {n} {named} requests no difference can be told from chance."
        else:
            yield (
                f"With {n} {named} requests a difference under {points(least)} cannot be told from chance, and a true "
                f"one of {points(likely)} is found four times in five."
            )
