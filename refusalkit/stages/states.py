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


def states_of(splits: PromptSplits, bench: Bench, site: Site, positions: tuple[int, ...]) -> States:
    """Return what reads prompts of `splits` at `site` and `positions`, when it is asked for the first of them."""

    @cache
    def read(side: Side, split: Literal["train", "validation"]) -> Tensor:
        check_enough(splits, side, split)
        tokens = bench.tokens(splits.of(side, split))
        request = Capture(tokens, positions, site, keep_samples=True)
        (found,) = bench.engine.run([request], bench.advance(f"{side} {split} prompts"))
        samples: Tensor = found.samples
        return samples

    def states(side: Side, split: Literal["train", "validation"], place: Place) -> Tensor:
        return read(side, split)[:, positions.index(place.position), place.layer].double()

    return states
