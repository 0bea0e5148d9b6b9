"""Offer to check recipes, and to say what may stand in them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from refusalkit.cli.shared import say
from refusalkit.errors import InputError


def validate(recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipes to check.")]) -> None:
    """Check recipes without running anything."""
    from refusalkit.recipe_file import load_members
    from refusalkit.registry import load_registry

    registry = load_registry()
    failed = False
    for path in recipes:
        try:
            members = load_members(path, registry)
        except InputError as error:
            failed = True
            say(error)
        else:
            print(f"{path}: ok" + (f", {len(members)} runs" if members[0].run else ""))
    if failed:
        raise typer.Exit(2)


def schema() -> None:
    """Print the JSON schema of recipes, installed plugins included."""
    import json

    from refusalkit.recipe import json_schema
    from refusalkit.registry import load_registry

    print(json.dumps(json_schema(load_registry()), indent=2))
