"""Estimate what many candidates do from the gradients of one unmodified pass.

Ablating a direction everywhere removes it from every write to the residual stream: the embedding, and what each
attention and MLP adds. To first order that changes a score by `-sum (gradient . r)(write . r)` over writes and
positions (attribution patching: Nanda 2023; Syed et al. 2023, arXiv 2310.10348).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from refusalkit.engine import blocks
from refusalkit.engine.batch import Batch
from refusalkit.engine.layout import Layout
from refusalkit.engine.lower import lower
from refusalkit.intervention import NOTHING, SITES, Site
from refusalkit.selector import Measure

#: The conjugate of the golden ratio: its multiples are spread evenly over the unit interval.
_GOLDEN = 0.6180339887498949


def sites(site: Site, n_layers: int) -> list[tuple[Site, int]]:
    """Return the places whose gradients are needed, in forward order: every write, and `site` at every layer."""
    wanted = {("resid_pre", 0), *((write, layer) for write in ("attn_out", "mlp_out") for layer in range(n_layers))}
    wanted |= {(site, layer) for layer in range(n_layers)}
    return [(place, layer) for layer in range(n_layers) for place in SITES if (place, layer) in wanted]


def attribute_batch(
    model: Any, layout: Layout, group: Batch, places: Sequence[tuple[Site, int]], measures: Sequence[Measure]
) -> tuple[list[Tensor], list[tuple[Tensor, list[Tensor]]]]:
    """Return the hidden states at `places`, and the value and gradients there of every measure, for one batch."""
    program = lower([NOTHING], layout, len(group.indices), group.input_ids.device, places)
    quantile = (torch.tensor(group.indices, dtype=torch.float64) + 0.5) * _GOLDEN % 1.0
    objectives = [
        (False, torch.tensor(measure.token_ids)) if measure.kind == "refusal_score" else (True, quantile)
        for measure in measures
    ]
    return blocks.gradients(model, group.repeated(1), program, objectives, {"logits_to_keep": 1, "use_cache": False})


def removed(
    places: Sequence[tuple[Site, int]], states: Sequence[Tensor], grads: Sequence[Tensor], bases: Tensor
) -> Tensor:
    """Return the first-order change [candidate, row] of removing each basis from every write.

    bases [candidate, rank, d_model]; states and grads [place] of [row, position, d_model].
    """
    rows = bases.reshape(-1, bases.shape[-1])
    change = torch.zeros(states[0].shape[0], rows.shape[0], dtype=torch.float64, device=states[0].device)
    for (site, layer), state, grad in zip(places, states, grads, strict=True):
        if site in ("attn_out", "mlp_out") or (site, layer) == ("resid_pre", 0):
            onto = rows.to(state.device).T
            change -= ((grad.float() @ onto) * (state.float() @ onto)).sum(1).to(change.device)
    return change.reshape(-1, *bases.shape[:2]).sum(-1).T
