"""Remove a subspace from every weight that writes the residual stream.

The adapter names the weights. Where the unembedding is tied to the embedding it is untied first: the final norm
stands between them, so removing the direction from both is not the same as ablation. Where a norm stands between a
projection and the stream, the projection is edited against `gain * direction`, so that nothing is written along the
direction; the adapter says that this is not equal to ablation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.adapter import Adapter, Gain
from refusalkit.engine.layout import layout_of, parameter, resolve


@dataclass(frozen=True)
class Edited:
    """Say which parameters an edit changed."""

    names: tuple[str, ...]
    untied: bool


@dataclass(frozen=True, eq=False)
class Writer:
    """Hold a parameter that writes the stream."""

    name: str
    weight: Tensor
    axis: int
    """The axis of length d_model."""
    rows: Tensor
    """What it must not write, [rank, d_model]: the basis, or what a norm behind the parameter makes of it."""
    is_matrix: bool
    """Whether it is a matrix of a block, and not a bias or an embedding."""


def orthogonalize(module: Any, adapter: Adapter, basis: Tensor, keep_norms: bool = False) -> Edited:
    """Edit the weights of `module` in place and for good; `basis` [rank, d_model] has orthonormal rows.

    `keep_norms` gives every column of the blocks' matrices its length back.
    """
    untied = _untie(module)
    names = []
    with torch.no_grad():
        for writer in writers(module, adapter, basis):
            rows = writer.rows.to(writer.weight.device)
            keeps = keep_norms and writer.is_matrix
            writer.weight.copy_(algebra.orthogonalize(writer.weight, rows, writer.axis, keeps))
            names.append(writer.name)
    return Edited(tuple(names), untied)


@contextmanager
def edited(module: Any, adapter: Adapter, basis: Tensor, keep_norms: bool = False) -> Iterator[Edited]:
    """Edit the weights of `module` for the length of a block, then restore them bit for bit."""
    kept = [(each.weight, each.weight.detach().cpu().clone()) for each in writers(module, adapter, basis)]
    changes = orthogonalize(module, adapter, basis, keep_norms)
    try:
        yield changes
    finally:
        with torch.no_grad():
            for weight, original in kept:
                weight.copy_(original)
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


def writers(module: Any, adapter: Adapter, basis: Tensor) -> Iterator[Writer]:
    """Yield everything that writes the stream; `basis` [rank, d_model] has orthonormal rows."""
    for name in (f"{adapter.embedding}.weight", *adapter.also_embedding):
        yield Writer(name, parameter(module, name, adapter), -1, basis, is_matrix=False)
    layout = layout_of(module, adapter)
    for layer, writes in enumerate(layout.writes):
        block = resolve(module, layout.block(layer))
        for write in writes:
            for matrix in write.matrices:
                found = resolve(block, matrix.path)
                if found is not None:
                    gains = [gain for gain in (write.gain, matrix.gain) if gain is not None]
                    rows = _rows(block, gains, adapter, basis)
                    is_matrix = not matrix.path.endswith("bias")
                    yield Writer(f"{layout.block(layer)}.{matrix.path}", found, matrix.axis, rows, is_matrix)


def _rows(block: Any, gains: Sequence[Gain], adapter: Adapter, basis: Tensor) -> Tensor:
    """Return what a parameter must not write, so that nothing is left along `basis` behind the norms after it."""
    rows = basis
    for gain in gains:
        weight = parameter(block, gain.path, adapter).detach().double()
        rows = rows.to(weight.device).double() * (weight + gain.offset)
    return algebra.orthonormal(rows) if gains else basis
