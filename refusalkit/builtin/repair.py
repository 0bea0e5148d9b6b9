"""Choose the direction whose removal answers safe prompts that look harmful, and keeps harmful ones refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from refusalkit.builtin.candidates import Candidate, Fraction, candidates_of, dropped, scores
from refusalkit.builtin.interventions import Ablate
from refusalkit.intervention import NOTHING, Direction, Intervention, InterventionSpec
from refusalkit.metric import SIDES
from refusalkit.selector import Measure, Score, SelectInputs, Selection, Selector, Subject, Tokens

if TYPE_CHECKING:
    from torch import Tensor

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, eq=False)
class _Trial:
    """Hold a candidate as the strategy finds it with one `share`; None stands for the recipe's."""

    candidate: Candidate
    share: float | None
    direction: Tensor

    def __str__(self) -> str:
        return str(self.candidate) if self.share is None else f"{self.candidate} with share {self.share:g}"


class Repair(Selector):
    """Choose the candidate whose removal answers most over-refused prompts, of those that keep harmful ones refused.

    This is the rule of Wang et al. (2024, 2410.03415): the lowest refusal score on over-refused prompts, among those
    that cost little KL and are not of the last layers. That true refusals stay is asked for besides.
    """

    selector: Literal["repair"] = "repair"
    sides = SIDES
    meanings: ClassVar[Mapping[str, tuple[str, str]]] = {
        "refusal_score": ("Refusal when repaired", "Of harmful requests: the higher, the more true refusals are left."),
        "kl_nats": ("KL when repaired", "On harmless requests: the lower, the less is broken."),
        "over_refusal_score": ("Over-refusal when repaired", "Of safe requests: the lower, the less is refused."),
        "lost_refusals": ("True refusals lost", "Share of refused harmful requests that are answered when repaired."),
        "share": ("Share", "Of the projection on the refusal direction that is subtracted."),
    }
    apply: InterventionSpec = Ablate()
    """How over-refusal is repaired: `ablate`, as the authors do, or another intervention on activations. `affine`
    leaves harmless prompts where they are, and costs less."""
    shares: tuple[Share, ...] = ()
    """Values of the strategy's `share` to try at every place, in its stead."""
    max_kl_nats: Annotated[float, Field(ge=0)] = 0.2
    """Largest KL on harmless prompts that the repair may cost."""
    max_lost: Share = 0.05
    """Largest share of the refused harmful prompts that the repair may answer."""
    prune_last: Fraction = 0.2
    """Share of the last layers whose candidates are never chosen."""

    @field_validator("apply")
    @classmethod
    def _can_be_tried(cls, spec: InterventionSpec) -> InterventionSpec:
        if spec.on_weights or not spec.uses_direction:
            raise ValueError(f"{spec.label} cannot be tried: take one on activations")
        return spec

    @property
    def tries(self) -> Mapping[str, Sequence[Any]]:
        return {"share": self.shares} if self.shares else {}

    def select(self, inputs: SelectInputs, subject: Subject) -> Selection:
        everything = candidates_of(inputs)
        trials, fell = self._trials(everything, inputs)
        openers = Measure("refusal_score", token_ids=inputs.opener_ids)
        before = subject.measure(inputs.harmful, [NOTHING], openers)[0]
        harmless = subject.measure(inputs.harmless, [NOTHING], openers)[0].mean().item()
        # Once for all that is measured: a gate learns from the training prompts each time it is made.
        made = {trial: self._made(trial, inputs) for trial in trials if trial not in fell}

        def measured(prompts: Sequence[Tokens], measure: Measure, what: str) -> dict[_Trial, Tensor]:
            rest = [trial for trial in trials if trial not in fell]
            told = inputs.advance
            advance = None if told is None else lambda done, total: told(what, done, total)
            tried = [made[trial] for trial in rest]
            return dict(zip(rest, subject.measure(prompts, tried, measure, advance), strict=True)) if rest else {}

        kl = measured(inputs.harmless, Measure("kl_nats", stop_above=self.max_kl_nats), "KL when repaired")
        fell |= {
            t: f"KL above {self.max_kl_nats:g} nats" for t, row in kl.items() if not row.mean() <= self.max_kl_nats
        }
        harmful = measured(inputs.harmful, openers, "harmful prompts when repaired")
        refused = before > 0
        lost = {t: (row[refused] <= 0).double().mean().nan_to_num().item() for t, row in harmful.items()}
        fell |= {t: f"more than {self.max_lost:.0%} of true refusals lost" for t in lost if lost[t] > self.max_lost}
        answered = {t: row.mean().item() for t, row in measured(inputs.over_refusal, openers, "over-refusal").items()}
        best = min(answered, key=lambda trial: answered[trial], default=None)
        # Of the trials at one place the one that came furthest.
        shown: dict[Candidate, _Trial] = {}
        for trial in sorted(trials, key=lambda t: (answered.get(t, inf), lost.get(t, inf))):
            shown.setdefault(trial.candidate, trial)
        known = {
            c: Score(
                c.position,
                c.layer,
                harmful[t].mean().item() if t in harmful else None,
                None,
                kl[t].mean().item(),
                "",
                {"over_refusal_score": answered[t], "lost_refusals": lost[t]} | _share(t) if t in answered else {},
            )
            for c, t in shown.items()
            if t in kl
        }
        return Selection(
            scores(
                everything, {c: fell[t] for c, t in shown.items() if t in fell}, best.candidate if best else None, known
            ),
            before.mean().item(),
            harmless,
            nearest_miss=None if best else self._nearest_miss(kl, lost),
            hint="raise `select.max_lost` or `select.max_kl_nats`, raise the share, or capture other positions",
            direction=best.direction if best else None,
        )

    def _trials(self, everything: Sequence[Candidate], inputs: SelectInputs) -> tuple[list[_Trial], dict[_Trial, str]]:
        """Return what to try, and of it what cannot be chosen whatever it does, each with the reason."""
        trials: list[_Trial] = []
        fell: dict[_Trial, str] = {}
        for share in self.shares or (None,):
            if share is not None:
                assert inputs.find is not None, "the plan refuses a strategy that cannot find again"
                inputs = replace(inputs, directions=inputs.find(inputs.captured, share=share))
            why = dropped(everything, inputs, self.prune_last)
            for candidate in everything:
                trials.append(_Trial(candidate, share, inputs.directions[candidate.row, candidate.layer]))
                if candidate in why:
                    fell[trials[-1]] = why[candidate]
        return trials, fell

    def _made(self, trial: _Trial, inputs: SelectInputs) -> Intervention:
        candidate = trial.candidate
        harmless, harmful = (inputs.captured[side].mean[candidate.row] for side in ("harmless", "harmful"))
        return self.apply.build(
            Direction(
                trial.direction.float(),
                candidate.position,
                candidate.layer,
                inputs.directions.shape[1],
                inputs.site,
                harmless,
                harmful,
                states=inputs.states,
            )
        )

    def _nearest_miss(self, kl: Mapping[_Trial, Tensor], lost: Mapping[_Trial, float]) -> str:
        """Name the trial that came closest and what stopped it."""
        if lost:
            best = min(lost, key=lambda trial: lost[trial])
            return f"{best} loses {lost[best]:.0%} of the true refusals, more than {self.max_lost:.0%}"
        if kl:
            return f"none of {len(kl)} keeps the KL on harmless prompts under {self.max_kl_nats:g} nats"
        return "no candidate could be scored"


def _share(trial: _Trial) -> dict[str, float]:
    return {} if trial.share is None else {"share": trial.share}
