"""Say what to do with a direction, as data the engine can run anywhere.

An `Intervention` is a set of edits of the residual stream or one edit of the weights. Recipes name an
`InterventionSpec`, a frozen pydantic class whose fields are its YAML keys; given the chosen direction it builds the
`Intervention`. Nothing here runs a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from refusalkit.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from refusalkit.metric import Side

Site = Literal["resid_pre", "attn_out", "mlp_out", "resid_post"]
#: The places of a block that can be read and edited, in forward order.
SITES: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out", "resid_post")


@dataclass(frozen=True, eq=False)
class Edit:
    """Change the hidden state at one site of one layer: `h - P h + |P h| turn + add`, P the projection on `remove`."""

    site: Site
    layer: int
    remove: Tensor | None = None
    """Orthonormal rows [rank, d_model] to project out."""
    add: Tensor | None = None
    """Vector [d_model] to add after the removal."""
    turn: Tensor | None = None
    """Vector [d_model] to add as often as what was removed is long."""
    along: Tensor | None = None
    """Vector [d_model]; tokens whose component along it is not positive stay as they are."""
    tokens: tuple[int | None, int | None] = (None, None)
    """The first and the last token that is changed, counted from the prompt's last, which is 0: 1 is the first token
    that is generated. None is open."""
    gated: bool = False
    """Whether only prompts are changed that the intervention's gate lets through."""

    @property
    def parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """What `algebra.edit` takes beside the hidden state, in its order."""
        return self.remove, self.add, self.turn, self.along


@dataclass(frozen=True)
class Place:
    """Name where one hidden state of a prompt is."""

    site: Site
    layer: int
    position: int
    """Negative, counted from the end of the prompt."""


class States(Protocol):
    """Read the prompts of a run in the unmodified model: `states(side, split, place)`, [prompt, d_model] float64.

    Each side and split is read once, when it is asked for.
    """

    def __call__(self, side: Side, split: Literal["train", "validation"], place: Place) -> Tensor:
        """Return [prompt, d_model] float64 at `place`."""


@dataclass(frozen=True, eq=False)
class Gate:
    """Decide for each prompt, as it is read, whether the gated edits apply; the decision holds for its completion."""

    site: Site
    layer: int
    position: int
    """Negative, counted from the end of the prompt."""
    vector: Tensor
    """[d_model]: the gate opens when the component along it is at least `threshold`."""
    threshold: float


@dataclass(frozen=True, eq=False)
class Intervention:
    """Hold everything an engine does differently: edits of activations, or a subspace removed from the weights."""

    edits: tuple[Edit, ...] = ()
    """Applied in forward order of their places, and at one place in the order given."""
    weights: Tensor | None = None
    """Orthonormal rows [rank, d_model] to remove from every weight that writes the residual stream."""
    keeps_norms: bool = False
    """Whether every column of an edited matrix in a block gets back the length it had."""
    gate: Gate | None = None
    """Read before the edits of its place."""

    @property
    def first_layer(self) -> int | None:
        """The lowest layer that is touched, or None when nothing is; layers below it run as in the plain model."""
        gates = [] if self.gate is None else [self.gate.layer]
        return min([*gates, *(edit.layer for edit in self.edits)], default=None)


#: The unmodified model.
NOTHING = Intervention()


@dataclass(frozen=True, eq=False)
class Direction:
    """Hold a chosen direction and where it was found."""

    vector: Tensor
    """[d_model] as found, or [rank, d_model] where the strategy returns a subspace."""
    position: int
    layer: int
    n_layers: int
    site: Site = "resid_pre"
    harmless: Tensor | None = None
    """[layer, d_model]: the mean of harmless training prompts at `site` and this position, in every layer."""
    harmful: Tensor | None = None
    """[layer, d_model]: the same of harmful training prompts."""
    states: States | None = None
    """What interventions that learn from single prompts read them with; None where there is no model to ask."""

    @property
    def main(self) -> Tensor:
        """The direction [d_model] as found; of a subspace, the first row."""
        return self.vector.reshape(-1, self.vector.shape[-1])[0]

    @property
    def place(self) -> Place:
        """Where it was found."""
        return Place(self.site, self.layer, self.position)

    @property
    def basis(self) -> Tensor:
        """Orthonormal rows [rank, d_model] float64 of what `vector` spans."""
        from refusalkit import algebra

        return algebra.orthonormal(self.vector.reshape(-1, self.vector.shape[-1]))


class InterventionSpec(BaseModel, ABC):
    """Provide an intervention: a frozen pydantic class whose fields are its YAML keys and whose docstring is its help.

    Subclasses set the field `intervention` to their name:
    `intervention: Literal["ablate"] = "ablate"`. One on activations is better a subclass of `ActivationSpec`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    intervention: str
    on_weights: ClassVar[bool] = False
    """Whether it edits the weights. Nobody may do that on a shared server."""
    uses_direction: ClassVar[bool] = True
    """Whether it depends on the direction, so that a random one is a meaningful control."""

    @abstractmethod
    def build(self, direction: Direction) -> Intervention:
        """Return what the engine does with `direction`."""

    @property
    def nested(self) -> tuple[InterventionSpec, ...]:
        """The interventions that are options of this one."""
        values = [getattr(self, name) for name in type(self).model_fields]
        listed = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
        return tuple(item for item in listed if isinstance(item, InterventionSpec))

    @property
    def names(self) -> tuple[str, ...]:
        """Its name and those of the interventions that are options of it."""
        return (self.intervention, *(name for spec in self.nested for name in spec.names))

    @property
    def gated(self) -> bool:
        """Whether a gate read in the prompt decides whether it applies."""
        return any(spec.gated for spec in self.nested)

    @property
    def sides(self) -> frozenset[Side]:
        """The prompts that it needs beside harmful and harmless ones."""
        return frozenset(side for spec in self.nested for side in spec.sides)

    @property
    def learns_from(self) -> frozenset[Side]:
        """The sides whose training prompts it reads when it is built."""
        return frozenset(side for spec in self.nested for side in spec.learns_from)

    def check(self, n_layers: int) -> None:
        """Raise `InputError` for what a model of `n_layers` has no place for."""
        for spec in self.nested:
            spec.check(n_layers)

    @property
    def label(self) -> str:
        """The name shown in tables: the intervention's name and every option that is not at its default."""
        fields = type(self).model_fields
        # What an intervention has of its own comes before where and when it acts.
        names = sorted(type(self).model_fields, key=lambda name: name in ActivationSpec.model_fields)
        shown = ", ".join(
            f"{name}={_shown(getattr(self, name))}"
            for name in names
            if name != "intervention" and getattr(self, name) != fields[name].default
        )
        return f"{self.intervention}({shown})" if shown else self.intervention


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return value.label if isinstance(value, InterventionSpec) else "null" if value is None else str(value)


Ordinal = Annotated[int, Field(ge=0, strict=True)]
Tokens = tuple[int | None, int | None]


class ActivationSpec(InterventionSpec):
    """Provide an intervention on activations that can be kept to some layers, tokens and decode steps.

    Subclasses define `edits`, and `everywhere` where they act in every layer unless told otherwise.
    """

    everywhere: ClassVar[bool] = False
    """Whether it acts in every layer, and not only in the one the direction was found in, where `layers` is null."""

    layers: Annotated[tuple[Ordinal, ...], Field(min_length=2, max_length=2)] | None = None
    """The first and the last layer it acts in; null: every layer for what acts on the whole stream (`ablate`,
    `mean_ablate`, `angular`), for all else the layer the direction was found in."""
    where: Literal["all", "prompt", "generated", "last"] = "all"
    """Which tokens it changes: all, those of the prompt, those that are generated, or at each step the last one alone,
    from which the next token follows."""
    steps: Annotated[tuple[Ordinal | None, ...], Field(min_length=2, max_length=2)] | None = None
    """The first and the last decode step at which it acts: step 0 reads the prompt and writes the first token, step 1
    reads that token; a last step of null is open."""

    @model_validator(mode="after")
    def _windows(self) -> ActivationSpec:
        for name, window in (("layers", self.layers), ("steps", self.steps)):
            if window is None:
                continue
            first, last = window
            if first is None:
                raise ValueError(f"`{name}` has no first: write 0")
            if last is not None and last < first:
                raise ValueError(f"`{name}: {_shown(window)}` ends before it starts: write the lower number first")
        first, last = self.tokens
        if first is not None and last is not None and last < first:
            raise ValueError(f"`where: {self.where}` and `steps: {_shown(self.steps)}` leave no token to change")
        return self

    @property
    def tokens(self) -> Tokens:
        """The first and the last token that is changed, counted from the prompt's last, as in `Edit.tokens`."""
        ends: dict[str, Tokens] = {"all": (None, None), "prompt": (None, 0), "generated": (1, None), "last": (0, None)}
        first, last = ends[self.where]
        if self.steps is None:
            return first, last
        start, stop = self.steps
        firsts = [end for end in (first, start or None) if end is not None]
        lasts = [end for end in (last, stop) if end is not None]
        return max(firsts, default=None), min(lasts, default=None)

    @property
    def starts(self) -> int | None:
        """The first layer it acts in; None is the one the direction will be found in."""
        return self.layers[0] if self.layers is not None else 0 if self.everywhere else None

    def check(self, n_layers: int) -> None:
        if self.layers is not None and self.layers[1] >= n_layers:
            raise InputError(
                f"layer {self.layers[1]} of {n_layers}",
                where=f"evaluate.interventions: {self.label}",
                hint=f"`layers` from 0 to {n_layers - 1}",
            )

    def build(self, direction: Direction) -> Intervention:
        self.check(direction.n_layers)
        first = direction.layer if self.starts is None else self.starts
        last = self.layers[1] if self.layers is not None else direction.n_layers - 1 if self.everywhere else first
        layers = range(first, last + 1)
        return Intervention(tuple(replace(edit, tokens=self.tokens) for edit in self.edits(direction, layers)))

    @abstractmethod
    def edits(self, direction: Direction, layers: Sequence[int]) -> Sequence[Edit]:
        """Return what changes in `layers`, at every token; where and when it applies is added to it."""
