"""Turn token sequences into padded batches.

Padding is on the left and positions are counted from the right, so that the last column is every prompt's last
token. Tokens that all prompts share at the front are split off: they run once and not once a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refusalkit.errors import RunError

Tokens = tuple[int, ...]

#: A shared front shorter than this costs more as a pass of its own than it saves.
SHORTEST_PREFIX = 8


@dataclass(frozen=True, eq=False)
class Batch:
    """Hold some prompts as tensors, without the tokens that all prompts share at the front."""

    indices: tuple[int, ...]
    """Which prompts these are, in the caller's order."""
    input_ids: Tensor
    """[prompt, position] left-padded."""
    attention_mask: Tensor
    """[prompt, prefix + position]: 0 for padding."""
    position_ids: Tensor
    """[prompt, position] as the model counts them, the prefix included."""

    def repeated(self, times: int) -> dict[str, Tensor]:
        """Return the model's inputs with the whole batch repeated `times` times, one after another."""
        return {
            "input_ids": self.input_ids.repeat(times, 1),
            "attention_mask": self.attention_mask.repeat(times, 1),
            "position_ids": self.position_ids.repeat(times, 1),
        }

    def part(self, rows: slice) -> Batch:
        """Return some of the prompts, without the columns that are padding in all of them."""
        prefix = self.attention_mask.shape[1] - self.input_ids.shape[1]
        own = self.attention_mask[rows, prefix:]
        width = int(own.sum(-1).max())
        mask = torch.cat([self.attention_mask[rows, :prefix], own[:, -width:]], dim=1)
        return Batch(self.indices[rows], self.input_ids[rows, -width:], mask, self.position_ids[rows, -width:])


def shared_prefix(prompts: Sequence[Tokens], keep: int) -> Tokens:
    """Return the tokens that all prompts begin with, leaving at least `keep` tokens of the shortest."""
    if len(prompts) < 2:
        return ()
    shortest = min(prompts, key=len)
    length = 0
    limit = len(shortest) - keep
    while length < limit and all(prompt[length] == shortest[length] for prompt in prompts):
        length += 1
    return shortest[:length] if length >= SHORTEST_PREFIX else ()


def chunks(lengths: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Split prompt indices into groups of at most `size`, longest first, so that a batch that fits is followed by
    batches that fit."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [tuple(order[start : start + size]) for start in range(0, len(order), size)]


def halved(groups: Sequence[tuple[int, ...]], size: int) -> list[tuple[int, ...]]:
    """Split groups further, in their order, into groups of at most `size`."""
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def prefix_inputs(prefix: Tokens, rows: int, device: torch.device) -> dict[str, Tensor]:
    """Return the model's inputs for `rows` passes over the shared front."""
    ids = torch.tensor([prefix], device=device).repeat(rows, 1)
    positions = torch.arange(len(prefix), device=device)[None].repeat(rows, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}


def batch(prompts: Sequence[Tokens], indices: Sequence[int], prefix: int, pad_id: int, device: torch.device) -> Batch:
    """Pad the prompts at `indices`, dropping their first `prefix` tokens."""
    rows = [prompts[index][prefix:] for index in indices]
    width = max(len(row) for row in rows)
    input_ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], device=device)
    own = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    mask = torch.cat([own.new_ones(len(rows), prefix), own], dim=1)
    positions = (own.cumsum(-1) - 1).clamp(min=0) + prefix
    return Batch(tuple(indices), input_ids, mask, positions)


def targets(group: Batch, counts: Tensor) -> tuple[int, tuple[Tensor, Tensor]]:
    """Say which of a batch's last tokens are those that each prompt ends with; `counts` [all prompts] says how many.

    Returns how many columns that takes, with one before the first, and their (token_ids, mask) [prompt, column].
    """
    lengths = counts[list(group.indices), None]
    width = int(lengths.max()) + 1
    return width, (group.input_ids[:, -width:], torch.arange(width, 0, -1)[None] <= lengths)


def check_lengths(prompts: Sequence[Tokens], positions: Sequence[int]) -> None:
    """Raise `RunError` for a prompt shorter than the deepest position."""
    deepest = -min(positions)
    shortest = min(len(prompt) for prompt in prompts)
    if deepest > shortest:
        raise RunError(
            f"position -{deepest} lies before the start of a prompt of {shortest} tokens",
            where="capture.positions",
            hint="capture positions nearer to the end",
        )
