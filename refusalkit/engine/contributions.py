"""Take apart what every attention head and every MLP writes along a direction, at the last position of prompts.

What a projection writes is a sum over the heads that enter it, plus its bias. A norm behind it divides by a number of
its own for every prompt and multiplies by its gain, which keeps the sum a sum: each head is divided by the number that
divided all of them. So the heads and the bias add up to what attention adds, and all additions to the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.adapter import Write
from refusalkit.engine import blocks
from refusalkit.engine.batch import Batch, Tokens
from refusalkit.engine.layout import resolve

if TYPE_CHECKING:
    from refusalkit.engine.engine import Engine

#: The first token and the one behind the last, counted from the start of a prompt.
Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Contributions:
    """Hold components along a unit direction, float64, in the units the stream has after the last block.

    Where a layer has fewer heads than another, not-a-number stands for those it lacks.
    """

    heads: Tensor
    """[prompt, layer, head]"""
    bias: Tensor
    """[prompt, layer]: of attention's projection."""
    attention: Tensor
    """[prompt, layer]: all that attention adds."""
    mlp: Tensor
    """[prompt, layer]"""
    attended: Tensor
    """[prompt, layer, head, span]: the share of attention from the last position to each span of tokens;
    not-a-number where a layer has no attention weights."""


@dataclass(frozen=True, eq=False)
class _Projection:
    """Hold what of a layer's weights decides its components along a direction."""

    paths: tuple[str, str, str, str]
    onto: Tensor
    """[head * width] float64: what the projection makes of its input along the direction."""
    bias: float
    n_heads: int
    gain: Tensor | None
    """[d_model] float64, where a norm stands behind the projection."""
    scales: tuple[float, float]
    """What attention's and the MLP's additions are multiplied by until the end of the last block."""


def contributions(
    engine: Engine, prompts: Sequence[Tokens], direction: Tensor, spans: Sequence[Sequence[Span]]
) -> Contributions:
    """Measure what each head and MLP writes along `direction` [d_model]; `spans` [prompt][span] of equal number."""
    unit = algebra.unit(direction.double().cpu())
    layers = _projections(engine, unit)
    n_heads, n_spans = max(layer.n_heads for layer in layers), len(spans[0])
    shape = (len(prompts), engine.n_layers)

    def empty(*more: int) -> Tensor:
        return torch.full((*shape, *more), torch.nan, dtype=torch.float64)

    found = Contributions(empty(n_heads), empty(), empty(), empty(), empty(n_heads, n_spans))

    def run(group: Batch, _: dict[str, Any]) -> None:
        rows = list(group.indices)
        options = {"logits_to_keep": 1, "use_cache": False}
        written = blocks.last_writes(engine.model, group.repeated(1), [layer.paths for layer in layers], options)
        for number, (layer, (entering, leaving, added, mlp, paid)) in enumerate(zip(layers, written, strict=True)):
            scale = layer.scales[0] * (1 if layer.gain is None else _divided(leaving, added, layer.gain))
            parts = (entering.double().cpu() * layer.onto).reshape(len(rows), layer.n_heads, -1).sum(-1)
            found.heads[rows, number, : layer.n_heads] = parts * torch.as_tensor(scale).reshape(-1, 1)
            found.bias[rows, number] = layer.bias * torch.as_tensor(scale, dtype=torch.float64).expand(len(rows))
            found.attention[rows, number] = layer.scales[0] * (added.double().cpu() @ unit)
            found.mlp[rows, number] = layer.scales[1] * (mlp.double().cpu() @ unit)
            if paid is not None:
                for row, index in enumerate(rows):
                    front = paid.shape[-1] - len(prompts[index])
                    for place, (first, end) in enumerate(spans[index]):
                        share = paid[row, :, front + first : front + end].double().sum(-1)
                        found.attended[index, number, : layer.n_heads, place] = share.cpu()
        engine.prompt_passes += len(rows)

    with _eager(engine.module):
        engine._over(prompts, run)
    return found


@contextmanager
def _eager(module: Any) -> Iterator[None]:
    """Let attention be computed in the way that keeps its weights, and in the way it was afterwards."""
    config = module.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def _divided(leaving: Tensor, added: Tensor, gain: Tensor) -> Tensor:
    """Return [row] what a norm multiplied by, apart from its gain, given what entered and what left it [row, d_model].

    A norm without a mean makes `leaving * gain * factor` of what enters it, so the factor is known without its epsilon.
    """
    plain = leaving.double().cpu() * gain
    return (added.double().cpu() * plain).sum(-1) / plain.square().sum(-1)


def _projections(engine: Engine, unit: Tensor) -> list[_Projection]:
    layout, config = engine.layout, engine.module.config.get_text_config()
    found: list[_Projection] = []
    behind = 1.0
    # From the last block down: what is added is multiplied at the end of its own block and of those behind it.
    for layer in reversed(range(engine.n_layers)):
        path, (attention, mlp) = layout.block(layer), layout.writes[layer]
        block = resolve(engine.module, path)
        if layout.adapter.block_multiplier is not None:
            behind *= float(resolve(block, layout.adapter.block_multiplier))
        matrix, *biases = attention.matrices
        projection = matrix.path.rpartition(".")[0]
        gain = None
        if attention.gain is not None:
            gain = resolve(block, attention.gain.path).double().cpu() + attention.gain.offset
        along = unit if gain is None else gain * unit
        weight = resolve(block, matrix.path).double().cpu()
        bias = next((value for each in biases if (value := resolve(block, each.path)) is not None), None)
        outputs = (attention.output, mlp.output)
        parts = (projection, projection.rpartition(".")[0], *outputs)
        found.append(
            _Projection(
                paths=tuple(f"{path}.{part}" for part in parts),  # type: ignore[arg-type]
                onto=weight @ along if matrix.axis == -1 else along @ weight,
                bias=0.0 if bias is None else float(bias.double().cpu() @ along),
                n_heads=int(getattr(config, attention.heads)),
                gain=gain,
                scales=(_multiplier(block, attention) * behind, _multiplier(block, mlp) * behind),
            )
        )
    return found[::-1]


def _multiplier(block: Any, write: Write) -> float:
    return 1.0 if write.multiplier is None else float(resolve(block, write.multiplier))
