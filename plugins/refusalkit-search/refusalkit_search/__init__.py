"""Search the keys of a recipe with Optuna: chosen on validation prompts, reported on test prompts."""

from __future__ import annotations

from collections.abc import Sequence

from refusalkit import hookimpl
from refusalkit.command import Command
from refusalkit_search.command import search


@hookimpl
def refusalkit_commands() -> Sequence[Command]:
    return (Command("search", search),)
