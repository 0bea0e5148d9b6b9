"""Measure what interventions do to the held-out test prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from refusalkit.engine.request import Completions, Cosines, Losses, Reading, Readings, Request, reading
from refusalkit.errors import RunError
from refusalkit.intervals import bootstrap, wilson
from refusalkit.intervention import NOTHING, Direction, Intervention
from refusalkit.metric import Evidence, Metric, Need, Side
from refusalkit.recipe import EvaluateSection
from refusalkit.stages.bench import Bench
from refusalkit.stages.cases import Case, all_cases

#: What metrics need that rests on completions of the unmodified model.
WRITTEN: set[Need] = {"completions", "losses"}
Tokens = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Asked:
    """Hold one side's test prompts, what is wanted of them, and what the unmodified model wrote."""

    side: Side
    prompts: tuple[str, ...]
    tokens: tuple[Tokens, ...]
    """Up to where the answer starts."""
    openings: tuple[Tokens, ...]
    """Up to where the model writes; the same unless it thinks."""
    opener_ids: tuple[int, ...]
    metrics: tuple[Metric, ...]
    """Those that mean something on this side."""
    max_new_tokens: int
    completions: tuple[Tokens, ...] = ()

    @property
    def needs(self) -> set[Need]:
        """What the metrics look at."""
        return {metric.needs for metric in self.metrics}


@dataclass(frozen=True, eq=False)
class Outcome:
    """Hold what one case made of one side's prompts."""

    reading: Reading
    unmodified: Tensor | None
    """The unmodified model's logits [prompt, d_vocab], where a metric or a weight edit needs logits."""
    completions: tuple[Tokens, ...] = ()
    losses: tuple[Tensor, Tensor] | None = None


Outcomes = dict[tuple[str, Side], Outcome]


def complete(section: EvaluateSection, splits: PromptSplits, bench: Bench) -> Unmodified:
    """Let the unmodified model complete the test prompts, where a metric looks at what it writes.

    Raises `RunError` where no completion comes to an answer.
    """
    writing = [each for each in _asked(section, splits, bench) if each.needs & WRITTEN]
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
    direction = Direction(
        choice.direction.float(),
        choice.position,
        choice.layer,
        activations.harmless_mean.shape[1],
        activations.site,
        activations.harmless_mean[row].float(),
        activations.harmful_mean[row].float(),
    )
    shuffled = None if activations.shuffled is None else activations.shuffled[row, choice.layer].float()
    cases = all_cases(section, direction, shuffled)
    written = unmodified.completions
    asked = [replace(each, completions=written.get(each.side, ())) for each in _asked(section, splits, bench)]
    outcomes, separation = _on_activations(cases, asked, direction, bench)
    edits = []
    for case in cases:
        if case.intervention.weights is not None:
            plain = {each.side: outcomes["none", each.side].unmodified for each in asked}
            made, edit = _on_weights(case, asked, plain, direction, bench)
            outcomes.update(made)
            edits.append(edit)
        _check(case, *({each.side: outcomes[label, each.side] for each in asked} for label in (case.label, "none")))
    results: list[Result] = []
    generated = []
    for case in cases:
        for each in asked:
            numbers, texts = _results(case, each, outcomes[case.label, each.side], section.seed, bench)
            results += numbers
            generated += texts
    return Evaluation(
        results=tuple(results), generated=tuple(generated), separation=separation, weight_edits=tuple(edits)
    )


def _asked(section: EvaluateSection, splits: PromptSplits, bench: Bench) -> tuple[Asked, ...]:
    return tuple(
        Asked(
            side,
            splits.of(side, "test"),
            bench.tokens(splits.of(side, "test")),
            bench.openings(splits.of(side, "test")),
            splits.openers.token_ids,
            tuple(metric for metric in section.metrics if side in metric.sides),
            section.max_new_tokens,
        )
        for side in splits.sides
    )


def _on_activations(
    cases: Sequence[Case], asked: Sequence[Asked], direction: Direction, bench: Bench
) -> tuple[Outcomes, tuple[Separation, ...]]:
    """Ask everything about every case that leaves the weights alone, and how the prompts lie along the direction."""
    edits_weights = any(case.intervention.weights is not None for case in cases)
    cases = [case for case in cases if case.intervention.weights is None]
    interventions = [case.intervention for case in cases]
    requests: dict[tuple[str, Side, str], Request] = {}
    for each in asked:
        requests["", each.side, "readings"] = Readings(
            each.tokens, interventions, each.opener_ids, keep_logits=edits_weights or "logits" in each.needs
        )
        requests["", each.side, "cosines"] = Cosines(each.tokens, direction.main, direction.position, direction.site)
        for case in cases:
            requests.update({(case.label, each.side, kind): made for kind, made in _writing(case, each).items()})
    found = bench.engine.run(list(requests.values()), bench.advance("interventions"))
    answers: dict[tuple[str, Side, str], Any] = dict(zip(requests, found, strict=True))
    outcomes: Outcomes = {}
    for each in asked:
        readings = answers["", each.side, "readings"]
        for case, made in zip(cases, readings, strict=True):
            key = (case.label, each.side)
            completions = answers.get((*key, "completions"), each.completions)
            outcomes[key] = Outcome(made, readings[0].logits, tuple(completions), answers.get((*key, "losses")))
    return outcomes, tuple(_separation(each.side, answers["", each.side, "cosines"]) for each in asked)


def _writing(case: Case, asked: Asked) -> dict[str, Request]:
    """Return what a case is asked to write, and to make of what the unmodified model wrote."""
    requests: dict[str, Request] = {}
    if "completions" in asked.needs and case.label != "none":
        requests["completions"] = Completions(asked.openings, case.intervention, asked.max_new_tokens)
    if "losses" in asked.needs:
        requests["losses"] = Losses(asked.openings, asked.completions, case.intervention)
    return requests


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
            writing = _writing(case, each)
            found = engine.run(list(writing.values()), bench.advance(f"{case.label} on {each.side} prompts"))
            answers = dict(zip(writing, found, strict=True))
            outcomes[case.label, each.side] = Outcome(
                reading(logits[each.side], plain, each.opener_ids, keep_logits=True),
                plain,
                tuple(answers.get("completions", ())),
                answers.get("losses"),
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
    pair = outcome.losses, plain.losses
    return pair[0] is not None and pair[1] is not None and not torch.equal(pair[0][0], pair[1][0])


def _why_nothing(intervention: Intervention) -> str:
    if intervention.gate is not None:
        return "its gate opens for no test prompt: set another `threshold`"
    if intervention.edits and all((edit.tokens[0] or 0) > 0 for edit in intervention.edits):
        return "it acts on generated tokens alone: measure completions (`refusal_rate`) or losses (`cross_entropy`)"
    return (
        "a scale of 0 changes nothing; otherwise the adapter may name modules that do not write the residual stream "
        "(docs/symptoms.md)"
    )


def _results(
    case: Case, asked: Asked, outcome: Outcome, seed: int, bench: Bench
) -> tuple[list[Result], list[Generated]]:
    """Let the metrics of one side measure an outcome; also return its completions as text, where there are any."""
    texts: tuple[str, ...] = ()
    if "completions" in asked.needs:
        answers = [bench.template.answer(ids) or () for ids in outcome.completions]
        texts = tuple(bench.template.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers)
    losses, counts = outcome.losses or (None, None)
    evidence = Evidence(
        asked.side,
        asked.prompts,
        asked.opener_ids,
        completions=texts,
        refusal_scores=outcome.reading.refusal_scores,
        kl_nats=outcome.reading.kl_nats,
        logits=outcome.reading.logits,
        baseline_logits=outcome.unmodified,
        losses=losses,
        n_tokens=counts,
    )
    measured = [(metric, summarise(metric, case.label, evidence, seed)) for metric in asked.metrics]
    generated = []
    if texts:
        verdicts = [result.values for metric, result in measured if (metric.kind, metric.needs) == _VERDICT]
        refused = tuple(value == 1 for value in verdicts[0]) if verdicts else None
        generated = [Generated(intervention=case.label, prompts=asked.side, texts=texts, refused=refused)]
    return [result for _, result in measured], generated


#: What tells of each completion whether it is a refusal.
_VERDICT = ("rate", "completions")


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


def _separation(side: Side, cosines: Tensor) -> Separation:
    """Show how the test prompts of one side lie along the direction in every layer; cosines [prompt, layer]."""
    low, high = torch.quantile(cosines, torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
    return Separation(
        prompts=side, mean=tuple(cosines.mean(0).tolist()), low=tuple(low.tolist()), high=tuple(high.tolist())
    )
