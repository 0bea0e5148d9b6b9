"""List every way to extend refusalkit.

A plugin is a module (or object) with one or more of these functions, marked with `@refusalkit.hookimpl` and named by
an entry point in the group `refusalkit`. Every hook is called once, when the registry is loaded, takes no argument
and returns declarations; a plugin never receives anything to register with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from refusalkit.adapter import Adapter
    from refusalkit.command import Command
    from refusalkit.intervention import InterventionSpec
    from refusalkit.metric import Metric
    from refusalkit.prompt_source import PromptSource
    from refusalkit.selector import Selector
    from refusalkit.strategy import Strategy

#: The name of the hooks' project and of the entry-point group.
NAME = "refusalkit"

hookspec = pluggy.HookspecMarker(NAME)
hookimpl = pluggy.HookimplMarker(NAME)


@hookspec
def refusalkit_adapters() -> Sequence[Adapter]:  # type: ignore[empty-body]
    """Return the architectures this plugin knows: `Adapter` values, which are data."""


@hookspec
def refusalkit_strategies() -> Sequence[type[Strategy]]:  # type: ignore[empty-body]
    """Return ways to find directions: `Strategy` classes, named in a recipe under `find.strategy`."""


@hookspec
def refusalkit_selectors() -> Sequence[type[Selector]]:  # type: ignore[empty-body]
    """Return ways to choose among candidates: `Selector` classes, named under `select.selector`."""


@hookspec
def refusalkit_interventions() -> Sequence[type[InterventionSpec]]:  # type: ignore[empty-body]
    """Return things to do with a direction: `InterventionSpec` classes, named under `evaluate.interventions`."""


@hookspec
def refusalkit_metrics() -> Sequence[type[Metric]]:  # type: ignore[empty-body]
    """Return things to measure: `Metric` classes, named under `evaluate.metrics`."""


@hookspec
def refusalkit_prompt_sources() -> Sequence[PromptSource]:  # type: ignore[empty-body]
    """Return places prompts come from: `PromptSource` values, named by their scheme (`file:harmful.txt`)."""


@hookspec
def refusalkit_commands() -> Sequence[Command]:  # type: ignore[empty-body]
    """Return commands of `refusalkit`: `Command` values, listed by `refusalkit --help` behind its own."""
