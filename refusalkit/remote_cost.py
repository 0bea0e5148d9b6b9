"""Estimate what a run asks of an NDIF server: jobs, and bytes both ways, before anything is sent.

Upper bounds: a selector drops most candidates before the last scores, and what repeats is compressed on its way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from refusalkit.analysis import Directions, Suffixes
from refusalkit.artifacts import Split
from refusalkit.engine.jobs import MOST_WORK
from refusalkit.metric import TextMetric
from refusalkit.plan import Plan
from refusalkit.stages.asking import WRITTEN
from refusalkit.stages.compare_directions import N_FOLDS, Groups
from refusalkit.stages.prompts import MOST_OPENERS
from refusalkit.stages.suffixes import append

#: The source that travels with every job, in bytes.
_SOURCE = 12_000
#: A job's tokens: ids that hardly repeat, masks and positions that do.
_PER_TOKEN = 4
_FLOAT64, _FLOAT32, _INT32 = 8, 4, 4


@dataclass(frozen=True)
class Cost:
    """Hold what one stage asks of a server."""

    jobs: int
    bytes_up: float
    bytes_down: float


def costs(plan: Plan) -> dict[str, Cost]:
    """Estimate every stage that asks the model something."""
    selecting = {"select": _select(plan)} if plan.recipe.select.runs_model else {}
    analyzing = {"analyze": _analyze(plan)} if plan.recipe.analyze else {}
    return {
        "prompts": _prompts(plan),
        "capture": _capture(plan),
        **selecting,
        "evaluate": _evaluate(plan),
        **analyzing,
    }


def _tokens(plan: Plan, prompts: Sequence[str]) -> float:
    """Return how many tokens prompts have together, from the first few of them."""
    few = prompts[:16]
    return len(prompts) * sum(len(plan.template.tokens(prompt)) for prompt in few) / max(1, len(few))


def _jobs(work: float) -> int:
    return max(1, -int(-work // MOST_WORK))


def _prompts_in(plan: Plan, *splits: Split) -> list[str]:
    return [prompt for side in plan.prompts.sides.values() for split in splits for prompt in side[split]]


def _prompts(plan: Plan) -> Cost:
    asked = _prompts_in(plan, "train", "validation")
    n_tokens = len(plan.prompts.family_openers) + MOST_OPENERS
    return Cost(1, _SOURCE + _PER_TOKEN * _tokens(plan, asked), len(asked) * n_tokens * _FLOAT64)


def _capture(plan: Plan) -> Cost:
    asked = [prompt for side in plan.sides for prompt in plan.prompts.sides[side]["train"]]
    size = plan.n_candidates * plan.checkpoint.d_model
    # The means of two halves a side.
    down = len(asked) * size * _FLOAT32 if plan.needs == "samples" else 2 * len(plan.sides) * size * _FLOAT64
    return _read(_tokens(plan, asked), down)


def _select(plan: Plan) -> Cost:
    validation = {side: plan.prompts.sides[side]["validation"] for side in plan.recipe.select.sides}
    harmless = validation.pop("harmless")
    harmful = [prompt for prompts in validation.values() for prompt in prompts]
    few, many = _tokens(plan, harmful), _tokens(plan, harmless)
    # Two baselines, then the induced score, the KL and the bypass score of candidates.
    jobs = 2 + 2 * _jobs(plan.n_candidates * many) + _jobs(plan.n_candidates * few)
    vectors = 3 * plan.n_candidates * plan.checkpoint.d_model * _FLOAT32
    scores = plan.n_candidates * (2 * len(harmless) + len(harmful)) * _FLOAT64
    return Cost(jobs, jobs * _SOURCE + vectors + _PER_TOKEN * (2 * few + 3 * many), scores)


def _evaluate(plan: Plan) -> Cost:
    section = plan.recipe.evaluate
    asked = _prompts_in(plan, "test")
    acting = sum(spec.uses_direction for spec in section.interventions)
    cases = 1 + acting * (1 + section.n_controls)
    needs = {metric.needs for metric in section.metrics}
    tokens = _tokens(plan, asked)
    written = len(asked) * section.max_new_tokens if needs & WRITTEN else 0
    texts = sum(_text_tokens(plan, metric) for metric in plan.evaluate.metrics if isinstance(metric, TextMetric))
    further = len(needs & {"token_kl", "written_losses", "projections"})
    work = cases * ((2 + further) * tokens + (2 + further) * written + texts)
    vectors = cases * plan.checkpoint.d_model * _FLOAT32
    logits = len(asked) * plan.checkpoint.d_vocab * _FLOAT32 if "logits" in needs else 0
    down = cases * (written * _INT32 + logits + 5 * len(asked) * _FLOAT64)
    down += len(asked) * plan.checkpoint.n_layers * _FLOAT64
    # What the unmodified model writes is asked for before, and what the others have written is read after.
    jobs = _jobs(work) + (1 if written else 0) + ("written_losses" in needs)
    up = _PER_TOKEN * (tokens + cases * (written + texts + further * (tokens + written)))
    return _together([Cost(jobs, jobs * _SOURCE + vectors + up, down), *_gates(plan)])


def _gates(plan: Plan) -> Iterator[Cost]:
    """Every side that gates learn from is read in a job of its own, then all that they open for."""
    specs = plan.recipe.evaluate.interventions
    size = plan.checkpoint.d_model * _FLOAT32
    for side in {side for spec in specs for side in spec.learns_from}:
        prompts = plan.prompts.sides[side]["train"]
        yield _read(_tokens(plan, prompts), len(prompts) * size)
    if gates := sum(spec.gated for spec in specs):
        asked = _prompts_in(plan, "test")
        yield _read(gates * _tokens(plan, asked), gates * len(asked) * _FLOAT64)


def _read(tokens: float, down: float) -> Cost:
    jobs = _jobs(tokens)
    return Cost(jobs, jobs * _SOURCE + _PER_TOKEN * tokens, down)


def _together(costs: Sequence[Cost]) -> Cost:
    return Cost(
        sum(cost.jobs for cost in costs), sum(cost.bytes_up for cost in costs), sum(cost.bytes_down for cost in costs)
    )


def _text_tokens(plan: Plan, metric: TextMetric) -> float:
    """Return how many tokens the texts of a metric have together with their prompts, from the first few of them."""
    few = metric.texts[:16]
    tokens = [
        min(len(plan.template.plain(passage.text)), metric.max_tokens)
        + (0 if passage.prompt is None else len(plan.template.tokens(passage.prompt)))
        for passage in few
    ]
    return len(metric.texts) * sum(tokens) / max(1, len(few))


def _analyze(plan: Plan) -> Cost:
    """Every analysis asks in one go."""
    asked = []
    for analysis, groups in zip(plan.recipe.analyze, plan.groups, strict=True):
        if isinstance(analysis, Suffixes):
            asked.append(_suffixes(plan, analysis))
        elif isinstance(analysis, Directions):
            asked.append(_directions(plan, analysis, groups))
    return _together(asked)


def _directions(plan: Plan, analysis: Directions, groups: Groups) -> Cost:
    own = [plan.prompts.sides[side]["train"] for side in ("harmful", "harmless")]
    taken = [*own, *(prompts[: analysis.most] for prompts in groups.values())]
    tokens = sum(_tokens(plan, prompts) for prompts in taken)
    size = len(analysis.positions) * plan.checkpoint.n_layers * plan.checkpoint.d_model
    jobs = _jobs(tokens)
    return Cost(jobs, jobs * _SOURCE + 2 * _PER_TOKEN * tokens, len(taken) * N_FOLDS * size * _FLOAT64)


def _suffixes(plan: Plan, analysis: Suffixes) -> Cost:
    harmful, harmless = (plan.prompts.sides[side]["test"] for side in ("harmful", "harmless"))
    # As they are, then with each suffix and with random tokens like it.
    asked = [*harmless, *harmful]
    for text in analysis.append.values():
        asked += [append(prompt, text) for prompt in harmful] * 2
    writes = any(metric.needs == "completions" for metric in plan.recipe.evaluate.metrics)
    written = len(asked) * plan.recipe.evaluate.max_new_tokens if writes else 0
    tokens = sum(len(plan.template.tokens(prompt)) for prompt in asked)
    jobs = _jobs(2 * tokens + written)
    up = jobs * _SOURCE + 3 * _PER_TOKEN * tokens + plan.checkpoint.d_model * _FLOAT32
    return Cost(jobs, up, written * _INT32 + len(asked) * (plan.checkpoint.n_layers + 4) * _FLOAT64)
