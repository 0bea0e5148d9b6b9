"""Losses equal plain transformers under plain hooks, and their gradients equal finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.builtin.adapters import GEMMA2, GPT2, LLAMA
from refusalkit.builtin.components import Affine
from refusalkit.builtin.interventions import Ablate, Steer
from refusalkit.engine.engine import Engine
from refusalkit.engine.gradients import Differentiable
from refusalkit.intervention import NOTHING, Direction, Intervention, InterventionSpec
from refusalkit.testing import random_engine
from refusalkit.testing.models import random_prompts
from tests.benchmarks.plain import Plain, hooked

PROMPTS = random_prompts(5)
COMPLETIONS = ((5, 6, 7), (8,), (), (9, 10), (11, 12, 13, 14))
LAST = 6
SPECS = (Ablate(), Steer(), Affine(alpha=0.5))
STEP = 1e-6

Loss = Callable[[Sequence[Intervention]], Tensor]


def _vector(engine: Engine, seed: int) -> Tensor:
    return torch.randn(engine.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _built(spec: InterventionSpec, engine: Engine, vector: Tensor) -> Intervention:
    harmless = torch.ones((engine.n_layers, engine.d_model), dtype=vector.dtype)
    return spec.build(Direction(vector, -1, 1, engine.n_layers, harmless=harmless))


def _losses(engine: Engine) -> dict[str, Loss]:
    subject = Differentiable(engine)
    onto = _vector(engine, 9)

    def objective(states: Tensor, prompts: Sequence[int]) -> Tensor:
        scale = 1 + torch.tensor(prompts, dtype=states.dtype)
        return scale * torch.nn.functional.cosine_similarity(states, onto.to(states), dim=-1).square().mean(-1)

    return {
        "cross_entropy": lambda edits: subject.cross_entropy(PROMPTS, COMPLETIONS, edits),
        "kl_nats": lambda edits: subject.kl_nats(PROMPTS, COMPLETIONS, edits, LAST),
        "state_loss": lambda edits: subject.state_loss(PROMPTS, edits, objective),
    }


@pytest.mark.parametrize("loss", ["cross_entropy", "kl_nats", "state_loss"])
@pytest.mark.parametrize("spec", SPECS[:2], ids=lambda spec: spec.label)
def test_the_gradient_of_a_loss_equals_a_finite_difference(spec: InterventionSpec, loss: str) -> None:
    # Its norms are computed in the model's own dtype, which RMS norms are not.
    engine = random_engine("GPT2LMHeadModel", GPT2, dtype=torch.float64)
    value = _losses(engine)[loss]
    vectors = [_vector(engine, seed).requires_grad_() for seed in range(3)]
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (value([_built(spec, engine, vector) for vector in vectors]) @ weights).backward()
    towards = _vector(engine, 7)
    ahead, behind = (
        value([_built(spec, engine, vector.detach() + step * towards) for vector in vectors]) for step in (STEP, -STEP)
    )
    slopes = weights * (ahead - behind) / (2 * STEP)
    found = torch.stack([vector.grad @ towards for vector in vectors if vector.grad is not None])
    assert slopes.abs().min() > 1e-4
    torch.testing.assert_close(found, slopes, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "kl_nats", "state_loss"])
@pytest.mark.parametrize(("adapter", "architecture"), [(LLAMA, "LlamaForCausalLM"), (GEMMA2, "Gemma2ForCausalLM")])
def test_values_and_gradients_do_not_depend_on_batches_and_packs(adapter: Any, architecture: str, loss: str) -> None:
    engine = random_engine(architecture, adapter)
    results = []
    for size in (32, 4, 1):
        engine.batch_size = size
        vectors = [_vector(engine, seed).requires_grad_() for seed in range(3)]
        edits = [_built(spec, engine, vector) for vector, spec in zip(vectors, SPECS, strict=True)]
        values = _losses(engine)[loss]([*edits, NOTHING])
        values.sum().backward()
        results.append((values.detach(), torch.stack([vector.grad for vector in vectors if vector.grad is not None])))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-5, rtol=1e-4)


def test_a_batch_that_runs_out_of_memory_is_counted_once() -> None:
    engine = random_engine("LlamaForCausalLM", LLAMA)
    vector = _vector(engine, 0).requires_grad_()

    def value_and_gradient() -> tuple[Tensor, Tensor]:
        value = _losses(engine)["cross_entropy"]([_built(Ablate(), engine, vector)])
        return value.detach(), torch.autograd.grad(value.sum(), vector)[0]

    expected = value_and_gradient()

    def too_small(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[0] > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    handle = engine.module.register_forward_pre_hook(too_small, with_kwargs=True)
    found = value_and_gradient()
    handle.remove()
    assert engine.batch_size <= 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_losses_equal_plain_transformers_under_plain_hooks() -> None:
    engine = random_engine("LlamaForCausalLM", LLAMA)
    vector = _vector(engine, 0).float()
    edits = [_built(Ablate(), engine, vector)]
    entropy, divergence = [], []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = torch.tensor([prompt + completion])
        plain = engine.module(ids).logits[0].double().log_softmax(-1)
        with hooked(Plain(engine.module, engine.adapter, pad_id=0).ablation(vector)):
            output = engine.module(ids, output_hidden_states=True)
        ablated = output.logits[0].double().log_softmax(-1)
        picked = ablated[range(len(prompt) - 1, ids.shape[1] - 1), list(completion)]
        entropy.append(-picked.mean() if completion else torch.zeros(()).double())
        divergence.append((ablated.exp() * (ablated - plain))[-LAST:].sum())
    losses = _losses(engine)
    torch.testing.assert_close(losses["cross_entropy"](edits), torch.stack(entropy).mean()[None], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(losses["kl_nats"](edits), torch.stack(divergence).mean()[None], atol=1e-5, rtol=1e-4)
    assert losses["kl_nats"]([NOTHING]).abs() < 1e-9


def test_states_are_those_that_capture_reads_and_state_losses_see_them_after_the_edits() -> None:
    engine = random_engine("LlamaForCausalLM", LLAMA)
    subject = Differentiable(engine)
    vector = _vector(engine, 0)
    ablation = _built(Ablate(), engine, vector)
    states = subject.states(PROMPTS, ablation)
    assert states.shape == (len(PROMPTS), engine.n_layers, engine.d_model)
    assert (states @ algebra.unit(vector).float()).abs().max() < 1e-5
    seen = {}

    def objective(found: Tensor, prompts: Sequence[int]) -> Tensor:
        seen.update(zip(prompts, found.detach(), strict=True))
        return found.sum((1, 2))

    subject.state_loss(PROMPTS, [ablation], objective)
    torch.testing.assert_close(torch.stack([seen[index] for index in range(len(PROMPTS))]), states, atol=2e-5, rtol=0)


def test_a_gradient_reaches_the_intervention_it_is_of_and_no_weight() -> None:
    engine = random_engine("LlamaForCausalLM", LLAMA)
    first, second = _vector(engine, 0).requires_grad_(), _vector(engine, 1).requires_grad_()
    value = _losses(engine)["cross_entropy"]([_built(Ablate(), engine, first), _built(Ablate(), engine, second)])
    value[1].backward()
    assert second.grad is not None
    assert second.grad.norm() > 0
    assert first.grad is None or not first.grad.any()
    assert not any(weight.requires_grad or weight.grad is not None for weight in engine.module.parameters())
    with torch.no_grad():
        assert not _losses(engine)["kl_nats"]([_built(Ablate(), engine, first)]).requires_grad
