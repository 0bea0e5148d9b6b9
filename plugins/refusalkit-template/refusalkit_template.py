"""Teach refusalkit medians instead of means, and SmolLM3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from refusalkit import hookimpl
from refusalkit.adapter import Adapter, Matrix, Write
from refusalkit.strategy import Captured, Strategy

if TYPE_CHECKING:
    # What is slow to import is imported where it is used: refusalkit loads every plugin when it starts.
    from torch import Tensor


class DifferenceInMedians(Strategy):
    """Subtract the coordinate-wise medians of the two sides, which a few odd prompts do not move."""

    strategy: Literal["template"] = "template"
    needs = "samples"
    scale: float = 1.0
    """Multiply the difference by this."""

    def find(self, harmful: Captured, harmless: Captured) -> Tensor:
        assert harmful.samples is not None
        assert harmless.samples is not None
        high = harmful.samples.double().median(0).values
        low = harmless.samples.double().median(0).values
        return self.scale * (high - low)


SMOLLM3 = Adapter(
    name="template_smollm3",
    architectures=("SmolLM3ForCausalLM",),
    # The modules of a block whose outputs are added to the residual stream, and the weights behind them.
    attention=Write("self_attn", (Matrix("self_attn.o_proj.weight"),)),
    mlp=Write("mlp", (Matrix("mlp.down_proj.weight"),)),
)


@hookimpl
def refusalkit_strategies() -> Sequence[type[Strategy]]:
    return (DifferenceInMedians,)


@hookimpl
def refusalkit_adapters() -> Sequence[Adapter]:
    return (SMOLLM3,)
