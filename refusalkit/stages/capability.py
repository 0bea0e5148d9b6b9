"""Score tasks of the lm-evaluation-harness before and after every intervention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from refusalkit.analysis import Capability
from refusalkit.artifacts import CapabilityFound, TaskScore
from refusalkit.intervals import Interval, bootstrap, wilson
from refusalkit.intervention import NOTHING
from refusalkit.stages.cases import Case, all_cases, chosen_direction
from refusalkit.stages.findings import Findings

_Z = 1.96
#: What the harness says beside the numbers.
_WORDS = ("alias", "name", "sample_len")


def study_capability(analysis: Capability, findings: Findings) -> CapabilityFound:
    """Let the harness score the unmodified model, and the model under each intervention, controls left out."""
    import lm_eval

    alone = findings.section.model_copy(update={"controls": 0})
    direction = chosen_direction(findings.activations, findings.choice, findings.splits, findings.bench)
    scores: list[TaskScore] = []
    for case in all_cases(alone, direction, None):
        scores += _scores(case.label, _asked(case, analysis, findings), findings.section.seed)
    return CapabilityFound(version=str(lm_eval.__version__), scores=tuple(scores))


def _asked(case: Case, analysis: Capability, findings: Findings) -> dict[str, Any]:
    from refusalkit.stages.harness import EngineLM, ask

    bench, change = findings.bench, case.intervention
    basis = change.weights
    acting = change if basis is None else NOTHING
    model = EngineLM(bench.engine, bench.template.tokenizer, acting, bench.advance(f"tasks under {case.label}"))
    options = {
        "num_fewshot": analysis.fewshot,
        "limit": analysis.limit,
        "apply_chat_template": analysis.chat_template,
    }
    with nullcontext() if basis is None else bench.engine.edited_weights(basis, change.keeps_norms):
        return ask(model, analysis.tasks, analysis.folder, options)


def _scores(label: str, found: Mapping[str, Any], seed: int) -> Iterator[TaskScore]:
    """Put intervals on what the harness found: ours where a number is the mean of its documents', else its own."""
    for task, numbers in found["results"].items():
        for key, value in numbers.items():
            metric, _, kept = key.partition(",")
            if key in _WORDS or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            values = _values(found["samples"].get(task, ()), metric, kept)
            mean = bool(values) and math.isclose(sum(values) / len(values), value, abs_tol=1e-9)
            n = int(found["n-samples"].get(task, {}).get("effective", 0))
            interval = (
                _interval(values, seed) if mean else _around(float(value), numbers.get(f"{metric}_stderr,{kept}"), n)
            )
            yield TaskScore(
                intervention=label,
                task=task,
                metric=metric if kept == "none" else f"{metric}, {kept}",
                value=interval.value,
                low=interval.low,
                high=interval.high,
                n=interval.n,
                kind="rate" if mean and set(values) <= {0.0, 1.0} else "mean",
                values=values if mean else (),
            )


def _values(samples: Any, metric: str, kept: str) -> tuple[float, ...]:
    """Return a document's number each, in the documents' order; nothing where they are not plain numbers."""
    rows = sorted((row for row in samples if row.get("filter") == kept), key=lambda row: row["doc_id"])
    found = [row.get(metric) for row in rows]
    return tuple(float(value) for value in found) if all(isinstance(value, int | float) for value in found) else ()


def _interval(values: tuple[float, ...], seed: int) -> Interval:
    return wilson(values) if set(values) <= {0.0, 1.0} else bootstrap(values, seed=seed)


def _around(value: float, error: Any, n: int) -> Interval:
    half = _Z * float(error) if isinstance(error, int | float) else math.nan
    return Interval(value, value - half, value + half, n)
