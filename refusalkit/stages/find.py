"""Find a direction at every position and layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from refusalkit import algebra
from refusalkit.arithmetic import Find
from refusalkit.artifacts import Activations, Candidates, PromptSplits
from refusalkit.engine.engine import Engine
from refusalkit.engine.gradients import Differentiable
from refusalkit.errors import RunError
from refusalkit.metric import Side
from refusalkit.stages.bench import Bench
from refusalkit.strategy import Captured, ModelInputs, Strategy

Model = Callable[[], ModelInputs]


def find(section: Find, activations: Activations, model: Model | None = None) -> Candidates:
    """Let the strategy find directions, work on them, and compare them with the difference in means.

    `model` is called for a strategy that needs it, and for no other, because it loads the weights. Raises `RunError`
    when the result has another shape than directions have, or is zero everywhere.
    """
    directions = directions_from(section, activations.captured, model)
    return Candidates(
        strategy=section.label,
        site=activations.site,
        positions=activations.positions,
        directions=directions,
        cosines=cosines(directions, activations.harmful_mean - activations.harmless_mean),
        repairs="over_refusal" in section.sides,
    )


def cosines(directions: Tensor, difference: Tensor) -> Tensor:
    """Return the cosines of directions [..., (rank,) d_model] with the difference in means [..., d_model].

    Of a subspace the first row counts. It is not a number where one of the two is zero.
    """
    leading = directions if directions.ndim == difference.ndim else directions[..., 0, :]
    missing = ~(leading.any(-1) & difference.any(-1))
    return (algebra.unit(leading) * algebra.unit(difference)).sum(-1).masked_fill(missing, float("nan"))


def model_inputs(activations: Activations, splits: PromptSplits, bench: Bench) -> ModelInputs:
    """Hand out the model with the prompts that the activations are of."""
    # No server computes gradients, and the plan refuses to ask one.
    assert isinstance(bench.engine, Engine)
    return ModelInputs(
        subject=Differentiable(bench.engine),
        prompts={side: bench.tokens(splits.of(side, "train")) for side in activations.captured},
        positions=activations.positions,
        site=activations.site,
        opener_ids=splits.openers.token_ids,
        text=bench.template.tokenizer.decode,
        advance=bench.progress.advance,
    )


def directions_from(section: Find, captured: Mapping[Side, Captured], model: Model | None = None) -> Tensor:
    """Return the directions of a section after its operations: [position, layer, (rank,) d_model] float64."""
    directions = _found(section, captured, model)
    for operation in section.then:
        directions = operation.apply(directions, lambda strategy: _found(strategy, captured, model))
        if not directions.any():
            raise RunError(
                "leaves nothing of any direction",
                where=f"find.then: {operation.label}",
                hint="a direction minus its projection on itself is nothing",
            )
    return directions


def _found(strategy: Strategy, captured: Mapping[Side, Captured], model: Model | None) -> Tensor:
    asked: dict[str, Any] = {side: captured[side] for side in strategy.sides}
    if strategy.needs == "model":
        assert model is not None
        asked["model"] = model()
    directions = strategy.find(**asked).detach().double()
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
