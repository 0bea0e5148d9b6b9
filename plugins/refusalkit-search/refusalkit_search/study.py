"""Ask Optuna what to try next, and keep what came of it in a journal, so that a search that is stopped goes on.

What is drawn depends on the seed, the number of the trial and the trials before it, and on nothing else: a search that
was stopped and goes on tries what it would have tried.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from refusalkit.errors import InputError
from refusalkit_search.space import SearchSpace

Kind = Literal["search", "random"]
#: Under these keys of the journal stands what became of a trial, and why; what has cost something counts.
BECAME = "became"
Became = Literal["measured", "failed", "repeated", "impossible"]
COUNTED = ("measured", "failed")
REASON = "reason"
#: After so many draws in a row that led nowhere, draws are random; after ten times as many, the search ends.
PATIENCE = 10


@dataclass(frozen=True)
class Trial:
    """Hold what was tried and what came of it."""

    run: str
    """The name of its folder: `search-003`."""
    values: Mapping[str, Any]
    """By dotted key."""
    measured: tuple[float, ...] | None
    """The objectives, in their order; None where it failed."""
    reason: str | None = None
    """Why it failed."""


@dataclass(frozen=True)
class Attempt:
    """Say what came of trying some values."""

    became: Became
    measured: tuple[float, ...] = ()
    """The objectives, in their order."""
    reason: str | None = None
    """Why there are none."""


#: Tries values in a folder of the given name.
Try = Callable[[str, Mapping[str, Any]], Attempt]


@dataclass(frozen=True)
class Budget:
    """Say how many trials to make, and what they are drawn from."""

    trials: int
    seed: int


def open_journal(path: Path) -> JournalStorage:
    """Open the journal at `path`, or begin one. Its folder has to be held: nobody else may write."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if path.exists():
        whole = path.read_bytes()
        # A process that was killed while it wrote leaves half a line, behind which nothing could be read.
        os.truncate(path, whole.rfind(b"\n") + 1)
    lock: Any = _Held()
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


class _Held:
    """Stand in for a lock file, which a process that is killed would leave behind: the folder is held already."""

    def acquire(self) -> bool:
        """Say that nobody else writes."""
        return True

    def release(self) -> None:
        """Do nothing."""


def open_study(storage: JournalStorage, kind: Kind, space: SearchSpace, own: Mapping[str, Any] | None) -> Study:
    """Open the study of one kind; the search begins with the recipe's own values, where they are in the space."""
    study = optuna.create_study(
        storage=storage,
        study_name=kind,
        directions=[objective.goal for objective in space.objectives],
        load_if_exists=True,
    )
    if kind == "search" and own is not None and not study.get_trials(deepcopy=False):
        dimensions = space.dimensions
        study.enqueue_trial({key: dimensions[key].stored(value) for key, value in own.items()})
    return study


def trials(study: Study, space: SearchSpace) -> list[Trial]:
    """Return the trials that count, in their order."""
    return [_trial(study, frozen, space) for frozen in _ended(study) if _became(frozen) in COUNTED]


def _trial(study: Study, frozen: FrozenTrial, space: SearchSpace) -> Trial:
    measured = tuple(frozen.values) if frozen.state is TrialState.COMPLETE else None
    dimensions = space.dimensions
    values = {key: dimensions[key].value(stored) for key, stored in frozen.params.items()}
    return Trial(_run(study, frozen.number), values, measured, frozen.user_attrs.get(REASON))


def _run(study: Study, number: int) -> str:
    return f"{study.study_name}-{number:03d}"


def _ended(study: Study) -> list[FrozenTrial]:
    return [frozen for frozen in study.get_trials(deepcopy=False) if frozen.state.is_finished()]


def _became(frozen: FrozenTrial) -> Became:
    became: Became = frozen.user_attrs[BECAME]
    return became


def spend(study: Study, space: SearchSpace, budget: Budget, attempt: Try, advance: Callable[[int, int], None]) -> None:
    """Make trials until the budget is spent, or there is nothing new to try. What was stopped is done first.

    Raises `InputError` where nothing that is drawn can be used.
    """
    while True:
        ended = _ended(study)
        counted = sum(_became(frozen) in COUNTED for frozen in ended)
        advance(counted, budget.trials)
        tried = {_identity(frozen) for frozen in ended}
        streak = _streak(ended)
        if counted >= budget.trials or (counted and (len(tried) >= space.size or streak >= 10 * PATIENCE)):
            return
        if len(tried) >= space.size or streak >= 10 * PATIENCE:
            reasons = [frozen.user_attrs[REASON] for frozen in ended if _became(frozen) == "impossible"]
            raise InputError(
                f"none of {len(tried)} combinations can be used; the first: {reasons[0]}",
                where="space",
                hint="take out the values that do not fit together",
            )
        trial = _next(study, space, budget.seed, at_random=study.study_name == "random" or streak >= PATIENCE)
        values = {key: part.suggest(key, trial) for key, part in space.dimensions.items()}
        again = _identity(trial) in tried
        _end(study, trial, Attempt("repeated") if again else attempt(_run(study, trial.number), values), space)


def _streak(ended: Sequence[FrozenTrial]) -> int:
    """Return how many of the last draws led nowhere."""
    counts = [_became(frozen) in COUNTED for frozen in reversed(ended)]
    return counts.index(True) if True in counts else len(ended)


def _identity(trial: BaseTrial | FrozenTrial) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(trial.params.items(), key=lambda item: item[0]))


def _next(study: Study, space: SearchSpace, seed: int, *, at_random: bool) -> optuna.Trial:
    """Take up the trial that was stopped, or ask for a new one."""
    known = study.get_trials(deepcopy=False)
    stopped = [frozen for frozen in known if frozen.state is TrialState.RUNNING]
    number = stopped[0].number if stopped else len(known)
    drawn = int(numpy.random.SeedSequence([seed, number, study.study_name == "random"]).generate_state(1)[0])
    study.sampler = (
        optuna.samplers.RandomSampler(seed=drawn)
        if at_random
        else optuna.samplers.TPESampler(seed=drawn, n_startup_trials=space.startup, multivariate=True)
    )
    return optuna.Trial(study, stopped[0]._trial_id) if stopped else study.ask()


def _end(study: Study, trial: optuna.Trial, made: Attempt, space: SearchSpace) -> None:
    """Note what came of a trial."""
    trial.set_user_attr(BECAME, made.became)
    if made.became != "measured":
        trial.set_user_attr(REASON, made.reason)
        study.tell(trial, state=TrialState.FAIL)
        return
    for objective, value in zip(space.objectives, made.measured, strict=True):
        if objective.limit is not None:
            trial.set_constraint(objective.label, objective.excess(value))
    study.tell(trial, list(made.measured))
