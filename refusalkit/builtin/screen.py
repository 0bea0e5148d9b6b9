"""Estimate the paper's three scores of every candidate from gradients, to score exactly only the best of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refusalkit.selector import Measure, SelectInputs, Subject

if TYPE_CHECKING:
    from torch import Tensor

Place = tuple[int, int]
#: How far the estimated KL may exceed the limit before a candidate is put behind the others. The estimate draws one
#: token a prompt and is good to a factor of about two.
KL_SLACK = 2.0


@dataclass(frozen=True, eq=False)
class Estimates:
    """Hold first-order estimates of the three scores, each [position, layer]."""

    refusal_score: Tensor
    induced_score: Tensor
    kl_nats: Tensor

    def at(self, place: Place) -> dict[str, float]:
        """Return one candidate's estimates by the names the report shows."""
        return {
            "estimated_refusal_score": self.refusal_score[place].item(),
            "estimated_induced_score": self.induced_score[place].item(),
            "estimated_kl_nats": self.kl_nats[place].item(),
        }

    def ranked(self, places: Iterable[Place], max_kl_nats: float) -> list[Place]:
        """Order candidates, best first: by induced and by refusal score in turn, those of too large a KL at the end.

        Two rankings protect each other. Where the model is sure of its answer a score hardly changes to first order,
        and which of the two that hides depends on the model. Neither estimate is held to a threshold: both keep the
        order of candidates far better than their size.
        """
        known = list(places)
        fits = {place: bool(self.kl_nats[place] <= KL_SLACK * max_kl_nats) for place in known}
        induces = sorted(known, key=lambda place: (not fits[place], -self.induced_score[place].item()))
        bypasses = sorted(known, key=lambda place: (not fits[place], self.refusal_score[place].item()))
        return list(dict.fromkeys(place for pair in zip(induces, bypasses, strict=True) for place in pair))


def estimate(inputs: SelectInputs, subject: Subject, openers: Measure) -> Estimates:
    """Estimate all three scores of all candidates; a candidate that is not finite gets those of a zero direction."""
    import torch

    from refusalkit import algebra

    shape = inputs.directions.shape
    vectors = inputs.directions.nan_to_num(posinf=0, neginf=0).reshape(*shape[:2], -1, shape[-1]).double()
    bases = torch.zeros_like(vectors)
    for row, layer in torch.cartesian_prod(torch.arange(shape[0]), torch.arange(shape[1])).tolist():
        if vectors[row, layer].any():
            basis = algebra.orthonormal(vectors[row, layer])
            bases[row, layer, : len(basis)] = basis
    flat = bases.flatten(0, 1)
    (harmful,) = subject.attribute(inputs.harmful, flat, inputs.site, [openers])
    reference = Measure("kl_nats")
    harmless, drawn = subject.attribute(inputs.harmless, flat, inputs.site, [openers, reference])
    return Estimates(
        refusal_score=harmful.removal.mean(-1).reshape(shape[:2]),
        induced_score=harmless.value.mean() + (vectors[:, :, 0] * harmless.gradient).sum(-1),
        kl_nats=drawn.removal.mean(-1).reshape(shape[:2]),
    )
