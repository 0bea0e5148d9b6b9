"""Repeat a published run on the weights that are on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from refusalkit.checkpoint import cached_commit
from refusalkit.plan import Plan, make_plan
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry
from refusalkit.reproduction.compare import check_model, compare
from refusalkit.reproduction.published import Published
from refusalkit.reproduction.reasons import departures, reasons
from refusalkit.reproduction.table import markdown
from refusalkit.run_directory import read_run


def plan_repetition(published: Published, weights: str | None, prompts: Path, registry: Registry) -> Plan | None:
    """Plan the published run on `weights`, by default the hub's where they are in the cache; None where they are not.

    Raises `InputError` when the weights are another model's or the prompts are not the authors'.
    """
    model = {"id": weights} if weights else _in_cache(published.hub)
    if model is None:
        return None
    addresses = {side: f"arditi:{prompts}#{side}" for side in ("harmful", "harmless")}
    recipe = load_recipe(published.recipe, registry, [*_settings("model", model), *_settings("prompts", addresses)])
    plan = make_plan(recipe, Path(), registry)
    found = plan.checkpoint
    seen = {key: getattr(found, key) for key in ("architecture", "n_layers", "d_model", "d_vocab")}
    check_model(published, seen, f"model.id {recipe.model.id!r}")
    return plan


def _in_cache(hub: str) -> dict[str, str] | None:
    commit = cached_commit(hub)
    return {"id": hub, "revision": commit} if commit else None


def _settings(section: str, values: dict[str, str]) -> Sequence[str]:
    # JSON is YAML, and quotes what a path may hold.
    return [f"{section}.{key}={json.dumps(value)}" for key, value in values.items()]


def compared(published: Published, folder: Path | None, registry: Registry) -> str:
    """Return the comparison with the finished run in `folder` as Markdown, or what it would compare."""
    if folder is None:
        return markdown(published, compare(published, None), reasons(published))
    run = read_run(folder)
    return markdown(published, compare(published, run), [*departures(published, run, registry), *reasons(published)])
