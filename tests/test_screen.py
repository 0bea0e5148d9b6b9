"""The gradient screen estimates what it says it does, and never decides on an estimate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from refusalkit import algebra
from refusalkit.artifacts import Choice
from refusalkit.builtin.adapters import GEMMA2, LLAMA
from refusalkit.builtin.selectors import SCREENED, Causal
from refusalkit.engine.engine import Engine
from refusalkit.pipeline import execute
from refusalkit.plan import make_plan
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import load_registry
from refusalkit.report.estimates import estimated_scores
from refusalkit.selector import Measure
from refusalkit.store import Store
from refusalkit.testing import random_engine
from tests.benchmarks.plain import Hook, hooked

OPENERS = Measure("refusal_score", token_ids=(5, 9))
STEP = 5e-4


def engine_in_double(architecture: str) -> Engine:
    engine = random_engine(architecture, GEMMA2 if architecture.startswith("Gemma") else LLAMA)
    engine.module.double()
    return engine


def last_logits(engine: Engine, prompts: list[tuple[int, ...]]) -> Tensor:
    with torch.no_grad():
        return torch.stack([engine.module(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])


def at_writers(engine: Engine, change: Callable[[Tensor], Tensor]) -> list[Hook]:
    outputs = [
        f"{engine.layout.block(layer)}.{write.output}"
        for layer, writes in enumerate(engine.layout.writes)
        for write in writes
    ]
    return [(engine.module.get_submodule(path), False, change) for path in (engine.adapter.embedding, *outputs)]


# Of one length: padding turns eager attention in float64 into not-a-number.
PROMPTS = [(3, 9, 11, 4, 8), (3, 7, 30, 33, 8), (3, 22, 41, 42, 8)]
# RMS norms compute in float32 whatever the model, which is what limits a finite difference.
NEAR = {"rtol": 5e-3, "atol": 1e-3}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_adding_a_little_of_a_vector_changes_the_score_as_the_gradient_says(architecture: str) -> None:
    engine = engine_in_double(architecture)
    vector = torch.randn(engine.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (found,) = engine.attribute(PROMPTS, torch.zeros(1, 1, engine.d_model), "resid_pre", [OPENERS])
    for layer in range(engine.n_layers):
        scores = []
        for sign in (1, -1):
            shift = sign * STEP * vector
            with hooked([(engine.module.model.layers[layer], True, lambda x, shift=shift: x + shift)]):
                scores.append(algebra.refusal_score(last_logits(engine, PROMPTS), torch.tensor([5, 9])).mean())
        slope = (scores[0] - scores[1]) / (2 * STEP)
        assert torch.isclose(found.gradient[layer] @ vector, slope, **NEAR)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_removing_a_little_from_every_write_changes_the_score_as_the_estimate_says(architecture: str) -> None:
    engine = engine_in_double(architecture)
    basis = algebra.orthonormal(torch.randn(2, engine.d_model, generator=torch.Generator().manual_seed(1)))
    (found,) = engine.attribute(PROMPTS, basis[None], "resid_pre", [OPENERS])
    scores = []
    for step in (STEP, -STEP):
        with hooked(at_writers(engine, lambda x, step=step: x - step * (x @ basis.T) @ basis)):
            scores.append(algebra.refusal_score(last_logits(engine, PROMPTS), torch.tensor([5, 9])))
    slope = (scores[0] - scores[1]) / (2 * STEP)
    assert torch.allclose(found.removal[0] - found.value, slope, **NEAR)


def test_the_estimated_kl_is_that_of_a_small_removal_scaled_up() -> None:
    engine = engine_in_double("LlamaForCausalLM")
    basis = algebra.orthonormal(torch.randn(1, engine.d_model, generator=torch.Generator().manual_seed(2)))
    many = PROMPTS[:1] * 400
    (found,) = engine.attribute(many, basis[None], "resid_pre", [Measure("kl_nats")])
    clean = last_logits(engine, many[:1]).log_softmax(-1)
    with hooked(at_writers(engine, lambda x: x - STEP * (x @ basis.T) @ basis)):
        changed = last_logits(engine, many[:1]).log_softmax(-1)
    exact = (clean.exp() * (clean - changed)).sum() / STEP**2
    assert torch.isclose(found.removal.mean(), exact, rtol=0.1)


def choose(tmp_path: Any, **select: Any) -> Choice:
    registry = load_registry()
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: screened\n"
        "model: {id: tiny:llama, dtype: float32}\n"
        "prompts: {harmful: tiny:harmful, harmless: tiny:harmless, train: 32, validation: 16, test: 8}\n"
        f"select: { ({'selector': 'causal', **select}) }\n".replace("True", "true")
    )
    execute(make_plan(load_recipe(path, registry), tmp_path, registry), tmp_path / "run", until="select")
    choice = Store(tmp_path / "run").load(Choice)
    assert choice is not None
    return choice


def test_a_screened_choice_is_the_exact_one_with_the_exact_scores(tmp_path: Any) -> None:
    exact, screened = choose(tmp_path), choose(tmp_path, screen="gradient", keep=6)
    assert (screened.position, screened.layer) == (exact.position, exact.layer)
    every = {(row.position, row.layer): row for row in exact.scores}
    # Not-scored rows and no-ops apart, what the screen kept has the numbers it has without a screen.
    kept = [row for row in screened.scores if row.status != SCREENED and row.induced_score is not None]
    for row in kept:
        other = every[row.position, row.layer]
        assert row.induced_score == pytest.approx(other.induced_score, abs=1e-4)
        assert row.refusal_score == pytest.approx(other.refusal_score, abs=1e-4)
    unkept = [row for row in screened.scores if row.status == SCREENED]
    assert len(unkept) == 25 - 6
    assert all(row.induced_score is None and "estimated_induced_score" in row.extra for row in unkept)
    assert [score.name for score in estimated_scores(screened)]
    assert not estimated_scores(exact)


def test_a_screen_that_kept_no_survivor_is_named_in_the_hint(tmp_path: Any) -> None:
    with pytest.raises(Exception, match=r"select\.keep"):
        choose(tmp_path, screen="gradient", keep=2, min_induced_score=12.0)


def test_scoring_everything_and_screening_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="take one of them"):
        Causal(exhaustive=True, screen="gradient")
