"""Count the test prompts that the gates of interventions open for."""

from __future__ import annotations

from collections.abc import Sequence

from refusalkit.artifacts import GATE_RATE, Result
from refusalkit.engine.request import Projections
from refusalkit.intervals import wilson
from refusalkit.intervention import NOTHING, Place
from refusalkit.stages.asking import Asked
from refusalkit.stages.bench import Bench
from refusalkit.stages.cases import Case


def gate_rates(cases: Sequence[Case], asked: Sequence[Asked], bench: Bench) -> tuple[Result, ...]:
    """Read every gate on every side's test prompts; controls have the gate of what they control for."""
    waiting = [
        (case.label, case.intervention.gate, each)
        for case in cases
        if case.acts and case.intervention.gate is not None
        for each in asked
    ]
    requests = [
        Projections(each.tokens, [NOTHING], gate.vector, Place(gate.site, gate.layer, gate.position))
        for _, gate, each in waiting
    ]
    found = bench.engine.run(requests, bench.advance("gates")) if requests else []
    results = []
    for (label, gate, each), readings in zip(waiting, found, strict=True):
        opened = tuple((readings[0] >= gate.threshold).double().tolist())
        share = wilson(opened)
        results.append(
            Result(
                intervention=label,
                prompts=each.side,
                metric=GATE_RATE,
                value=share.value,
                low=share.low,
                high=share.high,
                n=share.n,
                unit="fraction of prompts",
                kind="rate",
                values=opened,
            )
        )
    return tuple(results)
