"""Remove a subspace from every weight that writes the residual stream.

The adapter names the weights. Where the unembedding is tied to the embedding it is untied first: the final norm
stands between them, so removing the direction from both is not the same as ablation. Where a norm stands between a
projection and the stream, the projection is edited against `gain * direction`, so that nothing is written along the
direction; the adapter says that this is not equal to ablation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.adapter import Adapter, Write
from refusalkit.errors import RunError


@dataclass(frozen=True)
class Edited:
    """Say which parameters an edit changed."""

    names: tuple[str, ...]
    untied: bool


def orthogonalize(module: Any, adapter: Adapter, basis: Tensor) -> Edited:
    """Edit the weights of `module` in place and for good; `basis` [rank, d_model] has orthonormal rows."""
    untied = _untie(module)
    names = []
    with torch.no_grad():
        for name, parameter, axis, rows in _writers(module, adapter, basis):
            parameter.copy_(algebra.orthogonalize(parameter, rows.to(parameter.device), axis))
            names.append(name)
    return Edited(tuple(names), untied)


@contextmanager
def edited(module: Any, adapter: Adapter, basis: Tensor) -> Iterator[Edited]:
    """Edit the weights of `module` for the length of a block, then restore them bit for bit."""
    kept = [(parameter, parameter.detach().cpu().clone()) for _, parameter, _, _ in _writers(module, adapter, basis)]
    changes = orthogonalize(module, adapter, basis)
    try:
        yield changes
    finally:
        with torch.no_grad():
            for parameter, original in kept:
                parameter.copy_(original)
        if changes.untied:
            module.get_output_embeddings().weight = module.get_input_embeddings().weight
            module.config.tie_word_embeddings = True


def _untie(module: Any) -> bool:
    unembedding, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    if unembedding is None or unembedding.weight is not embedding.weight:
        return False
    unembedding.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    module.config.tie_word_embeddings = False
    return True


def _writers(module: Any, adapter: Adapter, basis: Tensor) -> Iterator[tuple[str, Tensor, int, Tensor]]:
    """Yield (name, parameter, axis of length d_model, rows to remove) for everything that writes the stream."""
    embedding = f"{adapter.embedding}.weight"
    yield embedding, _parameter(module, embedding, adapter), -1, basis
    blocks = _resolve(module, adapter.blocks)
    if blocks is None:
        raise _missing(adapter, adapter.blocks)
    for layer, block in enumerate(blocks):
        for write in adapter.writes:
            rows = _rows(block, write, adapter, basis)
            for matrix in write.matrices:
                parameter = _resolve(block, matrix.path)
                if parameter is None:
                    if matrix.path.endswith("bias"):
                        continue
                    raise _missing(adapter, f"{adapter.blocks}.{layer}.{matrix.path}")
                yield f"{adapter.blocks}.{layer}.{matrix.path}", parameter, matrix.axis, rows


def _rows(block: Any, write: Write, adapter: Adapter, basis: Tensor) -> Tensor:
    if write.gain is None:
        return basis
    weight = _parameter(block, write.gain.path, adapter)
    gain = weight.detach().double() + write.gain.offset
    return algebra.orthonormal(basis.to(gain.device).double() * gain)


def _parameter(module: Any, path: str, adapter: Adapter) -> Tensor:
    found = _resolve(module, path)
    if found is None:
        raise _missing(adapter, path)
    return found  # type: ignore[no-any-return]


def _resolve(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part, None)
    return module


def _missing(adapter: Adapter, path: str) -> RunError:
    return RunError(
        f"the adapter {adapter.name!r} names {path}, which this model does not have",
        where="model.adapter",
        hint="the checkpoint needs another adapter",
    )
