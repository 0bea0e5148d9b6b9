"""Measure what interventions do to the held-out test prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isnan
from typing import Any, Literal

import torch
from torch import Tensor

from refusalkit.artifacts import (
    Activations,
    Choice,
    Evaluation,
    Generated,
    PromptSplits,
    Result,
    Separation,
    Unmodified,
    WeightEdit,
)
from refusalkit.builtin.interventions import ablate_everywhere
from refusalkit.engine.request import Completions, Cosines, Readings, Request, reading
from refusalkit.errors import RunError
from refusalkit.intervals import bootstrap, wilson
from refusalkit.intervention import NOTHING, Direction, Intervention
from refusalkit.metric import Evidence, Metric, Side, TextMetric
from refusalkit.recipe import EvaluateSection
from refusalkit.stages.asking import (
    WRITTEN,
    Asked,
    Outcome,
    Outcomes,
    Sums,
    asked_of,
    of_all,
    of_one,
    read_back,
    sums_of,
)
from refusalkit.stages.bench import Bench
from refusalkit.stages.cases import Case, all_cases, chosen_direction
from refusalkit.stages.gates import gate_rates


def complete(section: EvaluateSection, splits: PromptSplits, bench: Bench) -> Unmodified:
    """Let the unmodified model complete the test prompts, where a metric looks at what it writes.

    Raises `RunError` where no completion comes to an answer.
    """
    writing = [each for each in asked_of(section, splits, bench) if each.needs & WRITTEN]
    requests = [Completions(each.openings, NOTHING, each.max_new_tokens) for each in writing]
    found = bench.engine.run(requests, bench.advance("completions of the unmodified model")) if requests else []
    written = {each.side: tuple(completions) for each, completions in zip(writing, found, strict=True)}
    if any(all(bench.template.answer(ids) is None for ids in completions) for completions in written.values()):
        raise RunError(
            f"no completion comes to an answer: every thought is longer than {section.max_new_tokens} tokens",
            where="evaluate.max_new_tokens",
            hint="raise it, or leave `prompts.thinking` out",
        )
    return Unmodified(completions=written)


def evaluate(
    section: EvaluateSection,
    found: tuple[Activations, Choice],
    splits: PromptSplits,
    unmodified: Unmodified,
    bench: Bench,
) -> Evaluation:
    """Run every intervention, and its controls, on every side's test prompts.

    Raises `RunError` when an intervention that should act changes no logit.
    """
    activations, choice = found
    row = activations.positions.index(choice.position)
    direction = chosen_direction(activations, choice, splits, bench)
    shuffled = None if activations.shuffled is None else activations.shuffled[row, choice.layer].float()
    cases = all_cases(section, direction, shuffled)
    written = unmodified.completions
    asked = [replace(each, completions=written.get(each.side, ())) for each in asked_of(section, splits, bench)]
    outcomes, shared, separation = _on_activations(cases, asked, direction, bench)
    edits = []
    for case in cases:
        if case.intervention.weights is not None:
            plain = {each.side: outcomes["none", each.side].unmodified for each in asked}
            made, edit = _on_weights(case, asked, plain, direction, bench)
            outcomes.update(made)
            edits.append(edit)
        _check(case, *({each.side: outcomes[label, each.side] for each in asked} for label in (case.label, "none")))
    outcomes = {key: replace(made, sums={**made.sums, **shared[key]}) for key, made in outcomes.items()}
    outcomes = read_back(asked, outcomes, bench)
    evidence = {
        (case.label, each.side): _evidence(each, outcomes[case.label, each.side], bench)
        for case in cases
        for each in asked
    }
    results = _measured(section, evidence, outcomes, bench)
    return Evaluation(
        results=results,
        generated=_generated(evidence, results),
        separation=separation,
        weight_edits=tuple(edits),
        gates=gate_rates(cases, asked, bench),
    )


def _on_activations(
    everything: Sequence[Case], asked: Sequence[Asked], direction: Direction, bench: Bench
) -> tuple[Outcomes, dict[tuple[str, Side], dict[str, Sums]], tuple[Separation, ...]]:
    """Ask everything about every case that leaves the weights alone, and how the prompts lie along the direction.

    In between stands what was asked about all cases at once, by case and side.
    """
    cases = [case for case in everything if case.intervention.weights is None]
    edits_weights = len(cases) < len(everything)
    interventions = [case.intervention for case in cases]
    requests: dict[tuple[str, Side, str], Request] = {}
    for each in asked:
        requests["", each.side, "readings"] = Readings(
            each.tokens, interventions, each.opener_ids, keep_logits=edits_weights or "logits" in each.needs
        )
        requests["", each.side, "cosines"] = Cosines(each.tokens, direction.main, direction.position, direction.site)
        requests.update({("", each.side, need): made for need, made in of_all(everything, each, direction).items()})
        for case in cases:
            requests.update({(case.label, each.side, kind): made for kind, made in of_one(case, each).items()})
    found = bench.engine.run(list(requests.values()), bench.advance("interventions"))
    answers: dict[tuple[str, Side, str], Any] = dict(zip(requests, found, strict=True))
    outcomes: Outcomes = {}
    for each in asked:
        readings = answers["", each.side, "readings"]
        for case, made in zip(cases, readings, strict=True):
            mine = {what: answer for (*whose, what), answer in answers.items() if whose == [case.label, each.side]}
            completions = mine.pop("completions", each.completions)
            outcomes[case.label, each.side] = Outcome(made, readings[0].logits, tuple(completions), mine)
    shared = {
        (case.label, each.side): {
            need: sums_of(answers["", each.side, need], number) for need in of_all(everything, each, direction)
        }
        for each in asked
        for number, case in enumerate(everything)
    }
    return outcomes, shared, tuple(_separation(each.side, answers["", each.side, "cosines"]) for each in asked)


def _on_weights(
    case: Case, asked: Sequence[Asked], unmodified: Mapping[Side, Tensor | None], direction: Direction, bench: Bench
) -> tuple[Outcomes, WeightEdit]:
    """Run a case with its weights edited, and compare it with the same ablation of the activations."""
    engine, ablation, basis = bench.engine, ablate_everywhere(direction), case.intervention.weights
    assert basis is not None
    keeps_norms = case.intervention.keeps_norms
    expected = {each.side: engine.logits(each.tokens, ablation) for each in asked}
    simpler: dict[Side, Tensor] = {}
    if keeps_norms:
        with engine.edited_weights(basis):
            simpler = {each.side: engine.logits(each.tokens) for each in asked}
    outcomes: Outcomes = {}
    logits: dict[Side, Tensor] = {}
    with engine.edited_weights(basis, keeps_norms) as edited:
        for each in asked:
            plain = unmodified[each.side]
            assert plain is not None
            logits[each.side] = engine.logits(each.tokens)
            writing = of_one(case, each)
            found = engine.run(list(writing.values()), bench.advance(f"{case.label} on {each.side} prompts"))
            answers = dict(zip(writing, found, strict=True))
            outcomes[case.label, each.side] = Outcome(
                reading(logits[each.side], plain, each.opener_ids, keep_logits=True),
                plain,
                tuple(answers.pop("completions", ())),
                answers,
            )
    return outcomes, WeightEdit(
        label=case.label,
        edited=edited.names,
        untied=edited.untied,
        claim="the columns of the blocks' matrices keep their lengths" if keeps_norms else engine.adapter.inexact,
        max_logit_gap=_gap(logits, expected),
        plain_logit_gap=_gap(logits, simpler) if keeps_norms else None,
    )


def _gap(logits: Mapping[Side, Tensor], others: Mapping[Side, Tensor]) -> float:
    return max(((logits[side] - other).abs().max() / other.std()).item() for side, other in others.items())


def _check(case: Case, outcomes: Mapping[Side, Outcome], plain: Mapping[Side, Outcome]) -> None:
    """Refuse numbers that mean nothing, given what the unmodified model did."""
    where = f"evaluate.interventions: {case.label}"
    bad = [side for side, outcome in outcomes.items() if not outcome.reading.finite]
    if bad:
        raise RunError(
            f"the logits on {' and '.join(bad)} test prompts are not numbers",
            where=where,
            hint="use a smaller scale, or load the model with `model.dtype: float32`",
        )
    if case.acts and not any(_moved(outcome, plain[side]) for side, outcome in outcomes.items()):
        raise RunError(
            "changes nothing: the logits of every test prompt are those of the unmodified model",
            where=where,
            hint=_why_nothing(case.intervention),
        )


def _moved(outcome: Outcome, plain: Outcome) -> bool:
    """Say whether anything that was measured differs: what acts on generated tokens alone moves no first logit."""
    if outcome.reading.moved or outcome.completions != plain.completions:
        return True
    both = outcome.sums.keys() & plain.sums.keys()
    return any(not torch.equal(outcome.sums[what][0], plain.sums[what][0]) for what in both)


def _why_nothing(intervention: Intervention) -> str:
    if intervention.gate is not None:
        return "its gate opens for no test prompt: set another `threshold`"
    if intervention.edits and all((edit.tokens[0] or 0) > 0 for edit in intervention.edits):
        return "it acts on generated tokens alone: measure completions (`refusal_rate`) or losses (`cross_entropy`)"
    return (
        "a scale of 0 changes nothing; otherwise the adapter may name modules that do not write the residual stream "
        "(docs/symptoms.md)"
    )


def _evidence(asked: Asked, outcome: Outcome, bench: Bench) -> Evidence:
    """Gather what the metrics of one side look at, but for what is summed over tokens."""
    answers: tuple[tuple[int, ...], ...] = ()
    if asked.writes:
        answers = tuple(bench.template.answer(ids) or () for ids in outcome.completions)
    texts = tuple(bench.template.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers)
    return Evidence(
        asked.side,
        asked.prompts,
        asked.opener_ids,
        completions=texts,
        completion_ids=answers,
        refusal_scores=outcome.reading.refusal_scores,
        kl_nats=outcome.reading.kl_nats,
        logits=outcome.reading.logits,
        baseline_logits=outcome.unmodified,
    )


def _with_sums(evidence: Evidence, metric: Metric, outcome: Outcome) -> Evidence:
    """Fill in what was summed over tokens for this metric."""
    if isinstance(metric, TextMetric):
        none = torch.full((len(metric.texts),), float("nan"), dtype=torch.float64)
        losses, counts = outcome.sums.get(metric.label, (none, torch.zeros_like(none)))
        prompts = tuple(passage.text if passage.prompt is None else passage.prompt for passage in metric.texts)
        return replace(evidence, prompts=prompts, losses=losses, n_tokens=counts)
    if metric.needs not in outcome.sums:
        return evidence
    values, counts = outcome.sums[metric.needs]
    match metric.needs:
        case "token_kl":
            return replace(evidence, token_kl=values, n_tokens=counts)
        case "projections":
            return replace(evidence, projections=values)
        case _:
            return replace(evidence, losses=values, n_tokens=counts)


def _measured(
    section: EvaluateSection, evidence: Mapping[tuple[str, Side], Evidence], outcomes: Outcomes, bench: Bench
) -> tuple[Result, ...]:
    """Let one metric after the other measure everything, so that a judge is loaded once; the order is by case."""
    parts = [part for metric in section.metrics for part in metric.parts]
    found: dict[tuple[str, Side, str], Result] = {}
    for part in parts:
        advance = bench.advance(part.label)
        asked = [key for key in evidence if key[1] in part.sides]
        for number, (label, side) in enumerate(asked):
            advance(number, len(asked))
            found[label, side, part.label] = summarise(
                part, label, _with_sums(evidence[label, side], part, outcomes[label, side]), section.seed
            )
    return tuple(found[*key, part.label] for key in evidence for part in parts if (*key, part.label) in found)


def _generated(evidence: Mapping[tuple[str, Side], Evidence], results: Sequence[Result]) -> tuple[Generated, ...]:
    """Keep the completions, with the verdicts of the first metric that tells refusals."""
    judging = next((result.metric for result in results if result.verdict == "refused"), None)
    verdicts = {(row.intervention, row.prompts): row.values for row in results if row.metric == judging}
    return tuple(
        Generated(
            intervention=label,
            prompts=side,
            texts=each.completions,
            refused=tuple(None if isnan(value) else value == 1 for value in verdicts[label, side])
            if (label, side) in verdicts
            else None,
        )
        for (label, side), each in evidence.items()
        if each.completions
    )


def summarise(metric: Metric, label: str, evidence: Evidence, seed: int) -> Result:
    """Let one metric measure what became of a side's prompts, and put an interval on it."""
    measured = metric.measure(evidence)
    if metric.kind == "rate":
        interval = wilson(measured.values)
    else:
        interval = bootstrap(measured.values, measured.weights, seed=seed)
    kind: Literal["rate", "mean"] = metric.kind
    return Result(
        intervention=label,
        prompts=evidence.side,
        metric=metric.label,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        n=interval.n,
        unit=metric.unit,
        kind=kind,
        values=measured.values,
        weights=measured.weights,
        verdict=metric.verdict,
    )


def _separation(side: Side, cosines: Tensor) -> Separation:
    """Show how the test prompts of one side lie along the direction in every layer; cosines [prompt, layer]."""
    low, high = torch.quantile(cosines, torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
    return Separation(
        prompts=side, mean=tuple(cosines.mean(0).tolist()), low=tuple(low.tolist()), high=tuple(high.tolist())
    )
