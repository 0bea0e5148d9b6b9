"""Attribute the direction to the attention heads and MLPs that write it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from refusalkit.analysis import Attribution
from refusalkit.artifacts import AttributionFound, AttributionGroup, HeadFound
from refusalkit.engine.contributions import Contributions, Span, contributions
from refusalkit.engine.engine import Engine
from refusalkit.errors import RunError
from refusalkit.intervals import bootstrap
from refusalkit.stages.findings import Findings
from refusalkit.stages.suffixes import Appended, appended
from refusalkit.template import ChatTemplate


def attribute(analysis: Attribution, findings: Findings) -> AttributionFound:
    """Measure what every head and MLP writes along the direction, and where the heads that write most look.

    Raises `RunError` where numbers are none.
    """
    bench, splits = findings.bench, findings.splits
    assert isinstance(bench.engine, Engine), "the plan refuses it on a server"
    harmful, harmless = (splits.of(side, "test") for side in ("harmful", "harmless"))
    groups = [
        Appended("harmful", "harmful", harmful),
        Appended("harmless", "harmless", harmless),
        *appended(analysis.append, analysis.seed, harmful, bench.template),
    ]
    found = {}
    for number, group in enumerate(groups):
        bare = harmless if group.side == "harmless" else harmful
        spans = [_spans(bench.template, *pair) for pair in zip(bare, group.prompts, strict=True)]
        made = contributions(bench.engine, bench.tokens(group.prompts), findings.direction, spans)
        if not (made.attention.isfinite().all() and made.mlp.isfinite().all()):
            raise RunError(
                f"what is written on {group.label} prompts is not numbers",
                where="analyze: attribution",
                hint="load the model with `model.dtype: float32` or `bfloat16`",
            )
        found[group.label] = made
        bench.advance("groups of prompts")(number + 1, len(groups))
    top = _top(found["harmful"].heads.mean(0), analysis.top)
    seed = findings.section.seed
    return AttributionFound(
        groups=tuple(_group(group, found[group.label]) for group in groups),
        top=tuple(_head(place, group, found[group.label], seed) for place in top for group in groups),
    )


def _spans(template: ChatTemplate, bare: str, prompt: str) -> tuple[Span, Span]:
    """Return where the instruction's own tokens and those of what is appended are."""
    tokens = template.tokens(prompt)
    first, end = len(template.prefix()), len(tokens) - len(template.suffix())
    behind = end - (len(tokens) - len(template.tokens(bare)))
    return (first, behind), (behind, end)


def _top(means: Tensor, most: int) -> list[tuple[int, int]]:
    """Return the (layer, head) that write most along the direction, given means [layer, head]."""
    order = means.nan_to_num(-torch.inf).flatten().argsort(descending=True)
    known = int(means.isfinite().sum())
    return [divmod(int(index), means.shape[1]) for index in order[: min(most, known)]]


def _group(group: Appended, found: Contributions) -> AttributionGroup:
    return AttributionGroup(
        label=group.label,
        suffix=group.suffix,
        random=group.random,
        n=len(group.prompts),
        heads=tuple(map(tuple, found.heads.mean(0).tolist())),
        attention=tuple(found.attention.mean(0).tolist()),
        mlp=tuple(found.mlp.mean(0).tolist()),
    )


def _head(place: tuple[int, int], group: Appended, found: Contributions, seed: int) -> HeadFound:
    layer, head = place
    written = bootstrap(found.heads[:, layer, head].tolist(), seed=seed)
    attended: Sequence[float] = found.attended[:, layer, head].mean(0).tolist()
    return HeadFound(
        layer=layer,
        head=head,
        label=group.label,
        value=written.value,
        low=written.low,
        high=written.high,
        on_instruction=attended[0],
        on_suffix=attended[1] if group.suffix is not None else float("nan"),
    )
