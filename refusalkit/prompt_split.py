"""Divide prompts into splits by seed, and refuse prompts that stand in two of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from refusalkit.errors import InputError

SPLITS = ("train", "validation", "test")


def normalized(prompt: str) -> str:
    """Return what makes two prompts the same: case folded, white space collapsed."""
    return " ".join(prompt.casefold().split())


def without_duplicates(prompts: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Keep the first of prompts that differ only in case or white space; return them and how many were dropped."""
    kept: dict[str, str] = {}
    for prompt in prompts:
        kept.setdefault(normalized(prompt), prompt)
    return tuple(kept.values()), len(prompts) - len(kept)


def in_proportion(sizes: Mapping[str, int], available: int) -> dict[str, int]:
    """Return the sizes, or where fewer prompts than their sum are available, smaller ones in the same proportion."""
    needed = sum(sizes[split] for split in SPLITS)
    return {split: min(sizes[split], max(1, available * sizes[split] // needed)) for split in SPLITS}


def split_pool(prompts: Sequence[str], sizes: Mapping[str, int], seed: int, where: str) -> dict[str, tuple[str, ...]]:
    """Draw disjoint splits of the given sizes from one pool, by seed; what is left over is not used.

    Prompts that differ only in case or white space count once, so no two splits can share one. Raises `InputError`
    when the pool is too small.
    """
    distinct, _ = without_duplicates(prompts)
    needed = sum(sizes[split] for split in SPLITS)
    if len(distinct) < needed:
        asked = " + ".join(f"{sizes[split]} {split}" for split in SPLITS)
        raise InputError(
            f"{len(distinct)} different prompts, but {needed} are asked for ({asked})",
            where=where,
            hint="lower `prompts.train`, `prompts.validation` or `prompts.test`, or give more prompts",
        )
    drawn = random.Random(seed).sample(distinct, needed)
    divided, start = {}, 0
    for split in SPLITS:
        divided[split] = tuple(drawn[start : start + sizes[split]])
        start += sizes[split]
    return divided


def check_leaks(parts: Iterable[tuple[str, str, Sequence[str]]]) -> None:
    """Raise `InputError` when a prompt stands in two of the (side, split, prompts).

    A test prompt that was trained on measures memory, and one on both sides measures nothing.
    """
    seen: dict[str, tuple[str, str]] = {}
    leaks = []
    for side, split, prompts in parts:
        # A prompt that stands twice in one split is a duplicate, not a leak.
        for prompt in without_duplicates(prompts)[0]:
            first = seen.setdefault(normalized(prompt), (side, split))
            if first != (side, split):
                leaks.append((prompt, first, (side, split)))
    if leaks:
        shown = "; ".join(
            f"{prompt[:60]!r} in {'.'.join(first)} and {'.'.join(second)}" for prompt, first, second in leaks[:3]
        )
        more = f" (and {len(leaks) - 3} more)" if len(leaks) > 3 else ""
        raise InputError(
            f"the same prompt stands in two places: {shown}{more}",
            where="prompts",
            hint="every prompt may stand in one split of one side only",
        )
