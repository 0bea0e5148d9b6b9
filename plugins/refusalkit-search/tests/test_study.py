"""Draws depend on the seed and on what was tried before; what is chosen is best, and no trial is made twice."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from refusalkit_search.choice import best, costs, front, keeps_limits
from refusalkit_search.space import Objective, SearchSpace
from refusalkit_search.study import Attempt, Budget, Kind, Trial, open_journal, open_study, spend, trials

from refusalkit.errors import InputError

SPACE = SearchSpace.model_validate(
    {
        "space": {
            "find": ["pca", {"strategy": "som", "rank": 2}, None],
            "select.layer": {"low": 1, "high": 30},
            "scale": {"low": 0.1, "high": 10.0, "log": True},
        },
        "objectives": [
            {"metric": "refusal_rate", "prompts": "harmful", "goal": "minimize"},
            {"metric": "kl", "prompts": "harmless", "goal": "minimize", "limit": 0.5},
        ],
        "startup": 4,
    }
)
OBJECTIVES = SPACE.objectives


def of(values: Mapping[str, Any]) -> Attempt:
    """Make up numbers with a best place: layer 20, scale 1."""
    layer, scale = values["select.layer"], values["scale"]
    return Attempt("measured", (abs(layer - 20) / 30 + (values["find"] == "pca"), abs(scale - 1)))


def made(
    journal: Path, kind: Kind, n: int, seed: int = 0, space: SearchSpace = SPACE, attempt: Any = None
) -> list[Trial]:
    study = open_study(open_journal(journal), kind, space, None)
    spend(study, space, Budget(n, seed), attempt or (lambda run, values: of(values)), lambda done, total: None)
    return trials(study, space)


@pytest.mark.parametrize("kind", ["search", "random"])
def test_a_study_that_is_stopped_anywhere_makes_the_same_trials(tmp_path: Path, kind: Kind) -> None:
    whole = made(tmp_path / "whole", kind, 12)
    assert len(whole) == 12
    tried: list[Mapping[str, Any]] = []

    def stopping(run: str, values: Mapping[str, Any]) -> Attempt:
        tried.append(values)
        if len(tried) % 3 == 0:
            raise KeyboardInterrupt
        return of(values)

    for _ in range(10):
        try:
            parts = made(tmp_path / "parts", kind, 12, attempt=stopping)
        except KeyboardInterrupt:
            continue
        break
    assert parts == whole
    # What was stopped is tried once more, and nothing else is.
    assert len(tried) == 12 + (len(tried) // 3)


def test_seeds_draw_different_trials_and_both_kinds_do(tmp_path: Path) -> None:
    drawn = [made(tmp_path / f"{kind}{seed}", kind, 3, seed) for kind in ("search", "random") for seed in (0, 1)]
    values = [[trial.values for trial in listed] for listed in drawn]
    assert all(one != other for one, other in itertools.combinations(values, 2))


def test_half_a_line_in_the_journal_is_dropped(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", "search", 8)
    made(tmp_path / "parts", "search", 5)
    with (tmp_path / "parts").open("ab") as journal:
        journal.write(b'{"op_code":4,"worker_')
    assert made(tmp_path / "parts", "search", 8) == whole


def test_no_combination_is_tried_twice_and_a_finite_space_ends(tmp_path: Path) -> None:
    few = SPACE.model_copy(update={"space": {"find": ("pca", "lda"), "select.layer": (1, 2, 3)}})
    tried = made(tmp_path / "j", "search", 50, space=few, attempt=lambda run, values: Attempt("measured", (0.0, 0.0)))
    combinations = {(trial.values["find"], trial.values["select.layer"]) for trial in tried}
    assert (len(tried), len(combinations)) == (6, 6)


def test_what_does_not_fit_together_costs_no_trial(tmp_path: Path) -> None:
    def picky(run: str, values: Mapping[str, Any]) -> Attempt:
        return of(values) if values["select.layer"] % 2 else Attempt("impossible", reason="even")

    tried = made(tmp_path / "j", "search", 10, attempt=picky)
    assert len(tried) == 10
    assert all(trial.values["select.layer"] % 2 for trial in tried)


def test_a_trial_that_comes_to_nothing_counts_and_says_why(tmp_path: Path) -> None:
    tried = made(tmp_path / "j", "search", 3, attempt=lambda run, values: Attempt("failed", reason="none survives"))
    assert [(trial.measured, trial.reason) for trial in tried] == [(None, "none survives")] * 3


@pytest.mark.parametrize("space", [{"a": (1, 2)}, SPACE.space], ids=["finite", "endless"])
def test_a_space_of_which_nothing_fits_together_is_an_error(tmp_path: Path, space: Any) -> None:
    none = SPACE.model_copy(update={"space": space})
    with pytest.raises(InputError, match="combinations can be used; the first: no"):
        made(tmp_path / "j", "search", 3, space=none, attempt=lambda run, values: Attempt("impossible", reason="no"))


def test_the_recipes_own_values_are_tried_first(tmp_path: Path) -> None:
    own = {"find": {"strategy": "som", "rank": 2}, "select.layer": 7, "scale": 1.5}
    study = open_study(open_journal(tmp_path / "j"), "search", SPACE, own)
    spend(study, SPACE, Budget(2, 0), lambda run, values: of(values), lambda done, total: None)
    assert trials(study, SPACE)[0].values == own


def test_the_sampler_learns(tmp_path: Path) -> None:
    found = {kind: best(made(tmp_path / kind, kind, 40), OBJECTIVES) for kind in ("search", "random")}
    values = {kind: costs(trial, OBJECTIVES)[0] for kind, trial in found.items() if trial is not None}
    assert values["search"] <= values["random"]
    assert values["search"] < 0.1


# What is chosen

DRAW = random.Random(0)
SOME = [Trial(str(n), {}, (round(DRAW.random(), 1), round(DRAW.random(), 1))) for n in range(60)]
FAILED = Trial("failed", {}, None, "nothing survives")


def test_what_is_chosen_keeps_the_limits_and_none_that_does_is_better() -> None:
    chosen = best([*SOME, FAILED], OBJECTIVES)
    assert chosen is not None
    kept = [trial for trial in SOME if keeps_limits(trial, OBJECTIVES)]
    assert chosen in kept
    assert all(costs(chosen, OBJECTIVES) <= costs(trial, OBJECTIVES) for trial in kept)
    assert best([FAILED], OBJECTIVES) is None


def test_the_front_is_what_no_other_beats() -> None:
    found = front([*SOME, FAILED], OBJECTIVES)

    def beats(one: Trial, other: Trial) -> bool:
        ours, theirs = costs(one, OBJECTIVES), costs(other, OBJECTIVES)
        return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))

    assert all((trial in found) != any(beats(other, trial) for other in SOME) for trial in SOME)


def test_maximising_is_minimising_the_other_way() -> None:
    def objective(goal: str, limit: float) -> Objective:
        return Objective.model_validate({"metric": "m", "prompts": "harmful", "goal": goal, "limit": limit})

    down, up = (objective("minimize", 0.4),), (objective("maximize", -0.4),)
    mirrored = [Trial(trial.run, {}, (-trial.measured[0],)) for trial in SOME if trial.measured]
    plain = [Trial(trial.run, {}, (trial.measured[0],)) for trial in SOME if trial.measured]
    one, other = best(plain, down), best(mirrored, up)
    assert one is not None
    assert other is not None
    assert one.run == other.run
