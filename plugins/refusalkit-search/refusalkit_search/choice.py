"""Choose among trials, and tell which of them no other beats."""

from __future__ import annotations

from collections.abc import Sequence

from refusalkit_search.space import Objective
from refusalkit_search.study import Trial


def costs(trial: Trial, objectives: Sequence[Objective]) -> tuple[float, ...]:
    """Return the objectives of a measured trial as numbers of which the smaller is better."""
    assert trial.measured is not None
    return tuple(objective.cost(value) for objective, value in zip(objectives, trial.measured, strict=True))


def keeps_limits(trial: Trial, objectives: Sequence[Objective]) -> bool:
    """Whether a trial is measured and no objective is beyond its limit."""
    if trial.measured is None:
        return False
    return all(objective.excess(value) <= 0 for objective, value in zip(objectives, trial.measured, strict=True))


def best(trials: Sequence[Trial], objectives: Sequence[Objective]) -> Trial | None:
    """Return the best by the first objective of those that keep every limit, ties going to the next objective.

    None where no trial keeps them.
    """
    kept = [trial for trial in trials if keeps_limits(trial, objectives)]
    return min(kept, key=lambda trial: costs(trial, objectives), default=None)


def front(trials: Sequence[Trial], objectives: Sequence[Objective]) -> tuple[Trial, ...]:
    """Return the Pareto front: trials that no other equals or beats in every objective and beats in one."""
    measured = [(costs(trial, objectives), trial) for trial in trials if trial.measured is not None]
    found = [
        (mine, trial)
        for mine, trial in measured
        if not any(theirs != mine and all(a <= b for a, b in zip(theirs, mine, strict=True)) for theirs, _ in measured)
    ]
    return tuple(trial for _, trial in sorted(found, key=lambda pair: pair[0]))
