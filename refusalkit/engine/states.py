"""Average what blocks hand on, under many interventions at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from refusalkit.engine import blocks
from refusalkit.engine.batch import Batch, Tokens
from refusalkit.engine.lower import lower, packs
from refusalkit.intervention import Intervention, Site
from refusalkit.selector import Advance

if TYPE_CHECKING:
    from refusalkit.engine.engine import Engine


def mean_states(
    engine: Engine,
    prompts: Sequence[Tokens],
    interventions: Sequence[Intervention],
    layers: Sequence[int],
    advance: Advance | None = None,
) -> Tensor:
    """Return the mean over prompts of resid_post at the last token: [intervention, layer, d_model] float64.

    Passes end behind the last of `layers`; those of interventions that touch the same places are shared.
    """
    reads: list[tuple[Site, int]] = [("resid_post", layer) for layer in sorted(layers)]
    order = [sorted(layers).index(layer) for layer in layers]
    total = torch.zeros((len(interventions), len(layers), engine.d_model), dtype=torch.float64)
    prefix = engine._prefix(prompts, keep=1, interventions=interventions)
    done = 0

    def run(group: Batch, _: dict[str, Any]) -> None:
        nonlocal done
        rows, sums = len(group.indices), torch.zeros_like(total)
        for pack in packs(list(enumerate(interventions)), max(1, engine.batch_size // rows)):
            times = len(pack.indices)
            options: dict[str, Any] = {"use_cache": False}
            if prefix:
                cache = copy.deepcopy(engine._front(pack, prefix, None))
                cache.batch_repeat_interleave(rows)
                options = engine._with_cache(cache)
            program = lower(pack.interventions, engine.layout, rows, engine.device, reads)
            found = blocks.read(engine.model, group.repeated(times), program, (-1,), options)
            states = torch.stack([state[:, 0] for state in found], 1).double().cpu()
            sums[list(pack.indices)] = states.reshape(times, rows, *states.shape[1:]).sum(1)
            engine.prompt_passes += times * rows * (1 + max(layers)) / engine.n_layers
            done += times * rows
            if advance is not None:
                advance(min(done, len(prompts) * len(interventions)), len(prompts) * len(interventions))
        # Not before the whole batch is through: one that runs out of memory is run again, in parts.
        total.add_(sums)

    engine._over(prompts, run, prefix=prefix)
    return total[:, order] / len(prompts)
