"""Hand stages what they work with: the model, the template and the progress display."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refusalkit.engine.engine import Engine
from refusalkit.progress import Progress
from refusalkit.selector import Advance
from refusalkit.template import ChatTemplate

if TYPE_CHECKING:
    from refusalkit.engine.remote import RemoteEngine


@dataclass(frozen=True, eq=False)
class Bench:
    """Hold the model, how to render prompts for it, and where to show progress."""

    engine: Engine | RemoteEngine
    template: ChatTemplate
    progress: Progress

    def tokens(self, prompts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Render and tokenise instructions."""
        return tuple(self.template.tokens(prompt) for prompt in prompts)

    def openings(self, prompts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Render and tokenise instructions up to where the model writes, its thought included."""
        return tuple(self.template.encode(self.template.opening(prompt)) for prompt in prompts)

    def advance(self, what: str) -> Advance:
        """Return the progress callback of one part of a stage."""
        return lambda done, total: self.progress.advance(what, done, total)
