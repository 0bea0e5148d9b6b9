"""Say which adapters there are, and check the one that fits a model on its own weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from refusalkit.checkpoint import Checkpoint
from refusalkit.registry import Registry

if TYPE_CHECKING:
    from refusalkit.testing.laws import Law


def adapter_table(registry: Registry) -> str:
    """Return a line for every adapter: its name, owner, what holds for weight edits, and its architectures."""
    rows = [("adapter", "from", "weight edit", "architectures")]
    for name, adapter in registry.adapters.items():
        owner = str(registry.owner("refusalkit_adapters", name))
        rows.append((name, owner, adapter.exactness, ", ".join([*adapter.architectures, *adapter.model_ids])))
    refusals = [f"{name} {adapter.refuses}" for name, adapter in registry.adapters.items() if adapter.refuses]
    return "\n".join([*_columns(rows), "", *refusals])


def check_checkpoint(checkpoint: Checkpoint) -> tuple[Law, ...]:
    """Load a checkpoint and check the laws of its adapter on it; raises `RunError` when the adapter does not fit."""
    from refusalkit.engine.load import load
    from refusalkit.testing.laws import check_adapter

    return check_adapter(checkpoint.adapter, load(checkpoint).module, tokenizer=checkpoint.tokenizer)


def check_text(checkpoint: Checkpoint, registry: Registry, laws: Sequence[Law]) -> str:
    """Return what was checked and what came of it."""
    adapter = checkpoint.adapter
    rows = [
        ("model", f"{checkpoint.section.id}, {checkpoint.dtype}"),
        ("", f"{checkpoint.architecture}, {checkpoint.n_layers} layers of {checkpoint.d_model}"),
        ("adapter", f"{adapter.name}, from {registry.owner('refusalkit_adapters', adapter.name)}"),
        ("weight edit", adapter.exactness),
        *([("because", adapter.inexact)] if adapter.inexact else []),
    ]
    return "\n".join([*_columns(rows), "", *map(str, laws)])


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
