"""Choose the direction whose ablation answers safe prompts that look harmful, and keeps harmful ones refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from refusalkit.builtin.candidates import Candidate, Fraction, ablation, candidates_of, dropped, scores
from refusalkit.intervention import NOTHING
from refusalkit.metric import SIDES
from refusalkit.selector import Measure, Score, SelectInputs, Selection, Selector, Subject, Tokens

if TYPE_CHECKING:
    from torch import Tensor


class Repair(Selector):
    """Choose the candidate whose ablation answers most over-refused prompts, of those that keep harmful ones refused.

    This is the rule of Wang et al. (2024, 2410.03415): the lowest refusal score on over-refused prompts, among those
    that cost little KL and are not of the last layers. That true refusals stay is asked for besides.
    """

    selector: Literal["repair"] = "repair"
    sides = SIDES
    further: ClassVar[Mapping[str, tuple[str, str]]] = {
        "over_refusal_score": (
            "Over-refusal when ablated",
            "Safe requests, direction removed: the lower, the less is refused.",
        ),
        "lost_refusals": (
            "True refusals lost",
            "Share of refused harmful requests that are answered with it removed.",
        ),
    }
    max_kl_nats: Annotated[float, Field(ge=0)] = 0.2
    """Largest KL on harmless prompts that an ablation may cost."""
    max_lost: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Largest share of the refused harmful prompts that an ablation may answer."""
    prune_last: Fraction = 0.2
    """Share of the last layers whose candidates are never chosen."""

    def select(self, inputs: SelectInputs, subject: Subject) -> Selection:
        everything = candidates_of(inputs)
        fell = dropped(everything, inputs, self.prune_last)
        openers = Measure("refusal_score", token_ids=inputs.opener_ids)
        before = subject.measure(inputs.harmful, [NOTHING], openers)[0]
        harmless = subject.measure(inputs.harmless, [NOTHING], openers)[0].mean().item()

        def measured(prompts: Sequence[Tokens], measure: Measure, what: str) -> dict[Candidate, Tensor]:
            rest = [candidate for candidate in everything if candidate not in fell]
            told = inputs.advance
            advance = None if told is None else lambda done, total: told(what, done, total)
            made = [ablation(candidate, inputs) for candidate in rest]
            return dict(zip(rest, subject.measure(prompts, made, measure, advance), strict=True)) if rest else {}

        kl = measured(inputs.harmless, Measure("kl_nats", stop_above=self.max_kl_nats), "KL under ablation")
        fell |= {
            c: f"KL above {self.max_kl_nats:g} nats" for c, row in kl.items() if not row.mean() <= self.max_kl_nats
        }
        harmful = measured(inputs.harmful, openers, "harmful prompts under ablation")
        refused = before > 0
        lost = {c: (row[refused] <= 0).double().mean().nan_to_num().item() for c, row in harmful.items()}
        fell |= {c: f"more than {self.max_lost:.0%} of true refusals lost" for c in lost if lost[c] > self.max_lost}
        answered = {c: row.mean().item() for c, row in measured(inputs.over_refusal, openers, "over-refusal").items()}
        best = min(answered, key=lambda candidate: answered[candidate], default=None)
        known = {
            c: Score(
                c.position,
                c.layer,
                harmful[c].mean().item() if c in harmful else None,
                None,
                row.mean().item(),
                "",
                {"over_refusal_score": answered[c]} | {"lost_refusals": lost[c]} if c in answered else {},
            )
            for c, row in kl.items()
        }
        return Selection(
            scores(everything, fell, best, known),
            before.mean().item(),
            harmless,
            nearest_miss=None if best else self._nearest_miss(kl, lost),
            hint="raise `select.max_lost` or `select.max_kl_nats`, raise `find.share`, or capture other positions",
        )

    def _nearest_miss(self, kl: Mapping[Candidate, Tensor], lost: Mapping[Candidate, float]) -> str:
        """Name the candidate that came closest and what stopped it."""
        if lost:
            best = min(lost, key=lambda candidate: lost[candidate])
            return f"{best} loses {lost[best]:.0%} of the true refusals, more than {self.max_lost:.0%}"
        if kl:
            return f"no ablation of {len(kl)} keeps the KL on harmless prompts under {self.max_kl_nats:g} nats"
        return "no candidate could be scored"
