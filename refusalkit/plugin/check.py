"""Check the laws on everything that an installed plugin provides, and show what came of it."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refusalkit.errors import InputError, RefusalkitError, RunError, nearest
from refusalkit.registry import Owner, Registry

if TYPE_CHECKING:
    from refusalkit.testing.law_sets import LawSet

WIDTH = 80
PREFIX = "refusalkit-"


@dataclass(frozen=True)
class Checked:
    """Hold what came of one set of laws."""

    laws: LawSet
    n_laws: int = 0
    broken: tuple[str, ...] = ()
    """Every law that does not hold, with its number; or what the plugin's code raised instead."""
    unchecked: str | None = None
    """Why nothing could be checked."""

    @property
    def state(self) -> str:
        """The outcome in a word or two."""
        if self.unchecked is not None:
            return "not checked"
        return "BROKEN" if self.broken else f"{self.n_laws} laws hold"


def installed_plugin(registry: Registry, name: str) -> Owner:
    """Return the distribution that a user means, `refusalkit-` before its name or not.

    Raises `InputError` when nothing of that name is installed, `RunError` when it is and cannot be loaded.
    """
    owners = list(dict.fromkeys([*registry.owners.values(), *(broken.owner for broken in registry.broken)]))
    found = [owner for owner in owners if short(owner.name) == short(name)]
    if not found:
        raise InputError(
            f"no plugin is called {name!r}",
            where="plugin",
            hint=f"{nearest(short(name), [short(owner.name) for owner in owners])} "
            "(`refusalkit plugins` lists what is installed)",
        )
    for broken in registry.broken:
        if broken.owner in found:
            raise RunError(
                f"cannot be loaded: {broken.error}",
                where=str(broken.owner),
                hint="mend it and install it again; until then refusalkit works without it",
            )
    return found[0]


def short(name: str) -> str:
    """Return a distribution's name as pip compares it, without the prefix that plugins share."""
    return re.sub(r"[-_.]+", "-", name).lower().removeprefix(PREFIX)


def check_plugin(registry: Registry, owner: Owner, advance: Callable[[int, int], None]) -> tuple[Checked, ...]:
    """Check every law on everything that `owner` provides; what its code raises breaks the law it was asked for."""
    from refusalkit.testing.law_sets import law_sets

    sets = law_sets(registry, owner.name)
    checked = []
    for number, laws in enumerate(sets):
        advance(number, len(sets))
        checked.append(_checked(laws))
    return tuple(checked)


def _checked(laws: LawSet) -> Checked:
    from refusalkit.testing.law_sets import UncheckedError

    try:
        found = laws.check()
    except UncheckedError as error:
        return Checked(laws, unchecked=str(error))
    except Exception as error:  # noqa: BLE001
        # Whatever a stranger's code raises is a result of the check.
        said = str(error) if isinstance(error, RefusalkitError) else f"it raises {type(error).__name__}: {error}"
        return Checked(laws, broken=(said,))
    return Checked(laws, len(found), tuple(str(law) for law in found if not law.holds))


def check_text(owner: Owner, checked: Sequence[Checked]) -> str:
    """Return a table of what was checked, then every law that broke and what could not be checked, and why."""
    details = [f"{one.laws}: {text}" for one in checked for text in one.broken]
    unchecked = [f"{one.laws.kind} {one.laws.name}: {one.unchecked}" for one in checked if one.unchecked is not None]
    details += dict.fromkeys(unchecked)
    wrapped = [textwrap.fill(" ".join(text.split()), WIDTH, subsequent_indent="  ") for text in details]
    return "\n".join([str(owner), "", *_table(checked), *([""] if wrapped else []), *wrapped])


def _table(checked: Sequence[Checked]) -> list[str]:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for column in ("kind", "name", "on", "laws"):
        table.add_column(column, overflow="fold")
    for one in checked:
        table.add_row(one.laws.kind, one.laws.name, one.laws.on, one.state)
    written = io.StringIO()
    Console(file=written, width=WIDTH, markup=False, highlight=False, color_system=None).print(table)
    return [line.rstrip() for line in written.getvalue().splitlines()]
