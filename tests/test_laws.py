"""Every built-in provider obeys the laws that plugins are held to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from refusalkit import algebra
from refusalkit.adapter import Adapter, Write
from refusalkit.builtin.adapters import ADAPTERS, GEMMA2, GEMMA4, GPT_NEOX, LLAMA, QWEN3_5
from refusalkit.builtin.components import Affine, Angular, Clamp, MeanAblate
from refusalkit.builtin.compositions import Combine, Conditional
from refusalkit.builtin.cosmic import Cosmic
from refusalkit.builtin.estimators import Pca, Som
from refusalkit.builtin.interventions import Ablate, Orthogonalize, Steer
from refusalkit.builtin.repair import Repair
from refusalkit.builtin.selectors import Causal
from refusalkit.builtin.separation import Separation
from refusalkit.builtin.strategies import FalseRefusal
from refusalkit.checkpoint import open_checkpoint
from refusalkit.engine.load import load_module
from refusalkit.errors import InputError, RunError
from refusalkit.intervention import Direction, InterventionSpec
from refusalkit.recipe import ModelSection
from refusalkit.selector import Selector
from refusalkit.strategy import Strategy
from refusalkit.testing import (
    Law,
    check_adapter,
    check_intervention,
    check_selector,
    check_strategy,
    random_engine,
    random_model,
    tiny_tokenizer,
)
from refusalkit.testing.architectures import ARCHITECTURES, COMMON
from refusalkit.testing.law_sets import LawSet, UncheckedError, law_sets
from tests.conftest import BUILT_IN

VARIANTS: tuple[tuple[Adapter, str, dict[str, Any]], ...] = (
    (GPT_NEOX, "GPTNeoXForCausalLM", {"use_parallel_residual": False}),
    (GPT_NEOX, "GPTNeoXForCausalLM", {"attention_bias": False}),
    (LLAMA, "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    (
        GEMMA4,
        "Gemma4ForCausalLM",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    ),
)


def _assert_hold(laws: tuple[Law, ...]) -> None:
    assert laws
    assert not [str(law) for law in laws if not law.holds]


def _name(value: object) -> str:
    if isinstance(value, Adapter):
        return value.name
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("laws", law_sets(BUILT_IN), ids=str)
def test_everything_built_in_obeys_its_laws_or_refuses(laws: LawSet) -> None:
    if laws.kind == "adapter" and BUILT_IN.adapters[laws.name].exactness == "refused":
        with pytest.raises(UncheckedError, match="refuses every checkpoint: "):
            laws.check()
    elif laws.kind == "strategy" and BUILT_IN.strategies[laws.name].reads_files:
        with pytest.raises(UncheckedError, match="from a file"):
            laws.check()
    else:
        _assert_hold(laws.check())


@pytest.mark.parametrize(("adapter", "architecture", "options"), VARIANTS, ids=_name)
def test_adapters_obey_their_laws_on_variants_of_an_architecture(
    adapter: Adapter, architecture: str, options: dict[str, Any]
) -> None:
    _assert_hold(check_adapter(adapter, random_model(architecture, dtype=torch.float64, **options)))


def test_every_architecture_with_a_tiny_shape_is_checked_or_refused() -> None:
    plugins = {
        "Mixtral",
        "Qwen2Moe",
        "Qwen3Moe",
        "Qwen3Next",
        "Qwen3_5Moe",
        "DeepseekV2",
        "DeepseekV3",
        "GptOss",
        "Llama4",
    }
    known = {name for adapter in ADAPTERS for name in adapter.architectures}
    assert ARCHITECTURES.keys() - known == {f"{name}ForCausalLM" for name in plugins}


@pytest.mark.parametrize("architecture", ["SmolLM3ForCausalLM", "StableLmForCausalLM", "NemotronForCausalLM"])
def test_an_architecture_without_a_shape_of_its_own_gets_the_usual_one(architecture: str) -> None:
    assert architecture not in ARCHITECTURES
    _assert_hold(check_adapter(LLAMA, random_model(architecture)))


def test_a_multimodal_checkpoint_is_studied_as_its_text_part(tmp_path: Path) -> None:
    text = {**COMMON, **ARCHITECTURES["Qwen3_5ForCausalLM"]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(ModelSection(id=str(tmp_path)), BUILT_IN)
    assert checkpoint.architecture == "Qwen3_5ForConditionalGeneration"
    _assert_hold(check_adapter(checkpoint.adapter, load_module(checkpoint)))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("Gemma3nForCausalLM", {}),
        ("DeepseekV4ForCausalLM", {}),
        ("Qwen4ExpForCausalLM", {}),
        ("Gemma4ForCausalLM", {"hidden_size_per_layer_input": 8}),
    ],
    ids=_name,
)
def test_a_stream_that_adapters_cannot_express_is_refused_with_the_reason(
    architecture: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    adapter = next(adapter for adapter in ADAPTERS if architecture in adapter.architectures)
    assert adapter.refuses
    config = getattr(transformers, architecture).config_class(**settings)
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    for section in (ModelSection(id=str(tmp_path)), ModelSection(id=str(tmp_path), adapter=adapter.name)):
        with pytest.raises(InputError) as caught:
            open_checkpoint(section, BUILT_IN)
        assert caught.value.message == f"{architecture} cannot be studied: {adapter.refuses.reason}"


@pytest.mark.parametrize("architecture", ["Gemma3nForCausalLM", "DeepseekV4ForCausalLM", "Qwen4ExpForCausalLM"])
def test_between_the_blocks_of_a_refused_architecture_is_more_than_one_vector_a_token(architecture: str) -> None:
    model = random_model(architecture)
    seen: list[torch.Size] = []
    model.model.layers[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    model(torch.arange(3, 20)[None])
    assert seen[0].numel() == COMMON["hidden_size"] * 17 * {"Gemma3nForCausalLM": 4}.get(architecture, 2)


def test_a_block_without_any_of_the_described_writes_is_an_error() -> None:
    dense = dataclasses.replace(QWEN3_5, attention=QWEN3_5.writes[0][:1])
    with pytest.raises(RunError, match=r"names model\.layers\.0\.self_attn, which this model does not have"):
        check_adapter(dense, random_model("Qwen3_5ForCausalLM"))


def test_adapter_law_catches_an_adapter_that_overlooks_the_post_norm() -> None:
    naive = dataclasses.replace(GEMMA2, attention=Write("self_attn", GEMMA2.attention.matrices))
    broken = [law.name for law in check_adapter(naive, random_model("Gemma2ForCausalLM")) if not law.holds]
    assert "resid_pre + attn_out + mlp_out == resid_post" in broken
    assert "nothing is left along an ablated direction" in broken


def test_adapter_law_catches_a_claim_of_equality_that_is_false() -> None:
    bold = dataclasses.replace(GEMMA2, inexact=None)
    broken = [law.name for law in check_adapter(bold, random_model("Gemma2ForCausalLM")) if not law.holds]
    assert broken == ["orthogonalized weights equal ablation, in logits"]


@pytest.mark.parametrize("strategy", [Pca(pairing="pooled"), Som(rank=1, side=1), FalseRefusal(share=0.9)], ids=repr)
def test_strategies_obey_their_laws_with_other_options(strategy: Strategy) -> None:
    _assert_hold(check_strategy(strategy))


def test_setting_a_component_twice_is_setting_it_once_and_leaves_it_where_it_was_set() -> None:
    generator = torch.Generator().manual_seed(0)
    vector, x = torch.randn(16, generator=generator), torch.randn((3, 5, 16), generator=generator)
    harmless = torch.randn((4, 16), generator=generator)
    direction = Direction(vector, -1, 2, 4, harmless=harmless)
    unit = vector / vector.norm()
    wanted = {
        Affine(alpha=1.5): harmless[2] @ unit + 1.5 * vector.norm(),
        MeanAblate(): harmless[0] @ unit,
        Clamp(value=-3.0): torch.tensor(-3.0),
    }
    for spec, component in wanted.items():
        edit = spec.build(direction).edits[0]
        once = algebra.edit(x, edit.remove, edit.add)
        torch.testing.assert_close(once @ unit, component.expand(3, 5), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(algebra.edit(once, edit.remove, edit.add), once, atol=1e-4, rtol=1e-4)
        # Nothing but the component moves.
        moved = once - x
        torch.testing.assert_close(moved - (moved @ unit)[..., None] * unit, torch.zeros_like(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "spec",
    [
        Steer(scale=-2.0, layers=(1, 3), where="last"),
        Ablate(where="generated"),
        Ablate(layers=(0, 1), steps=(0, 2)),
        Angular(degrees=180, adaptive=True),
        Orthogonalize(keep_norms=True),
        Conditional(apply=Ablate(layers=(2, 3)), when="harmless", layer=1),
        Conditional(apply=Combine(parts=(Clamp(value=3.0), Steer(scale=0.5)))),
        Combine(parts=(MeanAblate(), Steer(scale=2.0))),
        Combine(parts=(Conditional(), Clamp(layers=(3, 3)))),
    ],
    ids=lambda spec: spec.label,
)
def test_an_intervention_obeys_its_laws_with_other_options(spec: InterventionSpec) -> None:
    _assert_hold(check_intervention(spec, random_engine("LlamaForCausalLM", LLAMA)))


@pytest.mark.parametrize(
    "selector",
    [
        Causal(max_kl_nats=50.0, min_induced_score=-50.0),
        Causal(max_kl_nats=0.0, min_induced_score=50.0),
        Causal(exhaustive=True),
        Causal(screen="gradient", keep=3, max_kl_nats=50.0, min_induced_score=-50.0),
        Cosmic(max_kl_nats=50.0),
        Separation(folds=3, min_auroc=1.0, seed=1),
        Repair(max_kl_nats=50.0, max_lost=1.0),
        Repair(max_kl_nats=50.0, max_lost=0.0),
        Repair(max_kl_nats=50.0, max_lost=1.0, apply=Affine(), shares=(1.0, 0.5)),
    ],
    ids=repr,
)
def test_selectors_obey_their_laws_with_other_options(selector: Selector) -> None:
    _assert_hold(check_selector(selector, random_engine("LlamaForCausalLM", LLAMA)))
