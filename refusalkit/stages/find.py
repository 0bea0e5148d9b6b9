"""Find a direction at every position and layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from refusalkit import algebra
from refusalkit.arithmetic import Find
from refusalkit.artifacts import Activations, Candidates
from refusalkit.errors import RunError
from refusalkit.metric import Side
from refusalkit.strategy import Captured, Strategy


def find(section: Find, activations: Activations) -> Candidates:
    """Let the strategy find directions, work on them, and compare them with the difference in means.

    Raises `RunError` when the result has another shape than directions have, or is zero everywhere.
    """
    directions = directions_from(section, activations.captured)
    difference = activations.harmful_mean - activations.harmless_mean
    leading = directions if directions.ndim == 3 else directions[:, :, 0]
    cosines = (algebra.unit(leading) * algebra.unit(difference)).sum(-1)
    missing = ~(leading.any(-1) & difference.any(-1))
    return Candidates(
        strategy=section.label,
        site=activations.site,
        positions=activations.positions,
        directions=directions,
        cosines=cosines.masked_fill(missing, float("nan")),
        repairs="over_refusal" in section.sides,
    )


def directions_from(section: Find, captured: Mapping[Side, Captured]) -> Tensor:
    """Return the directions of a section after its operations: [position, layer, (rank,) d_model] float64."""
    directions = _found(section, captured)
    for operation in section.then:
        directions = operation.apply(directions, lambda strategy: _found(strategy, captured))
        if not directions.any():
            raise RunError(
                "leaves nothing of any direction",
                where=f"find.then: {operation.label}",
                hint="a direction minus its projection on itself is nothing",
            )
    return directions


def _found(strategy: Strategy, captured: Mapping[Side, Captured]) -> Tensor:
    directions = strategy.find(**{side: captured[side] for side in strategy.sides}).double()
    expected, seen = tuple(captured["harmful"].mean.shape), tuple(directions.shape)
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
    return directions
