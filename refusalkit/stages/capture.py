"""Read the residual stream of the training prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from refusalkit.artifacts import Activations, PromptSplits
from refusalkit.engine.engine import Samples
from refusalkit.engine.request import Capture
from refusalkit.errors import RunError
from refusalkit.metric import Side
from refusalkit.recipe import CaptureSection
from refusalkit.stages.bench import Bench
from refusalkit.stages.prompts import check_enough

#: The sides whose labels a control shuffles.
LABELLED: tuple[Side, ...] = ("harmful", "harmless")


def capture(
    section: CaptureSection,
    splits: PromptSplits,
    needs: Literal["means", "samples"],
    bench: Bench,
    sides: Sequence[Side] = ("harmful", "harmless"),
) -> Activations:
    """Capture `sides`, the harmful and the harmless among them, at the positions of `splits`.

    Every side is read in two halves, so that the difference of a shuffled labelling costs no pass of its own.
    Raises `RunError` where activations are not numbers, and where too few prompts of a side are left.
    """
    for side in sides:
        check_enough(splits, side, "train")
    halves = [(side, half) for side in sides for half in _halves(len(splits.of(side, "train")))]
    requests = []
    for side, half in halves:
        prompts = splits.of(side, "train")
        tokens = bench.tokens([prompts[index] for index in half])
        requests.append(Capture(tokens, splits.positions, section.site, needs == "samples"))
    parts: dict[Side, list[tuple[Sequence[int], Samples]]] = {side: [] for side in sides}
    for (side, half), found in zip(halves, bench.engine.run(requests, bench.advance("prompts")), strict=True):
        parts[side].append((half, found))
    captured = {side: _joined(found) for side, found in parts.items()}
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
    labelled = [[part.mean for _, part in parts[side]] for side in LABELLED]
    shuffled = None
    if all(len(means) == 2 for means in labelled):
        shuffled = torch.stack([means[0] - means[1] for means in labelled]).mean(0)
    return Activations(site=section.site, positions=splits.positions, shuffled=shuffled, **fields)


def _halves(n: int) -> list[list[int]]:
    """Deal `n` prompts into two random halves, or one where there is a single prompt."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    return [sorted(half) for half in (order[::2], order[1::2]) if half]


def _joined(parts: Sequence[tuple[Sequence[int], Samples]]) -> Samples:
    """Put what was captured of parts of a side together, in the order of its prompts."""
    n_prompts = sum(part.n_prompts for _, part in parts)
    mean = torch.stack([part.mean * part.n_prompts for _, part in parts]).sum(0) / n_prompts
    kept = [part.samples for _, part in parts if part.samples is not None]
    if not kept:
        return Samples(mean, n_prompts, None)
    samples = kept[0].new_empty((n_prompts, *kept[0].shape[1:]))
    for (indices, _), rows in zip(parts, kept, strict=True):
        samples[list(indices)] = rows
    return Samples(mean, n_prompts, samples)
