"""Turn interventions into plain tuples that can travel into a trace.

A block may name only the model, torch, numbers, tensors and tuples, because everything it names is shipped to the
server. So adapters and interventions are lowered here to steps in forward order, the order in which a trace has to
touch modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from refusalkit.engine.layout import Layout
from refusalkit.intervention import SITES, Edit, Intervention, Site

#: (path of the module, whether its input is meant rather than its output, remove, add, whether to keep what is there)
Step = tuple[str, bool, Tensor | None, Tensor | None, bool]
Program = tuple[Step, ...]


class Pack(NamedTuple):
    """Hold interventions that touch the same places and so can share a forward pass, row by row."""

    indices: tuple[int, ...]
    interventions: tuple[Intervention, ...]

    @property
    def first_layer(self) -> int | None:
        """The lowest layer that any of them touches."""
        return self.interventions[0].first_layer


def place(layout: Layout, site: Site, layer: int) -> tuple[str, bool]:
    """Return the module path of a site, and whether the site is that module's input."""
    block = layout.block(layer)
    attention, mlp = layout.writes[layer]
    match site:
        case "resid_pre":
            return block, True
        case "attn_out":
            return f"{block}.{attention.output}", False
        case "mlp_out":
            return f"{block}.{mlp.output}", False
        case "resid_post":
            return block, False


def _ordered(intervention: Intervention) -> list[Edit]:
    return sorted(intervention.edits, key=lambda edit: (edit.layer, SITES.index(edit.site)))


def _signature(intervention: Intervention) -> tuple[object, ...]:
    return tuple(
        (edit.layer, edit.site, None if edit.remove is None else edit.remove.shape, edit.add is None)
        for edit in _ordered(intervention)
    )


def packs(interventions: Sequence[tuple[int, Intervention]], size: int) -> list[Pack]:
    """Group numbered interventions that touch the same places into packs of at most `size`."""
    groups: dict[tuple[object, ...], list[tuple[int, Intervention]]] = {}
    for index, intervention in interventions:
        groups.setdefault(_signature(intervention), []).append((index, intervention))
    return [
        Pack(*zip(*group[start : start + size], strict=True))
        for group in groups.values()
        for start in range(0, len(group), size)
    ]


def lower(
    pack: Sequence[Intervention],
    layout: Layout,
    rows: int,
    device: torch.device,
    reads: Sequence[tuple[Site, int]] = (),
    dtype: torch.dtype = torch.float32,
) -> Program:
    """Lower interventions of one pack to steps; each intervention covers `rows` consecutive rows of the batch.

    `reads` are the (site, layer) whose hidden state is kept, as it is after the edits of that place. Tensors go to
    `device` in `dtype`.
    """
    # One basis stands in three edits a layer; stacking it once keeps a pack of 90 edits to one tensor.
    stacked: dict[tuple[int, ...], Tensor] = {}

    def rowwise(tensors: Sequence[Tensor | None], is_add: bool) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        if not present:
            return None
        key = tuple(id(tensor) for tensor in present)
        if key not in stacked:
            if len(present) == 1:
                value = present[0]
            else:
                value = torch.stack(present)
                value = (value[:, None] if is_add else value).repeat_interleave(rows, 0)
            stacked[key] = value.to(dtype).to(device)
        return stacked[key]

    steps: list[tuple[tuple[int, int, int], Step]] = []
    for edits in zip(*[_ordered(intervention) for intervention in pack], strict=True):
        site, layer = edits[0].site, edits[0].layer
        remove = rowwise([edit.remove for edit in edits], is_add=False)
        add = rowwise([edit.add for edit in edits], is_add=True)
        steps.append(((layer, SITES.index(site), 0), (*place(layout, site, layer), remove, add, False)))
    for site, layer in reads:
        steps.append(((layer, SITES.index(site), 1), (*place(layout, site, layer), None, None, True)))
    return tuple(step for _, step in sorted(steps, key=lambda pair: pair[0]))
