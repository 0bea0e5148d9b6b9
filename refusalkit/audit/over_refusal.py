"""Measure how often the model refuses harmless requests that look harmful."""

from __future__ import annotations

from collections.abc import Sequence

from refusalkit.artifacts import Artifact, Result
from refusalkit.builtin.metrics import RefusalRate
from refusalkit.engine.request import Completions
from refusalkit.intervals import wilson
from refusalkit.intervention import NOTHING
from refusalkit.metric import Evidence
from refusalkit.stages.bench import Bench

#: Where these requests come from.
ADDRESS = "builtin:over_refusal_safe"


class OverRefusal(Artifact):
    """Hold which of the requests were refused; what the model wrote is not kept."""

    stage = "over_refusal"

    refused: tuple[str, ...]
    result: Result


def over_refusal(prompts: Sequence[str], max_new_tokens: int, bench: Bench) -> OverRefusal:
    """Let the unmodified model answer the requests, greedily, and count its refusals."""
    request = Completions(bench.openings(prompts), NOTHING, max_new_tokens)
    (completions,) = bench.engine.run([request], bench.advance("completions"))
    answers = [bench.template.answer(ids) or () for ids in completions]
    texts = tuple(bench.template.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers)
    metric = RefusalRate()
    values = metric.measure(Evidence("harmless", tuple(prompts), (), completions=texts)).values
    rate = wilson(values)
    return OverRefusal(
        refused=tuple(prompt for prompt, value in zip(prompts, values, strict=True) if value == 1),
        result=Result(
            intervention="none",
            prompts="harmless",
            metric=metric.metric,
            value=rate.value,
            low=rate.low,
            high=rate.high,
            n=rate.n,
            unit=metric.unit,
            kind="rate",
            values=values,
        ),
    )
