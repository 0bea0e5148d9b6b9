"""Every built-in provider obeys the laws that plugins are held to."""

from __future__ import annotations

import dataclasses

import pytest

from refusalkit.adapter import Adapter, Write
from refusalkit.builtin.adapters import ADAPTERS, GEMMA2, LLAMA
from refusalkit.builtin.estimators import ESTIMATORS, Pca, Shuffled, Som
from refusalkit.builtin.interventions import INTERVENTIONS, Steer
from refusalkit.builtin.metrics import METRICS
from refusalkit.builtin.selectors import Causal, Fixed
from refusalkit.builtin.strategies import STRATEGIES, Random
from refusalkit.strategy import Strategy
from refusalkit.testing import (
    Law,
    check_adapter,
    check_intervention,
    check_metric,
    check_selector,
    check_strategy,
    random_engine,
    random_model,
)

CASES = [
    pytest.param(adapter, architecture, tied, id=f"{adapter.name}-{architecture}-{'tied' if tied else 'untied'}")
    for adapter in ADAPTERS
    for architecture in adapter.architectures
    for tied in (False, True)
]


def _assert_hold(laws: tuple[Law, ...]) -> None:
    assert laws
    assert not [str(law) for law in laws if not law.holds]


@pytest.mark.parametrize(("adapter", "architecture", "tied"), CASES)
def test_adapter_names_every_write_and_tells_the_truth_about_weights(
    adapter: Adapter, architecture: str, tied: bool
) -> None:
    _assert_hold(check_adapter(adapter, random_model(architecture, tied=tied)))


def test_adapter_law_catches_an_adapter_that_overlooks_the_post_norm() -> None:
    naive = dataclasses.replace(GEMMA2, attention=Write("self_attn", GEMMA2.attention.matrices))
    broken = [law.name for law in check_adapter(naive, random_model("Gemma2ForCausalLM")) if not law.holds]
    assert "resid_pre + attn_out + mlp_out == resid_post" in broken
    assert "nothing is left along an ablated direction" in broken


def test_adapter_law_catches_a_claim_of_equality_that_is_false() -> None:
    bold = dataclasses.replace(GEMMA2, inexact=None)
    broken = [law.name for law in check_adapter(bold, random_model("Gemma2ForCausalLM")) if not law.holds]
    assert broken == ["orthogonalized weights equal ablation, in logits"]


@pytest.mark.parametrize(
    "strategy",
    [*(kind() for kind in (*STRATEGIES, *ESTIMATORS)), Pca(pairing="pooled"), Som(rank=1, side=1)],
    ids=repr,
)
def test_strategies_obey_their_laws(strategy: Strategy) -> None:
    _assert_hold(check_strategy(strategy, finds=not isinstance(strategy, Random | Shuffled)))


@pytest.mark.parametrize("spec", [*(kind() for kind in INTERVENTIONS), Steer(scale=-2.0)], ids=lambda spec: spec.label)
def test_interventions_obey_their_laws(spec) -> None:  # type: ignore[no-untyped-def]
    _assert_hold(check_intervention(spec, random_engine("LlamaForCausalLM", LLAMA)))


@pytest.mark.parametrize(
    "selector",
    [
        Causal(max_kl_nats=50.0, min_induced_score=-50.0),
        Causal(max_kl_nats=0.0, min_induced_score=50.0),
        Causal(exhaustive=True),
        Causal(screen="gradient", keep=3, max_kl_nats=50.0, min_induced_score=-50.0),
        Fixed(position=-1, layer=2),
    ],
    ids=repr,
)
def test_selectors_obey_their_laws(selector) -> None:  # type: ignore[no-untyped-def]
    _assert_hold(check_selector(selector, random_engine("LlamaForCausalLM", LLAMA)))


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_obey_their_laws(metric: type) -> None:
    _assert_hold(check_metric(metric()))
