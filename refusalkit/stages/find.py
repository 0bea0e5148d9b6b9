"""Find a direction at every position and layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from refusalkit.artifacts import Activations, Candidates, PromptSplits
from refusalkit.engine.gradients import Differentiable
from refusalkit.errors import RunError
from refusalkit.metric import Side
from refusalkit.stages.bench import Bench
from refusalkit.strategy import AnyStrategy, Captured, FindInputs, ModelStrategy, Strategy


def find(
    strategy: AnyStrategy, activations: Activations, splits: PromptSplits, bench: Callable[[], Bench]
) -> Candidates:
    """Let the strategy find directions and check that they have the shape and length of directions.

    `bench` loads the model, and is called only for a strategy that needs it. Raises `RunError` when the result has
    another shape or is zero everywhere.
    """
    if isinstance(strategy, ModelStrategy):
        directions = _with_model(strategy, activations, splits, bench())
    else:
        assert isinstance(strategy, Strategy)
        directions = strategy.find(
            Captured(activations.harmful_mean, activations.n_harmful, activations.harmful_samples),
            Captured(activations.harmless_mean, activations.n_harmless, activations.harmless_samples),
        )
    directions = directions.detach().double()
    expected = tuple(activations.harmful_mean.shape)
    seen = tuple(directions.shape)
    if (*seen[:2], seen[-1]) != expected or len(seen) not in (3, 4):
        raise RunError(
            f"returned directions of shape {seen}, not [position, layer, (rank,) d_model] = {expected}",
            where=f"find.strategy {strategy.strategy!r}",
            hint="this is a fault of the strategy",
        )
    if not directions.any():
        raise RunError(
            "found no direction anywhere: harmful and harmless prompts have the same activations",
            where=f"find.strategy {strategy.strategy!r}",
            hint="check that the two sides are different prompts",
        )
    return Candidates(
        strategy=strategy.strategy, site=activations.site, positions=activations.positions, directions=directions
    )


def _with_model(strategy: ModelStrategy, activations: Activations, splits: PromptSplits, bench: Bench) -> Tensor:
    """Hand the training prompts and the model to a strategy that needs them."""

    def captured(side: Side, mean: Tensor) -> Captured:
        prompts = bench.tokens(splits.of(side, "train"))
        return Captured(mean, len(prompts), prompts=prompts)

    inputs = FindInputs(
        harmful=captured("harmful", activations.harmful_mean),
        harmless=captured("harmless", activations.harmless_mean),
        positions=activations.positions,
        site=activations.site,
        opener_ids=splits.openers.token_ids,
        text=bench.template.tokenizer.decode,
        advance=bench.progress.advance,
    )
    return strategy.find(inputs, Differentiable(bench.engine))
