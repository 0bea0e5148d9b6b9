"""Read single prompts of a run for what learns from them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Literal

from torch import Tensor

from refusalkit.artifacts import PromptSplits
from refusalkit.engine.request import Capture
from refusalkit.intervention import Place, Site, States
from refusalkit.metric import Side
from refusalkit.stages.bench import Bench
from refusalkit.stages.prompts import check_enough

Split = Literal["train", "validation"]


def states_everywhere(splits: PromptSplits, bench: Bench, site: Site, positions: tuple[int, ...]) -> States:
    """Return what reads prompts of `splits` in every layer at once, at `site` and `positions`."""

    @cache
    def read(side: Side, split: Split) -> Tensor:
        return _samples(splits, bench, (side, split), Capture((), positions, site, keep_samples=True))

    def states(side: Side, split: Split, place: Place) -> Tensor:
        return read(side, split)[:, positions.index(place.position), place.layer].double()

    return states


def states_at(splits: PromptSplits, bench: Bench) -> States:
    """Return what reads prompts of `splits` at one place, and nothing above it."""

    @cache
    def states(side: Side, split: Split, place: Place) -> Tensor:
        where = Capture((), (place.position,), place.site, keep_samples=True, layers=(place.layer,))
        return _samples(splits, bench, (side, split), where)[:, 0, 0].double()

    return states


def _samples(splits: PromptSplits, bench: Bench, asked: tuple[Side, Split], where: Capture) -> Tensor:
    side, split = asked
    check_enough(splits, side, split)
    request = replace(where, prompts=bench.tokens(splits.of(side, split)))
    (found,) = bench.engine.run([request], bench.advance(f"{side} {split} prompts"))
    samples: Tensor = found.samples
    return samples
