"""Write a report as Markdown: what was found, the tables, and where they come from. It holds no completion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from refusalkit.agreement import agreements
from refusalkit.artifacts import GATE_RATE
from refusalkit.report import tables
from refusalkit.report.analyses import parts
from refusalkit.report.chance import chance
from refusalkit.report.finding import sentence
from refusalkit.report.measured import costs_first, metrics, without_number
from refusalkit.report.provenance import provenance
from refusalkit.report.tables import AgreementRow, ChangeRow, Table
from refusalkit.report.wording import side_name
from refusalkit.run_directory import Run


def render_markdown(run: Run) -> str:
    """Write the report of a run, for a pull request, a wiki or a terminal."""
    return "\n".join(_lines(run)) + "\n"


def _lines(run: Run) -> Iterator[str]:
    evaluation, choice, origin = run.evaluation, run.choice, provenance(run)
    yield from (f"# {run.recipe.get('name') or run.folder.name}", "")
    yield from (sentence(choice, evaluation, repairs=run.candidates.repairs), "")
    yield from ("Brackets hold 95% intervals: Wilson for rates, bootstrap for means.", "")
    for title, kind in (("Rates", "rate"), ("Means", "mean")):
        if names := costs_first(metrics(evaluation, kind)):
            yield from (f"## {title} over held-out requests", "")
            yield from (*_results(tables.by_intervention(evaluation.results, names)), "")
    if names := without_number(evaluation):
        yield from ("## Every value is missing", "", *_results(tables.by_intervention(evaluation.results, names)), "")
    if evaluation.gates:
        yield from ("## How often a gate opens", "")
        yield from (*_results(tables.by_intervention(evaluation.gates, [GATE_RATE])), "")
    if agreed := tables.agreement_rows(agreements(evaluation.results)):
        yield from ("## How far verdicts on the same completions agree", "", *_agreement(agreed), "")
    tested = chance(evaluation)
    if changes := (*tested.rates, *tested.others):
        yield from ("## Could chance have done it?", "", *_changes(changes), "", *tested.power, "")
    yield from ("## How the direction was chosen", "")
    yield f"Layer {choice.layer}, position {choice.position}, by {choice.selector}; found by {run.candidates.strategy}."
    fates = [(fate.status, str(fate.count), str(fate.unscored)) for fate in tables.fates(choice)]
    yield from ("", *_table(("status", "candidates", "not fully scored"), fates, numbers=2), "")
    for part in parts(run):
        yield from (f"## {part.title}", "", *part.text, "")
        for table in part.tables:
            yield from (*_table(table.heads, table.rows, numbers=table.numbers), "")
    yield from ("## Where the numbers come from", "")
    for title, pairs in (("Model", origin.model), ("Versions", origin.versions), ("Refusal openers", origin.openers)):
        yield from (*_table((title, ""), pairs, numbers=0), "")
    used = [(row.side, row.split, str(row.used), row.dropped) for row in origin.prompts]
    yield from _table(("side", "split", "used", "dropped by the filter"), used, numbers=2)


def _results(table: Table) -> Iterator[str]:
    heads = [
        ", ".join(filter(None, (column.metric, side_name(column.side), column.unit, column.counted)))
        for column in table.columns
    ]
    rows = [
        (row.label, *(", ".join(filter(None, (cell.text, cell.counted))) for cell in row.cells)) for row in table.rows
    ]
    return _table(("intervention", *heads), rows, numbers=len(heads))


def _agreement(agreed: Iterable[AgreementRow]) -> Iterator[str]:
    heads = ("verdicts", "requests", "completions", "agree on", "Cohen's kappa")
    rows = [(" and ".join(row.metrics), row.side, str(row.n), row.share, row.kappa) for row in agreed]
    return _table(heads, rows, numbers=3)


def _changes(changes: Iterable[ChangeRow]) -> Iterator[str]:
    heads = ("intervention", "against", "metric", "requests", "difference", "p, corrected")
    rows = [(row.what, row.beside, row.metric, side_name(row.side), row.change, row.p) for row in changes]
    return _table(heads, rows, numbers=2)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int) -> Iterator[str]:
    """Write a table whose last columns, `numbers` of them, are set to the right."""
    yield _row(heads)
    yield _row(["---"] * (len(heads) - numbers) + ["---:"] * numbers)
    yield from map(_row, rows)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"
