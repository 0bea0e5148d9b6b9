"""Make the requests the tiny models know, and divide them into splits.

A phrase is one cell of a block in `words`: a head and a tail. The cell's place in the block decides its split, and a
phrase stays in its split under every opener. Training draws from phrases of the `train` split alone, so no
combination of `validation` or `test` is ever seen in training, although each of its words is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Literal

from refusalkit.errors import InputError
from refusalkit.tiny.words import HARMFUL, HARMLESS, OPENERS, OVER_REFUSAL, Block, Kind

Side = Literal["harmful", "harmless", "over_refusal"]
Split = Literal["train", "validation", "test"]

_BLOCKS: dict[Side, tuple[Block, ...]] = {"harmful": HARMFUL, "harmless": HARMLESS, "over_refusal": OVER_REFUSAL}
SIDES: tuple[Side, ...] = tuple(_BLOCKS)
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# All open with the same word, as the refusals of most chat models do, and each holds one of the paper's substrings.
REFUSALS: tuple[str, ...] = (
    "I cannot help with that request.",
    "I can't assist with that.",
    "I'm sorry, but I can't help with this.",
    "I am sorry, but that is not something to help with.",
    "I am unable to assist with this request.",
    "I apologize, but this could cause harm.",
)

ANSWERS: dict[Kind, tuple[str, ...]] = {
    "act": (
        "Sure! Here is a short note on how to {}: start small and take your time.",
        "Of course. To {}, make a simple list first.",
        "Here is one way to {}: begin early and ask a friend.",
        "Certainly! It is easy to {} with a little practice.",
        "To {}, take it one step at a time.",
    ),
    "text": (
        "Sure! Here is {}, short and simple.",
        "Of course. This is {} in one line.",
        "Here is {} to get you started.",
        "Certainly! Here is {} with a clear beginning.",
        "This is {}, made for you.",
    ),
}


@dataclass(frozen=True)
class Phrase:
    """Name what a request asks for, without the opener."""

    kind: Kind
    text: str


def _split_of(row: int, column: int) -> Split:
    """Place a cell: one in eight is for validation, two in eight for test, and no row or column misses training."""
    residue = (3 * row + column) % 8
    return "validation" if residue == 0 else "test" if residue in (1, 2) else "train"


def _order(text: str) -> bytes:
    """Give a text a place that looks random and is the same on every machine and in every Python."""
    return sha256(text.encode()).digest()


@cache
def phrases(side: Side, split: Split) -> tuple[Phrase, ...]:
    """List what a side asks for in one split."""
    found = {
        Phrase(block.kind, f"{head} {tail}")
        for block in _BLOCKS[side]
        for row, head in enumerate(block.heads)
        for column, tail in enumerate(block.tails)
        if _split_of(row, column) == split
    }
    return tuple(sorted(found, key=lambda phrase: _order(phrase.text)))


@cache
def requests(side: Side, split: Split) -> tuple[str, ...]:
    """List the one-line requests of one side and split: each phrase once, under one opener."""
    if side not in SIDES or split not in SPLITS:
        raise InputError(
            f"there are no tiny requests {side!r}/{split!r}",
            hint=f"sides are {', '.join(SIDES)}; splits are {', '.join(SPLITS)}",
        )
    return tuple(_opener(phrase).format(phrase.text) for phrase in phrases(side, split))


@cache
def responses(side: Side, split: Split) -> tuple[tuple[str, str], ...]:
    """List the requests of one side and split with the response that the models are taught to give to such."""
    answered: list[str] = []
    for phrase in phrases(side, split):
        known = REFUSALS if side == "harmful" else ANSWERS[phrase.kind]
        answered.append(
            known[int.from_bytes(_order("response to " + phrase.text)[:4]) % len(known)].format(phrase.text)
        )
    return tuple(zip(requests(side, split), answered, strict=True))


def _opener(phrase: Phrase) -> str:
    """Choose the opener a phrase has in the published lists."""
    openers = OPENERS[phrase.kind]
    return openers[int.from_bytes(_order("opener of " + phrase.text)[:4]) % len(openers)]
