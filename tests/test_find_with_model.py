"""A strategy that needs the model gets it with the training prompts, and the plan knows what that takes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from refusalkit import hookimpl
from refusalkit.artifacts import Candidates, PromptSplits
from refusalkit.builtin.interventions import Ablate
from refusalkit.errors import InputError, RunError
from refusalkit.intervention import Direction
from refusalkit.pipeline import execute
from refusalkit.plan import Plan, make_plan
from refusalkit.plan_text import describe
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import load_registry
from refusalkit.store import Store
from refusalkit.strategy import Captured, ModelInputs, Strategy
from tests.conftest import SMALL

GIVEN: list[ModelInputs] = []


class Nudged(Strategy):
    """Take one step from the difference in means at one place."""

    strategy: Literal["nudged"] = "nudged"
    needs: ClassVar[Literal["means", "samples", "model"]] = "model"
    layer: int = 4
    flat: bool = False

    def find(self, harmful: Captured, harmless: Captured, model: ModelInputs | None = None) -> Tensor:
        assert model is not None
        GIVEN.append(model)
        means = harmful.mean - harmless.mean
        vector = means[-1, self.layer].clone().requires_grad_()
        edit = Ablate().build(Direction(vector, model.positions[-1], self.layer, model.subject.n_layers, model.site))
        prompts = model.prompts["harmful"]
        model.subject.cross_entropy(prompts, model.subject.generate(prompts, None, 3), [edit]).sum().backward()
        assert vector.grad is not None
        found = torch.zeros_like(means)
        # As it comes, with its graph.
        found[-1, self.layer] = vector + vector.grad
        return found[0] if self.flat else found


plugin = ModuleType("nudged")
plugin.refusalkit_strategies = hookimpl(lambda: [Nudged], specname="refusalkit_strategies")  # type: ignore[attr-defined]


def plan_of(tmp_path: Path, *settings: str) -> Plan:
    registry = load_registry([plugin], entry_points=False)
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return make_plan(load_recipe(path, registry, ["find=nudged", *settings]), tmp_path, registry)


def found(tmp_path: Path, *settings: str) -> Tensor:
    execute(plan_of(tmp_path, *settings), tmp_path / "run", until="find")
    candidates = Store(tmp_path / "run").load(Candidates)
    assert candidates is not None
    return candidates.directions


def test_it_gets_the_filtered_training_prompts_and_what_they_were_captured_with(tmp_path: Path) -> None:
    GIVEN.clear()
    plan = plan_of(tmp_path, "capture.positions=[-3, -1]")
    execute(plan, tmp_path / "run", until="find")
    (given,) = GIVEN
    splits = Store(tmp_path / "run").load(PromptSplits)
    assert splits is not None
    assert given.positions == (-3, -1)
    assert given.site == "resid_pre"
    assert given.opener_ids == splits.openers.token_ids
    assert given.prompts["harmless"] == tuple(map(plan.template.tokens, splits.harmless["train"]))
    assert given.text(given.prompts["harmful"][0]) == plan.template.text(splits.harmful["train"][0])
    assert given.subject.n_layers == 8


def test_what_it_finds_can_be_worked_on_and_projected_onto(tmp_path: Path) -> None:
    plain = found(tmp_path)[-1, 4]
    scaled = found(tmp_path, "find={strategy: nudged, then: [{operation: scale, by: -2.0}]}")
    torch.testing.assert_close(scaled[-1, 4], -2 * plain)
    away = found(tmp_path, "find={strategy: difference_in_means, then: [{operation: minus_projection, onto: nudged}]}")
    assert (away[-1, 4] @ plain).abs() < 1e-6 * plain.norm() ** 2
    assert away[-1, 3].any()


def test_a_wrong_shape_is_the_strategy_s_fault(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="returned directions of shape"):
        found(tmp_path, "find.flat=true")


@pytest.mark.parametrize(
    "find", ["nudged", "{strategy: difference_in_means, then: [{operation: minus_projection, onto: nudged}]}"]
)
def test_the_plan_says_that_gradients_are_needed_and_refuses_what_has_none(find: str, tmp_path: Path) -> None:
    text = describe(plan_of(tmp_path, f"find={find}"), tmp_path / "run")
    assert "\ngradients find: " in text
    assert "at most 40 candidates" in text
    for setting, message in (("model.where=ndif", "needs gradients"), ("select=separation", "finds directions again")):
        with pytest.raises(InputError, match=message):
            plan_of(tmp_path, f"find={find}", setting, "evaluate.interventions=[ablate]")


def test_activations_are_those_of_strategies_that_need_the_means(tmp_path: Path) -> None:
    keys: list[Any] = [plan_of(tmp_path, f"find={name}").keys for name in ("nudged", "difference_in_means")]
    assert keys[0]["capture"] == keys[1]["capture"]
    assert keys[0]["find"] != keys[1]["find"]
    assert "gradients" not in describe(plan_of(tmp_path, "find=difference_in_means"), tmp_path / "run")
