"""Find one's way in the results: which interventions there are, in which order, and what controls for what."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from refusalkit.artifacts import Evaluation, Result
from refusalkit.metric import SIDES, Side

BASELINE = "none"
#: Metrics that say what an intervention breaks.
COSTS = (
    "kl",
    "token_kl",
    "cross_entropy",
    "text_cross_entropy",
    "answer_cross_entropy",
    "perplexity",
    "repetition",
)
_CONTROL = re.compile(r"_random(?:[_#]?\d+)?|_shuffled")


def is_control(label: str) -> bool:
    """Tell whether an intervention uses a random direction, or that of a shuffled labelling."""
    return _CONTROL.search(label) is not None


def controlled(label: str) -> str:
    """Return the label of the intervention that a control repeats with another direction."""
    return _CONTROL.sub("", label)


def control_mark(label: str) -> str:
    """Return what the label of a control has beside that of what it controls for: `_random_2`, `_shuffled`."""
    found = _CONTROL.search(label)
    return found.group() if found else ""


def controls_of(label: str, labels: Iterable[str]) -> tuple[str, ...]:
    """Return the controls of one intervention."""
    return tuple(other for other in labels if is_control(other) and controlled(other) == label)


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Put the unmodified model first and every control after what it controls for; otherwise keep the order."""
    given = list(dict.fromkeys(labels))
    real = [label for label in given if not is_control(label)]
    real.sort(key=lambda label: label != BASELINE)
    ordered = [name for label in real for name in (label, *controls_of(label, given))]
    return (*ordered, *(label for label in given if label not in ordered))


def interventions(evaluation: Evaluation) -> tuple[str, ...]:
    """Return every intervention that was measured or generated under, in the order of the page."""
    measured = [row.intervention for row in evaluation.results]
    return in_order(measured + [row.intervention for row in evaluation.generated])


def metrics(evaluation: Evaluation, kind: str) -> tuple[str, ...]:
    """Return the names of the metrics of one kind that have a number to show, in the order of the recipe."""
    names = (row.metric for row in evaluation.results if row.kind == kind and math.isfinite(row.value))
    return tuple(dict.fromkeys(names))


def is_cost(metric: str) -> bool:
    """Tell whether a metric, its options aside, says what an intervention breaks; none of these is below zero."""
    return metric.partition("(")[0] in COSTS


def without_number(evaluation: Evaluation) -> tuple[str, ...]:
    """Return the names of the metrics whose values are all missing."""
    shown = {row.metric for row in evaluation.results if math.isfinite(row.value)}
    return tuple(dict.fromkeys(row.metric for row in evaluation.results if row.missing and row.metric not in shown))


def costs_first(names: Iterable[str]) -> tuple[str, ...]:
    """Put the metrics that say what an intervention breaks before the others."""
    return tuple(sorted(names, key=lambda name: not is_cost(name)))


def find(results: Sequence[Result], intervention: str, side: Side, metric: str) -> Result | None:
    """Return one result, or None where it was not measured."""
    for row in results:
        if (row.intervention, row.prompts, row.metric) == (intervention, side, metric):
            return row
    return None


def sides(results: Iterable[Result], metric: str) -> tuple[Side, ...]:
    """Return the sides on which a metric was taken, those included where every value is missing."""
    seen = {row.prompts for row in results if row.metric == metric and (math.isfinite(row.value) or row.missing)}
    return tuple(side for side in SIDES if side in seen)
