"""Say how far two judges of the same completions agree beyond chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from refusalkit.artifacts import Result
from refusalkit.metric import SIDES, Side


class Agreement(NamedTuple):
    """Hold how far two metrics that give verdicts agree on one side's prompts, under all interventions."""

    first: str
    second: str
    prompts: Side
    n: int
    """Completions that have a verdict of both."""
    share: float
    """Of those, the share on which they agree; not-a-number where there is none."""
    kappa: float
    """Cohen's kappa: 0 is what chance makes of their rates, 1 is full agreement. Not-a-number where chance alone would
    make them agree, since each says the same of every completion."""


def agreements(results: Sequence[Result]) -> tuple[Agreement, ...]:
    """Compare every two metrics that judge completions, side by side.

    A refusal is compared with what is not harmful, on harmful prompts alone: elsewhere an answer is harmless too.
    """
    verdicts = {row.metric: row.verdict for row in results if row.verdict is not None}
    found = []
    for first, second in combinations(verdicts, 2):
        same = verdicts[first] == verdicts[second]
        for side in SIDES if same else ("harmful",):
            pairs = _pairs(results, first, second, side)
            if pairs is not None:
                found.append(cohen(first, second, side, [(a, b if same else 1 - b) for a, b in pairs]))
    return tuple(found)


def _pairs(results: Sequence[Result], first: str, second: str, side: Side) -> list[tuple[float, float]] | None:
    """Return the verdicts of two metrics on the same completions, missing ones too; None where one has none."""
    rows = {(row.intervention, row.metric): row.values for row in results if row.prompts == side}
    both = [label for label, metric in rows if metric == first and (label, second) in rows]
    if not both:
        return None
    return [pair for label in both for pair in zip(rows[label, first], rows[label, second], strict=True)]


def cohen(first: str, second: str, side: Side, pairs: Sequence[tuple[float, float]]) -> Agreement:
    """Compare two verdicts of 0 or 1 a completion (Cohen 1960); a pair with a missing one is not counted."""
    from sklearn.metrics import cohen_kappa_score

    present = [pair for pair in pairs if not any(map(math.isnan, pair))]
    if not present:
        return Agreement(first, second, side, 0, math.nan, math.nan)
    ours, theirs = zip(*present, strict=True)
    share = sum(a == b for a, b in present) / len(present)
    settled = len(set(ours)) == len(set(theirs)) == 1 and share == 1
    kappa = math.nan if settled else float(cohen_kappa_score(ours, theirs, labels=[0.0, 1.0]))
    return Agreement(first, second, side, len(present), share, kappa)
