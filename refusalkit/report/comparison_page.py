"""Write the page that compares runs: one HTML file that needs nothing else. It holds no completion of any model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refusalkit.artifacts import Evaluation, Result
from refusalkit.report.charts import file_name, words
from refusalkit.report.comparison import Comparison, Entry, alignment, differing
from refusalkit.report.figure import Figure
from refusalkit.report.intervals import chart
from refusalkit.report.measured import (
    BASELINE,
    control_mark,
    controls_of,
    costs_first,
    interventions,
    metrics,
    without_number,
)
from refusalkit.report.page import placed, render
from refusalkit.report.tables import Table, by_intervention, change_row
from refusalkit.report.wording import NOTHING_TO_SHOW, count, duration, number, with_interval
from refusalkit.store import cannot_write, write_text


@dataclass(frozen=True)
class ChoiceRow:
    """Hold what one run chose."""

    run: str
    link: str | None
    """The run's own report, where it lies below the page."""
    strategy: str
    model: str
    layer: int
    position: int
    survivors: str
    scores: tuple[str, str, str]
    alignment: str


@dataclass(frozen=True)
class CostRow:
    """Hold what one run cost."""

    run: str
    passes: str
    seconds: str
    shared: str


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page to `path`; its folder is made where there is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path.parent, error) from None
    write_text(path, render_comparison(comparison, path.parent))


def render_comparison(comparison: Comparison, folder: Path) -> str:
    """Write the page, which will lie in `folder`."""
    entries = comparison.entries
    changes = [change_row(change, change.run, change.second.intervention) for change in comparison.from_first]
    return render(
        "comparison.html.j2",
        kind="comparison",
        name=comparison.name,
        n_runs=count(len(entries), "run"),
        models=list(dict.fromkeys(_model(entry) for entry in entries)),
        toy=any(_model(entry).startswith("tiny:") for entry in entries),
        sentence=finding(comparison),
        first=entries[0].label,
        choices=[_choice_row(entry, entries[0], folder) for entry in entries],
        sections=[_section(comparison, label) for label in comparison.labels],
        n_from_unmodified=len(comparison.from_unmodified),
        n_from_first=len(comparison.from_first),
        changes=changes,
        marked=[row for row in changes if row.marked],
        notes=comparison.notes,
        runs=[entry.label for entry in entries],
        differing=differing(entries),
        costs=_costs(entries),
    )


def finding(comparison: Comparison) -> str:
    """Say in a sentence or two how far apart the runs are, following the numbers and nothing else."""
    results = [row for row in comparison.results if row.prompts == "harmful"]
    metric = next(iter([*(row.metric for row in results if row.kind == "rate"), *(row.metric for row in results)]), "")
    said = []
    for label in comparison.labels[:1]:
        under = [(row, entry) for entry in comparison.entries if (row := entry.result(label, "harmful", metric))]
        if not under:
            break
        (low, least), (high, most) = (edge(under, key=lambda pair: pair[0].value) for edge in (min, max))
        before = ""
        if len(comparison.unmodified) == 1:
            before = f", {with_interval(comparison.unmodified[0][1].result(BASELINE, 'harmful', metric))} without it,"
        said.append(
            f"Under {label}, the {words(metric)} of harmful requests{before} lies between {with_interval(low)} "
            f"({least.label}) and {with_interval(high)} ({most.label})."
        )
    if comparison.from_first:
        marked = sum(change.marked for change in comparison.from_first)
        n, first = len(comparison.from_first), comparison.entries[0].label
        said.append(
            f"Of {count(n, 'difference')} from {first}, {marked} {'is' if marked == 1 else 'are'} beyond chance."
        )
    return " ".join(said) or "Nothing in these runs can be compared."


def _model(entry: Entry) -> str:
    return str((entry.run.environment.get("model") or {}).get("id") or NOTHING_TO_SHOW)


def _choice_row(entry: Entry, first: Entry, folder: Path) -> ChoiceRow:
    run, choice = entry.run, entry.run.choice
    report = (run.folder / "report.html").resolve()
    below = report.is_relative_to(folder.resolve()) and report.is_file()
    rank = f", rank {choice.direction.shape[0]}" if choice.direction.dim() == 2 else ""
    scores = (choice.chosen.refusal_score, choice.chosen.induced_score, choice.chosen.kl_nats)
    return ChoiceRow(
        entry.label,
        report.relative_to(folder.resolve()).as_posix() if below else None,
        run.candidates.strategy + rank,
        _model(entry),
        choice.layer,
        choice.position,
        f"{choice.n_survivors} of {len(choice.scores)}",
        (number(scores[0]), number(scores[1]), number(scores[2])),
        number(alignment(first.run, run), 2) if entry is not first else NOTHING_TO_SHOW,
    )


def _section(comparison: Comparison, label: str) -> dict[str, Any]:
    """Show every run under one intervention, the unmodified models above and controls paler below each run."""
    rows = list(_rows(comparison, label))
    renamed = Evaluation(
        results=tuple(result.model_copy(update={"intervention": run}) for run, result in rows),
        generated=(),
        separation=(),
    )
    means = costs_first(metrics(renamed, "mean"))
    shown = [*metrics(renamed, "rate"), *means]
    table = _marked(by_intervention(renamed.results, [*shown, *without_number(renamed)]), comparison, label)
    figures = [_figure(renamed.results, metric, label) for metric in shown]
    return {"label": label, "figures": [placed(figure) for figure in figures], "table": table}


def _rows(comparison: Comparison, label: str) -> Iterator[tuple[str, Result]]:
    for model, entry in comparison.unmodified:
        yield from (
            (f"{model}, unmodified", row) for row in entry.run.evaluation.results if row.intervention == BASELINE
        )
    for entry in comparison.entries:
        names = {label: entry.label}
        for control in controls_of(label, interventions(entry.run.evaluation)):
            names[control] = f"{entry.label}{control_mark(control)}"
        for row in entry.run.evaluation.results:
            if row.intervention in names:
                yield names[row.intervention], row


def _marked(table: Table, comparison: Comparison, label: str) -> Table:
    runs = {entry.label: entry for entry in comparison.entries}
    rows = []
    for row in table.rows:
        cells = []
        for cell, column in zip(row.cells, table.columns, strict=True):
            result = runs[row.label].result(label, column.side, column.metric) if row.label in runs else None
            marks = comparison.marks(row.label, result) if result else ""
            cells.append(replace(cell, text=f"{cell.text} {marks}".rstrip()))
        rows.append(replace(row, cells=tuple(cells)))
    return replace(table, rows=tuple(rows))


def _figure(results: Sequence[Result], metric: str, label: str) -> Figure:
    unit = next(row.unit for row in results if row.metric == metric)
    rate = any(row.kind == "rate" for row in results if row.metric == metric)
    title = f"{words(metric)[0].upper()}{words(metric)[1:]} under {label}"
    return Figure(
        name=file_name("compared", label, metric),
        title=title,
        description=f"{title} with 95% intervals, by run.",
        chart=chart(results, metric, "share of held-out requests" if rate else unit, rows="run"),
        min_width=320,
    )


def _costs(entries: Sequence[Entry]) -> list[CostRow]:
    rows, together = [], [0.0, 0.0]
    for entry in entries:
        environment = entry.run.environment
        passes, seconds = (sum((environment.get(key) or {}).values()) for key in ("forward_passes", "seconds"))
        together = [together[0] + passes, together[1] + seconds]
        origins: dict[str, list[str]] = {}
        for stage, run in (environment.get("shared") or {}).items():
            origins.setdefault(run, []).append(stage)
        taken = "; ".join(f"{', '.join(stages)} from {run}" for run, stages in origins.items())
        rows.append(CostRow(entry.label, f"{passes:,.0f}", duration(seconds), taken or NOTHING_TO_SHOW))
    return [*rows, CostRow("together", f"{together[0]:,.0f}", duration(together[1]), "")]
