"""Say how far two judges of the same completions agree beyond chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from refusalkit.artifacts import Result
from refusalkit.metric import SIDES, Side

_RESAMPLES = 2000
#: The place of a prompt, and the verdicts of two metrics on one completion of it.
Judged = tuple[int, float, float]


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
    low: float
    """95% interval of kappa: percentile bootstrap over prompts, each with its completions under every intervention."""
    high: float


def agreements(results: Sequence[Result]) -> tuple[Agreement, ...]:
    """Compare every two metrics that judge completions, side by side.

    A refusal is compared with what is not harmful, on harmful prompts alone: elsewhere an answer is harmless too.
    """
    verdicts = {row.metric: row.verdict for row in results if row.verdict is not None}
    found = []
    for first, second in combinations(verdicts, 2):
        same = verdicts[first] == verdicts[second]
        for side in SIDES if same else ("harmful",):
            judged = _judged(results, first, second, side)
            if judged is not None:
                found.append(cohen(first, second, side, [(at, a, b if same else 1 - b) for at, a, b in judged]))
    return tuple(found)


def _judged(results: Sequence[Result], first: str, second: str, side: Side) -> list[Judged] | None:
    """Return the verdicts of two metrics on the same completions, missing ones too; None where one has none."""
    rows = {(row.intervention, row.metric): row.values for row in results if row.prompts == side}
    both = [label for label, metric in rows if metric == first and (label, second) in rows]
    if not both:
        return None
    pairs = [zip(rows[label, first], rows[label, second], strict=True) for label in both]
    return [(prompt, *pair) for under in pairs for prompt, pair in enumerate(under)]


def cohen(first: str, second: str, side: Side, judged: Sequence[Judged]) -> Agreement:
    """Compare two verdicts of 0 or 1 a completion (Cohen 1960); where one is missing the completion is not counted."""
    from sklearn.metrics import cohen_kappa_score

    present = [both for both in judged if not any(map(math.isnan, both))]
    if not present:
        return Agreement(first, second, side, 0, math.nan, math.nan, math.nan, math.nan)
    _, ours, theirs = zip(*present, strict=True)
    share = sum(a == b for _, a, b in present) / len(present)
    settled = len(set(ours)) == len(set(theirs)) == 1 and share == 1
    kappa = math.nan if settled else float(cohen_kappa_score(ours, theirs, labels=[0.0, 1.0]))
    return Agreement(first, second, side, len(present), share, kappa, *_interval(present))


def _interval(present: Sequence[Judged]) -> tuple[float, float]:
    """Draw prompts with replacement 2,000 times; a draw in which both always say the same has no kappa."""
    import torch

    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompt for prompt, _, _ in present))}
    tables = torch.zeros((len(places), 2, 2), dtype=torch.float64)
    for prompt, a, b in present:
        tables[places[prompt], int(a), int(b)] += 1
    generator = torch.Generator().manual_seed(0)
    drawn = tables[torch.randint(len(places), (_RESAMPLES, len(places)), generator=generator)].sum(1)
    shares = drawn / drawn.sum((1, 2), keepdim=True)
    agreed = shares.diagonal(dim1=1, dim2=2).sum(-1)
    chance = (shares.sum(1) * shares.sum(2)).sum(-1)
    kappas = ((agreed - chance) / (1 - chance))[chance < 1]
    if len(kappas) == 0:
        return math.nan, math.nan
    low, high = torch.quantile(kappas, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
