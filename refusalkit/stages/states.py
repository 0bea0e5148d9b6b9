"""Read single prompts of a run for what learns from them."""

from __future__ import annotations

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
        tokens = _tokens(splits, bench, side, split)
        return _read(Capture(tokens, positions, site, keep_samples=True), bench, f"{side} {split} prompts")

    def states(side: Side, split: Split, place: Place) -> Tensor:
        return read(side, split)[:, positions.index(place.position), place.layer].double()

    return states


def states_at(splits: PromptSplits, bench: Bench) -> States:
    """Return what reads prompts of `splits` at one place, and nothing above it."""

    @cache
    def states(side: Side, split: Split, place: Place) -> Tensor:
        tokens = _tokens(splits, bench, side, split)
        request = Capture(tokens, (place.position,), place.site, keep_samples=True, layers=(place.layer,))
        return _read(request, bench, f"{side} {split} prompts")[:, 0, 0].double()

    return states


def _tokens(splits: PromptSplits, bench: Bench, side: Side, split: Split) -> tuple[tuple[int, ...], ...]:
    check_enough(splits, side, split)
    return bench.tokens(splits.of(side, split))


def _read(request: Capture, bench: Bench, what: str) -> Tensor:
    (found,) = bench.engine.run([request], bench.advance(what))
    samples: Tensor = found.samples
    return samples
