"""The engine equals plain transformers with plain hooks, however it batches, packs and shares."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from refusalkit import algebra, tiny
from refusalkit.adapter import Adapter
from refusalkit.builtin.adapters import GEMMA2, GEMMA4, GPT2, GPT_NEOX, LLAMA, QWEN2, QWEN3_5
from refusalkit.builtin.interventions import ablate_everywhere
from refusalkit.checkpoint import open_checkpoint
from refusalkit.engine import blocks
from refusalkit.engine.batch import batch, chunks, shared_prefix
from refusalkit.engine.engine import Engine
from refusalkit.engine.load import load
from refusalkit.engine.lower import lower
from refusalkit.errors import InputError, RunError
from refusalkit.intervention import NOTHING, Direction, Edit, Intervention
from refusalkit.recipe import ModelSection
from refusalkit.selector import Measure
from refusalkit.testing import random_engine
from refusalkit.testing.models import random_prompts
from tests.benchmarks.plain import Plain, hooked
from tests.conftest import BUILT_IN

FAMILIES = [
    pytest.param(LLAMA, "LlamaForCausalLM", id="llama"),
    pytest.param(QWEN2, "Qwen2ForCausalLM", id="qwen2"),
    pytest.param(GEMMA2, "Gemma2ForCausalLM", id="gemma2"),
]
PROMPTS = random_prompts(7)


def _direction(engine: Engine, seed: int = 0, layer: int = 2) -> Direction:
    vector = torch.randn(engine.d_model, generator=torch.Generator().manual_seed(seed))
    return Direction(vector, -1, layer, engine.n_layers)


def _steer(engine: Engine, seed: int = 0, layer: int = 2) -> Intervention:
    return Intervention((Edit("resid_pre", layer, add=_direction(engine, seed, layer).vector),))


def _hooks(engine: Engine, removed: Tensor) -> AbstractContextManager[None]:
    """Ablate with plain forward hooks, written without the engine's help."""
    return hooked(Plain(engine.module, engine.adapter, pad_id=0).ablation(removed))


@torch.no_grad()
def _plainly(engine: Engine, prompt: Sequence[int]) -> Any:
    return engine.module(torch.tensor([list(prompt)]), output_hidden_states=True)


@pytest.mark.parametrize(("adapter", "architecture"), FAMILIES)
def test_capture_equals_the_hidden_states_of_transformers(adapter: Adapter, architecture: str) -> None:
    engine = random_engine(architecture, adapter)
    found = engine.capture(PROMPTS, (-3, -1), keep_samples=True)
    assert found.samples is not None
    for prompt, sample in zip(PROMPTS, found.samples, strict=True):
        states = _plainly(engine, prompt).hidden_states[: engine.n_layers]
        expected = torch.stack([state[0, [-3, -1]] for state in states], 1)
        torch.testing.assert_close(sample, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.mean, engine.capture(PROMPTS, (-3, -1)).mean, atol=1e-6, rtol=1e-6)


def test_capture_of_one_prompt_is_bit_equal_to_hidden_states() -> None:
    engine = random_engine("LlamaForCausalLM", LLAMA)
    mean = engine.capture(PROMPTS[:1], (-2, -1)).mean
    states = _plainly(engine, PROMPTS[0]).hidden_states[: engine.n_layers]
    assert torch.equal(mean, torch.stack([state[0, -2:] for state in states], 1).double())


@pytest.mark.parametrize(("adapter", "architecture"), FAMILIES)
def test_capture_of_some_layers_equals_that_of_all_and_runs_nothing_above(adapter: Adapter, architecture: str) -> None:
    engine = random_engine(architecture, adapter)
    prompts = [(*range(20, 32), *prompt) for prompt in PROMPTS]
    assert shared_prefix(prompts, keep=1), "a front is shared, so that it has to stop, too"
    everything = engine.capture(prompts, (-2, -1), keep_samples=True).samples
    assert everything is not None
    ran: set[int] = set()
    for layer in range(engine.n_layers):
        # Inside the block: a pass that stops at a block's output stops before hooks that were added behind nnsight's.
        attention = engine.module.get_submodule(f"{engine.layout.block(layer)}.self_attn")
        attention.register_forward_pre_hook(lambda *_, layer=layer: ran.add(layer))
    for layers, site, above in (((1,), "resid_pre", 1), ((0, 2), "resid_pre", 2), ((0,), "resid_post", 1)):
        ran.clear()
        before = engine.prompt_passes
        found = engine.capture(prompts, (-2, -1), site, layers=layers, keep_samples=True).samples
        assert found is not None
        shift = site == "resid_post"
        torch.testing.assert_close(found, everything[:, :, [layer + shift for layer in layers]], atol=2e-5, rtol=1e-4)
        assert ran == set(range(above))
        assert engine.prompt_passes - before == pytest.approx(len(prompts) * above / engine.n_layers)


def test_capture_of_what_goes_in_runs_no_block() -> None:
    engine = random_engine("LlamaForCausalLM", LLAMA)
    engine.module.get_submodule(engine.layout.block(0)).register_forward_hook(lambda *_: pytest.fail("it ran"))
    found = engine.capture(PROMPTS, (-1,), layers=(0,), keep_samples=True).samples
    assert found is not None
    embedding = engine.module.get_input_embeddings().weight
    assert torch.equal(found[:, 0, 0], embedding[[prompt[-1] for prompt in PROMPTS]].float())


@pytest.mark.parametrize(("adapter", "architecture"), FAMILIES)
def test_ablated_logits_equal_plain_hooks(adapter: Adapter, architecture: str) -> None:
    engine = random_engine(architecture, adapter)
    direction = _direction(engine)
    found = engine.logits(PROMPTS, ablate_everywhere(direction))
    with _hooks(engine, direction.vector):
        expected = torch.cat([_plainly(engine, prompt).logits[:, -1] for prompt in PROMPTS])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("adapter", "architecture"), FAMILIES)
def test_ablated_generation_equals_plain_hooks_token_for_token(adapter: Adapter, architecture: str) -> None:
    engine = random_engine(architecture, adapter)
    engine.module.generation_config.eos_token_id = -1
    direction = _direction(engine)
    found = engine.generate(PROMPTS, ablate_everywhere(direction), max_new_tokens=6)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with _hooks(engine, direction.vector):
        expected = [
            tuple(engine.module.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist())
            for prompt in PROMPTS
        ]
    assert found == expected
    assert found != engine.generate(PROMPTS, None, max_new_tokens=6)


def test_generation_ends_at_the_end_of_turn() -> None:
    engine = random_engine("LlamaForCausalLM", LLAMA)
    engine.module.generation_config.eos_token_id = -1
    whole = engine.generate(PROMPTS, None, max_new_tokens=6)
    engine.module.generation_config.eos_token_id = [whole[0][2]]
    cut = engine.generate(PROMPTS, None, max_new_tokens=6)
    assert cut[0] == whole[0][: whole[0].index(whole[0][2])]


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize(("adapter", "architecture"), FAMILIES)
def test_steering_that_starts_at_its_layer_equals_the_whole_pass(
    adapter: Adapter, architecture: str, layer: int
) -> None:
    engine = random_engine(architecture, adapter)
    steered = [_steer(engine, seed, layer) for seed in range(3)]
    measure = Measure("refusal_score", token_ids=(5, 7))
    found = engine.measure(PROMPTS, steered, measure)
    engine.shares_prefix = False
    for row, intervention in zip(found, steered, strict=True):
        expected = algebra.refusal_score(engine.logits(PROMPTS, intervention), torch.tensor([5, 7]))
        torch.testing.assert_close(row, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("adapter", "architecture", "options"),
    [
        (LLAMA, "LlamaForCausalLM", {}),
        (QWEN2, "Qwen2ForCausalLM", {}),
        (GEMMA2, "Gemma2ForCausalLM", {"sliding_window": 64}),
        (GEMMA2, "Gemma2ForCausalLM", {"sliding_window": 12}),
        (QWEN3_5, "Qwen3_5ForCausalLM", {}),
        (GPT2, "GPT2LMHeadModel", {}),
        (GPT_NEOX, "GPTNeoXForCausalLM", {}),
        (GEMMA4, "Gemma4ForCausalLM", {}),
    ],
    ids=["llama", "qwen2", "gemma2", "gemma2-short-window", "qwen3.5", "gpt2", "gpt-neox", "gemma4"],
)
def test_results_do_not_depend_on_batches_packs_or_the_shared_front(
    adapter: Adapter, architecture: str, options: dict[str, Any]
) -> None:
    engine = random_engine(architecture, adapter, **options)
    interventions = [NOTHING, *(ablate_everywhere(_direction(engine, seed)) for seed in range(3)), _steer(engine)]
    measure = Measure("refusal_score", token_ids=(5,))
    results = []
    for size, shares in ((32, True), (3, True), (1, True), (32, False), (2, False)):
        engine.batch_size, engine.shares_prefix = size, shares
        results.append(engine.measure(PROMPTS, interventions, measure))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=2e-4, rtol=1e-4)


def test_kl_is_given_up_only_where_the_mean_is_above_the_limit() -> None:
    engine = random_engine("LlamaForCausalLM", LLAMA)
    interventions = [NOTHING, *(ablate_everywhere(_direction(engine, seed)) for seed in range(6))]
    reference = engine.logits(PROMPTS)
    whole = engine.measure(PROMPTS, interventions, Measure("kl_nats", reference=reference)).mean(1)
    limit = whole.sort().values[3].item() * 1.0001
    found = engine.measure(PROMPTS, interventions, Measure("kl_nats", reference=reference, stop_above=limit))
    given_up = found.isnan().any(1)
    assert given_up.any()
    assert (whole[given_up] > limit).all()
    torch.testing.assert_close(found.mean(1)[~given_up], whole[~given_up], atol=1e-5, rtol=1e-4)
    assert whole[0].abs() < 1e-5


def test_losses_equal_cross_entropy_of_transformers() -> None:
    engine = random_engine("LlamaForCausalLM", LLAMA)
    completions = [(9, 10, 11), (12,), (13, 14), (15, 16, 17, 18), (), (20,), (21, 22)]
    losses, counts = engine.losses(PROMPTS, completions)
    assert counts.tolist() == [3, 1, 2, 4, 0, 1, 2]
    for prompt, completion, loss in zip(PROMPTS, completions, losses, strict=True):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logits = engine.module(ids).logits[0].double()
        expected = sum(
            torch.nn.functional.cross_entropy(logits[place - 1], ids[0, place])
            for place in range(len(prompt), ids.shape[1])
        )
        assert abs(float(expected) - loss.item()) < 1e-4


def test_a_remote_dry_run_reads_the_same_bits() -> None:
    nnsight.register("refusalkit")
    engine = random_engine("LlamaForCausalLM", LLAMA)
    group = batch(PROMPTS, range(len(PROMPTS)), 0, 0, torch.device("cpu"))
    ablation = ablate_everywhere(_direction(engine))
    program = lower([ablation], engine.layout, 7, torch.device("cpu"), [("resid_pre", layer) for layer in range(4)])
    plain = lower([ablation], engine.layout, 7, torch.device("cpu"))
    inputs = group.repeated(1)

    def both(call: Callable[[dict[str, Any]], Any]) -> tuple[Any, Any]:
        return call({}), call({"remote": "local"})

    sums = both(lambda options: blocks.read_sums(engine.model, inputs, program, (-2, -1), options))
    logits = both(lambda options: blocks.last_logits(engine.model, inputs, plain, options, ((), None)))
    every = both(lambda options: blocks.kept_logits(engine.model, inputs, plain, options))
    kept = both(lambda options: blocks.kept_logits(engine.model, inputs, plain, {"logits_to_keep": 3, **options}))
    assert torch.equal(*sums)
    assert torch.equal(*logits)
    assert torch.equal(*every)
    assert torch.equal(*kept)
    assert torch.equal(every[0][:, -1], logits[0])
    # A product over fewer rows may round differently, which depends on the processor.
    torch.testing.assert_close(kept[0], every[0][:, -3:], rtol=0, atol=1e-5)


def test_memory_that_runs_out_halves_the_batch_and_is_remembered() -> None:
    engine = random_engine("LlamaForCausalLM", LLAMA)
    expected = engine.logits(PROMPTS)

    def too_small(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[0] > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    handle = engine.module.register_forward_pre_hook(too_small, with_kwargs=True)
    found = engine.logits(PROMPTS)
    handle.remove()
    assert engine.batch_size <= 2
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_memory_that_is_too_small_for_one_prompt_is_an_error_that_says_so() -> None:
    engine = random_engine("LlamaForCausalLM", LLAMA)

    def always(module: Any, args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = engine.module.register_forward_pre_hook(always)
    with pytest.raises(RunError, match="single prompt"):
        engine.logits(PROMPTS)
    handle.remove()


def test_other_errors_of_the_model_are_not_taken_for_missing_memory() -> None:
    engine = random_engine("LlamaForCausalLM", LLAMA)

    def broken(module: Any, args: Any) -> None:
        raise RuntimeError("some kernel failed")

    handle = engine.module.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="some kernel failed"):
        engine.logits(PROMPTS)
    handle.remove()


def test_a_position_before_the_prompt_is_an_error() -> None:
    engine = random_engine("LlamaForCausalLM", LLAMA)
    with pytest.raises(RunError, match="before the start"):
        engine.capture([(3, 4, 5)], (-4,))


def test_shared_prefix_leaves_what_has_to_be_read() -> None:
    front = tuple(range(3, 20))
    assert shared_prefix([(*front, 1), (*front, 2, 3)], keep=1) == front
    assert shared_prefix([(*front, 1), (*front, 2, 3)], keep=5) == front[:-4]
    assert shared_prefix([front, front], keep=1) == front[:-1]
    assert shared_prefix([(*front[:7], 1), (*front[:7], 2)], keep=1) == ()
    assert shared_prefix([front], keep=1) == ()


def test_chunks_hold_every_prompt_once_longest_first() -> None:
    lengths = [3, 9, 4, 4, 7]
    found = chunks(lengths, 2)
    assert [lengths[index] for group in found for index in group] == [9, 7, 4, 4, 3]
    assert sorted(index for group in found for index in group) == list(range(5))


def test_a_checkpoint_that_lacks_a_weight_is_an_error_and_not_filled_with_noise(tmp_path: Path) -> None:
    folder = tmp_path / "lacking"
    shutil.copytree(tiny.checkpoint("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    section = ModelSection(id=str(folder))
    with pytest.raises(InputError, match=r"lacks 1 of .*down_proj"):
        load(open_checkpoint(section, BUILT_IN))
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="weights cannot be read"):
        load(open_checkpoint(section, BUILT_IN))
