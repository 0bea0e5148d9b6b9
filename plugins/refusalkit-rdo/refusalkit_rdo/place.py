"""Choose the place a direction is trained for, by what the difference in means does there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from refusalkit.builtin.interventions import Ablate, Steer
from refusalkit.builtin.screen import estimate
from refusalkit.errors import RunError
from refusalkit.intervention import Direction, Intervention, Site
from refusalkit.selector import Measure, SelectInputs
from refusalkit.strategy import ModelInputs

#: Training prompts a side on which differences in means are scored.
FEW = 32
#: How many of them are scored exactly, by the gradient estimate.
KEEP = 6
#: Share of the last layers that are not considered, as in selection: they act on the output tokens directly.
PRUNED = 0.2
#: The KL above which the estimate puts a candidate behind the others, as in the paper's selection.
MAX_KL_NATS = 0.1


@dataclass(frozen=True)
class Place:
    """Point at one candidate: its row and layer in the tensor, and what interventions need to know."""

    row: int
    layer: int
    position: int
    n_layers: int
    site: Site

    def direction(self, vector: Tensor) -> Direction:
        """Put a vector [d_model] or [rank, d_model] here."""
        return Direction(vector, self.position, self.layer, self.n_layers, self.site)

    def ablation(self, vector: Tensor) -> Intervention:
        """Remove a vector everywhere."""
        return Ablate().build(self.direction(vector))

    def addition(self, vector: Tensor) -> Intervention:
        """Add a vector as it is, here."""
        return Steer().build(self.direction(vector))


def best_place(difference: Tensor, model: ModelInputs, layer: int | None, position: int | None) -> Place:
    """Return the place, of those the recipe leaves open, whose difference in means moves refusal furthest.

    difference [position, layer, d_model]. It moves refusal by the induced score minus the refusal score under ablation,
    measured on training prompts for the few places that the gradient estimate ranks first. Raises `RunError` where the
    two sides do not differ.
    """
    n_layers = difference.shape[1]
    layers = range(int(n_layers * (1 - PRUNED))) if layer is None else [layer]
    places = [
        Place(row, at, label, n_layers, model.site)
        for row, label in enumerate(model.positions)
        for at in layers
        if position in (None, label) and difference[row, at].any()
    ]
    if not places:
        raise RunError(
            "harmful and harmless prompts do not differ at any place that may be trained for",
            where="find",
            hint="state another `find.layer` or `find.position`: layer 0 reads the token alone",
        )
    return places[0] if len(places) == 1 else _best(places, difference, model)


def _best(places: list[Place], difference: Tensor, model: ModelInputs) -> Place:
    openers = Measure("refusal_score", token_ids=model.opener_ids)
    harmful, harmless = model.prompts["harmful"][:FEW], model.prompts["harmless"][:FEW]
    known = SelectInputs(difference, model.positions, model.site, harmful, harmless, model.opener_ids)
    ranked = estimate(known, model.subject, openers).ranked([(place.row, place.layer) for place in places], MAX_KL_NATS)
    kept = [place for place in places if (place.row, place.layer) in ranked[:KEEP]]
    vectors = [difference[place.row, place.layer].float() for place in kept]
    ablations = [place.ablation(vector) for place, vector in zip(kept, vectors, strict=True)]
    additions = [place.addition(vector) for place, vector in zip(kept, vectors, strict=True)]
    induced = model.subject.measure(harmless, additions, openers).mean(1)
    bypassed = model.subject.measure(harmful, ablations, openers).mean(1)
    return kept[int((induced - bypassed).argmax())]
