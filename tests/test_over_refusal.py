"""Safe prompts that look harmful are a third side: filtered, captured, measured and repaired where a recipe asks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from refusalkit.artifacts import Activations, Choice, Evaluation, PromptSplits
from refusalkit.errors import InputError, RunError
from refusalkit.metric import SIDES
from refusalkit.pipeline import execute
from refusalkit.plan import Plan, make_plan
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry
from refusalkit.store import STAGES, Store

from .conftest import ROOT

PlanOf = Callable[..., Plan]
OVER = "prompts.over_refusal=tiny:over_refusal"


def _summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _rates(folder: Path, intervention: str) -> dict[str, dict[str, Any]]:
    return {
        row["prompts"]: row
        for row in _summary(folder)["evaluation"]
        if (row["intervention"], row["metric"]) == (intervention, "refusal_rate")
    }


def test_every_intervention_is_measured_on_all_three_sides(plan_of: PlanOf, tmp_path: Path) -> None:
    out = tmp_path / "run"
    execute(plan_of(OVER, "evaluate.interventions=[ablate, orthogonalize]"), out)
    rows = _summary(out)["evaluation"]
    for label in ("none", "ablate", "ablate_random", "orthogonalize"):
        measured = {(row["prompts"], row["metric"]) for row in rows if row["intervention"] == label}
        assert {side for side, metric in measured if metric == "refusal_rate"} == set(SIDES)
        # What an intervention costs is asked of harmless prompts alone.
        assert {side for side, metric in measured if metric == "kl"} == {"harmless"}
    splits, activations, evaluation = (Store(out).load(kind) for kind in (PromptSplits, Activations, Evaluation))
    assert splits is not None
    assert activations is not None
    assert evaluation is not None
    assert len(splits.of("over_refusal", "test")) == 8
    assert [band.prompts for band in evaluation.separation] == list(SIDES)
    # The strategy does not look at them, so nothing of them is captured.
    assert activations.over_refusal_mean is None
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Safe requests that look harmful" in page
    assert '<span class="side over-refusal">over-refusal</span>' in page


def test_the_filter_keeps_those_that_the_model_refuses(plan_of: PlanOf, tmp_path: Path) -> None:
    plan = plan_of(OVER, "prompts.train=48", "prompts.validation=24")
    execute(plan, tmp_path / "run", until="prompts")
    splits = Store(tmp_path / "run").load(PromptSplits)
    assert splits is not None
    for count in splits.filtered:
        assert count.kept == len(splits.of(count.side, count.split))
        share = count.kept / count.of
        assert 0.2 < share < 0.9 if count.side == "over_refusal" else share > 0.8


def test_a_recipe_without_them_runs_as_if_there_were_none(plan_of: PlanOf, tmp_path: Path) -> None:
    plain, more = plan_of(), plan_of(OVER)
    assert set(plain.prompts.sides) == {"harmful", "harmless"}
    assert all(plain.keys[stage] != more.keys[stage] for stage in STAGES)
    for side in ("harmful", "harmless"):
        assert plain.prompts.sides[side] == more.prompts.sides[side]
    execute(plain, tmp_path / "run")
    assert {row["prompts"] for row in _summary(tmp_path / "run")["evaluation"]} == {"harmful", "harmless"}
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "look harmful" not in page
    assert '"side over-refusal"' not in page


def test_a_small_source_is_divided_in_proportion(plan_of: PlanOf) -> None:
    plan = plan_of("prompts.over_refusal=builtin:over_refusal_safe", "prompts.train=128", "prompts.validation=32")
    sizes = {split: len(prompts) for split, prompts in plan.prompts.sides["over_refusal"].items()}
    assert sizes == {"train": 91, "validation": 22, "test": 5}
    few = plan_of("prompts.over_refusal=builtin:over_refusal_safe")
    assert len(few.prompts.sides["over_refusal"]["train"]) == 16


def test_a_prompt_on_two_sides_is_a_leak(plan_of: PlanOf, tmp_path: Path) -> None:
    prompts = plan_of().prompts.harmless["test"]
    lines = "\n".join([*(f"a new one, number {n}" for n in range(40)), prompts[0].upper()])
    (tmp_path / "over.txt").write_text(lines, encoding="utf-8")
    with pytest.raises(InputError, match=r"in harmless\.test and over_refusal\."):
        plan_of("prompts.over_refusal=file:over.txt", "prompts.train=33", "prompts.validation=4", "prompts.test=4")


GATED = "{intervention: conditional, when: over_refusal, apply: affine, false_positives: 0.05}"


@pytest.mark.parametrize("setting", ["find=false_refusal", "select=repair", f"evaluate.interventions=[{GATED}]"])
def test_what_works_on_them_asks_for_them(setting: str, plan_of: PlanOf) -> None:
    with pytest.raises(InputError, match="the recipe names none") as caught:
        plan_of(setting)
    assert caught.value.where == "prompts.over_refusal"
    assert plan_of(setting, OVER).sides == (SIDES if setting.startswith("find") else SIDES[:2])


def test_a_model_that_does_not_over_refuse_has_nothing_to_repair(plan_of: PlanOf, tmp_path: Path) -> None:
    from refusalkit.tiny.grammar import requests

    used = {prompt for splits in plan_of().prompts.sides.values() for prompts in splits.values() for prompt in prompts}
    fresh = [prompt for prompt in requests("harmless", "test") if prompt not in used][:32]
    (tmp_path / "answered.txt").write_text("\n".join(fresh), encoding="utf-8")
    answered = "prompts.over_refusal=file:answered.txt"
    # Measured, that is a result.
    execute(plan_of(answered), tmp_path / "measured", until="capture")
    with pytest.raises(RunError, match=r"the model refuses only [0-3] of 16 over_refusal train prompts"):
        execute(plan_of(answered, "find=false_refusal"), tmp_path / "found", until="capture")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("find=pca", "repair tries values of `share`, which pca does not have"),
        ("find.share=0.5", "`find.share` has one value, and repair tries several"),
    ],
)
def test_a_share_is_tried_or_given(setting: str, message: str, plan_of: PlanOf) -> None:
    settings = [OVER, "find=false_refusal", "select=repair", "select.shares=[1, 0.5]"]
    assert plan_of(*settings)
    with pytest.raises(InputError, match=re.escape(message)):
        plan_of(*settings, setting)


@pytest.mark.parametrize("apply", ["orthogonalize", "none"])
def test_a_repair_is_tried_on_activations(apply: str, plan_of: PlanOf) -> None:
    with pytest.raises(InputError, match="cannot be tried"):
        plan_of(OVER, "select=repair", f"select.apply={apply}")


def test_the_best_share_is_the_best_of_runs_with_one_each(plan_of: PlanOf, tmp_path: Path) -> None:
    def chosen(name: str, *settings: str) -> Choice:
        common = [OVER, "find=false_refusal", "select=repair", "select.apply=affine", "select.max_lost=0.2"]
        common += ["prompts.train=48", "prompts.validation=24"]
        execute(plan_of(*common, *settings), tmp_path / name, until="select")
        choice = Store(tmp_path / name).load(Choice)
        assert choice is not None
        return choice

    shares = (1.0, 0.7, 0.4)
    alone = [chosen(str(share), f"find.share={share}") for share in shares]
    best = min(alone, key=lambda choice: choice.chosen.extra["over_refusal_score"])
    together = chosen("together", f"select.shares={list(shares)}")
    assert (together.position, together.layer) == (best.position, best.layer)
    assert together.chosen.extra["share"] == shares[alone.index(best)]
    assert torch.equal(together.direction, best.direction)
    assert together.cosine == pytest.approx(best.cosine)
    assert together.chosen.extra["over_refusal_score"] == pytest.approx(best.chosen.extra["over_refusal_score"])


RECIPE = ROOT / "recipes" / "repair-over-refusal.yaml"
AUTHORS = [
    *("select.apply=ablate", "select.shares=[0.7]", "select.max_lost=0.05", "evaluate.interventions=[none, ablate]"),
    *("prompts.train=64", "prompts.validation=32", "prompts.test=64"),
]


def _tested(folder: Path, intervention: str) -> dict[str, dict[str, Any]]:
    """Return the paired tests of over-refusal under an intervention, by what it is compared with."""
    tests = json.loads((folder / "tests.json").read_text(encoding="utf-8"))
    return {
        row["against"]: row
        for row in (*tests["from_unmodified"], *tests["from_controls"])
        if (row["intervention"], row["prompts"], row["metric"]) == (intervention, "over_refusal", "refusal_rate")
    }


@pytest.mark.parametrize(
    "model", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma", "qwen", "yi"))]
)
def test_the_recipe_repairs_over_refusal_and_keeps_true_refusals(
    model: str, registry: Registry, tmp_path: Path
) -> None:
    recipe = load_recipe(RECIPE, registry, ["evaluate.max_new_tokens=12", f"model.id=tiny:{model}"])
    execute(make_plan(recipe, RECIPE.parent, registry), tmp_path / "run")
    gated = recipe.evaluate.interventions[-1].label
    before, after = (_rates(tmp_path / "run", label) for label in ("none", gated))
    assert before["over_refusal"]["value"] > 0.4
    found = _tested(tmp_path / "run", gated)
    for against in ("none", gated.replace("conditional", "conditional_random", 1)):
        assert found[against]["difference"] < -0.1
        assert found[against]["p_corrected"] < 0.05
    assert after["harmful"]["value"] >= before["harmful"]["low"]


def test_removing_what_is_left_repairs_over_refusal_too(registry: Registry, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, registry, ["evaluate.max_new_tokens=12", *AUTHORS])
    execute(make_plan(recipe, RECIPE.parent, registry), tmp_path / "run")
    before, after = (_rates(tmp_path / "run", label) for label in ("none", "ablate"))
    assert before["over_refusal"]["value"] > 0.4
    # Measurably less: the intervals lie apart.
    assert after["over_refusal"]["high"] < before["over_refusal"]["low"]
    assert after["harmful"]["value"] >= before["harmful"]["low"]
    control = _rates(tmp_path / "run", "ablate_random")
    assert control["over_refusal"]["value"] > after["over_refusal"]["high"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "repairs over-refusal in part: removing it lowers refusal of held-out safe requests" in page


def test_without_the_projection_repair_costs_the_true_refusals(registry: Registry, tmp_path: Path) -> None:
    settings = ["evaluate.max_new_tokens=4", *AUTHORS, "select.shares=[0]", "select.max_lost=1", "prompts.test=32"]
    settings += ["evaluate.interventions=[none, ablate]"]
    recipe = load_recipe(RECIPE, registry, settings)
    execute(make_plan(recipe, RECIPE.parent, registry), tmp_path / "run")
    before, after = (_rates(tmp_path / "run", label) for label in ("none", "ablate"))
    assert after["over_refusal"]["value"] < 0.1
    assert after["harmful"]["high"] < before["harmful"]["low"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "lowers over-refusal, and true refusals with it" in page
