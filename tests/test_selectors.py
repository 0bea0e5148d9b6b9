"""Selectors follow the rule they name, and choose a direction that does what it is chosen for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median_low
from typing import Any

import pytest
import torch
from torch import Tensor

from refusalkit import algebra
from refusalkit.artifacts import Activations, Candidates, Choice, PromptSplits
from refusalkit.builtin.candidates import ablation, candidates_of, steering
from refusalkit.builtin.cosmic import Cosmic
from refusalkit.builtin.estimators import LogisticProbe
from refusalkit.builtin.separation import Separation
from refusalkit.engine.engine import Engine
from refusalkit.engine.load import load
from refusalkit.errors import RunError
from refusalkit.intervention import NOTHING, Intervention
from refusalkit.pipeline import execute
from refusalkit.plan import Plan
from refusalkit.report import heat_map
from refusalkit.selector import SelectInputs, Tokens
from refusalkit.store import Store
from refusalkit.strategy import Captured

from .conftest import ROOT

PlanOf = Callable[..., Plan]


@pytest.fixture
def found(plan_of: PlanOf, tmp_path: Path) -> tuple[Engine, SelectInputs]:
    """Give the embedded model and what a selector chooses from on it."""
    plan = plan_of("find=pca", "select.openers=[I]")
    execute(plan, tmp_path / "found", until="find")
    store = Store(tmp_path / "found")
    splits, activations, candidates = (store.load(kind) for kind in (PromptSplits, Activations, Candidates))
    assert splits is not None
    assert activations is not None
    assert candidates is not None

    def tokens(side: Any, split: Any) -> tuple[Tokens, ...]:
        return tuple(plan.template.tokens(prompt) for prompt in splits.of(side, split))

    harmful, harmless = (activations.captured[side] for side in ("harmful", "harmless"))
    inputs = SelectInputs(
        harmful.mean - harmless.mean,
        candidates.positions,
        "resid_pre",
        tokens("harmful", "validation"),
        tokens("harmless", "validation"),
        splits.openers.token_ids,
        training={side: tokens(side, "train") for side in ("harmful", "harmless")},
        captured=activations.captured,
        find=lambda captured: captured["harmful"].mean - captured["harmless"].mean,
    )
    return load(plan.checkpoint), inputs


def _last_states(engine: Engine, prompts: Sequence[Tokens], intervention: Intervention | None = None) -> Tensor:
    """Return the mean state behind every block at the last token: [layer, d_model], one intervention at a time."""
    return engine.capture(prompts, (-1,), "resid_post", intervention=intervention).mean[0]


def test_mean_states_do_not_depend_on_batches_packs_or_the_shared_front(found: tuple[Engine, SelectInputs]) -> None:
    engine, inputs = found
    candidates = candidates_of(inputs)[1:4]
    interventions = [NOTHING, *(make(c, inputs) for c in candidates for make in (ablation, steering))]
    layers = (6, 2, 7)
    one_by_one = torch.stack([_last_states(engine, inputs.harmful, each)[list(layers)] for each in interventions])
    for size, shares in ((32, True), (3, True), (32, False)):
        engine.batch_size, engine.shares_prefix = size, shares
        together = engine.mean_states(inputs.harmful, interventions, layers)
        torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-4)


def test_cosmic_chooses_what_a_plain_loop_over_its_rules_chooses(found: tuple[Engine, SelectInputs]) -> None:
    engine, inputs = found
    rules = [Cosmic(max_kl_nats=1.0, drop_late=True, centred=centred) for centred in (True, False)]
    for _ in range(2):
        chosen = []
        for rule in rules:
            left = _by_hand(engine, inputs, rule)
            selection = rule.select(inputs, engine)
            assert {(s.position, s.layer) for s in selection.scores if s.status == "chosen"} == {left[0]}
            assert {(s.position, s.layer) for s in selection.scores if s.status in ("chosen", "survivor")} == set(left)
            chosen.append(left[0])
        # Once more without the direction that both rules find.
        directions = inputs.directions.clone()
        directions[inputs.positions.index(chosen[0][0]), chosen[0][1]] = 0
        inputs = replace(inputs, directions=directions)
    assert chosen[0] != chosen[1], "the rules part"


def _by_hand(engine: Engine, inputs: SelectInputs, rule: Cosmic) -> list[tuple[int, int]]:
    """Return the survivors, best first, computed as in the paper's code: candidate by candidate, nothing shared."""
    training = [_last_states(engine, inputs.training[side]) for side in ("harmful", "harmless")]
    cosines = torch.nn.functional.cosine_similarity(*training, dim=-1)
    layers = cosines.argsort()[: max(1, int(rule.compared * engine.n_layers))]
    middle = (training[0] + training[1])[layers].mean(0) / 2 if rule.centred else 0

    def state(prompts: Sequence[Tokens], intervention: Intervention | None = None) -> Tensor:
        return algebra.unit(_last_states(engine, prompts, intervention)[layers].mean(0) - middle)

    def alike(some: Tensor, other: Tensor) -> float:
        return (some @ other).item()

    harmful, harmless = state(inputs.harmful), state(inputs.harmless)
    plain = engine.logits(inputs.harmless)
    ablated: dict[tuple[int, int], float] = {}
    added, kl = dict(ablated), dict(ablated)
    for candidate in candidates_of(inputs):
        place = candidate.position, candidate.layer
        zero = not inputs.directions[candidate.row, candidate.layer].any()
        removing, adding = (NOTHING, NOTHING) if zero else (ablation(candidate, inputs), steering(candidate, inputs))
        ablated[place] = alike(state(inputs.harmful, removing), harmless)
        added[place] = alike(state(inputs.harmless, adding), harmful)
        kl[place] = 0.0 if zero else algebra.kl_nats(plain, engine.logits(inputs.harmless, removing)).mean().item()
    others = [position for position in inputs.positions if position != -1]
    peaks = [
        median_low(max(range(engine.n_layers), key=lambda layer: table[position, layer]) for position in others)
        for table in (ablated, added)
    ]
    left = [
        place
        for place in kl
        if place[1] < int(0.8 * engine.n_layers)
        and inputs.directions[inputs.positions.index(place[0]), place[1]].any()
        and kl[place] <= rule.max_kl_nats
        and not (place[0] == -1 and all(peak < place[1] for peak in peaks))
    ]
    return sorted(left, key=lambda place: -(ablated[place] if rule.centred else ablated[place] + added[place]))


def test_cosmic_needs_no_token_that_opens_a_refusal(plan_of: PlanOf, tmp_path: Path) -> None:
    # Two sides that are answered alike: no token tells them apart.
    sides = {"harmful": "harmful", "harmless": "harmful"}
    from refusalkit.tiny.grammar import requests

    pool = requests("harmful", "train")
    for number, side in enumerate(sides):
        texts = "\n".join(pool[number * 40 : number * 40 + 40])
        (tmp_path / f"{side}.txt").write_text(texts, encoding="utf-8")
    settings = [f"prompts.{side}=file:{side}.txt" for side in sides] + ["prompts.filter=false"]
    with pytest.raises(RunError, match="no token opens the answer"):
        execute(plan_of(*settings), tmp_path / "causal", until="prompts")
    cosmic = ["select.selector=cosmic", "select.max_kl_nats=50", "evaluate.metrics=[refusal_rate, refusal_score]"]
    execute(plan_of(*settings, *cosmic), tmp_path / "cosmic")
    splits, choice = Store(tmp_path / "cosmic").load(PromptSplits), Store(tmp_path / "cosmic").load(Choice)
    assert splits is not None
    assert choice is not None
    assert splits.openers.token_ids == ()
    assert choice.baseline_refusal_score is None
    page = (tmp_path / "cosmic" / "report.html").read_text(encoding="utf-8")
    assert "In the unmodified model the mean refusal score" not in page


def test_separation_runs_no_model_and_is_not_taken_in_by_what_fits_its_own_prompts(
    found: tuple[Engine, SelectInputs],
) -> None:
    engine, inputs = found
    generator = torch.Generator().manual_seed(0)
    noise: dict[Any, Captured] = {}
    for side in ("harmful", "harmless"):
        samples = torch.randn((16, 5, 8, 128), generator=generator)
        noise[side] = Captured(samples.double().mean(0), 16, samples)
    probe = LogisticProbe()
    fitted = replace(
        inputs,
        captured=noise,
        directions=probe.find(**noise),
        find=lambda captured: probe.find(**captured),  # type: ignore[arg-type]
    )
    before = engine.prompt_passes
    selection = Separation().select(fitted, engine)
    assert engine.prompt_passes == before
    areas = torch.tensor([score.extra["auroc"] for score in selection.scores])
    # The probe separates the prompts it was fitted to without a mistake; those it has not seen it cannot.
    leading = probe.find(**noise)
    along = [torch.einsum("npld,pld->npl", noise[side].samples.double(), leading) for side in ("harmful", "harmless")]  # type: ignore[union-attr]
    assert (along[0].min(0).values > along[1].max(0).values).all()
    assert 0.4 < areas.mean() < 0.6
    real = Separation().select(inputs, engine)
    best = next(score for score in real.scores if score.status == "chosen")
    assert best.extra["auroc"] > 0.95
    assert best.extra["d_prime"] == max(s.extra["d_prime"] for s in real.scores if s.status in ("chosen", "survivor"))
    assert {s.status for s in real.scores if s.layer == 0} == {"no direction was found here"}


def test_separation_asks_for_as_many_prompts_as_its_folds_need(found: tuple[Engine, SelectInputs]) -> None:
    engine, inputs = found
    with pytest.raises(RunError, match=r"20 folds of 1[0-6] prompts"):
        Separation(folds=20).select(inputs, engine)


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ({"selector": "cosmic", "max_kl_nats": 0}, "changes harmless prompts least, by a KL of 0"),
        ({"selector": "separation", "min_auroc": 1, "prune_last": 0.9}, "AUROC"),
        (
            {"selector": "repair", "max_kl_nats": 100},
            "position -1, layer 5 loses .* of the true refusals, more than 5%",
        ),
        ({"selector": "repair", "max_kl_nats": 0}, "keeps the KL on harmless prompts under 0 nats"),
    ],
    ids=str,
)
def test_where_nothing_survives_the_nearest_miss_is_named(
    selector: dict[str, Any], message: str, plan_of: PlanOf, tmp_path: Path
) -> None:
    settings = [f"select.{key}={value}" for key, value in selector.items()]
    # There is one candidate, and without it everything is answered.
    one = ROOT / "recipes" / "methods" / "difference-in-means.safetensors"
    over = ["prompts.over_refusal=tiny:over_refusal", "prompts.validation=16"]
    more = [*over, "find.strategy=from_file", f"find.path={one}"] if selector["selector"] == "repair" else []
    with pytest.raises(RunError, match=message) as caught:
        execute(plan_of(*more, *settings), tmp_path / "run", until="select")
    assert "candidates survives" in str(caught.value)


def _rate(plan: Plan, out: Path, label: str) -> float:
    import json

    execute(plan, out, until="evaluate")
    rows = json.loads((out / "summary.json").read_text(encoding="utf-8"))["evaluation"]
    (rate,) = (
        row["value"]
        for row in rows
        if (row["intervention"], row["prompts"], row["metric"]) == (label, "harmful", "refusal_rate")
    )
    return float(rate)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma", "qwen", "yi"])
def test_cosmic_chooses_a_direction_that_bypasses_as_much_as_the_causal_choice(
    family: str, plan_of: PlanOf, tmp_path: Path
) -> None:
    common = [f"model.id=tiny:{family}", "prompts.train=64", "prompts.validation=32", "prompts.test=64"]
    common += ["evaluate.interventions=[ablate]", "evaluate.metrics=[refusal_rate]", "evaluate.controls=0"]
    rates = {
        name: _rate(plan_of(*common, f"select.selector={name}"), tmp_path / name, "ablate")
        for name in ("causal", "cosmic")
    }
    assert rates["cosmic"] <= rates["causal"] + 0.1, rates


@pytest.mark.parametrize(
    "settings",
    [
        ["select=cosmic"],
        ["select=separation"],
        ["select.screen=gradient"],
        ["select=repair", "prompts.over_refusal=tiny:over_refusal", "prompts.train=48", "prompts.validation=24"],
    ],
    ids=lambda settings: settings[0],
)
def test_the_report_says_what_every_further_score_means(settings: list[str], plan_of: PlanOf, tmp_path: Path) -> None:
    execute(plan_of(*settings), tmp_path / "run", until="select")
    choice = Store(tmp_path / "run").load(Choice)
    assert choice is not None
    given = {name for row in choice.scores for name in row.extra}
    assert given
    shown = {score.name: score for score in heat_map.scores(choice)}
    assert given <= shown.keys()
    assert all((shown[name].title, shown[name].meaning) == choice.meanings[name] for name in given)
