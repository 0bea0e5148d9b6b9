"""Gather the laws of everything that is installed, in one set for each thing and each model it is checked on.

`refusalkit plugin check`, pytest with `--refusalkit` and `broken_laws` run these sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from pydantic import BaseModel

from refusalkit.adapter import Adapter
from refusalkit.builtin.adapters import LLAMA
from refusalkit.engine.engine import Engine
from refusalkit.errors import InputError
from refusalkit.recipe import Recipe, recipe_type
from refusalkit.registry import Owner, Registry, default_of, load_registry, unpackaged
from refusalkit.testing.laws import (
    Law,
    check_adapter,
    check_command,
    check_intervention,
    check_metric,
    check_prompt_source,
    check_selector,
    check_strategy,
)
from refusalkit.testing.models import random_engine, random_model

Check = Callable[[], tuple[Law, ...]]


class UncheckedError(Exception):
    """Say why laws cannot be checked here, which is no word on whether they hold."""


@dataclass(frozen=True)
class LawSet:
    """Hold the laws of one provided thing on one model, to be checked when they are asked for."""

    owner: Owner
    kind: str
    """What it is: `adapter`, `strategy`, ..."""
    name: str
    on: str
    """What it is checked on, where there is a choice."""
    check: Check
    """Check every law. Raises `UncheckedError`, or whatever the plugin raises."""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" + (f" on {self.on}" if self.on else "")


def law_sets(registry: Registry, owner: str | None = None) -> list[LawSet]:
    """List the sets of laws of everything that one distribution, or every one, provides; nothing is checked yet."""

    @cache
    def recipe() -> type[Recipe]:
        return recipe_type(registry)

    return [
        LawSet(by, kind, name, on, check)
        for (hook, name), by in registry.owners.items()
        if owner in (None, by.name)
        for kind, on, check in _sets(hook, getattr(registry, hook.removeprefix("refusalkit_"))[name], recipe)
    ]


def broken_laws(plugin: object) -> list[str]:
    """Check every law on everything that a module with hooks provides, installed or not; return those that broke.

    Raises `InputError` when the module is not a plugin that could be installed, and whatever its code raises.
    """
    registry = load_registry([plugin], entry_points=False)
    broken = []
    for laws in law_sets(registry, unpackaged(plugin).name):
        try:
            broken += [f"{laws}: {law}" for law in laws.check() if not law.holds]
        except UncheckedError:
            continue
    return broken


def _sets(hook: str, value: Any, recipe: Callable[[], type[Recipe]]) -> Iterator[tuple[str, str, Check]]:
    """Yield what a thing is, what it is checked on, and how."""
    match hook:
        case "refusalkit_adapters":
            yield from (("adapter", on, check) for on, check in _adapter_sets(value))
        case "refusalkit_strategies":
            check = partial(_unchecked, "it reads its directions from a file") if value.reads_files else None
            yield "strategy", "", check or (lambda: check_strategy(_asked(value, "strategy", recipe()).find))
        case "refusalkit_selectors":
            yield "selector", "", lambda: check_selector(_asked(value, "selector", recipe()).select, _llama())
        case "refusalkit_interventions":
            yield (
                "intervention",
                "",
                lambda: check_intervention(_asked(value, "intervention", recipe()).evaluate.interventions[0], _llama()),
            )
        case "refusalkit_metrics":
            yield "metric", "", lambda: check_metric(_asked(value, "metric", recipe()).evaluate.metrics[0])
        case "refusalkit_prompt_sources":
            yield "prompt source", "", lambda: check_prompt_source(value)
        case "refusalkit_commands":
            yield "command", "", lambda: check_command(value)


def _llama() -> Engine:
    return random_engine("LlamaForCausalLM", LLAMA)


def _adapter_sets(adapter: Adapter) -> Iterator[tuple[str, Check]]:
    if adapter.exactness == "refused":
        yield "", partial(_unchecked, str(adapter.refuses))
        return
    for architecture in adapter.architectures:
        for tied in (False, True):
            on = f"{architecture}, tied" if tied else architecture
            yield on, partial(_check_adapter, adapter, architecture, tied)


def _unchecked(reason: str) -> tuple[Law, ...]:
    raise UncheckedError(reason)


def _check_adapter(adapter: Adapter, architecture: str, tied: bool) -> tuple[Law, ...]:
    try:
        model = random_model(architecture, tied=tied, dtype=torch.float64, **adapter.tiny)
    except Exception as error:
        # Configurations raise anything for settings that they cannot bring together.
        said = error.message if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise UncheckedError(f"{said}; give settings in `Adapter.tiny`, or ask `refusalkit adapters MODEL`") from error
    if model.config._attn_implementation == "eager":
        # What transformers fills masks with is infinite in float64, and a padded row then gives no number.
        model = model.float()
    return check_adapter(adapter, model)


def _asked(provider: type[BaseModel], kind: str, recipe: type[Recipe]) -> Recipe:
    """Ask for a thing in a recipe, with the first example of every option that has one, and the default of the others.

    Raises `UncheckedError` when an option has neither.
    """
    asked = {kind: default_of(provider, kind)}
    for key, option in provider.model_fields.items():
        if option.examples:
            asked[key] = option.examples[0]
        elif option.is_required():
            raise UncheckedError(
                f"the option {key!r} has neither a default nor an example; declare one in "
                f"`{provider.__name__}`: `{key}: Annotated[..., Field(examples=[...])]`"
            )
    sections: dict[str, Any] = {
        "strategy": {"find": asked},
        "selector": {"select": asked},
        "intervention": {"evaluate": {"interventions": [asked]}},
        "metric": {"evaluate": {"metrics": [asked]}},
    }
    prompts = {"harmful": "tiny:harmful", "harmless": "tiny:harmless"}
    return recipe.model_validate({"name": "laws", "model": {"id": "tiny:llama"}, "prompts": prompts, **sections[kind]})
