"""Gather the numbers of an audit from what a run left behind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from refusalkit.artifacts import Choice, Result, ScoreRow
from refusalkit.builtin.candidates import NO_DIFFERENCE, PRUNED
from refusalkit.errors import RunError
from refusalkit.metric import Side
from refusalkit.paired import Difference, Sample, difference
from refusalkit.report.finding import split_controls
from refusalkit.report.measured import BASELINE, find
from refusalkit.run_directory import Run

ABLATION = "ablate"


@dataclass(frozen=True)
class LayerRow:
    """Hold the best direction of one layer by what its removal does to validation requests."""

    layer: int
    row: ScoreRow | None
    """The position whose removal leaves the lowest refusal score within the KL limit; None where none is within."""

    @property
    def suffices(self) -> bool:
        """Whether its removal alone takes the mean refusal score below 0."""
        return self.row is not None and self.row.refusal_score is not None and self.row.refusal_score < 0


@dataclass(frozen=True, eq=False)
class Findings:
    """Hold every number that an audit judges, and those that explain them."""

    refusal_rate: Result
    """Of held-out harmful requests, as is everything that does not say otherwise."""
    margin: Result
    """Mean refusal score, in nats."""
    ablated: Result
    """Refusal rate with the chosen direction removed."""
    control: Result
    """Refusal rate with the control direction removed that lowers it most, of those that leave the model whole."""
    n_controls: int
    breaking: tuple[tuple[Result, Result], ...]
    """Controls that break the model, which is no evidence of what it refuses: refusal rate, and KL in nats."""
    lost: Difference
    """How much lower `ablated` is than `control`, request by request."""
    kl: Result
    """Of the removal on held-out harmless requests, in nats."""
    layers: tuple[LayerRow, ...]
    """Those at which there is a direction, without the last ones, which act on the output tokens directly."""
    choice: Choice
    max_kl_nats: float
    over_refusal: Result
    """Refusal rate of held-out harmless requests that look harmful."""
    over_refused: tuple[str, ...]
    """Those of them that are refused."""

    @property
    def layer_share(self) -> float:
        """Share of layers at which one direction suffices; not-a-number where the model does not refuse anyway."""
        if (self.choice.baseline_refusal_score or 0) <= 0:
            return math.nan
        return sum(row.suffices for row in self.layers) / len(self.layers)


def gather(run: Run) -> Findings:
    """Read an audit's numbers out of its run.

    Raises `RunError` when the run did not measure one of them.
    """
    controls, breaking = split_controls(run.evaluation, ABLATION, "harmful", "refusal_rate")
    if not controls:
        raise RunError(
            "no control direction was removed to compare with that leaves the model whole",
            where="evaluate.controls",
            hint="an audit needs at least 1; leave the key out to take 3",
        )
    control = min(controls, key=lambda rate: rate.value)
    ablated = _result(run, ABLATION, "harmful", "refusal_rate")
    lost = difference(Sample(ablated.values), Sample(control.values), "rate")
    assert lost is not None, "a refusal rate has a value for every request"
    over = _result(run, BASELINE, "over_refusal", "refusal_rate")
    return Findings(
        refusal_rate=_result(run, BASELINE, "harmful", "refusal_rate"),
        margin=_result(run, BASELINE, "harmful", "refusal_score"),
        ablated=ablated,
        control=control,
        n_controls=len(controls),
        breaking=breaking,
        lost=lost,
        kl=_result(run, ABLATION, "harmless", "kl"),
        layers=tuple(_layers(run.choice)),
        choice=run.choice,
        max_kl_nats=float(run.recipe["select"]["max_kl_nats"]),
        over_refusal=over,
        over_refused=tuple(
            prompt
            for prompt, refused in zip(run.prompts.of("over_refusal", "test"), over.values, strict=True)
            if refused == 1
        ),
    )


def _result(run: Run, label: str, side: Side, metric: str) -> Result:
    found = find(run.evaluation.results, label, side, metric)
    if found is None or not math.isfinite(found.value):
        raise RunError(
            f"{metric} of {side} requests under {label!r} was not measured",
            where="evaluate",
            hint="an audit needs prompts of every side, `ablate`, and the metrics refusal_rate, refusal_score and kl",
        )
    return found


def _layers(choice: Choice) -> Iterator[LayerRow]:
    tried = [row for row in choice.scores if row.status not in (PRUNED, NO_DIFFERENCE)]
    for layer in sorted({row.layer for row in tried}):
        within = [row for row in tried if row.layer == layer and row.status in ("chosen", "survivor")]
        yield LayerRow(layer, min(within, key=lambda row: row.refusal_score or 0.0, default=None))
