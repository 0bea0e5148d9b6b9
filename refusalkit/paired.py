"""Test whether two conditions differ on the same prompts, and correct for how often that was asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Generator, Tensor

_RESAMPLES = 2000
_EXCHANGES = 9999
_SEED = 0
_FEWEST_CHANGES = 6
_POWER = 0.8


@dataclass(frozen=True)
class Sample:
    """Hold one value a prompt, not-a-number where it is missing, and what each counts; None for equally."""

    values: Sequence[float]
    weights: Sequence[float] | None = None


@dataclass(frozen=True)
class Difference:
    """Hold how much the mean of a condition is above that of another, and what chance makes of it."""

    value: float
    low: float
    """95% interval: percentile bootstrap over prompts."""
    high: float
    p: float
    """Two-sided, of the exact test of McNemar (1947) for rates and of a permutation test for means."""
    n: int
    """Prompts that have a value in both."""
    only: tuple[int, int]
    """Of a rate: prompts that are one in the first condition alone, and in the second alone."""


def difference(first: Sample, second: Sample, kind: Literal["rate", "mean"]) -> Difference | None:
    """Compare `second` with `first`, prompt by prompt; None where no prompt has a value in both."""
    import torch

    kept = [i for i, pair in enumerate(zip(first.values, second.values, strict=True)) if not any(map(math.isnan, pair))]
    n = len(kept)
    if n == 0:
        return None
    values = torch.tensor([[sample.values[i] for i in kept] for sample in (first, second)], dtype=torch.float64)
    weights = torch.tensor(
        [[1.0 if sample.weights is None else sample.weights[i] for i in kept] for sample in (first, second)],
        dtype=torch.float64,
    )
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(n, (_RESAMPLES, n), generator=generator)
    resampled = _difference(values[:, drawn], weights[:, drawn])
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    only = (int((values[0] > values[1]).sum()), int((values[1] > values[0]).sum()))
    p = _mcnemar(*only) if kind == "rate" else _permutation(values, weights, generator)
    return Difference(_difference(values, weights).item(), low, high, p, n, only)


def _difference(values: Tensor, weights: Tensor) -> Tensor:
    """Return the second weighted mean minus the first, of [condition, ..., prompt]."""
    means = (values * weights).sum(-1) / weights.sum(-1)
    return means[1] - means[0]


def _mcnemar(first: int, second: int) -> float:
    """Return the p-value of as many prompts that changed one way and the other, when both ways are equally likely."""
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(first, second), first + second, 0.5)))


def _permutation(values: Tensor, weights: Tensor, generator: Generator) -> float:
    """Exchange the conditions of random prompts, and count how often the means come to differ as much."""
    import torch

    swapped = torch.rand(_EXCHANGES, values.shape[-1], generator=generator) < 0.5
    if torch.equal(*weights):
        # An exchange turns the sign of a prompt's difference.
        found = (1.0 - 2.0 * swapped.double()) @ (weights[0] * (values[1] - values[0])) / weights[0].sum()
    else:
        exchanged = [torch.where(swapped, both[[1, 0]][:, None], both[:, None]) for both in (values, weights)]
        found = _difference(exchanged[0], exchanged[1])
    # A hair's breadth, so that rounding does not make an equal difference a smaller one.
    as_much = found.abs() >= _difference(values, weights).abs() * (1 - 1e-12)
    # The arrangement that was observed is one of those that chance could have made.
    return (1 + int(as_much.sum())) / (1 + _EXCHANGES)


def detectable(n: int) -> tuple[float, float]:
    """Return the smallest difference of rates that McNemar's test can find at 5% with `n` prompts, and the one that it
    finds four times in five; not-a-number where there is none.

    Both where every prompt that changes does so the same way, the best case. Six must: two-sided, 2 * 0.5**6 < 0.05.
    """
    from scipy.special import betaincinv

    if n < _FEWEST_CHANGES:
        return math.nan, math.nan
    # The share of prompts that change at which a binomial count reaches the fewest with that power.
    return _FEWEST_CHANGES / n, float(betaincinv(_FEWEST_CHANGES, n - _FEWEST_CHANGES + 1, _POWER))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number, so that 5% is the chance of any false alarm among them (Holm 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
