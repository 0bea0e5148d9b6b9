"""Do something with a direction: nothing, remove it, add it, remove it from the weights."""

from __future__ import annotations

from typing import Literal

from refusalkit.intervention import NOTHING, Direction, Edit, Intervention, InterventionSpec, Site

#: Every place a block reads or writes the stream; ablating at all of them is the authors' directional ablation.
ABLATED: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out")


def ablate_everywhere(direction: Direction) -> Intervention:
    """Remove the direction at every read and write of every block."""
    from refusalkit import algebra

    basis = algebra.orthonormal(direction.vector.reshape(-1, direction.vector.shape[-1]))
    layers = range(direction.n_layers)
    return Intervention(tuple(Edit(site, layer, remove=basis) for layer in layers for site in ABLATED))


class NoIntervention(InterventionSpec):
    """Leave the model as it is."""

    intervention: Literal["none"] = "none"
    uses_direction = False

    def build(self, direction: Direction) -> Intervention:
        return NOTHING


class Ablate(InterventionSpec):
    """Remove the direction from the residual stream at every layer and token (Arditi et al. 2024, section 2.4)."""

    intervention: Literal["ablate"] = "ablate"

    def build(self, direction: Direction) -> Intervention:
        return ablate_everywhere(direction)


class Steer(InterventionSpec):
    """Add the direction where it was found, at every token (activation addition, Arditi et al. 2024, section 2.4)."""

    intervention: Literal["steer"] = "steer"
    scale: float = 1.0
    """Multiples of the direction as found: 1 induces refusal, -1 bypasses it."""

    def build(self, direction: Direction) -> Intervention:
        # Of a subspace the first row is added.
        vector = direction.vector.reshape(-1, direction.vector.shape[-1])[0]
        return Intervention((Edit(direction.site, direction.layer, add=self.scale * vector),))


class Orthogonalize(InterventionSpec):
    """Remove the direction from every weight that writes the residual stream (Arditi et al. 2024, section 4)."""

    intervention: Literal["orthogonalize"] = "orthogonalize"
    on_weights = True

    def build(self, direction: Direction) -> Intervention:
        from refusalkit import algebra

        return Intervention(weights=algebra.orthonormal(direction.vector.reshape(-1, direction.vector.shape[-1])))


INTERVENTIONS = (NoIntervention, Ablate, Steer, Orthogonalize)
