"""Models that are packed, spread over devices or larger than memory run like any other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from refusalkit.artifacts import Choice, Evaluation
from refusalkit.checkpoint import open_checkpoint
from refusalkit.engine import blocks
from refusalkit.engine.engine import Engine
from refusalkit.engine.load import load
from refusalkit.errors import InputError
from refusalkit.pipeline import execute
from refusalkit.plan import make_plan
from refusalkit.recipe import ModelSection
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry
from refusalkit.store import Store
from refusalkit.testing import random_model
from refusalkit.testing.models import tiny_tokenizer
from tests.conftest import BUILT_IN

SMALL = "prompts: {harmful: tiny:harmful, harmless: tiny:harmless, train: 16, validation: 16, test: 8}\n"
PROMPTS = [tuple(range(5, 5 + length)) for length in (12, 20, 16)]


def opened(model: str = "tiny:llama", **section: Any) -> Engine:
    return load(open_checkpoint(ModelSection(id=model, **section), BUILT_IN))


def saved(folder: Path) -> str:
    """Save a model whose every width is a multiple of 128, as bitsandbytes on a CPU wants it."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_key_value_heads": 4}
    random_model("LlamaForCausalLM", **shape).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"name: small\n{SMALL}{text}", encoding="utf-8")
    return path


@pytest.mark.parametrize(("quantize", "bound"), [("int8", 0.2), ("nf4", 0.6)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_packed_weights_give_nearly_the_same_logits(quantize: str, bound: float, tmp_path: Path) -> None:
    model = saved(tmp_path)
    packed, plain = opened(model, quantize=quantize), opened(model)
    assert packed.module.model.layers[0].mlp.down_proj.weight.dtype in (torch.int8, torch.uint8)
    expected = plain.logits(PROMPTS)
    difference = (packed.logits(PROMPTS) - expected).std() / expected.std()
    assert 0 < difference < bound


def test_a_weight_edit_of_packed_weights_is_refused_before_anything_is_loaded(
    tmp_path: Path, registry: Registry
) -> None:
    text = "model: {id: tiny:llama, quantize: int8}\nevaluate: {interventions: [none, orthogonalize]}\n"
    with pytest.raises(InputError, match="cannot be edited"):
        make_plan(load_recipe(recipe(tmp_path, text), registry), tmp_path, registry)


def test_layers_that_are_spread_by_accelerate_give_the_same_logits() -> None:
    torch.testing.assert_close(opened(device="balanced").logits(PROMPTS), opened().logits(PROMPTS))


def test_capture_takes_no_more_memory_for_2048_prompts_than_for_64() -> None:
    script = """
import resource, torch
from refusalkit.builtin.adapters import LLAMA
from refusalkit.testing import random_engine
torch.set_num_threads(1)
engine = random_engine("LlamaForCausalLM", LLAMA, hidden_size=512, num_hidden_layers=8)
def peak(n):
    engine.capture([tuple(3 + (i + j) % 60 for j in range(24)) for i in range(n)], (-3, -2, -1))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
# As many passes, so that the two differ in nothing but how many prompts are captured at a time.
few, many = [peak(64) for _ in range(32)][-1], peak(2048)
assert many < 1.05 * few, (few, many)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("call", ["last_logits", "read_sums", "generate", "kept_logits", "gradients"])
def test_a_run_whose_memory_runs_out_in_the_middle_of_a_stage_finishes_with_the_same_numbers(
    call: str, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = "screen: gradient, " if call == "gradients" else ""
    text = (
        f"model: {{id: tiny:llama}}\nselect: {{selector: causal, {screen}max_kl_nats: 1.0}}\n"
        "evaluate: {interventions: [none, ablate, steer], max_new_tokens: 4, "
        "metrics: [refusal_rate, refusal_score, cross_entropy]}\n"
    )
    plan = make_plan(load_recipe(recipe(tmp_path, text), registry), tmp_path, registry)
    execute(plan, tmp_path / "plain", until="evaluate")
    real, planted, seen = getattr(blocks, call), [0], 0

    def too_large(model: Any, inputs: Any, *rest: Any) -> Any:
        nonlocal seen
        seen += 1
        # Not at once: a stage is under way when memory runs out.
        if seen > 1 and inputs["input_ids"].shape[0] > 4:
            planted[0] += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, inputs, *rest)

    monkeypatch.setattr(blocks, call, too_large)
    execute(plan, tmp_path / "short", until="evaluate")
    assert planted[0]
    plain, short = Store(tmp_path / "plain"), Store(tmp_path / "short")
    one, other = plain.load(Choice), short.load(Choice)
    assert one is not None
    assert other is not None
    assert (one.position, one.layer) == (other.position, other.layer)
    torch.testing.assert_close(one.direction, other.direction)
    results = [store.load(Evaluation) for store in (plain, short)]
    assert results[0] is not None
    assert results[1] is not None
    for row, again in zip(results[0].results, results[1].results, strict=True):
        assert again.value == pytest.approx(row.value, abs=1e-3)
