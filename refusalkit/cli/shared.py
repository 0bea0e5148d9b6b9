"""Share what several commands read and do alike: recipes, settings, a run shown as it goes, errors."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refusalkit.errors import RefusalkitError

if TYPE_CHECKING:
    from refusalkit.plan import Plan
    from refusalkit.recipe import Recipe
    from refusalkit.registry import Registry


class Until(StrEnum):
    """Name where a run may stop."""

    prompts = "prompts"
    capture = "capture"
    find = "find"  # type: ignore[assignment]
    select = "select"
    evaluate = "evaluate"
    analyze = "analyze"
    report = "report"


Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set model.dtype=float32")
]


def say(error: RefusalkitError) -> None:
    """Write an error where talk goes."""
    print(f"error: {error}", file=sys.stderr)


def load(recipe: Path, settings: list[str] | None) -> tuple[Recipe, Registry]:
    """Read a recipe with its settings, and the registry that it was read by."""
    from refusalkit.recipe_file import load_recipe
    from refusalkit.registry import load_registry

    registry = load_registry()
    return load_recipe(recipe, registry, settings or ()), registry


def plan_of(recipe: Path, settings: list[str] | None) -> Plan:
    """Plan a recipe; its relative paths start at its own folder."""
    checked, registry = load(recipe, settings)
    from refusalkit.checkpoint import quiet
    from refusalkit.plan import make_plan

    quiet()
    return make_plan(checked, recipe.parent, registry)


def folder_of(plan: Plan, out: Path | None) -> Path:
    """Return the folder of a run: the one that was asked for, or the one its name gives."""
    return out if out is not None else Path("runs") / plan.recipe.name


def execute(plan: Plan, folder: Path, until: Until = Until.report) -> None:
    """Execute a plan under a progress display, and close with the finding in a sentence."""
    from refusalkit.pipeline import execute as execute_plan
    from refusalkit.progress import progress

    with progress() as shown:
        execute_plan(plan, folder, shown, until.value)
    if until is Until.report:
        from refusalkit.report.finding import left_out, sentence
        from refusalkit.run_directory import read_run

        finished = read_run(folder)
        print(sentence(finished.choice, finished.evaluation, repairs=finished.candidates.repairs), file=sys.stderr)
        if missing := left_out(finished.evaluation):
            print(missing, file=sys.stderr)
