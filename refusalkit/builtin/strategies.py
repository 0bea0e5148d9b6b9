"""Find directions: the paper's difference in means, and a control."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from refusalkit.strategy import Captured, Strategy

if TYPE_CHECKING:
    from torch import Tensor


class DifferenceInMeans(Strategy):
    """Subtract the mean activation of harmless prompts from that of harmful ones (Arditi et al. 2024, section 2.3)."""

    strategy: Literal["difference_in_means"] = "difference_in_means"

    def find(self, harmful: Captured, harmless: Captured) -> Tensor:
        return harmful.mean - harmless.mean


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


STRATEGIES = (DifferenceInMeans, Random)
