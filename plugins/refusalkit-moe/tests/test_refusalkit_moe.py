"""Architectures with experts obey the laws of adapters, whatever the layout of their experts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import refusalkit_moe
import torch
from refusalkit_moe import ADAPTERS, GPT_OSS, LLAMA4

from refusalkit.adapter import Adapter, Matrix, Write
from refusalkit.builtin.interventions import ablate_everywhere
from refusalkit.engine.layout import layout_of, resolve
from refusalkit.engine.weights import orthogonalize
from refusalkit.intervention import NOTHING, Direction
from refusalkit.registry import load_registry
from refusalkit.selector import Measure
from refusalkit.testing import Law, check_adapter, random_engine, random_model
from refusalkit.testing.architectures import ARCHITECTURES
from refusalkit.testing.models import random_prompts

#: Its attention is computed eagerly, which in float64 gives a padded row no number.
FLOAT32 = ("GptOssForCausalLM",)
SHAPED = {name: adapter for adapter in ADAPTERS for name in adapter.architectures if name in ARCHITECTURES}
SQUARE = [
    pytest.param(GPT_OSS, "GptOssForCausalLM", {"intermediate_size": 32}, id="gpt-oss"),
    pytest.param(LLAMA4, "Llama4ForCausalLM", {"intermediate_size": 32}, id="llama4"),
]


def _model(architecture: str, **options: Any) -> Any:
    dtype = torch.float32 if architecture in FLOAT32 else torch.float64
    return random_model(architecture, dtype=dtype, **options)


def _broken(laws: tuple[Law, ...]) -> list[str]:
    return [str(law) for law in laws if not law.holds]


def test_the_plugin_is_found_by_its_module() -> None:
    registry = load_registry([refusalkit_moe], entry_points=False)
    assert {adapter.name for adapter in ADAPTERS} <= set(registry.adapters)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", SHAPED)
def test_adapter_names_every_write_and_edited_weights_equal_ablation(architecture: str, tied: bool) -> None:
    assert SHAPED[architecture].inexact is None
    assert not _broken(check_adapter(SHAPED[architecture], _model(architecture, tied=tied)))


@pytest.mark.parametrize(("adapter", "architecture", "options"), SQUARE)
def test_square_experts_are_edited_along_the_axis_that_writes(
    adapter: Adapter, architecture: str, options: dict[str, Any]
) -> None:
    model = _model(architecture, **options)
    experts = next(module for name, module in model.named_modules() if name.endswith("experts"))
    assert experts.down_proj.shape[1:] == (32, 32)
    laws = check_adapter(adapter, model)
    assert not _broken(laws)
    before = experts.down_proj.clone()
    basis = torch.nn.functional.normalize(torch.randn(1, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    orthogonalize(model, adapter, basis)
    direction = basis[0].to(before.dtype)
    assert (experts.down_proj @ direction).abs().max() < 1e-6 < (before @ direction).abs().max()
    assert (experts.down_proj.mT @ direction).abs().max() > 1e-2


@pytest.mark.parametrize(("adapter", "architecture", "options"), SQUARE)
def test_the_law_catches_experts_that_are_edited_along_the_wrong_axis(
    adapter: Adapter, architecture: str, options: dict[str, Any]
) -> None:
    def transposed(write: Write) -> Write:
        matrices = (
            Matrix(matrix.path, 1) if matrix.path.endswith("experts.down_proj") else matrix for matrix in write.matrices
        )
        return dataclasses.replace(write, matrices=tuple(matrices))

    wrong = dataclasses.replace(adapter, mlp=tuple(transposed(write) for write in adapter.writes[1]))
    broken = " ".join(_broken(check_adapter(wrong, _model(architecture, **options))))
    assert "orthogonalized weights equal ablation" in broken
    assert "orthogonalized weights write nothing along the direction" in broken


@pytest.mark.parametrize("architecture", SHAPED)
def test_declared_axes_agree_with_what_transformers_says_of_the_layout(architecture: str) -> None:
    model = _model(architecture)
    layout = layout_of(model, SHAPED[architecture])
    checked = 0
    for layer, (_, mlp) in enumerate(layout.writes):
        block = resolve(model, layout.block(layer))
        for matrix in mlp.matrices:
            parameter = resolve(block, matrix.path)
            if not matrix.path.endswith("experts.down_proj"):
                continue
            assert parameter.shape[matrix.axis] == 32
            experts = resolve(block, matrix.path.removesuffix(".down_proj"))
            if hasattr(experts, "is_transposed"):
                assert experts.is_transposed == (matrix.axis == -1)
            checked += 1
    assert checked


@pytest.mark.parametrize("architecture", ["Llama4ForCausalLM", "GptOssForCausalLM"])
def test_outputs_in_tuples_and_flat_outputs_can_be_packed(architecture: str) -> None:
    engine = random_engine(architecture, SHAPED[architecture])
    prompts = random_prompts(5)
    generator = torch.Generator().manual_seed(1)
    directions = [Direction(torch.randn(32, generator=generator), -1, 2, 4) for _ in range(3)]
    interventions = [NOTHING, *map(ablate_everywhere, directions)]
    results = []
    for size in (32, 2, 1):
        engine.batch_size = size
        results.append(engine.measure(prompts, interventions, Measure("refusal_score", token_ids=(5,))))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=2e-4, rtol=1e-4)
    assert engine.generate(prompts, interventions[1], max_new_tokens=3)
    (estimated,) = engine.attribute(
        prompts, torch.randn(3, 1, 32), "resid_pre", [Measure("refusal_score", token_ids=(5,))]
    )
    assert estimated.removal.isfinite().all()
