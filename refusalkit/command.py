"""Say what a plugin adds to the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """Provide a command of `refusalkit`: a name and the function behind it."""

    name: str
    """What stands behind `refusalkit` on the command line; none of refusalkit's own."""
    run: Callable[..., None]
    """A function that Typer can offer: its parameters are annotated, its docstring is the help, and errors are raised
    as `InputError` or `RunError`. Importing its module must be quick: import inside it what is not."""
