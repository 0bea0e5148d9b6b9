"""Rank candidates: what a selector is given, what it may ask the model, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from refusalkit.metric import Side

if TYPE_CHECKING:
    from torch import Tensor

    from refusalkit.intervention import Intervention, Site, States
    from refusalkit.strategy import Captured

Tokens = tuple[int, ...]
TokenId = Annotated[int, Field(ge=0, strict=True)]
#: Told how far a long computation is: (done, total).
Advance = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Measure:
    """Say which number to reduce the last-position logits of each prompt to, where the model runs."""

    kind: Literal["refusal_score", "kl_nats"]
    token_ids: tuple[int, ...] = ()
    """The refusal openers, for `refusal_score`."""
    reference: Tensor | None = None
    """Logits [prompt, d_vocab] to compare with, for `kl_nats`; None for the unmodified model's."""
    stop_above: float | None = None
    """Give up on an intervention once its mean over all prompts cannot come back to this value."""


@dataclass(frozen=True, eq=False)
class Attribution:
    """Hold first-order estimates of what candidates do to one measure, from the unmodified model's gradients.

    Adding a vector `v` at a layer moves the mean of a refusal score by about `gradient[layer] @ v`.
    """

    value: Tensor
    """[prompt] float64: the measure itself; 0 for a KL."""
    gradient: Tensor
    """[layer, d_model] float64: the gradient at the site, summed over positions and averaged over prompts."""
    removal: Tensor
    """[candidate, prompt] float64: the estimated measure once the candidate is removed from every write."""


class Subject(Protocol):
    """What a selector may ask of the model; the engine provides it, locally or remotely."""

    n_layers: int

    def logits(self, prompts: Sequence[Tokens], intervention: Intervention | None = None) -> Tensor:
        """Return the last-position logits [prompt, d_vocab]."""

    def measure(
        self,
        prompts: Sequence[Tokens],
        interventions: Sequence[Intervention],
        measure: Measure,
        advance: Advance | None = None,
    ) -> Tensor:
        """Reduce every prompt's logits under every intervention: [intervention, prompt] float64.

        Not-a-number stands for the prompts after which an intervention was given up (`Measure.stop_above`).
        """

    def mean_states(
        self,
        prompts: Sequence[Tokens],
        interventions: Sequence[Intervention],
        layers: Sequence[int],
        advance: Advance | None = None,
    ) -> Tensor:
        """Return what blocks hand on at the prompts' last token, averaged: [intervention, layer, d_model] float64."""

    def attribute(
        self, prompts: Sequence[Tokens], bases: Tensor, site: Site, measures: Sequence[Measure]
    ) -> list[Attribution]:
        """Estimate what candidates do to each measure from one forward pass and one backward pass a measure.

        bases [candidate, rank, d_model], rows orthonormal or zero.
        """


@dataclass(frozen=True, eq=False)
class SelectInputs:
    """Hold what a selector chooses from and the validation prompts it may use."""

    directions: Tensor
    """[position, layer, d_model] or [position, layer, rank, d_model] float64, as found."""
    positions: tuple[int, ...]
    """The label of each position: negative, counted from the end of the prompt."""
    site: Site
    harmful: tuple[Tokens, ...]
    harmless: tuple[Tokens, ...]
    opener_ids: tuple[int, ...]
    """Empty where no token opens a refusal, which only a selector is given that does not score refusals."""
    advance: Callable[[str, int, int], None] | None = None
    """Told what is being scored and how far it is: (what, done, total)."""
    over_refusal: tuple[Tokens, ...] = ()
    training: Mapping[Side, tuple[Tokens, ...]] = field(default_factory=dict)
    """The prompts that directions were found from."""
    captured: Mapping[Side, Captured] = field(default_factory=dict)
    """Their activations; every prompt's for a selector that needs `samples`."""
    states: States | None = None
    """Reads training and validation prompts at any candidate's place, for interventions that learn from them."""
    find: Callable[..., Tensor] | None = None
    """Finds directions again: `find(captured, **options)`, from other activations or with other options of the
    strategy; None where the strategy needs the model."""


@dataclass(frozen=True)
class Score:
    """Hold what is known of one candidate; None where it was not scored, and `status` says why."""

    position: int
    layer: int
    refusal_score: float | None
    """Mean refusal score of harmful prompts with the direction ablated, in nats (the paper's bypass score)."""
    induced_score: float | None
    """Mean refusal score of harmless prompts with the direction added, in nats."""
    kl_nats: float | None
    """Mean KL on harmless prompts between the unmodified and the ablated model, in nats."""
    status: str
    """`chosen`, `survivor`, or the reason it fell."""
    extra: dict[str, float] = field(default_factory=dict)
    """Further numbers of the selector, by name."""


@dataclass(frozen=True)
class Selection:
    """Hold every candidate's scores; exactly one has the status `chosen`, unless nothing survived."""

    scores: tuple[Score, ...]
    baseline_refusal_score: float | None
    """Mean refusal score of the harmful validation prompts in the unmodified model, in nats; None where the selector
    does not score refusals."""
    baseline_harmless_score: float | None
    """The same on the harmless validation prompts."""
    nearest_miss: str | None = None
    """When nothing survived: the candidate that came closest and what stopped it, in one sentence."""
    hint: str | None = None
    """When nothing survived: what to change in the recipe."""
    direction: Tensor | None = field(default=None, compare=False)
    """[d_model] or [rank, d_model] float64: what was chosen, where it is not the candidate as it was found."""


class Selector(BaseModel, ABC):
    """Provide a selector: a frozen pydantic class whose fields are its YAML keys and whose docstring is its help.

    Subclasses set the field `selector` to their name: `selector: Literal["causal"] = "causal"`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    selector: str
    needs: ClassVar[Literal["means", "samples"]] = "means"
    """What capture has to keep for it: nothing, or every prompt's activations."""
    sides: ClassVar[tuple[Side, ...]] = ("harmful", "harmless")
    """The prompts it selects on."""
    runs_model: ClassVar[bool] = True
    """Whether it asks the model anything."""
    scores_refusals: ClassVar[bool] = True
    """Whether it looks at refusal scores, and so at the openers."""
    finds_again: ClassVar[bool] = False
    """Whether it finds directions again (`SelectInputs.find`), which takes a strategy that does not need the model."""
    meanings: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """What the report calls each of its further scores (`Score.extra`), and what it says of them in a sentence; of the
    paper's three too, where they are not taken as the paper does."""
    openers: Literal["auto"] | tuple[str | TokenId, ...] = "auto"
    """The texts that open a refusal, turned into token ids in context, or token ids; `auto` takes the family's where
    this model says them and otherwise finds them on the training prompts."""

    @property
    def tries(self) -> Mapping[str, Sequence[Any]]:
        """The options of the strategy that it tries values of itself, so that the recipe gives none."""
        return {}

    @property
    def needs_gradients(self) -> bool:
        """Whether selecting runs backward passes, which a shared server does not allow."""
        return False

    @abstractmethod
    def select(self, inputs: SelectInputs, subject: Subject) -> Selection:
        """Score the candidates and mark one as chosen."""
