"""Put 95% intervals on rates and means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

_Z = NormalDist().inv_cdf(0.975)
_RESAMPLES = 2000


class Interval(NamedTuple):
    """Hold an estimate, its 95% interval and the number of values it rests on."""

    value: float
    low: float
    high: float
    n: int


def wilson(values: Sequence[float]) -> Interval:
    """Return the rate of ones among `values` (0 or 1) with Wilson's score interval (Wilson 1927).

    Not-a-number is a missing value and is not counted.
    """
    present = [value for value in values if not math.isnan(value)]
    n = len(present)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    rate = sum(present) / n
    centre = (rate + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(rate * (1 - rate) / n + _Z**2 / (4 * n**2))
    # At 0 and 1 the bound is the rate itself; rounding must not put it on the other side.
    return Interval(rate, max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half)), n)


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None, *, seed: int = 0) -> Interval:
    """Return the weighted mean of `values` with a percentile bootstrap interval over 2,000 resamples.

    Whole prompts are drawn with replacement, their weights with them. Not-a-number is missing and is not counted.
    """
    import torch

    both = zip(values, weights or [1.0] * len(values), strict=True)
    present = [(value, weight) for value, weight in both if not math.isnan(value)]
    n = len(present)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    value, weight = torch.tensor(present, dtype=torch.float64).T
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(n, (_RESAMPLES, n), generator=generator)
    means = (value * weight)[draws].sum(1) / weight[draws].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float((value * weight).sum() / weight.sum()), low, high, n)


def auroc(positive: Sequence[float], negative: Sequence[float]) -> Interval:
    """Return the probability that a positive scores higher than a negative: the area under the ROC curve.

    The interval is Newcombe's score interval (2006, method 5). DeLong's and the bootstrap's shrink to a point where
    the two sides separate, which small samples often do: at 32 a side and a true area of 0.98 they hold it in 82% and
    87% of samples, Newcombe's in 97%.
    """
    from sklearn.metrics import roc_auc_score

    n, m = len(positive), len(negative)
    area = float(roc_auc_score([1] * n + [0] * m, [*positive, *negative]))

    def half(true: float) -> float:
        """Return half the width of the interval of estimates around a true area."""
        pairs = (n + m) / 2 - 1
        spread = 1 + pairs * ((1 - true) / (2 - true) + true / (1 + true))
        return _Z * math.sqrt(true * (1 - true) * spread / (n * m))

    def bound(end: float) -> float:
        """Find the true area between the estimate and `end` whose interval just reaches the estimate."""
        inside, outside = area, end
        for _ in range(60):
            middle = (inside + outside) / 2
            if abs(area - middle) <= half(middle):
                inside = middle
            else:
                outside = middle
        return inside

    return Interval(area, bound(0.0), bound(1.0), n + m)
