"""The authors' code and refusalkit agree: on their published tables, and on a real model run through both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from refusalkit.artifacts import Activations, Candidates, Choice, Evaluation, Unmodified
from refusalkit.builtin.selectors import Causal
from refusalkit.engine.load import load
from refusalkit.errors import RunError
from refusalkit.intervention import Intervention
from refusalkit.pipeline import execute
from refusalkit.plan import make_plan
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import load_registry
from refusalkit.selector import Advance, Measure, SelectInputs, Tokens
from refusalkit.store import Store

from .plain_losses import plain_loss
from .reference import AUTHORS, SHARED, build_reference_model, needs_shared, read_json, write_reference_recipe

LAYERS = {
    "qwen-1_8b-chat": 24,
    "gemma-2b-it": 18,
    "yi-6b-chat": 32,
    "llama-2-7b-chat-hf": 32,
    "meta-llama-3-8b-instruct": 32,
}
pytestmark = needs_shared


class PublishedScores:
    """Answer a selector from a published table; candidate directions are one-hot, so that each is recognised."""

    def __init__(self, rows: Sequence[dict[str, Any]], n_layers: int) -> None:
        self.rows = rows
        self.n_layers = n_layers
        self.asked = 0

    def logits(self, prompts: Sequence[Tokens], intervention: Intervention | None = None) -> Tensor:
        return torch.zeros(len(prompts), 2)

    def measure(
        self,
        prompts: Sequence[Tokens],
        interventions: Sequence[Intervention],
        measure: Measure,
        advance: Advance | None = None,
    ) -> Tensor:
        self.asked += len(interventions)
        return torch.tensor([[self._score(i, measure)] for i in interventions], dtype=torch.float64)

    def _score(self, intervention: Intervention, measure: Measure) -> float:
        if not intervention.edits:
            return 0.0
        edit = intervention.edits[0]
        vector = edit.add if edit.add is not None else edit.remove
        assert vector is not None
        row = self.rows[int(vector.reshape(-1).abs().argmax())]
        if edit.add is not None:
            name = "steering_score"
        else:
            name = "kl_div_score" if measure.kind == "kl_nats" else "refusal_score"
        value = row[name]
        return math.nan if value is None else float(value)


def _replay(name: str) -> tuple[list[dict[str, Any]], Any, PublishedScores]:
    rows = read_json(SHARED / "official_runs" / name / "direction_evaluations.json")
    n_layers = LAYERS[name]
    positions = tuple(sorted({row["position"] for row in rows}))
    order = {(row["position"], row["layer"]): index for index, row in enumerate(rows)}
    directions = torch.zeros(len(positions), n_layers, len(rows), dtype=torch.float64)
    for place, position in enumerate(positions):
        for layer in range(n_layers):
            directions[place, layer, order[position, layer]] = 1.0
    subject = PublishedScores(rows, n_layers)
    inputs = SelectInputs(directions, positions, "resid_pre", ((1,),), ((1,),), (0,))
    return rows, Causal().select(inputs, subject), subject


@pytest.mark.parametrize("name", LAYERS)
def test_the_published_tables_give_the_published_survivors_and_choice(name: str) -> None:
    rows, selection, subject = _replay(name)
    expected = read_json(SHARED / "official_runs" / name / "direction_evaluations_filtered.json")
    kept = [score for score in selection.scores if score.status in ("chosen", "survivor")]
    ranked = sorted(kept, key=lambda score: score.refusal_score or 0.0)
    assert [(score.position, score.layer) for score in ranked] == [(r["position"], r["layer"]) for r in expected]
    chosen = next(score for score in selection.scores if score.status == "chosen")
    metadata = read_json(SHARED / "official_runs" / name / "direction_metadata.json")
    assert (chosen.position, chosen.layer) == (metadata["pos"], metadata["layer"])
    assert subject.asked < len(rows) * 1.5, "filters save more than half of three whole sweeps"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_reference_model(tmp_path_factory.mktemp("reference") / "model")


def _run(folder: Path, model: Path, until: str, **select: Any) -> Store:
    registry = load_registry()
    path = write_reference_recipe(folder, model, select)
    plan = make_plan(load_recipe(path, registry), folder, registry)
    execute(plan, folder / "run", until=until)
    return Store(folder / "run")


@pytest.mark.slow
def test_directions_scores_survivors_and_choice_are_the_authors(model: Path, tmp_path: Path) -> None:
    store = _run(tmp_path, model, "select", max_kl_nats=0.5, exhaustive=True)
    activations, candidates, choice = store.load(Activations), store.load(Candidates), store.load(Choice)
    assert activations is not None
    assert candidates is not None
    assert choice is not None
    theirs = load_file(AUTHORS / "mean_diffs.safetensors")["mean_diffs"]
    # At layer 0 template tokens are the same in every prompt; the authors' sums leave rounding there, ours exact zeros.
    nonzero = theirs.norm(dim=-1) > 1e-6
    assert torch.equal(candidates.directions.norm(dim=-1) > 0, nonzero)
    cosine = torch.nn.functional.cosine_similarity(candidates.directions, theirs, dim=-1)
    assert cosine[nonzero].min() > 0.99999
    scored = {(row.position, row.layer): row for row in choice.scores}
    for row in read_json(AUTHORS / "direction_evaluations.json"):
        ours = scored[row["position"], row["layer"]]
        for mine, name in (
            (ours.refusal_score, "refusal_score"),
            (ours.induced_score, "steering_score"),
            (ours.kl_nats, "kl_div_score"),
        ):
            if row[name] is not None and math.isfinite(row[name]):
                assert mine is not None, (row, name)
                assert abs(mine - row[name]) < 2e-3, (row, name)
    survivors = read_json(AUTHORS / "direction_evaluations_filtered.json")
    kept = {(row.position, row.layer) for row in choice.scores if row.status in ("chosen", "survivor")}
    assert kept == {(row["position"], row["layer"]) for row in survivors}
    assert (choice.position, choice.layer) == (survivors[0]["position"], survivors[0]["layer"])


def _measured(folder: Path, model: Path, select: dict[str, Any], *settings: str) -> dict[str, Any]:
    """Run a recipe on the reference model to its summary, with the threshold that leaves survivors."""
    folder.mkdir()
    registry = load_registry()
    path = write_reference_recipe(folder, model, select)
    wanted = ["evaluate.interventions=[ablate]", "evaluate.metrics=[refusal_rate]", "evaluate.controls=0"]
    # A refusal shows in its first words.
    wanted += ["evaluate.max_new_tokens=8", *settings]
    execute(make_plan(load_recipe(path, registry, wanted), folder, registry), folder / "run", until="evaluate")
    return dict(read_json(folder / "run" / "summary.json"))


def _refusal(summary: dict[str, Any], intervention: str) -> float:
    rows = [row for row in summary["evaluation"] if (row["intervention"], row["prompts"]) == (intervention, "harmful")]
    return float(rows[0]["value"])


@pytest.mark.slow
def test_the_three_losses_are_those_of_a_plain_loop_on_a_real_model(model: Path, tmp_path: Path) -> None:
    registry = load_registry()
    path = write_reference_recipe(tmp_path, model, {"selector": "fixed", "position": -1, "layer": 23})
    few = ["evaluate.interventions=[ablate]", "evaluate.controls=0"]
    metrics = "evaluate.metrics=[cross_entropy, text_cross_entropy, answer_cross_entropy]"
    plan = make_plan(load_recipe(path, registry, [*few, metrics]), tmp_path, registry)
    execute(plan, tmp_path / "run", until="evaluate")
    store = Store(tmp_path / "run")
    choice, unmodified, evaluation = store.load(Choice), store.load(Unmodified), store.load(Evaluation)
    assert choice is not None
    assert unmodified is not None
    assert evaluation is not None
    module, tokenizer = load(plan.checkpoint).module, plan.checkpoint.tokenizer
    found = {(row.intervention, row.metric): row.value for row in evaluation.results}
    for label, removed in (("none", None), ("ablate", choice.direction)):
        expected = plain_loss(module, tokenizer, plan.evaluate, (plan.prompts.harmless["test"], unmodified), removed)
        assert len(expected) == 3
        for metric, value in expected.items():
            assert abs(found[label, metric] - value) < 1e-5, (label, metric, found[label, metric], value)


@pytest.mark.slow
def test_the_found_direction_does_what_controls_do_not_on_a_real_model(model: Path, tmp_path: Path) -> None:
    asked = [
        "evaluate.interventions=[none,ablate,steer,orthogonalize]",
        "evaluate.controls=1",
        "evaluate.max_new_tokens=8",
    ]
    place = {"selector": "fixed", "position": -1, "layer": 23}
    rows = _measured(tmp_path / "evidence", model, place, *asked)["evaluation"]
    rates = {(row["intervention"], row["prompts"]): row for row in rows}

    def apart(label: str, side: str) -> bool:
        one, other = rates["none", side], rates[label, side]
        return bool(one["high"] < other["low"] or other["high"] < one["low"])

    found = [("ablate", "harmful"), ("orthogonalize", "harmful"), ("steer", "harmless")]
    # Shuffled labels give a direction of this small model's prompts that breaks it (KL 1.9 nats), so it is not here.
    controls = [("ablate_random", "harmful"), ("steer_random", "harmless")]
    assert [apart(*each) for each in found] == [True] * 3, rates
    assert [apart(*each) for each in controls] == [False] * 2, rates
    tests = read_json(tmp_path / "evidence" / "run" / "tests.json")
    sure = {(row["intervention"], row["against"], row["prompts"]): row["p_corrected"] < 0.05
            for row in (*tests["from_unmodified"], *tests["from_controls"])}  # fmt: skip
    for label, side in found:
        assert sure[label, "none", side]
        assert label == "orthogonalize" or sure[label, f"{label}_random", side]


@pytest.mark.slow
def test_cosmic_bypasses_refusals_on_a_real_model_as_well_as_the_causal_choice(model: Path, tmp_path: Path) -> None:
    # All choose at the last position, which saves five sixths of the candidates.
    def run(name: str, **select: Any) -> dict[str, Any]:
        return _measured(tmp_path / name, model, select, "capture.positions=-1")

    causal = run("causal", selector="fixed", position=-1, layer=23)
    for limit in (0.25, 0.5):
        found = run(f"cosmic-{limit}", selector="cosmic", max_kl_nats=limit)
        assert _refusal(found, "ablate") <= _refusal(causal, "ablate") + 0.1
    # The authors' rule needs the lower limit here: with 0.5 nats it takes (-1, 16), which leaves most refusals.
    authors = run("authors", selector="cosmic", max_kl_nats=0.25, centred=False)
    assert (authors["choice"]["position"], authors["choice"]["layer"]) == (-1, 18)
    assert _refusal(authors, "ablate") < _refusal(authors, "none") - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["pca", "logistic_probe", "lda", "leace"])
def test_other_strategies_are_compared_with_the_difference_in_means_on_a_real_model(
    strategy: str, model: Path, tmp_path: Path
) -> None:
    # At the place of the causal choice, so that nothing differs but the direction.
    place = {"selector": "fixed", "position": -1, "layer": 23}
    found = _measured(tmp_path / strategy, model, place, f"find={strategy}")
    choice = found["choice"]
    assert 0.1 < choice["cosine_with_difference_in_means"] < 0.9999
    assert None not in (choice["refusal_score"], choice["induced_score"], choice["kl_nats"])
    assert _refusal(found, "ablate") <= _refusal(found, "none")


@pytest.mark.slow
def test_the_paper_threshold_fails_with_counts_and_the_nearest_miss(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        _run(tmp_path, model, "select")
    text = str(caught.value)
    assert "none of 180 candidates survives" in text
    assert "16 KL above 0.1 nats" in text or "KL above 0.1 nats" in text
    assert "position -1, layer 19" in text
    assert "select.max_kl_nats" in text
