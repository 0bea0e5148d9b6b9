"""Measure what interventions do to the held-out test prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.artifacts import (
    Activations,
    Choice,
    Completions,
    Evaluation,
    Generated,
    PromptSplits,
    Result,
    Separation,
    WeightEdit,
)
from refusalkit.builtin.interventions import ablate_everywhere
from refusalkit.errors import RunError
from refusalkit.intervals import bootstrap, wilson
from refusalkit.intervention import NOTHING, Direction, Intervention, InterventionSpec
from refusalkit.metric import Evidence, Metric, Side
from refusalkit.recipe import EvaluateSection
from refusalkit.stages.bench import Bench

SIDES: tuple[Side, Side] = ("harmful", "harmless")
Tokens = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Case:
    """Hold one thing to compare: an intervention with the label it has in tables."""

    label: str
    intervention: Intervention
    acts: bool
    """Whether it is meant to change anything."""


@dataclass(frozen=True, eq=False)
class Baseline:
    """Hold what the unmodified model did to one side's test prompts; every case is compared with it."""

    prompts: tuple[str, ...]
    tokens: tuple[Tokens, ...]
    """Up to where the answer starts."""
    openings: tuple[Tokens, ...]
    """Up to where the model writes; the same unless it thinks."""
    logits: Tensor
    completions: tuple[Tokens, ...]


@dataclass(frozen=True, eq=False)
class Outcome:
    """Hold everything one case made of both sides."""

    results: list[Result]
    generated: list[Generated]
    logits: dict[Side, Tensor]


def needs_completions(section: EvaluateSection) -> bool:
    """Whether a metric asks what the unmodified model answers."""
    return any(metric.needs in ("completions", "losses") for metric in section.metrics)


def complete(section: EvaluateSection, splits: PromptSplits, bench: Bench) -> Completions:
    """Let the unmodified model answer both sides' test prompts.

    Raises `RunError` where no completion comes to an answer.
    """
    token_ids = {
        side: tuple(
            bench.engine.generate(
                bench.openings(splits.of(side, "test")),
                None,
                section.max_new_tokens,
                bench.advance(f"completions of the unmodified model to {side} prompts"),
            )
        )
        for side in SIDES
    }
    for completions in token_ids.values():
        if all(bench.template.answer(ids) is None for ids in completions):
            raise RunError(
                f"no completion comes to an answer: every thought is longer than {section.max_new_tokens} tokens",
                where="evaluate.max_new_tokens",
                hint="raise it, or leave `prompts.thinking` out",
            )
    return Completions(token_ids=token_ids)


def evaluate(
    section: EvaluateSection,
    found: tuple[Activations, Choice],
    splits: PromptSplits,
    said: Completions | None,
    bench: Bench,
) -> Evaluation:
    """Run every intervention, and its random controls, on both sides' test prompts.

    `said` holds the unmodified model's completions where a metric needs them.
    Raises `RunError` when an intervention that should act changes no logit.
    """
    activations, choice = found
    harmless = activations.harmless_mean[activations.positions.index(choice.position)].float()
    direction = Direction(
        choice.direction.float(), choice.position, choice.layer, len(harmless), activations.site, harmless
    )
    baselines = {
        side: _baseline(splits.of(side, "test"), said.token_ids[side] if said else (), bench) for side in SIDES
    }
    cases = _cases(section, direction)
    outcomes: dict[str, Outcome] = {}
    edits = []
    for number, case in enumerate(cases):
        with _in_place(case, bench) as edited:
            outcomes[case.label] = _run(section, case, baselines, splits, bench)
        _check_finite(case, outcomes[case.label])
        if case.acts:
            _check_acts(case, outcomes[case.label], baselines)
        if edited is not None:
            edits.append(_weight_edit(case, direction, edited, outcomes[case.label], baselines, bench))
        bench.progress.advance("interventions", number + 1, len(cases))
    return Evaluation(
        results=tuple(result for outcome in outcomes.values() for result in outcome.results),
        generated=tuple(texts for outcome in outcomes.values() for texts in outcome.generated),
        separation=tuple(_separation(side, baselines[side], direction, bench) for side in SIDES),
        weight_edits=tuple(edits),
    )


def _cases(section: EvaluateSection, direction: Direction) -> list[Case]:
    """List what to run: the unmodified model first, then each intervention followed by its controls."""
    cases = [Case("none", NOTHING, acts=False)]
    for spec in section.interventions:
        if not spec.uses_direction:
            continue
        cases.append(Case(spec.label, spec.build(direction), acts=True))
        if spec.on_weights:
            # Its control would be that of the same ablation in the activations.
            continue
        for number in range(section.controls):
            control = _random_like(direction, section.seed + number)
            cases.append(Case(_control_label(spec, number), spec.build(control), acts=False))
    return cases


def _control_label(spec: InterventionSpec, number: int) -> str:
    name, parenthesis, options = spec.label.partition("(")
    suffix = f"_{number + 1}" if number else ""
    return f"{name}_random{suffix}{parenthesis}{options}"


def _random_like(direction: Direction, seed: int) -> Direction:
    """Draw a random direction with the norm of `direction`."""
    vector = direction.vector
    draw = torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed))
    scaled = algebra.unit(draw) * vector.norm(dim=-1, keepdim=True)
    return replace(direction, vector=scaled)


def _baseline(prompts: tuple[str, ...], completions: tuple[Tokens, ...], bench: Bench) -> Baseline:
    tokens = bench.tokens(prompts)
    return Baseline(prompts, tokens, bench.openings(prompts), bench.engine.logits(tokens), completions)


@contextmanager
def _in_place(case: Case, bench: Bench) -> Iterator[tuple[tuple[str, ...], bool] | None]:
    """Hold the weights edited while a case that edits weights runs."""
    if case.intervention.weights is None:
        yield None
        return
    with bench.engine.edited_weights(case.intervention.weights) as edited:
        yield edited.names, edited.untied


def _run(
    section: EvaluateSection, case: Case, baselines: Mapping[Side, Baseline], splits: PromptSplits, bench: Bench
) -> Outcome:
    outcome = Outcome([], [], {})
    plain = case.label == "none"
    for side in SIDES:
        base = baselines[side]
        engine, what = bench.engine, f"{case.label} on {side} prompts"
        metrics = [metric for metric in section.metrics if side in metric.sides]
        needs = {metric.needs for metric in metrics}
        outcome.logits[side] = base.logits if plain else engine.logits(base.tokens, case.intervention)
        texts: tuple[str, ...] = ()
        if "completions" in needs:
            made = (
                base.completions
                if plain
                else engine.generate(base.openings, case.intervention, section.max_new_tokens, bench.advance(what))
            )
            answers = [bench.template.answer(ids) or () for ids in made]
            texts = tuple(bench.template.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers)
        losses = counts = None
        if "losses" in needs:
            losses, counts = engine.losses(base.openings, base.completions, case.intervention)
        evidence = Evidence(
            side, base.prompts, splits.openers.token_ids, texts, outcome.logits[side], base.logits, losses, counts
        )
        measured = [(metric, _result(metric, case.label, evidence, section.seed)) for metric in metrics]
        outcome.results.extend(result for _, result in measured)
        if texts:
            verdicts = [result.values for metric, result in measured if (metric.kind, metric.needs) == _VERDICT]
            refused = tuple(value == 1 for value in verdicts[0]) if verdicts else None
            outcome.generated.append(Generated(intervention=case.label, prompts=side, texts=texts, refused=refused))
    return outcome


#: What tells of each completion whether it is a refusal.
_VERDICT = ("rate", "completions")


def _result(metric: Metric, label: str, evidence: Evidence, seed: int) -> Result:
    measured = metric.measure(evidence)
    if metric.kind == "rate":
        interval = wilson(measured.values)
    else:
        interval = bootstrap(measured.values, measured.weights, seed=seed)
    kind: Literal["rate", "mean"] = metric.kind
    return Result(
        intervention=label,
        prompts=evidence.side,
        metric=metric.metric,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        n=interval.n,
        unit=metric.unit,
        kind=kind,
        values=measured.values,
        weights=measured.weights,
    )


def _check_finite(case: Case, outcome: Outcome) -> None:
    bad = [side for side in SIDES if not outcome.logits[side].isfinite().all()]
    if bad:
        raise RunError(
            f"the logits on {' and '.join(bad)} test prompts are not numbers",
            where=f"evaluate.interventions: {case.label}",
            hint="use a smaller scale, or load the model with `model.dtype: float32`",
        )


def _check_acts(case: Case, outcome: Outcome, baselines: Mapping[Side, Baseline]) -> None:
    if all(torch.equal(outcome.logits[side], baselines[side].logits) for side in SIDES):
        raise RunError(
            "changes nothing: the logits of every test prompt are those of the unmodified model",
            where=f"evaluate.interventions: {case.label}",
            hint="a scale of 0 changes nothing; otherwise the adapter may name modules that do not write the residual "
            "stream (docs/symptoms.md)",
        )


def _weight_edit(
    case: Case,
    direction: Direction,
    edited: tuple[tuple[str, ...], bool],
    outcome: Outcome,
    baselines: Mapping[Side, Baseline],
    bench: Bench,
) -> WeightEdit:
    ablation = ablate_everywhere(direction)
    gaps = []
    for side in SIDES:
        expected = bench.engine.logits(baselines[side].tokens, ablation)
        gaps.append((outcome.logits[side] - expected).abs().max().item() / expected.std().item())
    names, untied = edited
    return WeightEdit(
        label=case.label,
        edited=names,
        untied=untied,
        claim=bench.engine.adapter.inexact,
        max_logit_gap=max(gaps),
    )


def _separation(side: Side, baseline: Baseline, direction: Direction, bench: Bench) -> Separation:
    """Show how the test prompts of one side lie along the direction in every layer."""
    found = bench.engine.capture(baseline.tokens, (direction.position,), direction.site, keep_samples=True)
    assert found.samples is not None
    main = algebra.unit(direction.vector.reshape(-1, direction.vector.shape[-1])[0])
    cosines = (algebra.unit(found.samples[:, 0]) @ main).double()
    low, high = torch.quantile(cosines, torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
    return Separation(
        prompts=side, mean=tuple(cosines.mean(0).tolist()), low=tuple(low.tolist()), high=tuple(high.tolist())
    )
