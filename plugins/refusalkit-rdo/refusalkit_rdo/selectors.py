"""Judge a cone by the directions in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from refusalkit.builtin.candidates import NO_DIFFERENCE
from refusalkit.selector import Advance, Measure, Score, SelectInputs, Selection, Selector, Subject
from refusalkit_rdo.strategies import Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from refusalkit_rdo.place import Place


class Cone(Selector):
    """Draw directions from the cone at every place and try each by itself; the place where they bypass most is chosen.

    There is no filter. `scores.json` says what share of the directions bypasses refusal (ablating it takes the mean
    refusal score of harmful prompts below 0), what share induces it, and how the worst does.
    """

    selector: Literal["cone"] = "cone"
    meanings: ClassVar[Mapping[str, tuple[str, str]]] = {
        "cone_bypassed_share": ("Share that bypasses", "Of directions drawn: ablated, harmful requests score below 0."),
        "cone_mean_refusal_score": (
            "Mean refusal score when ablated",
            "Over the directions drawn; the lowest wins.",
        ),
        "cone_highest_refusal_score": ("Highest refusal score when ablated", "Of the direction that bypasses least."),
        "cone_induced_share": ("Share that induces", "Of directions drawn: added, harmless requests score above 0."),
        "cone_lowest_induced_score": ("Lowest refusal score when added", "Of the direction that induces least."),
        "cone_mean_kl_nats": ("Mean KL when ablated", "On harmless requests, over the directions drawn."),
    }
    samples: Annotated[int, Field(ge=1, strict=True, examples=[64])] = 512
    """Directions to draw."""
    sampling: Sampling = "hypersphere"
    """How directions are drawn: evenly in angle, or as convex combinations of the basis with log-normal weights."""
    seed: Annotated[int, Field(strict=True)] = 0
    """Seed of the draw."""

    def select(self, inputs: SelectInputs, subject: Subject) -> Selection:
        from refusalkit.intervention import NOTHING

        openers = Measure("refusal_score", token_ids=inputs.opener_ids)
        harmful, harmless = (
            subject.measure(prompts, [NOTHING], openers).mean().item() for prompts in (inputs.harmful, inputs.harmless)
        )
        scores = [
            self._score(row, layer, inputs, subject)
            for row in range(len(inputs.positions))
            for layer in range(inputs.directions.shape[1])
        ]
        found = [score for score in scores if score.extra]
        if found:
            best = min(found, key=lambda score: score.extra["cone_mean_refusal_score"])
            scores[scores.index(best)] = Score(**{**vars(best), "status": "chosen"})
        miss = None if found else "no place has a direction"
        return Selection(tuple(scores), harmful, harmless, nearest_miss=miss)

    def _score(self, row: int, layer: int, inputs: SelectInputs, subject: Subject) -> Score:
        from refusalkit_rdo.place import Place

        vectors = inputs.directions[row, layer]
        rows = vectors.reshape(-1, vectors.shape[-1])
        position = inputs.positions[row]
        if not rows.any():
            return Score(position, layer, None, None, None, NO_DIFFERENCE)
        place = Place(row, layer, position, inputs.directions.shape[1], inputs.site)
        openers = Measure("refusal_score", token_ids=inputs.opener_ids)
        kl = Measure("kl_nats", reference=subject.logits(inputs.harmless))
        jointly = place.ablation(rows.float())
        return Score(
            position,
            layer,
            subject.measure(inputs.harmful, [jointly], openers).mean().item(),
            subject.measure(inputs.harmless, [place.addition(rows[0].float())], openers).mean().item(),
            subject.measure(inputs.harmless, [jointly], kl).mean().item(),
            "survivor",
            self._samples(rows, place, inputs, subject),
        )

    def _samples(self, rows: Tensor, place: Place, inputs: SelectInputs, subject: Subject) -> dict[str, float]:
        """Ablate and add every direction drawn, by itself."""
        import torch

        from refusalkit_rdo.cone import draw

        directions = draw(rows, self.samples, self.sampling, torch.Generator().manual_seed(self.seed)).float()
        openers = Measure("refusal_score", token_ids=inputs.opener_ids)
        length = rows[0].norm().float()
        ablations = [place.ablation(direction) for direction in directions]
        additions = [place.addition(length * direction) for direction in directions]
        kl = Measure("kl_nats", reference=subject.logits(inputs.harmless))

        def told(what: str) -> Advance | None:
            advance = inputs.advance
            return None if advance is None else lambda done, total: advance(what, done, total)

        bypass = subject.measure(inputs.harmful, ablations, openers, told("cone ablated, harmful")).mean(1)
        induced = subject.measure(inputs.harmless, additions, openers, told("cone added, harmless")).mean(1)
        changed = subject.measure(inputs.harmless, ablations, kl, told("cone ablated, harmless")).mean(1)
        return {
            "cone_bypassed_share": (bypass < 0).double().mean().item(),
            "cone_mean_refusal_score": bypass.mean().item(),
            "cone_highest_refusal_score": bypass.max().item(),
            "cone_induced_share": (induced > 0).double().mean().item(),
            "cone_lowest_induced_score": induced.min().item(),
            "cone_mean_kl_nats": changed.mean().item(),
        }
