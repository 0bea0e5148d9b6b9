"""Show what the model can still do under each intervention."""

from __future__ import annotations

from typing import Literal

from refusalkit.artifacts import CapabilityFound, TaskScore
from refusalkit.paired import Difference, Sample, holm
from refusalkit.paired import difference as compared
from refusalkit.report.measured import BASELINE
from refusalkit.report.part import Part, Plain
from refusalkit.report.wording import NOTHING_TO_SHOW, difference, p_value, without_count

_TEXT = (
    "Tasks of EleutherAI's lm-evaluation-harness {version}, scored by it on the unmodified model and under every "
    "intervention. Brackets hold 95% intervals over documents: Wilson for accuracies, bootstrap for other means, the "
    "harness's own standard error otherwise. Differences from the unmodified model are tested document by document, "
    "with p-values corrected by Holm's method over this table."
)


def capability(found: CapabilityFound) -> Part:
    """Put every task before and after into one table."""
    before = {(score.task, score.metric): score for score in found.scores if score.intervention == BASELINE}
    changes = {
        place: change
        for place, score in enumerate(found.scores)
        if score.intervention != BASELINE and (change := _change(before[score.task, score.metric], score)) is not None
    }
    corrected = dict(zip(changes, holm([change.p for change in changes.values()]), strict=True))
    order = {label: place for place, label in enumerate(before)}
    places = sorted(
        range(len(found.scores)), key=lambda place: order[found.scores[place].task, found.scores[place].metric]
    )
    rows = [_row(found.scores[place], changes.get(place), corrected.get(place)) for place in places]
    heads = ("task", "metric", "intervention", "n", "score", "difference", "p, corrected")
    table = Plain("Tasks before and after", heads, tuple(rows), 4)
    return Part("What the model can still do", (_TEXT.format(version=found.version),), (), (table,))


def _change(first: TaskScore, second: TaskScore) -> Difference | None:
    if not first.values or len(first.values) != len(second.values):
        return None
    kind: Literal["rate", "mean"] = "rate" if first.kind == second.kind == "rate" else "mean"
    return compared(Sample(first.values), Sample(second.values), kind)


def _row(score: TaskScore, change: Difference | None, p: float | None) -> tuple[str, ...]:
    return (
        score.task,
        score.metric,
        score.intervention,
        str(score.n),
        without_count(score),
        NOTHING_TO_SHOW if change is None else difference(change, score.kind),
        NOTHING_TO_SHOW if p is None else p_value(p),
    )
