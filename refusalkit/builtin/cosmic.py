"""Choose by where activations end up, without refusal tokens (COSMIC)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from refusalkit.builtin.candidates import (
    NO_DIFFERENCE,
    NOT_A_NUMBER,
    Candidate,
    Fraction,
    ablation,
    candidates_of,
    dropped,
    scores,
    steering,
)
from refusalkit.intervention import NOTHING, Intervention
from refusalkit.selector import Advance, Measure, Score, SelectInputs, Selection, Selector, Subject, Tokens

if TYPE_CHECKING:
    from torch import Tensor

#: At the prompt's last token directions go on scoring well behind the layers in which they are made.
LATE = "at the last position, behind the layers where other positions score best"


class Cosmic(Selector):
    """Choose by the activations alone, without refusal tokens (COSMIC, Siu et al. 2025, 2506.00085).

    Harmful prompts with the direction ablated should end up where harmless ones do, and harmless prompts with it added
    where harmful ones do. Both are told by the cosine between mean states of the last token, about the middle of the
    two sides, behind those blocks in which harmful and harmless training prompts are least alike. The direction whose
    ablation does most is chosen. The authors' own rule, the sum of both, is `centred: false` with `drop_late: true`.
    """

    selector: Literal["cosmic"] = "cosmic"
    scores_refusals = False
    meanings: ClassVar[Mapping[str, tuple[str, str]]] = {
        "ablated_similarity": ("Similarity when ablated", "Of harmful requests, direction removed, to harmless ones."),
        "added_similarity": ("Similarity when added", "Of harmless requests, direction added, to harmful ones."),
        "cosmic_score": ("COSMIC score", "The sum of the two similarities, by which its authors choose."),
    }
    max_kl_nats: Annotated[float, Field(ge=0)] = 0.1
    """Largest KL on harmless prompts that an ablation may cost."""
    prune_last: Fraction = 0.2
    """Share of the last layers whose candidates are never chosen."""
    compared: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the layers in which states are compared, at least one layer."""
    centred: bool = True
    """Take cosines about the middle of the two sides' training means, and choose by ablation. The authors take them
    about zero, from where states of both sides point almost the same way, and choose by the sum of both."""
    drop_late: bool = False
    """Drop, as the authors do, the last position's candidates behind the layers in which other positions score best.
    A model whose refusal direction shows at the last position alone loses all of them that way."""

    def select(self, inputs: SelectInputs, subject: Subject) -> Selection:
        everything = candidates_of(inputs)
        fell = dropped(everything, inputs, self.prune_last)
        found = self._similarities(everything, fell, inputs, subject)
        if self.drop_late:
            fell |= {candidate: LATE for candidate in _late(found) if candidate not in fell}
        kl = self._kl(everything, fell, inputs, subject)
        fell |= {
            candidate: f"KL above {self.max_kl_nats:g} nats" for candidate in kl if kl[candidate] > self.max_kl_nats
        }
        # Of equals the first in the order of enumeration, as the authors' stable sort.
        survivors = [candidate for candidate in everything if candidate not in fell]
        best = max(survivors, key=lambda candidate: self._merit(*found[candidate]), default=None)
        known = {
            c: Score(
                c.position,
                c.layer,
                None,
                None,
                0.0 if fell.get(c) == NO_DIFFERENCE else kl.get(c),
                "",
                {"ablated_similarity": ablated, "added_similarity": added, "cosmic_score": ablated + added},
            )
            for c, (ablated, added) in found.items()
        }
        return Selection(
            scores(everything, fell, best, known),
            *_baselines(inputs, subject),
            nearest_miss=None if best else self._nearest_miss(kl, inputs, subject),
            hint="raise `select.max_kl_nats` if the nearest miss is good enough for you, use more prompts, or capture "
            "other positions",
        )

    def _merit(self, ablated: float, added: float) -> float:
        """Return what candidates are ranked by, from how alike ablation and addition make the two sides."""
        return ablated if self.centred else ablated + added

    def _origin(self, inputs: SelectInputs, subject: Subject) -> tuple[list[int], Tensor]:
        """Return the layers to compare in, and the mean state over them [d_model] that cosines are taken about.

        They are those behind which harmful and harmless training prompts are least alike.
        """
        import torch

        from refusalkit import algebra

        sides = (inputs.training["harmful"], inputs.training["harmless"])
        every = range(subject.n_layers)
        means = torch.cat([subject.mean_states(prompts, [NOTHING], every) for prompts in sides])
        alike = algebra.unit(means).prod(0).sum(-1)
        layers = sorted(alike.argsort(stable=True)[: max(1, int(self.compared * len(every)))].tolist())
        middle = means[:, layers].mean((0, 1))
        return layers, middle if self.centred else torch.zeros_like(middle)

    def _similarities(
        self, everything: Sequence[Candidate], fell: dict[Candidate, str], inputs: SelectInputs, subject: Subject
    ) -> dict[Candidate, tuple[float, float]]:
        """Return how alike ablation makes harmful to harmless prompts, and addition harmless to harmful ones.

        Candidates that cannot be chosen count too: where the scores of a position peak is part of the rule. Those whose
        scores are not numbers fall.
        """
        from refusalkit import algebra

        layers, origin = self._origin(inputs, subject)

        def states(prompts: Sequence[Tokens], interventions: Sequence[Intervention], what: str | None) -> Tensor:
            """Return the unit mean state over layers [intervention, d_model]."""
            advance = _told(inputs, what) if what else None
            return algebra.unit(subject.mean_states(prompts, interventions, layers, advance).mean(1) - origin)

        def alike(some: Tensor, other: Tensor) -> list[float]:
            return (some * other).sum(-1).tolist()

        harmful, harmless = (states(prompts, [NOTHING], None) for prompts in (inputs.harmful, inputs.harmless))
        tried = [candidate for candidate in everything if fell.get(candidate) not in (NOT_A_NUMBER, NO_DIFFERENCE)]
        (unmodified,) = alike(harmful, harmless)
        found = {c: (unmodified, unmodified) for c in everything if fell.get(c) == NO_DIFFERENCE}
        if tried:
            ablated = states(inputs.harmful, [ablation(c, inputs) for c in tried], "similarity under ablation")
            added = states(inputs.harmless, [steering(c, inputs) for c in tried], "similarity under addition")
            pairs = zip(alike(ablated, harmless), alike(added, harmful), strict=True)
            for candidate, pair in zip(tried, pairs, strict=True):
                if sum(pair) == sum(pair):
                    found[candidate] = pair
                else:
                    fell[candidate] = NOT_A_NUMBER
        return found

    def _kl(
        self, everything: Sequence[Candidate], fell: Mapping[Candidate, str], inputs: SelectInputs, subject: Subject
    ) -> dict[Candidate, float]:
        """Measure the KL of what has not fallen, infinite where it was given up."""
        rest = [candidate for candidate in everything if candidate not in fell]
        if not rest:
            return {}
        measure = Measure("kl_nats", stop_above=self.max_kl_nats)
        advance = _told(inputs, "KL under ablation")
        found = subject.measure(inputs.harmless, [ablation(each, inputs) for each in rest], measure, advance)
        return {
            candidate: float("inf") if row.isnan().any() else row.mean().item()
            for candidate, row in zip(rest, found, strict=True)
        }

    def _nearest_miss(self, kl: Mapping[Candidate, float], inputs: SelectInputs, subject: Subject) -> str:
        if not kl:
            return "no candidate could be scored"
        whole = Measure("kl_nats")
        found = subject.measure(inputs.harmless, [ablation(each, inputs) for each in kl], whole).mean(-1)
        best, least = min(zip(kl, found.tolist(), strict=True), key=lambda pair: pair[1])
        return f"{best} changes harmless prompts least, by a KL of {least:.3g}, above {self.max_kl_nats:g} nats"


def _late(found: Mapping[Candidate, tuple[float, float]]) -> list[Candidate]:
    """List the last position's candidates behind the median layer in which other positions peak, by both scores."""
    others = sorted({candidate.position for candidate in found} - {-1})
    if not others:
        return []
    peaks = []
    for which in (0, 1):
        best = []
        for position in others:
            row = [candidate for candidate in found if candidate.position == position]
            best.append(max(row, key=lambda c: found[c][which]).layer)
        peaks.append(median_low(best))
    return [candidate for candidate in found if candidate.position == -1 and candidate.layer > max(peaks)]


def _baselines(inputs: SelectInputs, subject: Subject) -> tuple[float | None, float | None]:
    """Return the unmodified model's refusal scores, for the report, where tokens that open a refusal are known."""
    if not inputs.opener_ids:
        return None, None
    openers = Measure("refusal_score", token_ids=inputs.opener_ids)
    harmful, harmless = (
        subject.measure(prompts, [NOTHING], openers)[0].mean().item() for prompts in (inputs.harmful, inputs.harmless)
    )
    return harmful, harmless


def _told(inputs: SelectInputs, what: str) -> Advance | None:
    advance = inputs.advance
    return None if advance is None else lambda done, total: advance(what, done, total)
