"""Choose one direction: by its causal effect as in the paper, or by place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from refusalkit.builtin.candidates import (
    NO_DIFFERENCE,
    NOT_A_NUMBER,
    PRUNED,
    Candidate,
    Fraction,
    ablation,
    candidates_of,
    dropped,
    finite,
    steering,
)
from refusalkit.builtin.screen import Estimates, estimate
from refusalkit.intervention import NOTHING
from refusalkit.selector import Measure, Score, SelectInputs, Selection, Selector, Subject

if TYPE_CHECKING:
    from torch import Tensor

SCREENED = "not among the best by the gradient estimate"


@dataclass
class Table:
    """Collect scores while the selector works; absent means not scored."""

    induced: dict[Candidate, float]
    kl: dict[Candidate, float]
    bypass: dict[Candidate, float]
    fell: dict[Candidate, str]
    estimates: Estimates | None = None


class Causal(Selector):
    """Score candidates by what they do, and filter as the paper does (Arditi et al. 2024, section 2.3, appendix C).

    A candidate survives when adding it to harmless prompts induces refusal, ablating it changes harmless prompts
    little, and its layer is not among the last. The survivor whose ablation bypasses refusal most is chosen. The
    filters are exact and run cheapest first, so most candidates never meet the dearer ones.
    """

    selector: Literal["causal"] = "causal"
    meanings: ClassVar[Mapping[str, tuple[str, str]]] = {
        "estimated_refusal_score": ("Estimated refusal score when ablated", "From gradients, before any is scored."),
        "estimated_induced_score": ("Estimated refusal score when added", "From gradients, before any is scored."),
        "estimated_kl_nats": ("Estimated KL when ablated", "From gradients, before any is scored."),
    }
    max_kl_nats: Annotated[float, Field(ge=0)] = 0.1
    """Largest KL on harmless prompts that an ablation may cost."""
    min_induced_score: float = 0.0
    """Smallest refusal score of harmless prompts that adding the direction must reach."""
    prune_last: Fraction = 0.2
    """Share of the last layers whose candidates are never chosen: they act on the output tokens directly."""
    exhaustive: bool = False
    """Score every candidate on all three measures, for full maps; the choice is the same."""
    screen: Literal["none", "gradient"] = "none"
    """`gradient` estimates every candidate's scores from one backward pass a prompt and scores only the best `keep`:
    faster, and the choice is scored exactly, but a candidate that is estimated badly can be missed."""
    keep: Annotated[int, Field(ge=1)] = 10
    """How many candidates the screen keeps."""

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Causal:
        if self.exhaustive and self.screen != "none":
            raise ValueError("`exhaustive: true` scores what `screen` leaves out; take one of them")
        return self

    @property
    def needs_gradients(self) -> bool:
        return self.screen == "gradient"

    def select(self, inputs: SelectInputs, subject: Subject) -> Selection:
        import torch

        openers = Measure("refusal_score", token_ids=inputs.opener_ids)
        harmful = subject.measure(inputs.harmful, [NOTHING], openers)[0].mean().item()
        harmless = subject.measure(inputs.harmless, [NOTHING], openers)[0].mean().item()
        everything = candidates_of(inputs)
        table = Table({}, {}, {}, dropped(everything, inputs, self.prune_last))
        for candidate, reason in table.fell.items():
            if reason == NO_DIFFERENCE:
                # An exact no-op: its scores are the unmodified model's, without running anything.
                table.bypass[candidate], table.induced[candidate] = harmful, harmless
                table.kl[candidate] = 0.0
        if self.screen == "gradient":
            table.estimates = estimate(inputs, subject, openers)
            self._screen(table, everything)
        unscored = self._unscored(table, everything, table.induced)
        for candidate, scores in _measured(unscored, inputs, subject, openers, "induced score"):
            table.induced[candidate] = scores.mean().item()
        self._drop(table, "induced", everything)
        limit = None if self.exhaustive else self.max_kl_nats
        kl = Measure("kl_nats", stop_above=limit)
        for candidate, scores in _measured(
            self._unscored(table, everything, table.kl), inputs, subject, kl, "KL under ablation"
        ):
            score = scores.mean().item()
            # Above the limit nothing depends on how far the sum was computed, which the batches decide.
            given_up = torch.isnan(scores).any() or (limit is not None and score > limit)
            table.kl[candidate] = float("inf") if given_up else score
        self._drop(table, "kl", everything)
        if all(candidate in table.fell for candidate in everything):
            self._finish_kl(table, inputs, subject)
        for candidate, scores in _measured(
            self._unscored(table, everything, table.bypass), inputs, subject, openers, "bypass score"
        ):
            table.bypass[candidate] = scores.mean().item()
        return self._decide(table, everything, (harmful, harmless))

    def _screen(self, table: Table, everything: Sequence[Candidate]) -> None:
        assert table.estimates is not None
        places = {(candidate.row, candidate.layer): candidate for candidate in everything}
        eligible = [place for place, candidate in places.items() if candidate not in table.fell]
        for place in table.estimates.ranked(eligible, self.max_kl_nats)[self.keep :]:
            table.fell[places[place]] = SCREENED

    def _unscored(
        self, table: Table, everything: Sequence[Candidate], scores: dict[Candidate, float]
    ) -> list[Candidate]:
        return [
            candidate
            for candidate in everything
            if candidate not in scores
            and (self.exhaustive or candidate not in table.fell)
            and table.fell.get(candidate) != NOT_A_NUMBER
        ]

    def _drop(self, table: Table, which: Literal["induced", "kl"], everything: Sequence[Candidate]) -> None:
        scores = table.induced if which == "induced" else table.kl
        for candidate in everything:
            score = scores.get(candidate)
            if candidate in table.fell or score is None:
                continue
            if score != score:
                table.fell[candidate] = NOT_A_NUMBER
            elif which == "induced" and score < self.min_induced_score:
                table.fell[candidate] = f"induced score below {self.min_induced_score:g}"
            elif which == "kl" and score > self.max_kl_nats:
                table.fell[candidate] = f"KL above {self.max_kl_nats:g} nats"

    def _finish_kl(self, table: Table, inputs: SelectInputs, subject: Subject) -> None:
        """Measure to the end what was given up, so that the nearest miss can be named with its number."""
        given_up = [candidate for candidate, score in table.kl.items() if score == float("inf")]
        for candidate, scores in _measured(given_up, inputs, subject, Measure("kl_nats"), "KL under ablation"):
            table.kl[candidate] = scores.mean().item()

    def _decide(self, table: Table, everything: Sequence[Candidate], baseline: tuple[float, float]) -> Selection:
        # The most negative bypass score wins; ties keep the order of enumeration, as the authors' sort does.
        survivors = sorted(
            (candidate for candidate in everything if candidate not in table.fell),
            key=lambda candidate: table.bypass[candidate],
        )
        status = dict.fromkeys(survivors, "survivor")
        status.update(dict.fromkeys(survivors[:1], "chosen"))
        scores = tuple(
            Score(
                candidate.position,
                candidate.layer,
                finite(table.bypass.get(candidate)),
                finite(table.induced.get(candidate)),
                finite(table.kl.get(candidate)),
                status.get(candidate) or table.fell[candidate],
                {} if table.estimates is None else table.estimates.at((candidate.row, candidate.layer)),
            )
            for candidate in everything
        )
        miss = None if survivors else self._nearest_miss(table)
        return Selection(scores, *baseline, nearest_miss=miss, hint=_HINT if self.screen == "none" else _SCREEN_HINT)

    def _nearest_miss(self, table: Table) -> str:
        """Name the candidate that came closest and what stopped it."""
        induces = {c: score for c, score in table.induced.items() if score >= self.min_induced_score}
        reached = {c: table.kl[c] for c in induces if c in table.kl and c in table.fell}
        if reached:
            best = min(reached, key=lambda c: reached[c])
            kl = f"KL {reached[best]:.3g}" if reached[best] != float("inf") else "KL"
            return (
                f"position {best.position}, layer {best.layer} induces refusal ({induces[best]:.2f}) "
                f"but its {kl} is above {self.max_kl_nats:g} nats"
            )
        scored = {c: s for c, s in table.induced.items() if table.fell.get(c) not in (NO_DIFFERENCE, PRUNED)}
        if not scored:
            return "no candidate could be scored"
        best = max(scored, key=lambda c: scored[c])
        return (
            f"position {best.position}, layer {best.layer} has the highest induced score, {scored[best]:.2f}, "
            f"below {self.min_induced_score:g}"
        )


_HINT = (
    "raise `select.max_kl_nats` or lower `select.min_induced_score` if the nearest miss is good enough for you, "
    "use more prompts, or capture other positions"
)
_SCREEN_HINT = f"raise `select.keep` or leave out `select.screen`, which may have passed a survivor over; or {_HINT}"


def _measured(
    candidates: Sequence[Candidate], inputs: SelectInputs, subject: Subject, measure: Measure, what: str
) -> list[tuple[Candidate, Tensor]]:
    """Measure candidates: steering with the induced score on harmless prompts, ablation for the other two."""
    make = steering if what == "induced score" else ablation
    prompts = inputs.harmful if what == "bypass score" else inputs.harmless
    interventions = [make(candidate, inputs) for candidate in candidates]
    if not interventions:
        return []
    advance = inputs.advance
    scores = subject.measure(
        prompts, interventions, measure, None if advance is None else lambda done, total: advance(what, done, total)
    )
    return list(zip(candidates, scores, strict=True))


class Fixed(Selector):
    """Take the direction at a given place, without asking what it does."""

    selector: Literal["fixed"] = "fixed"
    position: Annotated[int, Field(lt=0)] = -1
    """The position, counted from the end of the prompt."""
    layer: Annotated[int, Field(ge=0, examples=[2])]
    """The layer."""

    def select(self, inputs: SelectInputs, subject: Subject) -> Selection:
        from refusalkit.errors import InputError

        n_layers = inputs.directions.shape[1]
        if self.layer >= n_layers:
            raise InputError(f"layer {self.layer} of {n_layers}", where="select.layer", hint=f"0 to {n_layers - 1}")
        if self.position not in inputs.positions:
            raise InputError(
                f"position {self.position} was not captured",
                where="select.position",
                hint=f"captured: {', '.join(map(str, inputs.positions))}",
            )
        openers = Measure("refusal_score", token_ids=inputs.opener_ids)
        harmful = subject.measure(inputs.harmful, [NOTHING], openers)[0].mean().item()
        harmless = subject.measure(inputs.harmless, [NOTHING], openers)[0].mean().item()
        chosen = Candidate(inputs.positions.index(self.position), self.layer, self.position)
        found = {
            what: _measured([chosen], inputs, subject, measure, what)[0][1].mean().item()
            for what, measure in (
                ("induced score", openers),
                ("KL under ablation", Measure("kl_nats")),
                ("bypass score", openers),
            )
        }
        scores = tuple(
            Score(
                position,
                layer,
                *(
                    (found["bypass score"], found["induced score"], found["KL under ablation"], "chosen")
                    if (position, layer) == (self.position, self.layer)
                    else (None, None, None, "another place was fixed in the recipe")
                ),
            )
            for position in inputs.positions
            for layer in range(n_layers)
        )
        return Selection(scores, harmful, harmless)


SELECTORS = (Causal, Fixed)
