"""Hold what a page says of one analysis, whatever it is of."""

from __future__ import annotations

from dataclasses import dataclass

from refusalkit.report.figure import Figure


@dataclass(frozen=True)
class Plain:
    """Hold a table as text; its last columns, `numbers` of them, are numbers."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: int


@dataclass(frozen=True, eq=False)
class Part:
    """Hold the sentences, figures and tables of one analysis."""

    title: str
    text: tuple[str, ...]
    figures: tuple[Figure, ...]
    tables: tuple[Plain, ...]
    side_by_side: bool = False
    """Whether its figures are small enough to stand next to each other."""
