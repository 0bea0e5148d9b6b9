"""Offer the command line's `run` to Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from refusalkit.checkpoint import quiet
from refusalkit.pipeline import execute
from refusalkit.plan import make_plan
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import load_registry
from refusalkit.run_directory import Run, read_run


def run(recipe: str | Path, out: str | Path | None = None, settings: Sequence[str] = ()) -> Run:
    """Run the recipe at `recipe` and return the finished run.

    `settings` override keys as `--set` does: `["model.dtype=float32"]`. Finished stages in `out` (by default
    `runs/NAME`) are not repeated.
    Raises `InputError` for a recipe that cannot be used, `RunError` for a run that fails.
    """
    path = Path(recipe)
    quiet()
    registry = load_registry()
    plan = make_plan(load_recipe(path, registry, settings), path.parent, registry)
    folder = Path(out) if out is not None else Path("runs") / plan.recipe.name
    execute(plan, folder)
    return read_run(folder)
