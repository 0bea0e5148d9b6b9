"""What training is made of: starts, constraints, draws from a cone, targets, places."""

from __future__ import annotations

import math

import pytest
import refusalkit_rdo
import torch
from refusalkit_rdo.cone import draw
from refusalkit_rdo.objective import first_sentence
from refusalkit_rdo.training import orthonormalized

from refusalkit import algebra
from refusalkit.registry import load_registry


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_plugin_is_found_by_its_module() -> None:
    registry = load_registry([refusalkit_rdo], entry_points=False)
    assert {"rdo", "rdo_independent", "refusal_cone"} <= set(registry.strategies)
    assert "cone" in registry.selectors


def test_rows_are_put_at_right_angles_in_their_order() -> None:
    rows, away = _randn(3, 32), list(_randn(2, 32, seed=1))
    # Nearly parallel rows are where one pass of Gram-Schmidt loses its digits.
    rows[1] = rows[0] + 1e-7 * rows[1]
    found = orthonormalized(rows, away)
    torch.testing.assert_close(found @ found.T, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (found @ torch.stack(away).T).abs().max() < 1e-12
    first = orthonormalized(rows, [])[0]
    torch.testing.assert_close(first, algebra.unit(rows[0]))


@pytest.mark.parametrize("sampling", ["hypersphere", "interpolation"])
def test_what_is_drawn_is_of_length_one_and_between_the_basis_vectors(sampling) -> None:  # type: ignore[no-untyped-def]
    basis = orthonormalized(_randn(3, 32), [])
    found = draw(7.0 * basis, 4000, sampling, torch.Generator().manual_seed(0))
    assert (found.norm(dim=-1) - 1).abs().max() < 1e-12
    weights = found @ basis.T
    assert (weights >= 0).all()
    torch.testing.assert_close(weights @ basis, found)
    # No basis vector is favoured.
    assert (weights.mean(0) - weights.mean()).abs().max() < 0.02


def test_hypersphere_draws_evenly_in_angle() -> None:
    found = draw(torch.eye(2, dtype=torch.float64), 20000, "hypersphere", torch.Generator().manual_seed(0))
    angles = torch.atan2(found[:, 1], found[:, 0])
    quarters = torch.histc(angles, 4, min=0, max=math.pi / 2) / len(angles)
    assert (quarters - 0.25).abs().max() < 0.02


def test_the_first_sentence_ends_before_its_full_stop() -> None:
    words = {1: "I", 2: " am", 3: " sorry", 4: ".", 5: " No.", 6: " More"}

    def text(tokens: tuple[int, ...]) -> str:
        return "".join(words[token] for token in tokens)

    assert first_sentence((1, 2, 3, 4, 6, 4), text) == (1, 2, 3)
    assert first_sentence((1, 5, 6), text) == (1,)
    assert first_sentence((1, 2), text) == (1, 2)
    assert first_sentence((4, 1), text) == ()
