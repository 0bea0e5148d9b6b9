"""Offer to run recipes, to say before what they would do, and to write a checkpoint that keeps what they found."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refusalkit.cli.shared import Settings, Until, execute, folder_of, load, plan_of, say
from refusalkit.errors import InputError

if TYPE_CHECKING:
    from refusalkit.batch import Batch


def run(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipes in YAML.")],
    out: Annotated[Path | None, typer.Option(help="The run's folder; by default runs/NAME.")] = None,
    until: Annotated[Until, typer.Option(help="Stop after this stage.")] = Until.report,
    jobs: Annotated[int, typer.Option(min=1, help="How many runs at a time, each in a process of its own.")] = 1,
    settings: Settings = None,
) -> None:
    """Run recipes: find a direction, choose one, measure what it does, write a report.

    Finished stages are kept: an interrupted run goes on where it stopped. Several recipes, and the runs of a sweep, are
    all checked before the first starts; one that fails stops no other, and a table at the end says how each ended. A
    sweep ends in a comparison of its runs.
    """
    batches = _plan_all(recipes, settings, out)
    if len(batches) > 1 or batches[0].is_sweep:
        from refusalkit.many import run_batches

        raise typer.Exit(run_batches(batches, until.value, jobs))
    (planned,) = batches[0].runs
    execute(planned.plan, planned.out, until)
    if until is Until.report:
        print(planned.out / "report.html")


def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML.")],
    out: Annotated[Path | None, typer.Option(help="The run's folder, to see what is already done there.")] = None,
    settings: Settings = None,
) -> None:
    """Show what a recipe would do, before any weight is loaded."""
    (batch,) = _plan_all([recipe], settings, out)
    from refusalkit.plan_text import describe, describe_sweep

    planned = batch.runs[0]
    print(describe_sweep(batch) if batch.is_sweep else describe(planned.plan, planned.out))


def _plan_all(recipes: list[Path], settings: list[str] | None, out: Path | None) -> list[Batch]:
    """Plan every run that the recipes ask for, and say of each recipe what is wrong with it."""
    from refusalkit.recipe_file import load_members
    from refusalkit.registry import load_registry

    if out is not None and len(recipes) > 1:
        raise InputError(
            "several recipes need several folders", where="--out", hint="leave it out: they go to runs/NAME"
        )
    registry, read, batches, errors = load_registry(), [], [], []
    for path in recipes:
        try:
            read.append((path, load_members(path, registry, settings or ())))
        except InputError as error:
            errors.append(error)
    if read:
        # Takes seconds to import, which nobody with a typo in a recipe has to wait for.
        from refusalkit.batch import check_folders, plan_batch
        from refusalkit.checkpoint import quiet

        quiet()
    for path, members in read:
        try:
            batches.append(plan_batch(path, members, out, registry))
        except InputError as error:
            errors.append(error)
    for found in errors[:-1]:
        say(found)
    if errors:
        raise errors[-1]
    check_folders(batches)
    return batches


def bake(
    source: Annotated[Path, typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe, or a finished run's folder.")],
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes; a new folder.")],
    settings: Settings = None,
) -> None:
    """Write a checkpoint with the direction removed from its weights, and a model card that says so."""
    is_run = source.is_dir()
    recipe = source / "recipe.yaml" if is_run else source
    if is_run and not recipe.is_file():
        raise InputError("the folder holds no run", where=str(source), hint="name a recipe, or a run's folder")
    if is_run:
        # The prompts are not needed again, and may lie elsewhere.
        checked, registry = load(recipe, settings)
        from refusalkit.checkpoint import open_checkpoint, quiet

        quiet()
        folder, checkpoint = source, open_checkpoint(checked.model, registry)
    else:
        made = plan_of(recipe, settings)
        folder, checkpoint = folder_of(made, None), made.checkpoint
        execute(made, folder, Until.select)
    from refusalkit.artifacts import Choice
    from refusalkit.bake import bake as write_checkpoint
    from refusalkit.store import Store

    choice = Store(folder).load(Choice)
    if choice is None:
        raise InputError("the run has not chosen a direction yet", where=str(folder), hint="run its recipe first")
    edited = write_checkpoint(checkpoint, choice, out)
    print(f"{len(edited.names)} parameters changed", file=sys.stderr)
    print(out)
