"""Say what an evaluation asks of the model about its cases: on which prompts, completions and texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from refusalkit.artifacts import PromptSplits
from refusalkit.engine.request import CompletionKL, Completions, Losses, Projections, Reading, Request
from refusalkit.intervention import NOTHING, Direction, Intervention
from refusalkit.metric import Metric, Need, Side, TextMetric
from refusalkit.recipe import EvaluateSection
from refusalkit.stages.bench import Bench
from refusalkit.stages.cases import Case

#: What metrics need that rests on completions of the unmodified model.
WRITTEN: set[Need] = {"completions", "losses", "token_kl", "written_losses"}
#: What metrics need that rests on what every intervention writes.
_WRITES: set[Need] = {"completions", "written_losses"}
Tokens = tuple[int, ...]
#: A sum for each prompt or text [prompt], and how many tokens it is over [prompt].
Sums = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Texts:
    """Hold the texts of one metric: what they follow, and what is predicted of them."""

    openings: tuple[Tokens, ...]
    """A rendered prompt, or the first token of a text that stands alone."""
    tokens: tuple[Tokens, ...]
    alone: bool

    def ask(self, intervention: Intervention) -> Losses | None:
        """Ask for their losses under an intervention; None where a gate has no prompt to be read in."""
        gated = self.alone and intervention.gate is not None
        return None if gated else Losses(self.openings, self.tokens, intervention)


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
    texts: Mapping[str, Texts]
    """By the label of the metric that looks at them."""
    max_new_tokens: int
    completions: tuple[Tokens, ...] = ()

    @property
    def needs(self) -> set[Need]:
        """What the metrics look at."""
        return {metric.needs for metric in self.metrics}

    @property
    def writes(self) -> bool:
        """Whether a metric looks at what the interventions write."""
        return bool(self.needs & _WRITES)


@dataclass(frozen=True, eq=False)
class Outcome:
    """Hold what one case made of one side's prompts."""

    reading: Reading
    unmodified: Tensor | None
    """The unmodified model's logits [prompt, d_vocab], where a metric or a weight edit needs logits."""
    completions: tuple[Tokens, ...] = ()
    sums: Mapping[str, Sums] = field(default_factory=dict)
    """By what metrics need; of texts, by the metric's label."""


Outcomes = dict[tuple[str, Side], Outcome]


def asked_of(section: EvaluateSection, splits: PromptSplits, bench: Bench) -> tuple[Asked, ...]:
    """Render every side's test prompts and the texts of the metrics that mean something there."""
    metrics = [part for metric in section.metrics for part in metric.parts]
    return tuple(
        Asked(
            side,
            splits.of(side, "test"),
            bench.tokens(splits.of(side, "test")),
            bench.openings(splits.of(side, "test")),
            splits.openers.token_ids,
            tuple(metric for metric in metrics if side in metric.sides),
            {m.label: _tokenised(m, bench) for m in metrics if isinstance(m, TextMetric) and side in m.sides},
            section.max_new_tokens,
        )
        for side in splits.sides
    )


def _tokenised(metric: TextMetric, bench: Bench) -> Texts:
    openings, tokens = [], []
    for passage in metric.texts:
        if passage.prompt is None:
            # With the tokens that the tokenizer puts before any text.
            whole = bench.template.plain(passage.text)[: metric.max_tokens]
            opening, rest = whole[:1], whole[1:]
        else:
            opening, rest = bench.template.answered(passage.prompt, passage.text)
        openings.append(opening)
        tokens.append(rest[: metric.max_tokens])
    return Texts(tuple(openings), tuple(tokens), alone=not metric.answered)


def of_one(case: Case, asked: Asked) -> dict[str, Request]:
    """Return what a case is asked to write, and to make of texts and of what the unmodified model wrote."""
    requests: dict[str, Request] = {}
    if asked.writes and case.label != "none":
        requests["completions"] = Completions(asked.openings, case.intervention, asked.max_new_tokens)
    if "losses" in asked.needs:
        requests["losses"] = Losses(asked.openings, asked.completions, case.intervention)
    for label, texts in asked.texts.items():
        request = texts.ask(case.intervention)
        if request is not None:
            requests[label] = request
    return requests


def of_all(cases: Sequence[Case], asked: Asked, direction: Direction) -> dict[str, Request]:
    """Return what is asked about all cases at once, those that edit weights included."""
    interventions = [case.intervention for case in cases]
    requests: dict[str, Request] = {}
    if "token_kl" in asked.needs:
        requests["token_kl"] = CompletionKL(asked.openings, asked.completions, interventions)
    if "projections" in asked.needs:
        requests["projections"] = Projections(asked.tokens, interventions, direction.main, direction.place)
    return requests


def sums_of(answer: Sums | Tensor, number: int) -> Sums:
    """Take one case's part out of an answer to a question about all of them."""
    values, counts = answer if isinstance(answer, tuple) else (answer, torch.ones_like(answer[0]))
    return values[number], counts


def read_back(asked: Iterable[Asked], outcomes: Outcomes, bench: Bench) -> Outcomes:
    """Let the unmodified model read what every case wrote, where a metric asks for it."""
    openings = {each.side: each.openings for each in asked if "written_losses" in each.needs}
    keys = [key for key in outcomes if key[1] in openings]
    requests = [Losses(openings[side], outcomes[label, side].completions, NOTHING) for label, side in keys]
    found = bench.engine.run(requests, bench.advance("what was written, read by the unmodified model")) if keys else []
    for key, sums in zip(keys, found, strict=True):
        outcome = outcomes[key]
        outcomes[key] = replace(outcome, sums={**outcome.sums, "written_losses": sums})
    return outcomes
