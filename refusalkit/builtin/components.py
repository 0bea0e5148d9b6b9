"""Set the component along a direction: to the mean of harmless prompts, to one value, or to an angle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from refusalkit.errors import RunError
from refusalkit.intervention import ActivationSpec, Direction, Edit

if TYPE_CHECKING:
    from torch import Tensor


class Affine(ActivationSpec):
    """Put every token's component along the direction where harmless prompts have it, and add (ACE, 2411.09003).

    `h - P h + P m + alpha r` with m the harmless mean and P the projection on the direction r: 0 makes a prompt look
    harmless to the model, 1 harmful, whatever it was before.
    """

    intervention: Literal["affine"] = "affine"
    alpha: float = 0.0
    """Multiples of the direction as found, counted from the harmless mean."""

    def edits(self, direction: Direction, layers: Sequence[int]) -> Sequence[Edit]:
        return _set_component(direction, layers, self.alpha)


class MeanAblate(ActivationSpec):
    """Put the component along the direction at the mean of harmless prompts, in every layer (Yu et al., 2409.20089).

    Unlike `ablate` it leaves harmless prompts where they are on average.
    """

    intervention: Literal["mean_ablate"] = "mean_ablate"
    everywhere = True

    def edits(self, direction: Direction, layers: Sequence[int]) -> Sequence[Edit]:
        return _set_component(direction, layers, 0.0)


class Clamp(ActivationSpec):
    """Set the component along the direction to one value, at every token of the layer it was found in."""

    intervention: Literal["clamp"] = "clamp"
    value: float = 0.0
    """The component that is left, in the units of the activations: 0 removes it there."""

    def edits(self, direction: Direction, layers: Sequence[int]) -> Sequence[Edit]:
        basis = direction.basis.float()
        return [Edit(direction.site, layer, remove=basis, add=self.value * basis[0]) for layer in layers]


class Angular(ActivationSpec):
    """Turn every token to one angle in a plane of the direction and a second vector (Vu and Nguyen, 2510.26243).

    `h - P h + |P h| (cos(t) b1 + sin(t) b2)`: b1 is the direction, b2 the first principal component, over layers, of
    the mean differences at its position, made orthogonal to b1. What lies in the plane keeps its length, so the angle
    alone decides. Applied to the input of every block.
    """

    intervention: Literal["angular"] = "angular"
    everywhere = True
    degrees: float = 90.0
    """The angle t: 0 points along the direction, 90 has nothing of it, 180 points away from it."""
    adaptive: bool = False
    """Turn only tokens whose component along the direction is positive, and leave the others alone."""

    def edits(self, direction: Direction, layers: Sequence[int]) -> Sequence[Edit]:
        plane = _plane(direction)
        angle = math.radians(self.degrees)
        heading = math.cos(angle) * plane[0] + math.sin(angle) * plane[1]
        along = plane[0] if self.adaptive else None
        return [Edit("resid_pre", layer, remove=plane, turn=heading, along=along) for layer in layers]


def _set_component(direction: Direction, layers: Sequence[int], alpha: float) -> Sequence[Edit]:
    """Move the projection on the direction to the harmless mean's plus `alpha` times the direction."""
    assert direction.harmless is not None, "evaluation hands the means to every intervention"
    basis = direction.basis.float()
    means = direction.harmless.to(basis.dtype) @ basis.T @ basis
    return [Edit(direction.site, layer, remove=basis, add=means[layer] + alpha * direction.main) for layer in layers]


def _plane(direction: Direction) -> Tensor:
    """Return orthonormal rows [2, d_model]: the direction, and where the mean differences go from layer to layer."""
    import torch

    from refusalkit import algebra

    assert direction.harmful is not None
    assert direction.harmless is not None
    first = algebra.unit(direction.main.double())
    # The authors take candidates between unit means, so that the length of the stream does not decide.
    candidates = algebra.unit(direction.harmful.double()) - algebra.unit(direction.harmless.double())
    _, spread, components = torch.linalg.svd(candidates - candidates.mean(0), full_matrices=False)
    second = components[0] - (components[0] @ first) * first
    if spread[0] < 1e-6 or second.norm() < 1e-6:
        raise RunError(
            "the mean differences of all layers point the same way, so there is no plane to turn in",
            where="evaluate.interventions: angular",
            hint="use `steer` or `clamp`",
        )
    # A principal component has no sign of its own: the last layer lies on the positive side.
    sign = 1.0 if second @ (candidates[-1] - candidates[0]) >= 0 else -1.0
    return torch.stack([first, sign * algebra.unit(second)])


COMPONENTS = (Affine, MeanAblate, Clamp, Angular)
