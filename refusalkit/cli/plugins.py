"""Offer what plugin authors need, `refusalkit plugin`, and the commands of their plugins."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from refusalkit.errors import InputError
from refusalkit.hookspecs import NAME

plugin_app = typer.Typer(help="Start a plugin of your own, and check installed ones.", no_args_is_help=True)


def plugins() -> None:
    """List every plugin, its version, whether it works, and all it provides; of a broken one, its error.

    Exit status 1 says that one is broken. The others work all the same.
    """
    from refusalkit.plugin.listing import plugin_list
    from refusalkit.registry import load_registry

    registry = load_registry()
    print(plugin_list(registry))
    if registry.broken:
        raise typer.Exit(1)


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


class Commands(TyperGroup):
    """Offer the commands of plugins behind our own. Plugins are loaded for the list and for names that are not ours."""

    _origins: dict[str, str] | None = None  # of the commands that are not ours, once they are loaded

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the first sentence of every command, whole; those of plugins stand under their plugin's name."""
        names = self.list_commands(ctx)
        origins = self._origins or {}
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in names:
            text = (self.get_command(ctx, name).help or "").partition("\n\n")[0]
            sections.setdefault(origins.get(name, "Commands"), []).append((name, text.replace("\n", " ")))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)

    def list_commands(self, ctx: Any) -> list[str]:
        """Return every name, ours first."""
        self._load()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command called `cmd_name`, or None."""
        if cmd_name not in self.commands:
            self._load()
        return super().get_command(ctx, cmd_name)

    def _load(self) -> None:
        """Take the commands of plugins over; raises `InputError` for one that has the name of ours."""
        # Where no plugin is installed, help need not wait for the registry.
        if self._origins is not None or not importlib.metadata.entry_points(group=NAME):
            return
        self._origins = {}
        from refusalkit.registry import load_registry

        registry = load_registry()
        for name, command in registry.commands.items():
            owner = registry.owner("refusalkit_commands", name)
            if name in self.commands:
                raise InputError(
                    f"refusalkit has a command called {name!r} itself", where=str(owner), hint="uninstall that plugin"
                )
            app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
            app.command(name)(command.run)
            self._origins[name] = f"From {owner}"
            self.commands[name] = typer.main.get_command(app)
