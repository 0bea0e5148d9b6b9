"""Check a search before anything runs, and turn the values of a trial into a plan."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refusalkit.artifacts import Evaluation
from refusalkit.errors import InputError, RunError, nearest
from refusalkit.metric import Metric, Side
from refusalkit.plan import Plan, make_plan
from refusalkit.recipe import Recipe, recipe_type
from refusalkit.recipe_file import Source, Words, checked, load_recipe, put, read_recipe, read_source, variant
from refusalkit.registry import Registry
from refusalkit.report.measured import find
from refusalkit_search.space import Choices, Objective, SearchSpace

WORDS = Words("search space", "start with `space:` and `objectives:`", "the README of refusalkit-search has one")
#: What may differ between trials: all else decides what their numbers mean.
SEARCHED = ("capture", "find", "select", "evaluate.interventions")


@dataclass(frozen=True, eq=False)
class Setup:
    """Hold a recipe, what may change in it, and what is better."""

    source: Source
    """The recipe as it was read, settings applied."""
    written: Source
    """The search space as it was read."""
    space: SearchSpace
    registry: Registry
    checks: type[Recipe]
    """What recipes are checked against."""
    keeps_samples: bool = False
    """Whether some trials need every prompt's activations: captured once, they serve the others too."""

    @property
    def name(self) -> str:
        """The recipe's name."""
        return str(self.source.data["name"])

    def where(self, key: str) -> str:
        """Return where a key of the space stands."""
        return self.written.where(("space", key))

    def recipe(self, run: str, values: Mapping[str, Any]) -> Recipe:
        """Return the recipe with `values` under their keys; raises `InputError` where they do not fit together."""
        made = variant(self.source, run)
        for key, value in values.items():
            put(made, key, copy.deepcopy(value), self.where(key))
        return checked(made, self.checks, self.registry)

    def trial(self, run: str, values: Mapping[str, Any]) -> Plan:
        """Plan what a trial costs: the objectives alone, on validation prompts. No test prompt is in the plan."""
        recipe = self.recipe(run, values)
        evaluate, objectives = recipe.evaluate, self.space.objectives
        places = sorted({place(objective, recipe) for objective in objectives})
        named = {objective.metric for objective in objectives}
        asked = evaluate.model_copy(
            update={
                "interventions": tuple(evaluate.interventions[index] for index in places),
                "metrics": tuple(metric for metric in evaluate.metrics if metric.label in named),
                "controls": 0,
            }
        )
        reduced = recipe.model_copy(update={"evaluate": asked})
        folder = self.source.path.parent
        return make_plan(reduced, folder, self.registry, keeps_samples=self.keeps_samples, measured="validation")

    def test(self, run: str, values: Mapping[str, Any]) -> Plan:
        """Plan a run with `values` like any other: all that the recipe measures, on test prompts."""
        return make_plan(self.recipe(run, values), self.source.path.parent, self.registry)

    def values(self, run: str, values: Mapping[str, Any], evaluation: Evaluation) -> tuple[float, ...]:
        """Return the objectives' numbers; raises `RunError` where one could not be measured."""
        recipe = self.recipe(run, values)
        found = []
        for objective in self.space.objectives:
            label = recipe.evaluate.interventions[place(objective, recipe)].label
            result = find(evaluation.results, label, objective.prompts, objective.metric)
            if result is None or not math.isfinite(result.value):
                raise RunError(f"no prompt has a value of {objective.label}", where=f"evaluate.metrics: {label}")
            found.append(result.value)
        return tuple(found)

    def own(self) -> dict[str, Any] | None:
        """Return the values that the recipe itself has, or None where one of them is not in the space."""
        itself = _content(self.recipe("own", {}))
        found: dict[str, Any] = {}
        for key, part in self.space.dimensions.items():
            if isinstance(part, Choices):
                same = [value for value in part.examples if _content(self.recipe("own", {key: value})) == itself]
            else:
                value = _at(itself, key.split("."))
                fits = isinstance(value, int if part.whole else int | float) and part.low <= value <= part.high
                same = [value] if fits else []
            if not same:
                return None
            found[key] = same[0]
        return found


def place(objective: Objective, recipe: Recipe) -> int:
    """Return where the intervention that an objective is about stands in a recipe."""
    listed = recipe.evaluate.interventions
    acting = [index for index, spec in enumerate(listed) if spec.uses_direction]
    if objective.intervention in acting:
        return objective.intervention
    if objective.intervention is None and acting:
        return acting[0]
    raise InputError(
        "no intervention that uses the direction stands there" if acting else "the recipe has no intervention",
        where="intervention",
        hint="one of: " + ", ".join(f"{index} ({listed[index].label})" for index in acting)
        if acting
        else "list one below `evaluate.interventions:`",
    )


def read_setup(recipe: Path, space: Path, settings: Sequence[str], registry: Registry) -> Setup:
    """Read a recipe and a search space, and check every value that may be tried, each for itself.

    Raises `InputError` with file, line, key, what was seen and one hint.
    """
    base = load_recipe(recipe, registry, settings)
    written = read_source(space, WORDS)
    setup = Setup(
        read_recipe(recipe, settings),
        written,
        checked(written, SearchSpace, registry),
        registry,
        recipe_type(registry),
    )
    for key in setup.space.space:
        _check_key(key, setup)
    for number, objective in enumerate(setup.space.objectives):
        _check_objective(objective, base, lambda *keys, number=number: written.where(("objectives", number, *keys)))
    needs = {setup.trial("check", {}).needs}
    for key, values in _tried(setup.space):
        try:
            needs.add(setup.trial("check", values).needs)
        except InputError as error:
            raise InputError(
                f"{json.dumps(values[key])} cannot be used: {error.message}", where=setup.where(key), hint=error.hint
            ) from None
    return replace(setup, keeps_samples="samples" in needs)


def _check_key(key: str, setup: Setup) -> None:
    if not any(f"{key}.".startswith(f"{part}.") for part in SEARCHED):
        raise InputError(
            "cannot change between trials, which are compared on the same model, prompts and metrics",
            where=setup.where(key),
            hint=f"what can be searched stands below {', '.join(SEARCHED)}",
        )
    part = setup.space.space[key]
    for index, value in enumerate(part if isinstance(part, tuple) else ()):
        if value in part[:index]:
            raise InputError(f"lists {json.dumps(value)} twice", where=setup.where(key), hint="keep one of them")


def _check_objective(objective: Objective, base: Recipe, where: Any) -> None:
    """Refuse an objective that the recipe does not measure."""
    metrics: dict[str, Metric] = {metric.label: metric for metric in base.evaluate.metrics}
    if objective.metric not in metrics:
        raise InputError(
            f"the recipe does not measure {objective.metric!r}",
            where=where("metric"),
            hint=f"{nearest(objective.metric, list(metrics))}; `evaluate.metrics` lists them",
        )
    sides: list[Side] = [
        side for side in metrics[objective.metric].sides if getattr(base.prompts, side, None) is not None
    ]
    if objective.prompts not in sides:
        raise InputError(
            f"the recipe does not measure {objective.metric} on {objective.prompts} prompts",
            where=where("prompts"),
            hint=f"one of: {', '.join(sides)}",
        )
    try:
        place(objective, base)
    except InputError as error:
        error.where = where("intervention") if objective.intervention is not None else "evaluate.interventions"
        raise


def _tried(space: SearchSpace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the first value of every key, one key more each time, and then every other value beside these."""
    first: dict[str, Any] = {}
    for key, part in space.dimensions.items():
        first[key] = part.examples[0]
        yield key, dict(first)
    for key, part in space.dimensions.items():
        for value in part.examples[1:]:
            yield key, {**first, key: value}


def _content(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", serialize_as_any=True)


def _at(data: Any, parts: Sequence[str]) -> Any:
    for part in parts:
        if isinstance(data, list) and part.isdecimal() and int(part) < len(data):
            data = data[int(part)]
        elif isinstance(data, dict):
            data = data.get(part)
        else:
            return None
    return data
