"""Name the methods of Wollschläger et al. (2025) in recipes: one direction, independent directions, a cone."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from refusalkit.errors import InputError
from refusalkit.strategy import Captured, ModelInputs, Setting, Strategy

if TYPE_CHECKING:
    from torch import Tensor

    from refusalkit_rdo.objective import Objective

Count = Annotated[int, Field(ge=1, strict=True)]
Weight = Annotated[float, Field(ge=0)]
Sampling = Literal["hypersphere", "interpolation"]


class Trained(Strategy):
    """Train directions for one place, which the difference in means decides unless the recipe does.

    They are as long as the difference in means there; everywhere else is zero, so there is one candidate.
    """

    needs: ClassVar[Literal["means", "samples", "model"]] = "model"
    layer: Annotated[int, Field(ge=0, strict=True)] | None = None
    """The layer the direction is added at; null takes that of the best difference in means."""
    position: Annotated[int, Field(lt=0, strict=True)] | None = None
    """The position whose difference in means sets the targets and the length; null takes the best."""
    steps: Annotated[Count, Field(examples=[10])] = 60
    """Optimiser steps at most, for each direction."""
    batch_size: Count = 16
    """Prompts a side in each step."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    """Of AdamW, on vectors of length one."""
    patience: Count = 5
    """After this many steps without a lower loss the learning rate falls to a tenth, twice, and training ends."""
    target_tokens: Count = 30
    """Length of the completions that are trained towards, and of the stretch on which harmless prompts are retained."""
    ablation_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of saying, under ablation, what the ablated difference in means says to harmful prompts."""
    addition_weight: Weight = 0.2
    """Weight of saying, under addition, the first sentence that the added difference in means says to harmless ones."""
    retain_weight: Weight = 1.0
    """Weight of the KL that ablation costs on harmless prompts and their answers, summed over `target_tokens`."""
    seed: Annotated[int, Field(strict=True)] = 0
    """Decides where training starts, the order of prompts and the samples of a cone."""

    def fitted(self, setting: Setting) -> Strategy:
        if self.layer is not None and self.layer >= setting.n_layers:
            hint = f"0 to {setting.n_layers - 1}"
            raise InputError(f"layer {self.layer} of {setting.n_layers}", where="find.layer", hint=hint)
        if self.position is not None and self.position not in setting.positions:
            hint = f"captured: {', '.join(map(str, setting.positions))}"
            raise InputError(f"position {self.position} is not captured", where="find.position", hint=hint)
        return self

    def find(self, harmful: Captured, harmless: Captured, model: ModelInputs | None = None) -> Tensor:
        from refusalkit_rdo.objective import Objective
        from refusalkit_rdo.place import best_place

        assert model is not None
        difference = harmful.mean - harmless.mean
        place = best_place(difference, model, self.layer, self.position)
        objective = Objective.at(place, difference[place.row, place.layer], self, model)
        rows = self.train(objective) * objective.length
        found = difference.new_zeros((*difference.shape[:2], *rows.shape))
        found[place.row, place.layer] = rows.to(found)
        return found[:, :, 0] if len(rows) == 1 else found

    @abstractmethod
    def train(self, objective: Objective) -> Tensor:
        """Return directions of length one: [rank, d_model] float64."""


class Rdo(Trained):
    """Train a direction whose ablation bypasses refusal and whose addition induces it (RDO, 2502.17420).

    Gradient descent on the vector, from a random start: ablating it must make harmful prompts answered, adding it
    harmless ones refused, and harmless answers must not change under ablation.
    """

    strategy: Literal["rdo"] = "rdo"
    rank: Count = 1
    """How many directions to train, one after another, each orthogonal to those before."""
    orthogonal_to: Literal["nothing", "difference_in_means"] = "nothing"
    """What the directions must be orthogonal to besides."""

    def train(self, objective: Objective) -> Tensor:
        from refusalkit_rdo.training import train_orthogonal

        given = [objective.difference] if self.orthogonal_to == "difference_in_means" else []
        return train_orthogonal(objective, self, self.rank, given)


class RdoIndependent(Trained):
    """Train a direction that is independent of the difference in means in what ablation does (RepInd, 2502.17420).

    Ablating one of the two must not change how far the hidden states point along the other, in any layer but the last
    tenth. Orthogonal directions need not be independent in this sense.
    """

    strategy: Literal["rdo_independent"] = "rdo_independent"
    rank: Count = 1
    """How many directions to train, one after another, each independent of those before as well."""
    retain_weight: Weight = 0.1
    """Weight of the KL that ablation costs on harmless prompts and their answers, summed over `target_tokens`."""
    independence_weight: Weight = 200.0
    """Weight of the squared changes of cosine, on harmful prompts."""

    def train(self, objective: Objective) -> Tensor:
        from refusalkit_rdo.training import train_independent

        return train_independent(objective, self, self.rank, self.independence_weight)


class RefusalCone(Trained):
    """Train an orthonormal basis between whose vectors every direction mediates refusal (RCO, 2502.17420).

    The basis grows by one vector at a time. In each step the loss is that of the basis vectors and of directions
    drawn from the cone between them. `ablate` removes all of them jointly; the selector `cone` tries them one by one.
    """

    strategy: Literal["refusal_cone"] = "refusal_cone"
    rank: Annotated[int, Field(ge=2, strict=True)] = 2
    """The number of basis vectors."""
    samples: Count = 2
    """Directions that each prompt tries in each step; every four prompts draw others. The authors take 8."""
    sampling: Sampling = "hypersphere"
    """How directions are drawn: evenly in angle, or as convex combinations of the basis with log-normal weights."""

    def train(self, objective: Objective) -> Tensor:
        from refusalkit_rdo.training import train_cone

        return train_cone(objective, self, self.rank, (self.samples, self.sampling))
