"""Say where prompts come from, and texts whose loss is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Passage:
    """Hold a text whose loss is taken."""

    text: str
    prompt: str | None = None
    """The instruction that the text answers; None where it stands alone."""


@dataclass(frozen=True)
class PromptSource:
    """Provide prompts for addresses of one scheme."""

    scheme: str
    """What stands before the colon in a recipe: `file` in `file:harmful.txt`."""
    help: str
    """One line for the reference."""
    read: Callable[[str, Path], Mapping[str, tuple[str, ...]]]
    """(address, folder of the recipe) -> split name -> prompts; `{"all": ...}` when the source is not divided."""
    read_answered: Callable[[str, Path], tuple[Passage, ...]] | None = None
    """(address, folder of the recipe) -> prompts with an answer each; None where there are no answers."""
