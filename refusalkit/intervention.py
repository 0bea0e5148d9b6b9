"""Say what to do with a direction, as data the engine can run anywhere.

An `Intervention` is a set of edits of the residual stream or one edit of the weights. Recipes name an
`InterventionSpec`, a frozen pydantic class whose fields are its YAML keys; given the chosen direction it builds the
`Intervention`. Nothing here runs a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

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
    """In forward order of their places; at one place in the order given."""
    weights: Tensor | None = None
    """Orthonormal rows [rank, d_model] to remove from every weight that writes the residual stream."""
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


class InterventionSpec(BaseModel, ABC):
    """Provide an intervention: a frozen pydantic class whose fields are its YAML keys and whose docstring is its help.

    Subclasses set the field `intervention` to their name:
    `intervention: Literal["ablate"] = "ablate"`.
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
    def label(self) -> str:
        """The name shown in tables: the intervention's name and every option that is not at its default."""
        options = self.model_dump(exclude_defaults=True)
        options.pop("intervention", None)
        shown = ", ".join(f"{key}={value}" for key, value in options.items())
        return f"{self.intervention}({shown})" if shown else self.intervention
