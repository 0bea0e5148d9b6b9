"""Read the residual stream of the training prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from refusalkit.artifacts import Activations, PromptSplits
from refusalkit.engine.request import Capture
from refusalkit.errors import RunError
from refusalkit.metric import Side
from refusalkit.recipe import CaptureSection
from refusalkit.stages.bench import Bench
from refusalkit.stages.prompts import check_enough


def capture(
    section: CaptureSection,
    splits: PromptSplits,
    needs: Literal["means", "samples"],
    bench: Bench,
    sides: Sequence[Side] = ("harmful", "harmless"),
) -> Activations:
    """Capture `sides`, the harmful and the harmless among them, at the positions of `splits`.

    Raises `RunError` where activations are not numbers, and where too few prompts of a side are left.
    """
    for side in sides:
        check_enough(splits, side, "train")
    requests = [
        Capture(bench.tokens(splits.of(side, "train")), splits.positions, section.site, needs == "samples")
        for side in sides
    ]
    captured = dict(zip(sides, bench.engine.run(requests, bench.advance("prompts")), strict=True))
    for side, found in captured.items():
        bad = (~found.mean.isfinite()).nonzero()
        if len(bad):
            raise RunError(
                f"activations of {side} prompts are not numbers from layer {int(bad[:, 1].min())} on",
                where="capture",
                hint="float16 overflows on many models: load with `model.dtype: bfloat16` or `float32`; "
                "where it is one of these, a weight of the checkpoint is damaged",
            )
    fields: dict[str, Any] = {}
    for side, found in captured.items():
        fields |= {f"{side}_mean": found.mean, f"n_{side}": found.n_prompts, f"{side}_samples": found.samples}
    return Activations(site=section.site, positions=splits.positions, **fields)
