"""Write a report as data: everything a run knows as JSON, or every number of its evaluation as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from refusalkit.artifacts import Evaluation
from refusalkit.report.changes import Change, effects
from refusalkit.report.finding import sentence
from refusalkit.run_directory import Run

COLUMNS = ("intervention", "prompts", "metric", "unit", "kind", "value", "low", "high", "n", "missing")


def render_json(run: Run, *, show_completions: bool = False) -> str:
    """Write everything that the page shows; completions to harmful prompts are null unless asked for."""
    generated = _plain(run.evaluation.generated)
    for row in generated:
        if row["prompts"] == "harmful" and not show_completions:
            row["texts"] = None
    document = {
        **run.summary,
        "finding": sentence(run.choice, run.evaluation, repairs=run.candidates.repairs),
        "tests": tests(run.evaluation),
        "candidates": _plain(run.choice.scores),
        "separation": _plain(run.evaluation.separation),
        "weight_edits": _plain(run.evaluation.weight_edits),
        "gates": _plain(run.evaluation.gates),
        **({} if run.analyses is None else {"analyses": _plain(run.analyses.found)}),
        "completions": generated,
        "environment": run.environment,
        "resolved_recipe": run.recipe,
    }
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def render_csv(run: Run) -> str:
    """Write one line a number, with its interval; a field is empty where there is no number."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    results = (*run.evaluation.results, *run.evaluation.gates)
    writer.writerows({**row, "missing": one.missing} for row, one in zip(_plain(results), results, strict=True))
    return out.getvalue()


def tests(evaluation: Evaluation) -> dict[str, Any]:
    """Return every paired test of a run, by what it compares with: the content of `tests.json`, version 1."""
    found = effects(evaluation)
    return {
        "version": 1,
        "from_unmodified": [_test(change) for change in found.from_unmodified],
        "from_controls": [_test(change) for change in found.from_controls],
        "between_interventions": [_test(change) for change in found.between],
    }


def _test(change: Change) -> dict[str, Any]:
    return {
        "intervention": change.second.intervention,
        "against": change.first.intervention,
        "prompts": change.second.prompts,
        "metric": change.second.metric,
        "difference": change.found.value,
        "low": change.found.low,
        "high": change.found.high,
        "p": change.found.p,
        "p_corrected": change.p,
        "n": change.found.n,
    }


def _plain(rows: Iterable[BaseModel]) -> list[dict[str, Any]]:
    """Turn values into what JSON can hold, not-a-number into null."""
    return [json.loads(row.model_dump_json()) for row in rows]
