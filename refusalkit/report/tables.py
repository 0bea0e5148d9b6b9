"""Gather the tables of the page: plain rows of text, escaped where they are written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from refusalkit.agreement import Agreement
from refusalkit.artifacts import Choice, Result, WeightEdit
from refusalkit.metric import Side
from refusalkit.report.changes import Change
from refusalkit.report.heat_map import scores
from refusalkit.report.measured import find, in_order, is_control, sides
from refusalkit.report.wording import bracketed, difference, number, p_value, percent, side_name, without_count


@dataclass(frozen=True)
class Column:
    """Head one column of results."""

    metric: str
    side: Side
    unit: str
    n: int | None
    """How many prompts every number of the column rests on, or None where that differs."""
    missing: int = 0
    """How many prompts have no value, where that is the same for every number."""

    @property
    def counted(self) -> str:
        """What every number rests on, in words; empty where that differs."""
        return _counted(self.n, self.missing)


@dataclass(frozen=True)
class Cell:
    """Hold one number as text, and its own `n` where the column has no common one."""

    text: str
    n: int | None = None
    missing: int = 0

    @property
    def counted(self) -> str:
        """What the number rests on, in words; empty where its column says so."""
        return _counted(self.n, self.missing)


def _counted(n: int | None, missing: int) -> str:
    return "" if n is None else f"n = {n}" + (f", {missing} missing" if missing else "")


@dataclass(frozen=True)
class Row:
    """Hold the numbers of one intervention."""

    label: str
    control: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Hold results by intervention."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def by_intervention(everything: Sequence[Result], metrics: Sequence[str]) -> Table:
    """Put interventions in rows and metrics by side in columns."""
    results = [row for row in everything if row.metric in metrics]
    columns = tuple(_column(results, metric, side) for metric in metrics for side in sides(results, metric))
    rows = tuple(
        Row(label, is_control(label), tuple(_cell(results, label, column) for column in columns))
        for label in in_order([row.intervention for row in results])
    )
    return Table(columns, rows)


def _column(results: Sequence[Result], metric: str, side: Side) -> Column:
    chosen = [row for row in results if row.metric == metric and row.prompts == side]
    counts = {(row.n, row.missing) for row in chosen if math.isfinite(row.value) or row.missing}
    n, missing = counts.pop() if len(counts) == 1 else (None, 0)
    return Column(metric, side, chosen[0].unit, n, missing)


def _cell(results: Sequence[Result], label: str, column: Column) -> Cell:
    result = find(results, label, column.side, column.metric)
    counted = (result.n, result.missing) if result is not None and column.n is None else (None, 0)
    return Cell(without_count(result), *counted)


@dataclass(frozen=True)
class AgreementRow:
    """Hold what the page says of two judges on one side."""

    metrics: tuple[str, str]
    side: str
    n: int
    share: str
    kappa: str


def agreement_rows(agreements: Sequence[Agreement]) -> list[AgreementRow]:
    """Write how far every two judges agree."""
    return [
        AgreementRow(
            (row.first, row.second),
            side_name(row.prompts),
            row.n,
            percent(row.share),
            bracketed(row.kappa, row.low, row.high, digits=2),
        )
        for row in agreements
    ]


@dataclass(frozen=True)
class ChangeRow:
    """Hold one difference as text."""

    what: str
    beside: str
    metric: str
    side: Side
    change: str
    p: str
    marked: bool


def change_row(change: Change, what: str, beside: str) -> ChangeRow:
    """Write a difference under what it is the difference of."""
    second = change.second
    text = difference(change.found, second.kind)
    return ChangeRow(what, beside, second.metric, second.prompts, text, p_value(change.p), change.marked)


@dataclass(frozen=True)
class Fate:
    """Count the candidates that ended the same way."""

    status: str
    count: int
    unscored: int
    """How many of them lack a score that others have."""


def fates(choice: Choice) -> list[Fate]:
    """Count how many candidates were chosen, survived, or fell to which reason."""
    counts = Counter(row.status for row in choice.scores)
    names = [score.name for score in scores(choice)]
    unscored = Counter(
        row.status
        for row in choice.scores
        if any(row.extra.get(name, getattr(row, name, None)) is None for name in names)
    )
    order = sorted(counts, key=lambda status: (status != "chosen", status != "survivor", -counts[status], status))
    return [Fate(status, counts[status], unscored[status]) for status in order]


@dataclass(frozen=True)
class EditRow:
    """Hold what the page says of one weight edit."""

    label: str
    edited: tuple[str, ...]
    untied: bool
    gap: str
    claim: str


def weight_edits(edits: Sequence[WeightEdit]) -> list[EditRow]:
    """Say of every weight edit how far it is from ablation, and whether it claims to be the same."""
    return [
        EditRow(
            edit.label,
            edit.edited,
            edit.untied,
            number(edit.max_logit_gap, 2),
            _claim(edit),
        )
        for edit in edits
    ]


def _claim(edit: WeightEdit) -> str:
    if edit.plain_logit_gap is not None:
        gap = number(edit.plain_logit_gap, 2)
        return f"{edit.claim}; up to {gap} standard deviations from the edit that does not keep them"
    return edit.claim or "equivalent to ablating the activations on this architecture"
