"""Say what went wrong in words a user can act on.

Every error a user can cause is one of two kinds. `InputError` is something the user wrote (exit status 2);
`RunError` is a run that failed or could not mean anything (exit status 1). Both carry what was seen, where, and one
hint; the command line prints exactly that and no traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class RefusalkitError(Exception):
    """Carry a message, the place it is about and one hint."""

    exit_status = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        hint = f"\nhint: {self.hint}" if self.hint else ""
        return f"{where}{self.message}{hint}"


class InputError(RefusalkitError):
    """Something the user wrote cannot be used: a recipe, a file, a name, an option."""

    exit_status = 2


class RunError(RefusalkitError):
    """The run failed, or its result could not mean anything."""


class Interrupted(BaseException):
    """Stop on Ctrl-C and say what is kept; nothing in between may take it for an ordinary error."""


def nearest(name: str, names: Sequence[str]) -> str:
    """Return a hint that points from a misspelt `name` to the nearest valid one, or lists them all."""
    import difflib

    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(names)}"
