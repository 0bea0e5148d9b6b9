"""Find a direction at every position and layer."""

from __future__ import annotations

from refusalkit.artifacts import Activations, Candidates
from refusalkit.errors import RunError
from refusalkit.strategy import Captured, Strategy


def find(strategy: Strategy, activations: Activations) -> Candidates:
    """Let the strategy find directions and check that they have the shape and length of directions.

    Raises `RunError` when the result has another shape or is zero everywhere.
    """
    directions = strategy.find(
        Captured(activations.harmful_mean, activations.n_harmful, activations.harmful_samples),
        Captured(activations.harmless_mean, activations.n_harmless, activations.harmless_samples),
    ).double()
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
