"""Turn interventions into plain tuples that can travel into a trace.

A block may name only the model, torch, numbers, tensors and tuples, because everything it names is shipped to the
server. So adapters and interventions are lowered here to steps in forward order, the order in which a trace has to
touch modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.engine.layout import Layout
from refusalkit.intervention import SITES, Edit, Intervention, Site

#: (path of the module, whether its input is meant rather than its output, the gate to read there, the change to make
#: there); with neither, what is there is kept.
Step = tuple[str, bool, algebra.Gate | None, algebra.Change | None]
Program = tuple[Step, ...]


class Pack(NamedTuple):
    """Hold interventions that touch the same places and so can share a forward pass, row by row."""

    indices: tuple[int, ...]
    interventions: tuple[Intervention, ...]

    @property
    def first_layer(self) -> int | None:
        """The lowest layer that any of them touches."""
        return self.interventions[0].first_layer

    def of(self, rows: Sequence[int]) -> Pack:
        """Return some of the interventions."""
        return Pack(tuple(self.indices[row] for row in rows), tuple(self.interventions[row] for row in rows))


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
    gate = intervention.gate
    return (
        None if gate is None else (gate.site, gate.layer, gate.position),
        *(
            (edit.layer, edit.site, edit.tokens, edit.gated, *map(_shape, edit.parts))
            for edit in _ordered(intervention)
        ),
    )


def _shape(part: Tensor | None) -> tuple[int, ...] | None:
    return None if part is None else tuple(part.shape)


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

    def rowwise(tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        if not present:
            return None
        key = tuple(id(tensor) for tensor in present)
        if key not in stacked:
            value = present[0]
            if len(present) > 1:
                value = torch.stack([tensor.reshape(-1, tensor.shape[-1]) for tensor in present])
                value = value.repeat_interleave(rows, 0)
            stacked[key] = value.to(dtype).to(device)
        return stacked[key]

    steps: list[tuple[tuple[int, int, int], Step]] = []
    gates = [intervention.gate for intervention in pack if intervention.gate is not None]
    if gates:
        site, layer = gates[0].site, gates[0].layer
        vectors = torch.stack([gate.vector.float() for gate in gates]).repeat_interleave(rows, 0).to(device)
        thresholds = torch.tensor([gate.threshold for gate in gates]).repeat_interleave(rows, 0).to(device)
        gate = (vectors, thresholds, gates[0].position + 1)
        steps.append(((layer, SITES.index(site), 0), (*place(layout, site, layer), gate, None)))
    for edits in zip(*[_ordered(intervention) for intervention in pack], strict=True):
        site, layer, tokens = edits[0].site, edits[0].layer, edits[0].tokens
        remove, add, turn, along = map(rowwise, zip(*[edit.parts for edit in edits], strict=True))
        change = ((remove, add, turn, along), None if tokens == (None, None) else tokens, edits[0].gated)
        steps.append(((layer, SITES.index(site), 1), (*place(layout, site, layer), None, change)))
    for site, layer in reads:
        steps.append(((layer, SITES.index(site), 2), (*place(layout, site, layer), None, None)))
    return tuple(step for _, step in sorted(steps, key=lambda pair: pair[0]))


def counted_from(program: Program, column: int | Tensor) -> Program:
    """Return a program for a pass that ends `column` tokens after the prompt's last: a number, or [prompt, 1]."""

    def end(at: int | Tensor | None) -> int | Tensor | None:
        return None if at is None else at - column

    def moved(gate: algebra.Gate | None, change: algebra.Change | None) -> Any:
        if gate is not None:
            vector, threshold, position = gate
            return (vector, threshold, position - (column[:, 0] if isinstance(column, Tensor) else column)), None
        if change is not None and change[1] is not None:
            edits, (first, last), gated = change[0], change[1], change[2]
            return None, (edits, (end(first), end(last)), gated)
        return None, change

    return tuple((path, at_input, *moved(gate, change)) for path, at_input, gate, change in program)
