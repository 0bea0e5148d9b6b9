"""Find directions: what a direction-finding strategy is given, what it may ask the model, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from refusalkit.metric import Side
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


#: Reduces the last token's hidden states [row, layer, d_model] to one number a row; told which prompt each row is of.
StateObjective = Callable[["Tensor", Sequence[int]], "Tensor"]


class DifferentiableSubject(Subject, Protocol):
    """What a strategy that needs the model may ask of it; the engine provides it, on this machine.

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
class ModelInputs:
    """Hold what a strategy that needs the model is given beside activations: the model, and the training prompts."""

    subject: DifferentiableSubject
    prompts: Mapping[Side, tuple[Tokens, ...]]
    """Those the activations are of. The validation prompts choose among what is found, the test prompts judge."""
    positions: tuple[int, ...]
    """The label of each position: negative, counted from the end of the prompt."""
    site: Site
    opener_ids: tuple[int, ...]
    text: Callable[[Tokens], str]
    """Turns token ids into text."""
    advance: Callable[[str, int, int], None] | None = None
    """Told what is being computed and how far it is: (what, done, total)."""


@dataclass(frozen=True)
class Setting:
    """Say for which model and places directions are wanted; known before any weight is loaded."""

    folder: Path
    """Where the recipe's relative paths start."""
    positions: tuple[int, ...]
    """Negative, counted from the end of the prompt, ascending."""
    instruction_end: int
    """The position of the instruction's last token."""
    site: Site
    n_layers: int
    d_model: int


class Strategy(BaseModel, ABC):
    """Provide a strategy: a frozen pydantic class whose fields are its YAML keys and whose docstring is its help.

    Subclasses set the field `strategy` to their name: `strategy: Literal["pca"] = "pca"`. One that reads files or means
    nothing on some models overrides `fitted`, which is given the `Setting` before any weight is loaded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    strategy: str
    needs: ClassVar[Literal["means", "samples", "model"]] = "means"
    """What it works on: the means alone, every prompt's activations, or the means and the model. With `model` `find`
    gets a further argument of that name, a `ModelInputs`."""
    sides: ClassVar[tuple[Side, ...]] = ("harmful", "harmless")
    """The prompts it finds from. With `over_refusal` among them `find` gets a third argument of that name."""
    reads_at: ClassVar[Literal["post_instruction", "instruction_end"]] = "post_instruction"
    """The positions that `capture.positions: auto` stands for."""
    reads_files: ClassVar[bool] = False
    """Whether its directions come from elsewhere, so that there is nothing it could find in activations."""
    control: ClassVar[bool] = False
    """Whether it is there to compare with, and must not find what tells the two sides apart."""

    @property
    def needs_gradients(self) -> bool:
        """Whether finding runs backward passes, which a shared server does not allow; what needs the model does."""
        return self.needs == "model"

    def fitted(self, setting: Setting) -> Strategy:
        """Return the strategy as it runs there, its files looked up; raise `InputError` where it means nothing."""
        return self

    @property
    def content(self) -> dict[str, Any]:
        """What decides the directions beside the activations: its options, and what they name."""
        return self.model_dump(mode="json")

    @abstractmethod
    def find(self, harmful: Captured, harmless: Captured) -> Tensor:
        """Return a direction for every candidate: [position, layer, d_model], or [position, layer, rank, d_model].

        Directions keep their natural length (steering adds them as they are, and of a subspace the first row); an
        exact zero means that nothing was found, or sought, at that place. The inputs must not be changed, and the same
        inputs must give the same result.
        """
