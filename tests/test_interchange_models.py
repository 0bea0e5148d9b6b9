"""Files that change a model do in its own reader what the intervention does here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from refusalkit import algebra
from refusalkit.builtin.interventions import ablate_everywhere
from refusalkit.checkpoint import open_checkpoint
from refusalkit.engine.engine import Engine
from refusalkit.engine.load import load
from refusalkit.intervention import Direction, Edit, Intervention
from refusalkit.recipe import ModelSection
from refusalkit.testing import random_model, tiny_tokenizer
from refusalkit.testing.models import random_prompts
from tests.benchmarks.plain import Hook, hooked
from tests.conftest import BUILT_IN
from tests.interchange import convert, random, refused
from tests.reference import read_json

Tokens = tuple[int, ...]
PROMPTS = random_prompts(3)
LAYER = 2


def made(folder: Path, architecture: str, rank: int = 1, **options: bool) -> tuple[Engine, Direction]:
    """Save a random model and a random direction in `folder`; return the model and the direction."""
    random_model(architecture, **options).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    section = ModelSection(id=str(folder / "model"), dtype="float32")
    engine = load(open_checkpoint(section, BUILT_IN))
    vector = random(rank, engine.d_model) if rank > 1 else random(engine.d_model)
    about = {"layer": str(LAYER), "position": "-1", "model": section.id}
    save_file({"direction": vector}, folder / "direction.safetensors", about)
    return engine, Direction(vector, -1, LAYER, engine.n_layers)


def gap(logits: Tensor, expected: Tensor, plain: Tensor) -> float:
    """Return the largest difference over the largest logit, after checking that the intervention does something."""
    scale = expected.abs().max()
    assert (plain - expected).abs().max() > 1e-2 * scale
    return ((logits - expected).abs().max() / scale).item()


def last_logits(module: torch.nn.Module, prompts: Sequence[Tokens] = PROMPTS) -> Tensor:
    with torch.no_grad():
        return torch.stack([module(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in prompts])


# PEFT


@pytest.mark.parametrize(
    ("architecture", "rank", "tied"),
    [
        ("LlamaForCausalLM", 1, False),
        ("LlamaForCausalLM", 1, True),
        ("LlamaForCausalLM", 2, False),
        # Biases that do not write the stream, an embedding that is scaled, a multiplier, one norm for both writes.
        ("Qwen2ForCausalLM", 1, True),
        ("GemmaForCausalLM", 1, True),
        ("GraniteForCausalLM", 1, False),
        ("CohereForCausalLM", 1, True),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_the_logits_under_the_lora_are_those_under_ablation(
    architecture: str, rank: int, tied: bool, tmp_path: Path
) -> None:
    engine, direction = made(tmp_path, architecture, rank, tied=tied)
    expected, plain = engine.logits(PROMPTS, ablate_everywhere(direction)), engine.logits(PROMPTS)
    said = convert(tmp_path / "direction.safetensors", tmp_path / "lora", "lora").said
    assert any("tied" in line for line in said) == tied
    model = peft.PeftModel.from_pretrained(engine.module, tmp_path / "lora")
    assert gap(last_logits(model), expected, plain) < 1e-5
    with model.disable_adapter():
        torch.testing.assert_close(last_logits(model), plain, rtol=1e-4, atol=1e-4)


def test_the_lora_can_be_merged_where_nothing_is_tied_and_its_card_says_what_it_does(tmp_path: Path) -> None:
    engine, direction = made(tmp_path, "LlamaForCausalLM")
    expected, plain = engine.logits(PROMPTS, ablate_everywhere(direction)), engine.logits(PROMPTS)
    convert(tmp_path / "direction.safetensors", tmp_path / "lora", "lora")
    merged = peft.PeftModel.from_pretrained(engine.module, tmp_path / "lora").merge_and_unload()
    assert gap(last_logits(merged), expected, plain) < 1e-5
    assert "altered for research" in (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    record = read_json(tmp_path / "lora" / "refusalkit.json")
    assert (record["layer"], record["position"], record["equivalent_to_ablation"]) == (LAYER, -1, True)
    assert len(record["edited_parameters"]) == 1 + 2 * engine.n_layers


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("GPTNeoXForCausalLM", ("gpt_neox.layers.0.attention.dense.bias", "it is a bias", "refusalkit bake")),
        ("GPT2LMHeadModel", ("transformer.h.0.attn.c_proj.weight", "Conv1D")),
        ("Gemma2ForCausalLM", ("no weight edit of Gemma2ForCausalLM equals ablation",)),
    ],
)
def test_what_a_lora_cannot_change_is_named(architecture: str, words: tuple[str, ...], tmp_path: Path) -> None:
    made(tmp_path, architecture)
    refused(lambda: convert(tmp_path / "direction.safetensors", tmp_path / "lora", "lora"), *words)
    assert not (tmp_path / "lora").exists()


def test_a_lora_of_others_gives_the_direction_it_removes(tmp_path: Path) -> None:
    engine, direction = made(tmp_path, "LlamaForCausalLM")
    unit = algebra.unit(direction.vector).float()
    config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(engine.module, config)
    weights = {name: weight for name, weight in model.named_parameters() if "lora_B" in name}
    for number, weight in enumerate(weights.values()):
        # Strength and sign are the writer's own.
        weight.data = (0.5 + number) * (-1) ** number * unit[:, None]
    model.save_pretrained(tmp_path / "theirs")
    said = convert(tmp_path / "theirs", tmp_path / "x.pt", "steered", model=str(tmp_path / "model"))
    assert any("sign" in line for line in said.lost)
    (vector, *_) = (step["steering_vector"] for step in torch.load(tmp_path / "x.pt", weights_only=True).values())
    assert abs(vector @ unit) > 1 - 1e-6
    next(iter(weights.values())).data.add_(random(engine.d_model, 1, seed=9).float())
    model.save_pretrained(tmp_path / "mixed")
    refused(lambda: convert(tmp_path / "mixed", tmp_path / "y.pt", "steered"), "along different directions")


# lm-eval


def by_rule(folder: Path) -> Tensor:
    """Do what lm-eval documents: change the outputs of the modules below `base_model` that the file names."""
    engine = load(open_checkpoint(ModelSection(id=str(folder / "model")), BUILT_IN))
    modules = dict(engine.module.base_model.named_modules())
    steps = torch.load(folder / "steer.pt", weights_only=True)

    def hook(name: str) -> Hook:
        vector, value = steps[name]["steering_vector"], steps[name]["steering_coefficient"]
        assert (steps[name]["bias"], steps[name]["head_index"]) == (None, None)
        if steps[name]["action"] == "add":
            return modules[name], False, lambda x: x + vector * value
        unit = vector / vector.norm()
        return modules[name], False, lambda x: x + unit * (value - (x * unit).sum(-1, keepdim=True))

    with hooked([hook(name) for name in steps]):
        return last_logits(engine.module)


def by_lm_eval(folder: Path) -> Tensor:
    """Let lm-eval do it, where it is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = pytest.importorskip("lm_eval.models.hf_steered")
        model = reader.SteeredModel(
            pretrained=str(folder / "model"), steer_path=str(folder / "steer.pt"), device="cpu", dtype="float32"
        )
        return torch.stack([model._model_call(torch.tensor([prompt]))[0, -1] for prompt in PROMPTS])


READERS = [by_rule, pytest.param(by_lm_eval, id="lm_eval")]


@pytest.mark.parametrize("apply", READERS)
@pytest.mark.parametrize(
    "architecture",
    # Post norms, two embeddings and biases, a parallel block, a multiplier, blocks that differ in kind.
    ["LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "GraniteForCausalLM"],
)
def test_clamping_to_nothing_is_ablation(architecture: str, apply: Callable[[Path], Tensor], tmp_path: Path) -> None:
    engine, direction = made(tmp_path, architecture)
    convert(tmp_path / "direction.safetensors", tmp_path / "steer.pt", "steered", operation="ablate")
    expected = engine.logits(PROMPTS, ablate_everywhere(direction))
    assert gap(apply(tmp_path), expected, engine.logits(PROMPTS)) < 1e-5


@pytest.mark.parametrize("apply", READERS)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_adding_is_steering(architecture: str, apply: Callable[[Path], Tensor], tmp_path: Path) -> None:
    engine, direction = made(tmp_path, architecture)
    convert(tmp_path / "direction.safetensors", tmp_path / "steer.pt", "steered", operation="steer", scale=-0.5)
    steer = Intervention((Edit("resid_pre", LAYER, add=-0.5 * direction.vector.float()),))
    assert gap(apply(tmp_path), engine.logits(PROMPTS, steer), engine.logits(PROMPTS)) < 1e-5


def test_the_modules_that_are_clamped_are_those_behind_the_norms(tmp_path: Path) -> None:
    made(tmp_path, "Gemma2ForCausalLM")
    convert(tmp_path / "direction.safetensors", tmp_path / "steer.pt", "steered", operation="ablate")
    names = list(torch.load(tmp_path / "steer.pt", weights_only=True))
    assert names[:3] == [
        "embed_tokens",
        "layers.0.post_attention_layernorm",
        "layers.0.post_feedforward_layernorm",
    ]
    assert len(names) == 1 + 2 * 4


# What a projective control vector does


def test_projecting_at_the_outputs_of_blocks_is_not_ablation(tmp_path: Path) -> None:
    # Why the conversion says so. What it leaves is what blocks read before their output is cleared.
    engine, direction = made(tmp_path, "LlamaForCausalLM")
    basis = algebra.orthonormal(direction.vector[None]).float()
    projected = Intervention(tuple(Edit("resid_post", layer, remove=basis) for layer in range(1, engine.n_layers)))
    expected = engine.logits(PROMPTS, ablate_everywhere(direction))
    assert gap(engine.logits(PROMPTS, projected), expected, engine.logits(PROMPTS)) > 1e-2
