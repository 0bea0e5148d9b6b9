"""Hand analyses what a run has found."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from refusalkit.artifacts import Activations, Choice, PromptSplits, Unmodified
from refusalkit.recipe import EvaluateSection
from refusalkit.stages.bench import Bench


@dataclass(frozen=True, eq=False)
class Findings:
    """Hold the direction, where and from what it was found, and the model."""

    section: EvaluateSection
    activations: Activations
    choice: Choice
    splits: PromptSplits
    unmodified: Unmodified
    bench: Bench

    def position(self, at: str | int) -> int:
        """Return a position as a negative number; `at` is one of `refusalkit.analysis.At`."""
        match at:
            case "chosen":
                return self.choice.position
            case "last":
                return -1
            case _:
                return self.bench.template.positions((at,))[0]

    @property
    def direction(self) -> Tensor:
        """The direction as found, of a subspace the first row: [d_model] float32."""
        found = self.choice.direction
        row: Tensor = found.reshape(-1, found.shape[-1])[0].float()
        return row
