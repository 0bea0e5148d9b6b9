"""Read the residual stream of the training prompts."""

from __future__ import annotations

from typing import Literal

from refusalkit.artifacts import Activations, PromptSplits
from refusalkit.engine.request import Capture
from refusalkit.errors import RunError
from refusalkit.metric import Side
from refusalkit.recipe import CaptureSection
from refusalkit.stages.bench import Bench


def capture(
    section: CaptureSection, splits: PromptSplits, needs: Literal["means", "samples", "model"], bench: Bench
) -> Activations:
    """Capture both sides at the positions of `splits`; raises `RunError` where activations are not numbers."""
    sides: tuple[Side, Side] = ("harmful", "harmless")
    requests = [
        Capture(bench.tokens(splits.of(side, "train")), splits.positions, section.site, needs == "samples")
        for side in sides
    ]
    harmful, harmless = bench.engine.run(requests, bench.advance("prompts"))
    for side, found in zip(sides, (harmful, harmless), strict=True):
        bad = (~found.mean.isfinite()).nonzero()
        if len(bad):
            raise RunError(
                f"activations of {side} prompts are not numbers from layer {int(bad[:, 1].min())} on",
                where="capture",
                hint="float16 overflows on many models: load with `model.dtype: bfloat16` or `float32`; "
                "where it is one of these, a weight of the checkpoint is damaged",
            )
    return Activations(
        site=section.site,
        positions=splits.positions,
        harmful_mean=harmful.mean,
        harmless_mean=harmless.mean,
        n_harmful=harmful.n_prompts,
        n_harmless=harmless.n_prompts,
        harmful_samples=harmful.samples,
        harmless_samples=harmless.samples,
    )
