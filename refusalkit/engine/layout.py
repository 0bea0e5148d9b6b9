"""Fit an adapter to a loaded model: which block makes which of the writes that the adapter describes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from refusalkit.adapter import Adapter, Write
from refusalkit.errors import RunError


@dataclass(frozen=True)
class Layout:
    """Hold an adapter and the two writes of every block, by layer and in forward order."""

    adapter: Adapter
    writes: tuple[tuple[Write, Write], ...]

    def block(self, layer: int) -> str:
        """Return the path of a block."""
        return f"{self.adapter.blocks}.{layer}"


def layout_of(module: Any, adapter: Adapter) -> Layout:
    """Find out what every block writes; raises `RunError` for a block whose write the adapter does not describe."""
    attention, mlp = adapter.writes
    blocks = list(parameter(module, adapter.blocks, adapter))
    return Layout(
        adapter,
        tuple(
            (_write(block, attention, adapter, layer), _write(block, mlp, adapter, layer))
            for layer, block in enumerate(blocks)
        ),
    )


def resolve(module: Any, path: str) -> Any:
    """Return what lies at `path` below a module, or None."""
    for part in path.split("."):
        module = getattr(module, part, None)
    return module


def parameter(module: Any, path: str, adapter: Adapter) -> Any:
    """Return what lies at `path` below a module; raises `RunError` when nothing does."""
    found = resolve(module, path)
    if found is None:
        raise _missing(adapter, path)
    return found


def _write(block: Any, kinds: tuple[Write, ...], adapter: Adapter, layer: int) -> Write:
    lacking = {}
    for write in kinds:
        paths = [write.output, *(matrix.path for matrix in write.matrices if not matrix.path.endswith("bias"))]
        missing = [path for path in paths if resolve(block, path) is None]
        if not missing:
            return write
        lacking[f"{adapter.blocks}.{layer}.{missing[0]}"] = write
    raise _missing(adapter, " or ".join(lacking))


def _missing(adapter: Adapter, path: str) -> RunError:
    return RunError(
        f"the adapter {adapter.name!r} names {path}, which this model does not have",
        where="model.adapter",
        hint="the checkpoint needs another adapter",
    )
