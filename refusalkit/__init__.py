"""Find, measure and repair the refusal direction of language models, from a recipe.

    import refusalkit
    result = refusalkit.run("recipes/quickstart.yaml", out="runs/quickstart")

Importing the package is light; torch and the model are loaded by the calls that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refusalkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from refusalkit.python import run

__version__ = "0.1.0"
__all__ = ["__version__", "hookimpl", "run"]


def __getattr__(name: str) -> Any:
    if name == "run":
        from refusalkit.python import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
