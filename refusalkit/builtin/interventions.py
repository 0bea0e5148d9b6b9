"""Do something with a direction: nothing, remove it, add it, set it, remove it from the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from refusalkit.intervention import NOTHING, Direction, Edit, Intervention, InterventionSpec, Site

if TYPE_CHECKING:
    from torch import Tensor

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


class Affine(InterventionSpec):
    """Put every token's component along the direction where harmless prompts have it, and add (ACE, 2411.09003).

    `h - P h + P m + alpha r` with m the harmless mean and P the projection on the direction r: 0 makes a prompt look
    harmless to the model, 1 harmful, whatever it was before.
    """

    intervention: Literal["affine"] = "affine"
    alpha: float = 0.0
    """Multiples of the direction as found, counted from the harmless mean."""

    def build(self, direction: Direction) -> Intervention:
        return _set_component(direction, [direction.layer], self.alpha)


class MeanAblate(InterventionSpec):
    """Put the component along the direction at the mean of harmless prompts, in every layer (Yu et al., 2409.20089).

    Unlike `ablate` it leaves harmless prompts where they are on average.
    """

    intervention: Literal["mean_ablate"] = "mean_ablate"

    def build(self, direction: Direction) -> Intervention:
        return _set_component(direction, range(direction.n_layers), 0.0)


class Clamp(InterventionSpec):
    """Set the component along the direction to one value, at every token of the layer it was found in."""

    intervention: Literal["clamp"] = "clamp"
    value: float = 0.0
    """The component that is left, in the units of the activations: 0 removes it there."""

    def build(self, direction: Direction) -> Intervention:
        basis = _basis(direction)
        return Intervention((Edit(direction.site, direction.layer, remove=basis, add=self.value * basis[0]),))


def _basis(direction: Direction) -> Tensor:
    from refusalkit import algebra

    return algebra.orthonormal(direction.vector.reshape(-1, direction.vector.shape[-1])).float()


def _set_component(direction: Direction, layers: Iterable[int], alpha: float) -> Intervention:
    """Move the projection on the direction to the harmless mean's plus `alpha` times the direction."""
    assert direction.harmless is not None, "evaluation hands the harmless means to every intervention"
    basis = _basis(direction)
    vector = direction.vector.reshape(-1, direction.vector.shape[-1])[0]
    means = direction.harmless.to(basis.dtype) @ basis.T @ basis
    return Intervention(
        tuple(Edit(direction.site, layer, remove=basis, add=means[layer] + alpha * vector) for layer in layers)
    )


INTERVENTIONS = (NoIntervention, Ablate, Steer, Affine, MeanAblate, Clamp, Orthogonalize)
