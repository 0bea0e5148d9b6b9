"""Find directions: what a direction-finding strategy is given, what it may ask the model, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from refusalkit.selector import Advance, Subject, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from refusalkit.intervention import Intervention, Site


@dataclass(frozen=True, eq=False)
class Captured:
    """Hold the residual stream of one side's training prompts, read at the recipe's site."""

    mean: Tensor
    """[position, layer, d_model] float64: the mean over prompts."""
    n_prompts: int
    samples: Tensor | None = None
    """[prompt, position, layer, d_model] float32, for strategies that need `samples`."""
    prompts: tuple[Tokens, ...] = ()
    """The prompts themselves, for strategies that need the `model`."""


class AnyStrategy(BaseModel, ABC):
    """Provide a strategy: a frozen pydantic class whose fields are its YAML keys and whose docstring is its help.

    Subclass `Strategy`, or `ModelStrategy` for one that has to run the model, and set the field `strategy` to its name:
    `strategy: Literal["pca"] = "pca"`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    strategy: str
    needs: ClassVar[Literal["means", "samples", "model"]]
    """What it works on: the means alone, every prompt's activations as well, or the model."""

    @property
    def needs_gradients(self) -> bool:
        """Whether finding runs backward passes, which a shared server does not allow."""
        return False


class Strategy(AnyStrategy):
    """Provide a strategy that works on captured activations."""

    needs: ClassVar[Literal["means", "samples"]] = "means"
    """What capture has to keep: the means alone, or every prompt's activations as well."""

    @abstractmethod
    def find(self, harmful: Captured, harmless: Captured) -> Tensor:
        """Return a direction for every candidate: [position, layer, d_model], or [position, layer, rank, d_model].

        Directions keep their natural length (steering adds them as they are, and of a subspace the first row); an
        exact zero means that there is nothing to find at that place. The inputs must not be changed, and the same
        inputs must give the same result.
        """


#: Reduces the last token's hidden states [row, layer, d_model] to one number a row; told which prompt each row is of.
StateObjective = Callable[["Tensor", Sequence[int]], "Tensor"]


class DifferentiableSubject(Subject, Protocol):
    """What a strategy that needs the model may ask of it; the engine provides it.

    A loss is a mean over prompts, one value an intervention, and has a gradient with respect to those tensors of the
    interventions that require one. Build them with the classes that recipes use, from a vector that requires grad:
    `Ablate().build(Direction(vector, position, layer, n_layers))`. The weights take no gradient. A loss can be
    differentiated once.
    """

    def generate(
        self,
        prompts: Sequence[Tokens],
        intervention: Intervention | None = None,
        max_new_tokens: int = 64,
        advance: Advance | None = None,
    ) -> list[Tokens]:
        """Return each prompt's greedy completion, without the token that ends it."""

    def states(
        self, prompts: Sequence[Tokens], intervention: Intervention | None = None, site: Site = "resid_pre"
    ) -> Tensor:
        """Return the last token's hidden state in every layer: [prompt, layer, d_model] float32, without gradient."""

    def cross_entropy(
        self, prompts: Sequence[Tokens], completions: Sequence[Tokens], interventions: Sequence[Intervention]
    ) -> Tensor:
        """Return the cross-entropy a token of given completions, in nats: [intervention] float64.

        An empty completion counts as 0.
        """

    def kl_nats(
        self,
        prompts: Sequence[Tokens],
        completions: Sequence[Tokens],
        interventions: Sequence[Intervention],
        last: int,
    ) -> Tensor:
        """Return KL(modified || unmodified), in nats, summed over the `last` positions: [intervention] float64.

        The positions are those of the prompt with its completion, counted from the end.
        """

    def state_loss(
        self,
        prompts: Sequence[Tokens],
        interventions: Sequence[Intervention],
        objective: StateObjective,
        site: Site = "resid_pre",
    ) -> Tensor:
        """Return `objective` on the last token's hidden states, as they are after the edits: [intervention] float64."""


@dataclass(frozen=True, eq=False)
class FindInputs:
    """Hold what a strategy that needs the model works with, beside the model."""

    harmful: Captured
    harmless: Captured
    positions: tuple[int, ...]
    """The label of each position: negative, counted from the end of the prompt."""
    site: Site
    opener_ids: tuple[int, ...]
    text: Callable[[Tokens], str]
    """Turns token ids into text."""
    advance: Callable[[str, int, int], None] | None = None
    """Told what is being computed and how far it is: (what, done, total)."""


class ModelStrategy(AnyStrategy):
    """Provide a strategy that runs the model to find directions, by training them or by trying them.

    It sees the training prompts alone: the validation prompts choose among what it finds, the test prompts judge. One
    that runs no backward pass overrides the property `needs_gradients` to say so.
    """

    needs: ClassVar[Literal["model"]] = "model"

    @property
    def needs_gradients(self) -> bool:
        """Whether finding runs backward passes; say no where it only tries directions."""
        return True

    @abstractmethod
    def find(self, inputs: FindInputs, subject: DifferentiableSubject) -> Tensor:
        """Return directions as `Strategy.find` does: zero everywhere but where something was found."""
