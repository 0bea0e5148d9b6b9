"""Find directions from means: the paper's difference, what else is a difference of means, and a control."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from refusalkit.errors import InputError
from refusalkit.metric import SIDES
from refusalkit.strategy import Captured, Setting, Strategy

if TYPE_CHECKING:
    from torch import Tensor


class DifferenceInMeans(Strategy):
    """Subtract the mean activation of harmless prompts from that of harmful ones (Arditi et al. 2024, section 2.3)."""

    strategy: Literal["difference_in_means"] = "difference_in_means"

    def find(self, harmful: Captured, harmless: Captured) -> Tensor:
        return harmful.mean - harmless.mean


class Harmfulness(Strategy):
    """Subtract the means at the instruction's last token, where a model has read what is asked and answers nothing yet.

    There, refused harmful and answered harmless prompts differ in harmfulness rather than in refusal (Zhao et al. 2025,
    2507.11878). Which prompts are refused and answered is what `prompts.filter` decides.
    """

    strategy: Literal["harmfulness"] = "harmfulness"
    reads_at = "instruction_end"

    def fitted(self, setting: Setting) -> Strategy:
        if setting.positions != (setting.instruction_end,):
            raise InputError(
                f"{self.strategy} is read at the instruction's last token, {setting.instruction_end}, and captured is "
                f"{', '.join(map(str, setting.positions))}",
                where="capture.positions",
                hint="write `positions: instruction_end` below `capture:`",
            )
        return self

    def find(self, harmful: Captured, harmless: Captured) -> Tensor:
        return harmful.mean - harmless.mean


class FalseRefusal(Strategy):
    """Subtract harmless from over-refused prompts, then what points along the refusal direction (Wang et al. 2024).

    Ablating it answers safe prompts that look harmful, and leaves the refusal direction to refuse harmful ones
    (2410.03415). What is left after the projection gets back the length of the difference.
    """

    strategy: Literal["false_refusal"] = "false_refusal"
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """How much of the projection on the difference in means of harmful and harmless prompts is subtracted, the paper's
    lambda: with less, more over-refusal goes, and more true refusals with it."""
    sides = SIDES

    def find(self, harmful: Captured, harmless: Captured, over_refusal: Captured | None = None) -> Tensor:
        from refusalkit import algebra

        assert over_refusal is not None
        difference = over_refusal.mean - harmless.mean
        left = algebra.minus_projection(difference, harmful.mean - harmless.mean, self.share)
        repaired: Tensor = algebra.unit(left) * difference.norm(dim=-1, keepdim=True)
        return repaired


class Random(Strategy):
    """Draw random directions as long as the difference in means: what a pipeline finds when there is nothing."""

    strategy: Literal["random"] = "random"
    control: ClassVar[bool] = True
    seed: int = 0
    """Seed of the draw."""

    def find(self, harmful: Captured, harmless: Captured) -> Tensor:
        import torch

        from refusalkit import algebra

        difference = harmful.mean - harmless.mean
        generator = torch.Generator().manual_seed(self.seed)
        draw = torch.randn(difference.shape, generator=generator, dtype=torch.float64)
        lengths: Tensor = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
        return algebra.unit(draw) * lengths


STRATEGIES = (DifferenceInMeans, Harmfulness, FalseRefusal, Random)
