"""Do with a direction what the paper does: nothing, remove it, add it, remove it from the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from refusalkit.intervention import NOTHING, ActivationSpec, Direction, Edit, Intervention, InterventionSpec, Site

#: Every place a block reads or writes the stream; ablating at all of them is the authors' directional ablation.
ABLATED: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out")


def ablate_everywhere(direction: Direction) -> Intervention:
    """Remove the direction at every read and write of every block."""
    return Intervention(tuple(_ablations(direction, range(direction.n_layers))))


def _ablations(direction: Direction, layers: Sequence[int]) -> list[Edit]:
    basis = direction.basis
    return [Edit(site, layer, remove=basis) for layer in layers for site in ABLATED]


class NoIntervention(InterventionSpec):
    """Leave the model as it is."""

    intervention: Literal["none"] = "none"
    uses_direction = False

    def build(self, direction: Direction) -> Intervention:
        return NOTHING


class Ablate(ActivationSpec):
    """Remove the direction from the residual stream at every layer and token (Arditi et al. 2024, section 2.4)."""

    intervention: Literal["ablate"] = "ablate"
    everywhere = True

    def edits(self, direction: Direction, layers: Sequence[int]) -> Sequence[Edit]:
        return _ablations(direction, layers)


class Steer(ActivationSpec):
    """Add the direction where it was found, at every token (activation addition, Arditi et al. 2024, section 2.4)."""

    intervention: Literal["steer"] = "steer"
    scale: float = 1.0
    """Multiples of the direction as found: 1 induces refusal, -1 bypasses it."""

    def edits(self, direction: Direction, layers: Sequence[int]) -> Sequence[Edit]:
        vector = self.scale * direction.main
        return [Edit(direction.site, layer, add=vector) for layer in layers]


class Orthogonalize(InterventionSpec):
    """Remove the direction from every weight that writes the residual stream (Arditi et al. 2024, section 4)."""

    intervention: Literal["orthogonalize"] = "orthogonalize"
    on_weights = True
    keep_norms: bool = False
    """Give every column of the blocks' matrices back the length it had (norm-preserving abliteration). On no
    architecture is that equal to ablation; the report says how far it is from ablation and from the plain edit."""

    def build(self, direction: Direction) -> Intervention:
        return Intervention(weights=direction.basis, keeps_norms=self.keep_norms)


INTERVENTIONS = (NoIntervention, Ablate, Steer, Orthogonalize)
