"""Say what may change between trials, and which of two trials is better.

A search space is YAML of its own: the recipe it changes stays a recipe.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from refusalkit.metric import Side
from refusalkit.recipe import Section

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

Number = Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True)]


class Range(Section):
    """Let a number lie anywhere between two others, both included; a whole number between whole numbers."""

    low: Number
    """The smallest value."""
    high: Number
    """The largest value."""
    log: bool = False
    """Draw factors as evenly as differences otherwise: as many values between 1 and 10 as between 10 and 100."""

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"`low: {self.low}` is not below `high: {self.high}`")
        if self.log and self.low <= 0:
            raise ValueError(f"`log: true` needs a `low` above 0, not {self.low}")
        return self

    @property
    def whole(self) -> bool:
        """Whether the values are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def size(self) -> float:
        """How many values there are."""
        return self.high - self.low + 1 if self.whole else math.inf

    @property
    def examples(self) -> tuple[Any, ...]:
        """Values that stand for all others when a space is checked."""
        return (self.low, self.high)

    def suggest(self, key: str, trial: BaseTrial) -> Any:
        """Let Optuna choose a value."""
        if self.whole:
            return trial.suggest_int(key, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(key, float(self.low), float(self.high), log=self.log)

    def stored(self, value: Any) -> Any:
        """Return what the journal calls `value`."""
        return value

    def value(self, stored: Any) -> Any:
        """Return the value that the journal calls `stored`."""
        return stored


class Choices:
    """Let a key have one of the values that are listed."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.examples = tuple(values)
        self.size = float(len(values))
        self._named = {self.stored(value): value for value in values}

    def suggest(self, key: str, trial: BaseTrial) -> Any:
        """Let Optuna choose a value."""
        return self._named[trial.suggest_categorical(key, list(self._named))]

    def stored(self, value: Any) -> Any:
        """Return what the journal calls `value`: Optuna knows single values only."""
        return json.dumps(value) if isinstance(value, list | dict) else value

    def value(self, stored: Any) -> Any:
        """Return the value that the journal calls `stored`."""
        return self._named[stored]


Dimension = Range | Choices
Part = Annotated[
    Annotated[Range, Tag("range")] | Annotated[tuple[Any, ...], Field(min_length=1), Tag("list")],
    Discriminator(lambda value: "range" if isinstance(value, dict | Range) else "list"),
]


class Objective(Section):
    """Name one number of the evaluation and say which way is better."""

    metric: str
    """A metric of the recipe's `evaluate.metrics`, as tables name it."""
    prompts: Side
    """The prompts it is taken on."""
    goal: Literal["minimize", "maximize"]
    """Which way is better."""
    limit: Number | None = None
    """The worst value that may be chosen: the largest where it is minimised, the smallest where it is maximised."""
    intervention: Annotated[int, Field(ge=0, strict=True)] | None = None
    """The place in the recipe's `evaluate.interventions`, counted from 0; null takes the first that changes
    anything."""

    @property
    def label(self) -> str:
        """The name in tables."""
        return f"{self.metric}, {self.prompts.replace('_', '-')}"

    def cost(self, value: float) -> float:
        """Return a number that is smaller where `value` is better."""
        return value if self.goal == "minimize" else -value

    def excess(self, value: float) -> float:
        """Return by how much `value` is beyond the limit; not above 0 where it is within."""
        return -math.inf if self.limit is None else self.cost(value) - self.cost(self.limit)


class SearchSpace(Section):
    """Declare a search: what may change, and what is better."""

    space: Annotated[dict[str, Part], Field(min_length=1)]
    """Dotted keys of the recipe with a list of values, or a range: `{low: 1, high: 6}`, `{low: 0.1, high: 4.0, log:
    true}`. A number in a key counts the items of a list from 0: `evaluate.interventions.0.scale`."""
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)]
    """What is better, the most important first: of the trials that keep every `limit`, the best by the first is
    chosen, and where several are equally good, the best of these by the next."""
    startup: Annotated[int, Field(ge=1, strict=True)] = 10
    """How many trials are drawn at random before the sampler learns from them."""

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        """What may change, by dotted key."""
        return {key: part if isinstance(part, Range) else Choices(part) for key, part in self.space.items()}

    @property
    def size(self) -> float:
        """How many combinations there are."""
        return math.prod(part.size for part in self.dimensions.values())
