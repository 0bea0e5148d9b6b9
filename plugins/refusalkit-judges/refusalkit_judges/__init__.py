"""Let other models judge completions: Llama Guard, HarmBench, StrongREJECT, and any chat endpoint with a rubric."""

from __future__ import annotations

from collections.abc import Sequence

from refusalkit import hookimpl
from refusalkit.metric import Metric
from refusalkit_judges.published import HarmBench, LlamaGuard, StrongReject
from refusalkit_judges.rubric import Rubric

__all__ = ["HarmBench", "LlamaGuard", "Rubric", "StrongReject"]


@hookimpl
def refusalkit_metrics() -> Sequence[type[Metric]]:
    return (LlamaGuard, HarmBench, StrongReject, Rubric)
