"""Find directions: what a direction-finding strategy is given and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from refusalkit.metric import Side

if TYPE_CHECKING:
    from torch import Tensor

    from refusalkit.intervention import Site


@dataclass(frozen=True, eq=False)
class Captured:
    """Hold the residual stream of one side's training prompts, read at the recipe's site."""

    mean: Tensor
    """[position, layer, d_model] float64: the mean over prompts."""
    n_prompts: int
    samples: Tensor | None = None
    """[prompt, position, layer, d_model] float32, for strategies that need `samples`."""


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

    Subclasses set the field `strategy` to their name: `strategy: Literal["pca"] = "pca"`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    strategy: str
    needs: ClassVar[Literal["means", "samples"]] = "means"
    """What capture has to keep: the means alone, or every prompt's activations as well."""
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
        """Whether finding runs backward passes, which a shared server does not allow."""
        return False

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
        exact zero means that there is nothing to find at that place. The inputs must not be changed, and the same
        inputs must give the same result.
        """
