"""Offer `refusalkit search`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def search(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML, which trials change.")],
    space: Annotated[Path, typer.Argument(metavar="SPACE", help="What may change, and what is better, in YAML.")],
    trials: Annotated[int, typer.Option(min=1, help="Trials of the search, and as many of random search.")] = 50,
    out: Annotated[Path | None, typer.Option(help="The search's folder; by default runs/NAME-search.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides which trials are drawn.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set model.dtype=float32")
    ] = None,
) -> None:
    """Search the values of a recipe's keys: chosen on validation prompts, reported on test prompts.

    The recipe as it is and a random search of the same size stand beside what is found. Finished trials are kept: the
    same command goes on where it stopped, and with more --trials it adds some.
    """
    from refusalkit.checkpoint import quiet
    from refusalkit.progress import progress
    from refusalkit.registry import load_registry
    from refusalkit_search.outcome import text
    from refusalkit_search.run import Budget, run_search
    from refusalkit_search.setup import read_setup

    quiet()
    setup = read_setup(recipe, space, settings or (), load_registry())
    folder = out if out is not None else Path("runs") / f"{setup.name}-search"
    with progress() as shown:
        found = run_search(setup, folder, Budget(trials, seed), shown)
    print(text(found), file=sys.stderr)
    print(folder / "search.html")
