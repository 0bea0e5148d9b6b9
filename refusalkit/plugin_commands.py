"""Offer what plugin authors need on the command line: `refusalkit plugin`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

plugin_app = typer.Typer(help="Start a plugin of your own, and check installed ones.", no_args_is_help=True)


@plugin_app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="What it is for, in a word or two: conditional-steering.")],
    out: Annotated[Path, typer.Option(help="The folder to write it into.")] = Path(),
) -> None:
    """Write a plugin that works, refusalkit-NAME, for you to change: a strategy, an adapter and their test."""
    from refusalkit.plugin.new import new_plugin
    from refusalkit.registry import load_registry

    folder = new_plugin(name, out, load_registry())
    print(f"next: pip install -e {folder} && refusalkit plugin check {name}", file=sys.stderr)
    print(folder)


@plugin_app.command("check")
def check(
    name: Annotated[str, typer.Argument(help="An installed plugin, or refusalkit for what is built in.")],
) -> None:
    """Check the laws of refusalkit.testing on everything that a plugin provides.

    Models are tiny and random, made from configurations. Exit status 1 says that a law is broken.
    """
    from refusalkit.plugin.check import check_plugin, check_text, installed_plugin
    from refusalkit.registry import load_registry

    registry = load_registry()
    owner = installed_plugin(registry, name)
    from refusalkit.checkpoint import quiet
    from refusalkit.progress import progress

    quiet()
    with progress() as shown:
        shown.stage("check", "running")
        checked = check_plugin(registry, owner, lambda done, total: shown.advance("laws", done, total))
        shown.stage("check", "done")
    print(check_text(owner, checked))
    if any(one.broken for one in checked):
        print(f"`pytest --refusalkit={owner.name}` shows where", file=sys.stderr)
        raise typer.Exit(1)
