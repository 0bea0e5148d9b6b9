"""Offer everything on the command line.

stdout is data, stderr is talk. Exit status 0: done; 1: the run failed or could not mean anything; 2: bad input.
Commands import what they need when they run, so that `--help` is instant.
"""

from __future__ import annotations

import os
import signal
import sys

import typer

from refusalkit.cli.models import adapters, ndif_app, tiny_app
from refusalkit.cli.plugins import Commands, plugin_app, plugins
from refusalkit.cli.recipes import schema, validate
from refusalkit.cli.results import compare, convert, report, reproduce
from refusalkit.cli.running import bake, plan, run
from refusalkit.cli.safety import audit, monitor
from refusalkit.cli.shared import say
from refusalkit.errors import Interrupted, RefusalkitError

app = typer.Typer(
    name="refusalkit",
    cls=Commands,
    help="Find, measure and repair the refusal direction of language models, from a recipe.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    run, plan, validate, schema, plugins, adapters, report, compare, reproduce, bake, monitor, audit, convert
):  # fmt: skip
    app.command()(command)
app.add_typer(tiny_app, name="tiny")
app.add_typer(ndif_app, name="ndif")
app.add_typer(plugin_app, name="plugin")


def main() -> None:
    """Run the command line and turn errors into messages and exit statuses."""
    signal.signal(signal.SIGINT, _interrupt)
    # Threads that spin while they wait make a run five times slower on a machine whose cores are shared. Read by the
    # OpenMP runtime when torch is imported, so it has to be set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except RefusalkitError as error:
        say(error)
        sys.exit(error.exit_status)
    except Interrupted as stop:
        print(f"\ninterrupted; {stop}", file=sys.stderr)
        sys.exit(130)


def _interrupt(*_: object) -> None:
    raise Interrupted("finished stages are kept, and the same command goes on from there")
