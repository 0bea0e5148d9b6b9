"""A gate opens for the prompts it is meant for, learns from training prompts alone, and is counted and reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from refusalkit.artifacts import Evaluation, PromptSplits
from refusalkit.builtin.adapters import LLAMA
from refusalkit.builtin.compositions import Conditional
from refusalkit.builtin.interventions import Steer
from refusalkit.engine.engine import Engine
from refusalkit.engine.load import load
from refusalkit.errors import RunError
from refusalkit.intervention import Place
from refusalkit.metric import SIDES
from refusalkit.pipeline import execute
from refusalkit.plan import Plan, make_plan
from refusalkit.plan_text import describe
from refusalkit.progress import Silent
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry
from refusalkit.stages.bench import Bench
from refusalkit.stages.states import states_at, states_everywhere
from refusalkit.store import Store
from refusalkit.testing import random_engine
from tests.conftest import ROOT
from tests.test_interventions import direction_in


@pytest.fixture(scope="module")
def engine() -> Engine:
    return random_engine("LlamaForCausalLM", LLAMA)


def test_the_gate_stands_where_the_threshold_says_and_faces_the_side_it_is_for(engine: Engine) -> None:
    direction = direction_in(engine)
    assert direction.states is not None
    for layer in (None, 1):
        place = replace(direction.place, layer=direction.layer if layer is None else layer)
        harmful, harmless = (direction.states(side, "train", place) for side in ("harmful", "harmless"))
        for threshold in (0.0, 0.3, 1.0):
            options: dict[str, Any] = {"apply": Steer(layers=(3, 3)), "layer": layer, "threshold": threshold}
            for when, opens, shuts in (("harmful", harmful, harmless), ("harmless", harmless, harmful)):
                gate = Conditional(**options, when=when).build(direction).gate
                assert gate is not None
                assert (gate.site, gate.layer, gate.position) == (place.site, place.layer, place.position)
                assert gate.vector.norm() == pytest.approx(1)
                low, high = float((shuts @ gate.vector).mean()), float((opens @ gate.vector).mean())
                assert low < high
                assert gate.threshold == pytest.approx(low + threshold * (high - low))


@pytest.mark.parametrize(("share", "most"), [(0.01, 1), (0.1, 10), (0.5, 50)])
def test_a_gate_opens_for_no_more_harmless_prompts_than_it_may(engine: Engine, share: float, most: int) -> None:
    direction = direction_in(engine)
    assert direction.states is not None
    harmful, harmless = (direction.states(side, "train", direction.place) for side in ("harmful", "harmless"))
    gate = Conditional(apply=Steer(layers=(3, 3)), false_positives=share).build(direction).gate
    assert gate is not None
    low, high = (float((side @ gate.vector).mean()) for side in (harmless, harmful))
    stands = (gate.threshold - low) / (high - low)
    readings = []
    for fold in range(5):
        rest = harmless[torch.arange(100) % 5 != fold]
        rows = torch.cat([rest, harmful]).numpy()
        probe = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        along = torch.tensor(probe.fit(rows, [0] * 80 + [1] * 100).coef_[0])
        out = harmless[fold::5] @ along
        readings += ((out - (rest @ along).mean()) / ((harmful @ along).mean() - (rest @ along).mean())).tolist()
    ranked = sorted(readings, reverse=True)
    # It turns away all but so many, and no more than it has to.
    assert sum(reading >= stands for reading in readings) == most
    assert stands == pytest.approx(ranked[most], abs=1e-3)


@pytest.mark.parametrize("layer", [None, 1])
def test_a_gate_for_over_refused_prompts_tells_them_from_harmful_ones(layer: int | None, engine: Engine) -> None:
    generator = torch.Generator().manual_seed(4)
    # One coordinate tells the sides apart; along the next one, where they differ too, prompts vary too much to tell.
    means = {"over_refusal": torch.zeros(engine.d_model), "harmful": torch.zeros(engine.d_model)}
    means["over_refusal"][:2] = torch.tensor([1.0, 3.0])
    spread = torch.ones(engine.d_model)
    spread[:2] = torch.tensor([0.2, 30.0])

    direction = direction_in(engine)
    where = replace(direction.place, layer=direction.layer if layer is None else layer)

    def read(side: str, split: str, place: Place) -> torch.Tensor:
        assert place == where
        return (means[side] + spread * torch.randn((200, engine.d_model), generator=generator)).double()

    direction = replace(direction, states=read)
    options: dict[str, Any] = {"apply": Steer(layers=(3, 3)), "when": "over_refusal", "layer": layer}
    gate = Conditional(**options, false_positives=0.02).build(direction).gate
    assert gate is not None
    # Not along the direction, and not along the difference in means.
    assert gate.vector[0] > 0.95
    opened = {
        side: float((read(side, "test", where) @ gate.vector >= gate.threshold).double().mean()) for side in means
    }
    assert opened["harmful"] < 0.06
    assert opened["over_refusal"] > 0.9
    middle = Conditional(**options).build(direction).gate
    assert middle is not None
    assert middle.threshold == pytest.approx(0.5, abs=0.3)
    assert Conditional(**options).sides == {"over_refusal"}


def test_a_gate_has_one_threshold() -> None:
    with pytest.raises(ValueError, match="false_positives"):
        Conditional(apply=Steer(layers=(3, 3)), false_positives=0.1, threshold=0.5)


def test_a_gate_needs_a_layer_in_which_the_two_sides_differ(engine: Engine) -> None:
    direction = direction_in(engine)
    assert direction.states is not None
    read = direction.states

    def alike_in_layer_0(side: Any, split: Any, place: Place) -> torch.Tensor:
        return read("harmful" if place.layer == 0 else side, split, place)

    direction = replace(direction, states=alike_in_layer_0)
    assert Conditional().build(direction).gate
    with pytest.raises(RunError, match="harmful and harmless training prompts do not differ at position -1, layer 0"):
        Conditional(layer=0).build(direction)


def test_a_control_waits_for_the_same_gate(engine: Engine) -> None:
    direction = direction_in(engine)
    control = replace(direction, vector=torch.ones(engine.d_model))
    gates = [Conditional().build(each) for each in (direction, control)]
    assert gates[0].gate is not None
    assert gates[1].gate is not None
    assert torch.equal(gates[0].gate.vector, gates[1].gate.vector)
    assert gates[0].gate.threshold == gates[1].gate.threshold
    assert not torch.equal(gates[0].edits[0].add, gates[1].edits[0].add)  # type: ignore[arg-type]


def test_a_gate_learns_from_training_prompts_at_its_place_and_the_plan_counts_them(
    finished_run: Path, plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = plan_of("evaluate.interventions=[conditional]")
    assert "32 of training prompts" in describe(plan, tmp_path)
    assert "of training prompts" not in describe(plan_of("evaluate.interventions=[steer]"), tmp_path)
    splits = Store(finished_run).load(PromptSplits)
    assert splits is not None
    bench = Bench(load(plan.checkpoint), plan.template, Silent())
    at, everywhere = states_at(splits, bench), states_everywhere(splits, bench, "resid_pre", (-2, -1))
    for where in (Place("resid_pre", 3, -1), Place("resid_pre", 7, -2)):
        for side in SIDES[:2]:
            torch.testing.assert_close(at(side, "train", where), everywhere(side, "train", where))


def test_strengthening_behind_a_gate_refuses_more_and_leaves_harmless_completions_alone(
    tmp_path: Path, registry: Registry
) -> None:
    path = ROOT / "recipes" / "methods" / "conditional.yaml"
    settings = ["evaluate.controls=0", "evaluate.metrics=[refusal_rate]", "evaluate.max_new_tokens=12"]
    execute(make_plan(load_recipe(path, registry, settings), path.parent, registry), tmp_path / "run", until="evaluate")
    evaluation = Store(tmp_path / "run").load(Evaluation)
    assert evaluation is not None
    made = {(row.intervention, row.prompts): row for row in evaluation.generated}
    opened = {(row.intervention, row.prompts): row for row in evaluation.gates}
    plain, before = made["none", "harmful"].refused, made["none", "harmless"].texts
    assert plain is not None
    for label, share, more in (("threshold=0.3", 0.2, 15), ("false_positives=0.01", 0.1, 8)):
        gated = made[f"conditional({label})", "harmful"].refused
        assert gated is not None
        answered = [after for refused, after in zip(plain, gated, strict=True) if not refused]
        assert len(answered) > 50, "the model answers many of them"
        assert sum(map(bool, answered)) / len(answered) > share
        assert sum(map(bool, gated)) - sum(map(bool, plain)) > more
        after = made[f"conditional({label})", "harmless"].texts
        assert sum(map(str.__eq__, before, after)) / len(before) >= 0.95
        harmful, harmless = (opened[f"conditional({label})", side].values for side in SIDES[:2])
        # What a gate turns away stays as it is, to the token.
        assert all(one == other for one, other, let in zip(before, after, harmless, strict=True) if not let)
        assert not any(new and not old for new, old, let in zip(gated, plain, harmful, strict=True) if not let)
        assert sum(harmful) > 4 * sum(harmless) > 0
    assert sum(map(str.__eq__, before, made["steer", "harmless"].texts)) / len(before) < 0.1
