"""Draw directions from a cone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refusalkit import algebra

if TYPE_CHECKING:
    from refusalkit_rdo.strategies import Sampling


def draw(basis: Tensor, n: int, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw `n` directions of length one, [n, d_model], from the cone between the rows of `basis` [rank, d_model].

    `hypersphere` draws evenly in angle where the rows are orthonormal, `interpolation` with log-normal weights.
    """
    weights = torch.randn((n, len(basis)), generator=generator, dtype=basis.dtype)
    positive = weights.abs() if sampling == "hypersphere" else weights.exp()
    return algebra.unit(positive @ algebra.unit(basis))
