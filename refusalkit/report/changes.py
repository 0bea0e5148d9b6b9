"""Test every difference that a table invites to see: from the unmodified model, from controls, between interventions.

Two conditions are compared prompt by prompt, on the same prompts. The tests of one question are corrected together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from refusalkit.artifacts import Evaluation, Result
from refusalkit.metric import Side
from refusalkit.paired import Difference, Sample, difference, holm
from refusalkit.report.measured import BASELINE, controls_of, find, interventions, is_control

#: A difference is marked where its corrected p-value is below this.
LEVEL = 0.05


@dataclass(frozen=True)
class Change:
    """Hold one difference between two conditions on the same prompts."""

    run: str
    """The run that the second condition is of, where there are several."""
    first: Result
    second: Result
    found: Difference
    p: float
    """Corrected for the number of changes it is listed with."""

    @property
    def marked(self) -> bool:
        """Whether chance would rarely make as much."""
        return self.p < LEVEL


@dataclass(frozen=True)
class Effects:
    """Hold the changes of one run, by what they are measured from."""

    from_unmodified: tuple[Change, ...]
    from_controls: tuple[Change, ...]
    """Every intervention against each of its own controls."""
    between: tuple[Change, ...]
    """Every two interventions."""


def effects(evaluation: Evaluation) -> Effects:
    """Make every paired test of one run."""
    labels = interventions(evaluation)
    real = [label for label in labels if label != BASELINE and not is_control(label)]
    against = [(control, label) for label in real for control in controls_of(label, labels)]
    return Effects(
        corrected(from_unmodified("", evaluation)),
        corrected(_pairs(evaluation, against)),
        corrected(_pairs(evaluation, combinations(real, 2))),
    )


def from_unmodified(run: str, evaluation: Evaluation) -> Iterator[Change]:
    """Compare every intervention with the unmodified model; p-values are not corrected yet."""
    for second in evaluation.results:
        first = find(evaluation.results, BASELINE, second.prompts, second.metric)
        if second.intervention == BASELINE or is_control(second.intervention) or first is None:
            continue
        # A mean that is zero for every prompt of the unmodified model measures the distance from it.
        if first.kind == "mean" and not any(first.values):
            continue
        yield from change(run, first, second)


def _pairs(evaluation: Evaluation, pairs: Iterable[tuple[str, str]]) -> Iterator[Change]:
    asked: dict[tuple[str, Side], None] = {(row.metric, row.prompts): None for row in evaluation.results}
    for one, other in pairs:
        for metric, side in asked:
            first, second = (find(evaluation.results, label, side, metric) for label in (one, other))
            if first is not None and second is not None:
                yield from change("", first, second)


def change(run: str, first: Result, second: Result) -> Iterator[Change]:
    """Compare two results on the same prompts; nothing where they have no value a prompt in common."""
    if len(first.values) != len(second.values):
        return
    found = difference(Sample(first.values, first.weights), Sample(second.values, second.weights), second.kind)
    if found is not None:
        yield Change(run, first, second, found, found.p)


def corrected(changes: Iterable[Change]) -> tuple[Change, ...]:
    """Correct the p-values of changes that are listed together."""
    listed = list(changes)
    found = holm([change.found.p for change in listed])
    return tuple(replace(change, p=p) for change, p in zip(listed, found, strict=True))
