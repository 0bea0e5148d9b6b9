"""Say what a stage wants of the model, as data, and answer it on this machine.

A stage hands over everything it can ask at once. Here the requests are answered one after the other; on a server all
of them travel as one job, so each asks for the smallest thing that answers the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.engine.batch import Tokens
from refusalkit.engine.work import of_openers
from refusalkit.intervention import Intervention, Place, Site
from refusalkit.selector import Advance, Measure

if TYPE_CHECKING:
    from refusalkit.engine.engine import Engine


@dataclass(frozen=True, eq=False)
class Capture:
    """Read the residual stream of prompts at positions; answered by `Samples`."""

    prompts: Sequence[Tokens]
    positions: Sequence[int]
    site: Site = "resid_pre"
    keep_samples: bool = False
    layers: tuple[int, ...] | None = None
    """Ascending; None for all. Nothing above the last one runs."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Reduce last-position logits under interventions; answered by [intervention, prompt] float64."""

    prompts: Sequence[Tokens]
    interventions: Sequence[Intervention]
    measure: Measure


@dataclass(frozen=True, eq=False)
class States:
    """Average what blocks hand on at the last token; answered by [intervention, layer, d_model] float64."""

    prompts: Sequence[Tokens]
    interventions: Sequence[Intervention]
    layers: Sequence[int]


@dataclass(frozen=True, eq=False)
class Openings:
    """Find the tokens that open the answers of one group of prompts more often than those of another.

    Answered by `Opened`. The groups may be followed by others whose probabilities are wanted too.
    """

    groups: Sequence[Sequence[Tokens]]
    """The first two are compared, first minus second."""
    token_ids: tuple[int, ...]
    """Tokens whose probabilities are wanted in any case."""
    most: int
    """How many tokens to find."""


@dataclass(frozen=True, eq=False)
class Opened:
    """Hold next-token probabilities of a few tokens."""

    token_ids: tuple[int, ...]
    """Those asked for, then those found, most different first."""
    probabilities: tuple[Tensor, ...]
    """A [prompt, token] float64 for every group; not-a-number where the logits are."""


@dataclass(frozen=True, eq=False)
class Readings:
    """Compare the next token under interventions with the unmodified model's; answered by a `Reading` for each."""

    prompts: Sequence[Tokens]
    interventions: Sequence[Intervention]
    token_ids: tuple[int, ...]
    """The refusal openers."""
    keep_logits: bool = False


@dataclass(frozen=True, eq=False)
class Reading:
    """Hold what one intervention made of each prompt's next token."""

    refusal_scores: Tensor
    """[prompt] float64, nats."""
    kl_nats: Tensor
    """[prompt] float64: KL(unmodified || modified)."""
    finite: bool
    """Whether every logit is a number."""
    moved: bool
    """Whether any logit differs from the unmodified model's."""
    logits: Tensor | None = None
    """[prompt, d_vocab], where they were asked for."""


@dataclass(frozen=True, eq=False)
class Completions:
    """Complete prompts greedily; answered by a tuple of token ids for each."""

    prompts: Sequence[Tokens]
    intervention: Intervention
    max_new_tokens: int


@dataclass(frozen=True, eq=False)
class Losses:
    """Sum the cross-entropy of given completions; answered by (losses [prompt] in nats, lengths [prompt])."""

    prompts: Sequence[Tokens]
    completions: Sequence[Tokens]
    intervention: Intervention


@dataclass(frozen=True, eq=False)
class Cosines:
    """Measure how activations at one position lie along a direction; answered by [prompt, layer] float64."""

    prompts: Sequence[Tokens]
    direction: Tensor
    """[d_model]"""
    position: int
    site: Site = "resid_pre"


@dataclass(frozen=True, eq=False)
class CompletionKL:
    """Sum KL(unmodified || modified) along given completions.

    Answered by (sums [intervention, prompt] float64 in nats, lengths [prompt]).
    """

    prompts: Sequence[Tokens]
    completions: Sequence[Tokens]
    interventions: Sequence[Intervention]


@dataclass(frozen=True, eq=False)
class Likelihoods:
    """Score given completions; answered by (log-likelihoods [prompt] float64 in nats, whether greedy [prompt])."""

    prompts: Sequence[Tokens]
    completions: Sequence[Tokens]
    intervention: Intervention


@dataclass(frozen=True, eq=False)
class Projections:
    """Measure the component at one place along a direction, behind the edits; answered by [intervention, prompt]."""

    prompts: Sequence[Tokens]
    interventions: Sequence[Intervention]
    direction: Tensor
    """[d_model]"""
    place: Place


Request = (
    Capture
    | Scores
    | States
    | Openings
    | Readings
    | Completions
    | Losses
    | Likelihoods
    | Cosines
    | CompletionKL
    | Projections
)


def answer(engine: Engine, request: Request, advance: Advance | None) -> Any:
    """Answer one request on this machine."""
    match request:
        case Capture(prompts, positions, site, keep_samples, layers):
            return engine.capture(prompts, positions, site, layers=layers, keep_samples=keep_samples, advance=advance)
        case Scores(prompts, interventions, measure):
            return engine.measure(prompts, interventions, measure, advance)
        case States(prompts, interventions, layers):
            return engine.mean_states(prompts, interventions, layers, advance)
        case Openings():
            return opened([engine.logits(group) for group in request.groups], request.token_ids, request.most)
        case Readings():
            return _readings(engine, request)
        case Completions(prompts, intervention, max_new_tokens):
            return engine.generate(prompts, intervention, max_new_tokens, advance)
        case Losses() | Likelihoods() | CompletionKL():
            return _following(engine, request)
        case Cosines() | Projections():
            return _along(engine, request, advance)


def _following(engine: Engine, request: Losses | Likelihoods | CompletionKL) -> tuple[Tensor, Tensor]:
    prompts, completions = request.prompts, request.completions
    if isinstance(request, CompletionKL):
        return engine.completion_kl(prompts, completions, request.interventions)
    follow = engine.likelihoods if isinstance(request, Likelihoods) else engine.losses
    return follow(prompts, completions, request.intervention)


def _along(engine: Engine, request: Cosines | Projections, advance: Advance | None) -> Tensor:
    if isinstance(request, Projections):
        return engine.projections(request.prompts, request.interventions, request.direction, request.place, advance)
    found = engine.capture(request.prompts, (request.position,), request.site, keep_samples=True, advance=advance)
    assert found.samples is not None
    return (algebra.unit(found.samples[:, 0]) @ algebra.unit(request.direction).cpu()).double()


def _readings(engine: Engine, request: Readings) -> list[Reading]:
    plain = whole = engine.logits(request.prompts)
    gated = [each for each in request.interventions if each.gate is not None]
    if gated:
        # A gate shares no front between prompts: beside an equal pass, those it turns away keep every bit.
        whole = engine.logits(request.prompts, replace(gated[0], edits=()))
    read = []
    for each in request.interventions:
        reference = plain if each.gate is None else whole
        logits = engine.logits(request.prompts, each) if each.edits else reference
        read.append(reading(logits, reference, request.token_ids, request.keep_logits))
    return read


def opened(groups: Sequence[Tensor], token_ids: tuple[int, ...], most: int) -> Opened:
    """Reduce the groups' last-position logits [prompt, d_vocab] to the probabilities of a few tokens."""
    wanted, *probabilities = of_openers(groups, token_ids, most)
    return Opened(tuple(wanted.tolist()), tuple(probabilities))


def reading(logits: Tensor, reference: Tensor, token_ids: tuple[int, ...], keep_logits: bool = False) -> Reading:
    """Reduce last-position logits [prompt, d_vocab] to numbers, next to those of the unmodified model."""
    return Reading(
        algebra.refusal_score(logits, torch.tensor(token_ids)),
        algebra.kl_nats(reference, logits),
        bool(logits.isfinite().all()),
        not torch.equal(logits, reference),
        logits if keep_logits else None,
    )
