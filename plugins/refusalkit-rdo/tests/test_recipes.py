"""A recipe that names the plugin's methods is checked, planned, run, interrupted and taken up like any other."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path

import pytest
import refusalkit_rdo
import torch
from refusalkit_rdo import Cone, Rdo, RdoIndependent, RefusalCone
from safetensors.torch import load_file

from refusalkit.builtin.adapters import LLAMA
from refusalkit.errors import InputError
from refusalkit.pipeline import execute
from refusalkit.plan import Plan, make_plan
from refusalkit.plan_text import describe
from refusalkit.progress import Silent
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import load_registry
from refusalkit.store import Store
from refusalkit.strategy import Strategy
from refusalkit.testing import check_selector, check_strategy, random_engine

RECIPES = sorted(
    (path for path in importlib.resources.files("refusalkit_rdo").joinpath("recipes").iterdir()),
    key=lambda path: path.name,
)
SMALL = [
    "prompts.train=8",
    "prompts.validation=6",
    "prompts.test=4",
    "evaluate.max_new_tokens=4",
    "find.steps=2",
    "find.batch_size=4",
]


def plan_of(name: str, *settings: str) -> Plan:
    """Plan a recipe of the package, made small."""
    registry = load_registry([refusalkit_rdo], entry_points=False)
    path = Path(str(importlib.resources.files("refusalkit_rdo").joinpath("recipes", name)))
    return make_plan(load_recipe(path, registry, [*SMALL, *settings]), path.parent, registry)


def test_every_method_has_a_recipe() -> None:
    found = {plan_of(path.name).recipe.find.strategy for path in RECIPES}
    assert found == {"rdo", "rdo_independent", "refusal_cone"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_runs(path: Path, tmp_path: Path) -> None:
    plan = plan_of(path.name, "find.target_tokens=8", "select.samples=4")
    execute(plan, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert (tmp_path / "run" / "report.html").is_file()
    directions = load_file(tmp_path / "run" / "candidates.safetensors")["directions"]
    rank = 2 if plan.recipe.find.strategy == "refusal_cone" else 1
    assert directions.shape == ((5, 8, 2, 128) if rank == 2 else (5, 8, 128))
    ((row, layer),) = directions.flatten(2).any(-1).nonzero().tolist()
    assert (plan.prompts.positions[row], layer) == (summary["choice"]["position"], summary["choice"]["layer"])
    rows = directions[row, layer].reshape(rank, -1)
    torch.testing.assert_close(rows @ rows.T / rows[0].norm() ** 2, torch.eye(rank, dtype=torch.float64))
    scores = json.loads((tmp_path / "run" / "scores.json").read_text(encoding="utf-8"))
    (chosen,) = [score for score in scores if score["status"] == "chosen"]
    assert 0 <= chosen["cone_bypassed_share"] <= 1
    assert {score["status"] for score in scores if score is not chosen} == {"no direction was found here"}


def test_the_plan_says_that_gradients_are_needed() -> None:
    text = describe(plan_of("rdo.yaml"), Path("runs/rdo"))
    assert "find      rdo: at most 40 candidates" in text
    assert "gradients find: " in text
    assert "gradients" not in describe(plan_of("rdo.yaml", "find=difference_in_means"), Path("runs/rdo"))
    screened = plan_of("rdo.yaml", "select={selector: causal, screen: gradient}")
    assert "gradients find and select: " in describe(screened, Path("runs/rdo"))


def test_the_key_of_find_holds_all_that_decides_what_is_trained() -> None:
    base = plan_of("rdo.yaml")
    for setting in (
        "find.seed=1",
        "find.steps=3",
        "find.layer=4",
        "find.retain_weight=0.5",
        "prompts.seed=1",
        "prompts.filter=false",
        "prompts.system=Be kind.",
        "select.openers=[I]",
        "capture.positions=[-1]",
    ):
        assert plan_of("rdo.yaml", setting).keys["find"] != base.keys["find"], setting
    for setting in ("select.seed=1", "evaluate.controls=2", "model.batch_size=4"):
        assert plan_of("rdo.yaml", setting).keys["find"] == base.keys["find"], setting
    # Activations are those of every strategy that needs no samples.
    assert plan_of("rdo.yaml", "find=difference_in_means").keys["capture"] == base.keys["capture"]


def test_a_run_that_is_interrupted_in_training_goes_on_from_the_stage_before(tmp_path: Path) -> None:
    class Impatient(Silent):
        def advance(self, what: str, done: int, total: int) -> None:
            if what == "direction" and done == 1:
                raise KeyboardInterrupt

    class Heard(Silent):
        states: list[tuple[str, str]]

        def __init__(self) -> None:
            self.states = []

        def stage(self, name: str, state: str) -> None:
            self.states.append((name, state))

    plan = plan_of("rdo.yaml", "find.layer=5", "find.position=-1")
    with pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "run", Impatient(), until="find")
    assert [Store(tmp_path / "run").key(stage) is None for stage in ("capture", "find")] == [False, True]
    heard = Heard()
    execute(plan, tmp_path / "run", heard, until="find")
    assert heard.states == [("prompts", "kept"), ("capture", "kept"), ("find", "running"), ("find", "done")]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("find.rank=0", "greater than or equal to 1"),
        ("find.step=3", "unknown key"),
        ("find.layer=-1", "greater than"),
        ("find.layer=9", "layer 9 of 8"),
        ("find.position=-7", "position -7 is not captured"),
        ("select=separation", "finds directions again"),
        ("model.where=ndif", "needs gradients"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_of("rdo.yaml", setting)


@pytest.mark.parametrize("strategy", [Rdo(rank=2, steps=2), RdoIndependent(steps=2), RefusalCone(steps=2)], ids=repr)
def test_strategies_obey_the_laws(strategy: Strategy) -> None:
    laws = check_strategy(strategy)
    assert not [str(law) for law in laws if not law.holds]


def test_the_selector_obeys_the_laws() -> None:
    laws = check_selector(Cone(samples=3), random_engine("LlamaForCausalLM", LLAMA))
    assert not [str(law) for law in laws if not law.holds]
