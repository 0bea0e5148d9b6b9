"""Hold what a search found, and say it as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from refusalkit.artifacts import Result
from refusalkit.report.measured import find
from refusalkit.report.wording import NOTHING_TO_SHOW, count, number, percent, with_interval
from refusalkit.run_directory import Run
from refusalkit_search.choice import keeps_limits
from refusalkit_search.setup import Setup, place
from refusalkit_search.space import Objective
from refusalkit_search.study import Budget, Trial

#: What stands beside each other, and what it is.
NAMES = {"fixed": "the recipe as it is", "random": "random search", "search": "search"}


@dataclass(frozen=True, eq=False)
class Found:
    """Hold every trial and what was chosen of them."""

    setup: Setup
    budget: Budget
    fixed: Trial
    """The recipe as it is, on validation prompts."""
    search: tuple[Trial, ...]
    random: tuple[Trial, ...]
    chosen: Trial | None
    """The best of the search; None where no trial keeps the limits."""
    rival: Trial | None
    """The best of random search."""
    front: tuple[Trial, ...]
    """The Pareto front of the search."""
    tests: dict[str, Run] = field(default_factory=dict)
    """The runs on test prompts: `fixed`, `random`, `search`."""

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What is better."""
        return self.setup.space.objectives

    def compared(self) -> Iterator[tuple[str, Trial]]:
        """Yield what stands beside each other, by name."""
        for name, trial in (("fixed", self.fixed), ("random", self.rival), ("search", self.chosen)):
            if trial is not None:
                yield name, trial

    def tested(self, name: str, objective: Objective) -> Result | None:
        """Return an objective on test prompts."""
        run = self.tests.get(name)
        if run is None:
            return None
        values = next(trial.values for other, trial in self.compared() if other == name)
        recipe = self.setup.recipe(name, values)
        label = recipe.evaluate.interventions[place(objective, recipe)].label
        return find(run.evaluation.results, label, objective.prompts, objective.metric)


def shown(found: Found, objective: Objective, value: float) -> str:
    """Write an objective's number: a share as a percentage."""
    rate = any(row.kind == "rate" for run in found.tests.values() for row in run.evaluation.results
               if row.metric == objective.metric)  # fmt: skip
    return percent(value) if rate else number(value)


def on_validation(found: Found, trial: Trial) -> list[str]:
    """Write the objectives of one trial."""
    if trial.measured is None:
        return [NOTHING_TO_SHOW] * len(found.objectives)
    return [shown(found, each, value) for each, value in zip(found.objectives, trial.measured, strict=True)]


def rule(found: Found) -> str:
    """Say how the choice was made."""
    words = {"minimize": "lowest", "maximize": "highest"}
    order = ", then ".join(
        f"the {words[each.goal]} {each.metric} on {_side(each)} prompts" for each in found.objectives
    )
    limits = [
        f"{each.metric} on {_side(each)} prompts {'at most' if each.goal == 'minimize' else 'at least'} {each.limit:g}"
        for each in found.objectives
        if each.limit is not None
    ]
    return f"Chosen: {order}" + (f", with {' and '.join(limits)}" if limits else "") + "."


def _side(objective: Objective) -> str:
    return objective.prompts.replace("_", "-")


def sentence(found: Found) -> str:
    """Say what was found, following the numbers and nothing else."""
    if found.chosen is None:
        n = len(found.search)
        return f"None of {count(n, 'trial')} keeps the limits on validation prompts: nothing is chosen."
    said = []
    for objective in found.objectives:
        numbers = {name: with_interval(found.tested(name, objective)) for name, _ in found.compared()}
        others = ", ".join(f"{numbers[name]} for {NAMES[name]}" for name in numbers if name != "search")
        said.append(f"{objective.metric} on {_side(objective)} prompts is {numbers['search']} ({others})")
    return f"On test prompts, {'; '.join(said)}."


def failures(found: Found) -> list[tuple[str, int]]:
    """Count the reasons for which trials came to nothing."""
    reasons: dict[str, int] = {}
    for trial in (*found.search, *found.random):
        if trial.reason is not None:
            reasons[trial.reason] = reasons.get(trial.reason, 0) + 1
    return sorted(reasons.items(), key=lambda pair: -pair[1])


def text(found: Found) -> str:
    """Write the outcome as plain text."""
    lines = [sentence(found), rule(found), ""]
    for objective in found.objectives:
        lines.append(f"{objective.label}, {objective.goal}")
        for name, trial in found.compared():
            index = found.objectives.index(objective)
            measured = on_validation(found, trial)[index]
            lines.append(f"  {name:<8}validation {measured:<10}test {with_interval(found.tested(name, objective))}")
    lines.append("")
    if found.chosen is not None:
        lines += [f"{key}: {json.dumps(value)}" for key, value in found.chosen.values.items()]
    lines.append(f"{count(len(found.search), 'trial')}, {len(found.random)} of random search")
    lines += [f"{times} came to nothing: {reason}" for reason, times in failures(found)]
    return "\n".join(lines)


def document(found: Found) -> dict[str, Any]:
    """Return the content of `search.json`, version 1."""
    objectives = found.objectives

    def told(trial: Trial | None) -> dict[str, Any] | None:
        if trial is None:
            return None
        return {
            "run": trial.run,
            "values": dict(trial.values),
            "validation": None if trial.measured is None else dict(_named(found, trial.measured)),
            "keeps_limits": keeps_limits(trial, objectives),
            "reason": trial.reason,
        }

    return {
        "version": 1,
        "recipe": found.setup.name,
        "seed": found.budget.seed,
        "objectives": [each.model_dump(mode="json") for each in objectives],
        "chosen": told(found.chosen),
        "random": told(found.rival),
        "fixed": told(found.fixed),
        "front": [told(trial) for trial in found.front],
        "test": {
            name: {
                each.label: json.loads(result.model_dump_json(include={"value", "low", "high", "n"}))
                for each in objectives
                if (result := found.tested(name, each)) is not None
            }
            for name in found.tests
        },
        "trials": [told(trial) for trial in (*found.search, *found.random)],
    }


def _named(found: Found, measured: tuple[float, ...]) -> Mapping[str, float]:
    return {each.label: value for each, value in zip(found.objectives, measured, strict=True)}
