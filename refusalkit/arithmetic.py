"""Work on the directions a strategy finds: four operations, applied in the order in which a recipe lists them.

They are a vocabulary and not a language: an operation may name one other strategy, whose directions are found at the
same places, and nothing nests any deeper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from refusalkit.errors import InputError, RunError
from refusalkit.intervention import Ordinal
from refusalkit.strategy import Setting, Strategy

if TYPE_CHECKING:
    from torch import Tensor


class Operation(BaseModel, ABC):
    """Turn directions [position, layer, d_model] or [position, layer, rank, d_model] into others of the same shape."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    operation: str

    @property
    def others(self) -> tuple[Strategy, ...]:
        """The strategies whose directions it needs."""
        return ()

    @property
    def label(self) -> str:
        """How it is written in reports."""
        return self.operation

    def fitted(self, setting: Setting) -> Operation:
        """Return the operation as it runs there; raise `InputError` where it means nothing."""
        return self

    @property
    def content(self) -> dict[str, Any]:
        """What decides its result: its options, and what they name."""
        return self.model_dump(mode="json")

    @abstractmethod
    def apply(self, directions: Tensor, found: Callable[[Strategy], Tensor]) -> Tensor:
        """Return the directions worked on; `found` gives those of one of the `others`."""


class MinusProjection(Operation):
    """Subtract the projection on another strategy's direction, or on the subspace it returns, place by place."""

    operation: Literal["minus_projection"] = "minus_projection"
    onto: Strategy
    """The other strategy."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """How much of the projection is subtracted; 1 leaves nothing of it."""

    @property
    def others(self) -> tuple[Strategy, ...]:
        return (self.onto,)

    @property
    def label(self) -> str:
        share = "" if self.share == 1 else f" ({self.share:g} of it)"
        return f"{self.operation} onto {self.onto.strategy}{share}"

    def fitted(self, setting: Setting) -> Operation:
        return self.model_copy(update={"onto": self.onto.fitted(setting)})

    @property
    def content(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"onto"}) | {"onto": self.onto.content}

    def apply(self, directions: Tensor, found: Callable[[Strategy], Tensor]) -> Tensor:
        from refusalkit import algebra

        return algebra.minus_projection(directions, found(self.onto), self.share)


class Normalize(Operation):
    """Give every direction length one."""

    operation: Literal["normalize"] = "normalize"

    def apply(self, directions: Tensor, found: Callable[[Strategy], Tensor]) -> Tensor:
        from refusalkit import algebra

        return algebra.unit(directions)


class Scale(Operation):
    """Multiply every direction by a number: steering adds as much more, ablation does not notice."""

    operation: Literal["scale"] = "scale"
    by: float
    """The number; a negative one turns directions round."""

    @field_validator("by")
    @classmethod
    def _leaves_something(cls, by: float) -> float:
        if by == 0 or abs(by) == float("inf"):
            raise ValueError(f"{by:g} leaves no direction")
        return by

    @property
    def label(self) -> str:
        return f"{self.operation} by {self.by:g}"

    def apply(self, directions: Tensor, found: Callable[[Strategy], Tensor]) -> Tensor:
        return directions * self.by


class MeanOverLayers(Operation):
    """Put the mean over some layers in the place of each of them; in the other layers nothing is left.

    Directions count by their length, which grows with depth: `normalize` before it lets every layer count the same.
    """

    operation: Literal["mean_over_layers"] = "mean_over_layers"
    layers: Annotated[tuple[Ordinal, ...], Field(min_length=2, max_length=2)]
    """The first and the last layer."""

    @field_validator("layers")
    @classmethod
    def _in_order(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if layers[1] < layers[0]:
            raise ValueError(f"layers {layers[0]} to {layers[1]} are none: write the lower number first")
        return layers

    @property
    def label(self) -> str:
        return f"{self.operation} {self.layers[0]} to {self.layers[1]}"

    def fitted(self, setting: Setting) -> Operation:
        if self.layers[1] >= setting.n_layers:
            raise InputError(
                f"layer {self.layers[1]} of {setting.n_layers}",
                where=f"find.then: {self.label}",
                hint=f"`layers` from 0 to {setting.n_layers - 1}",
            )
        return self

    def apply(self, directions: Tensor, found: Callable[[Strategy], Tensor]) -> Tensor:
        import torch

        if directions.ndim == 4:
            raise RunError(
                "rows of a subspace in one layer have no counterpart in another",
                where=f"find.then: {self.label}",
                hint="take a strategy that finds one direction a place",
            )
        first, last = self.layers
        averaged = torch.zeros_like(directions)
        averaged[:, first : last + 1] = directions[:, first : last + 1].mean(1, keepdim=True)
        return averaged


OPERATIONS: Mapping[str, type[Operation]] = {
    "minus_projection": MinusProjection,
    "normalize": Normalize,
    "scale": Scale,
    "mean_over_layers": MeanOverLayers,
}


class Find(Strategy):
    """Find directions with a strategy, then work on them: what stands under `find` in a recipe."""

    then: tuple[Operation, ...] = ()
    """What to do with the directions, first to last: operations from the list below."""

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """The strategy itself and those that its operations name."""
        return (self, *(other for operation in self.then for other in operation.others))

    @property
    def needs_model(self) -> bool:
        """Whether one of its strategies needs the model."""
        return any(strategy.needs == "model" for strategy in self.strategies)

    @property
    def label(self) -> str:
        """How it is written in reports."""
        return ", then ".join([self.strategy, *([", ".join(each.label for each in self.then)] if self.then else [])])


def fitted(find: Find, setting: Setting) -> Find:
    """Return the section as it runs there; raises `InputError` where a part of it means nothing."""
    then = tuple(operation.fitted(setting) for operation in find.then)
    made = find.fitted(setting).model_copy(update={"then": then})
    assert isinstance(made, Find)
    return made


def content(find: Find) -> dict[str, Any]:
    """Return what decides the directions beside the activations; without operations, what the strategy says alone."""
    own = find.content
    del own["then"]
    return own | ({"then": [operation.content for operation in find.then]} if find.then else {})
