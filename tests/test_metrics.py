"""Metrics measure what they say: against plain loops, against each other, and on texts made to be told apart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from refusalkit import algebra
from refusalkit.artifacts import Choice, Evaluation, Result, Unmodified
from refusalkit.builtin.adapters import GEMMA2, LLAMA
from refusalkit.builtin.interventions import ablate_everywhere
from refusalkit.builtin.metrics import Perplexity, RefusalRate, Repetition
from refusalkit.builtin.phrases import REFUSAL_SUBSTRINGS, says_no
from refusalkit.engine.engine import Engine
from refusalkit.engine.load import load
from refusalkit.errors import InputError
from refusalkit.intervention import NOTHING, Direction, Edit, Intervention, Place
from refusalkit.metric import Evidence
from refusalkit.pipeline import execute
from refusalkit.plan import Plan
from refusalkit.plan_text import describe
from refusalkit.store import Store
from refusalkit.testing import random_engine
from refusalkit.testing.models import random_prompts

from .plain_losses import plain_loss

PlanOf = Callable[..., Plan]
PROMPTS = random_prompts(6)
COMPLETIONS = [(9, 10, 11), (12,), (13, 14), (15, 16, 17, 18), (), (20,)]
LOSSES = "evaluate.metrics=[cross_entropy, text_cross_entropy, {metric: answer_cross_entropy, source: 'tiny:harmless'}]"


def _vector(engine: Engine, seed: int = 0) -> torch.Tensor:
    return torch.randn(engine.d_model, generator=torch.Generator().manual_seed(seed))


def _results(folder: Path) -> dict[tuple[str, str, str], Result]:
    evaluation = Store(folder).load(Evaluation)
    assert evaluation is not None
    return {(row.intervention, row.prompts, row.metric): row for row in evaluation.results}


# -- along completions ------------------------------------------------------------------------------------------


def test_token_kl_is_that_of_every_prefix_read_alone() -> None:
    engine = random_engine("LlamaForCausalLM", LLAMA)
    engine.batch_size = 4
    vector = _vector(engine)
    interventions = [
        ablate_everywhere(Direction(vector, -1, 2, engine.n_layers)),
        Intervention((Edit("resid_pre", 2, add=vector),)),
    ]
    sums, counts = engine.completion_kl(PROMPTS, COMPLETIONS, [NOTHING, *interventions])
    assert counts.tolist() == [len(completion) for completion in COMPLETIONS]
    assert sums[0].abs().max() < 1e-9
    for found, intervention in zip(sums[1:], interventions, strict=True):
        for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            prefixes = [prompt + completion[:place] for place in range(len(completion))]
            if prefixes:
                pair = (torch.cat([engine.logits([one], each) for one in prefixes]) for each in (NOTHING, intervention))
                assert found[row].item() == pytest.approx(algebra.kl_nats(*pair).sum().item(), abs=1e-4)
            else:
                assert found[row] == 0


def test_edited_weights_are_read_like_the_ablation_they_equal_and_put_back() -> None:
    engine = random_engine("LlamaForCausalLM", LLAMA)
    direction = Direction(_vector(engine), -1, 2, engine.n_layers)
    both = [ablate_everywhere(direction), Intervention(weights=direction.basis)]
    plain = engine.logits(PROMPTS)
    sums, _ = engine.completion_kl(PROMPTS, COMPLETIONS, both)
    torch.testing.assert_close(sums[0], sums[1], atol=1e-4, rtol=1e-3)
    assert sums.sum() > 0.01
    along = engine.projections(PROMPTS, [NOTHING, *both], direction.vector, Place("resid_pre", 2, -1))
    assert along[1:].abs().max() < 1e-5 * along[0].abs().max()
    assert torch.equal(engine.logits(PROMPTS), plain)


@pytest.mark.parametrize("site", ["resid_pre", "mlp_out", "resid_post"])
def test_steering_moves_the_projection_by_its_own_length(site: Any) -> None:
    engine = random_engine("Gemma2ForCausalLM", GEMMA2)
    vector = _vector(engine)
    steered = [Intervention((Edit(site, 2, add=scale * vector),)) for scale in (1.0, -0.5)]
    along = engine.projections(PROMPTS, [NOTHING, *steered], vector, Place(site, 2, -2))
    length = vector.double().norm()
    torch.testing.assert_close(along[1] - along[0], length.expand(len(PROMPTS)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(along[2] - along[0], -0.5 * length.expand(len(PROMPTS)), atol=1e-4, rtol=1e-4)
    read = engine.capture(PROMPTS, (-2,), site, keep_samples=True).samples
    assert read is not None
    torch.testing.assert_close(along[0], read[:, 0, 2].double() @ algebra.unit(vector.double()), atol=1e-5, rtol=1e-5)


# -- a run ------------------------------------------------------------------------------------------------------


def test_the_three_losses_are_those_of_a_plain_loop(plan_of: PlanOf, tmp_path: Path) -> None:
    plan = plan_of(LOSSES, "evaluate.interventions=[ablate]")
    execute(plan, tmp_path / "run", until="evaluate")
    store = Store(tmp_path / "run")
    choice, unmodified = store.load(Choice), store.load(Unmodified)
    assert choice is not None
    assert unmodified is not None
    module, tokenizer = load(plan.checkpoint).module, plan.checkpoint.tokenizer
    written = plan.prompts.harmless["test"], unmodified
    expected, ablated = (
        plain_loss(module, tokenizer, plan.evaluate, written, removed) for removed in (None, choice.direction)
    )
    found = _results(tmp_path / "run")
    assert len(expected) == 3
    for label, values in (("none", expected), ("ablate", ablated)):
        for metric, value in values.items():
            assert found[label, "harmless", metric].value == pytest.approx(value, abs=1e-5), (label, metric)
    assert all(abs(ablated[metric] - expected[metric]) > 1e-4 for metric in expected)


def test_every_metric_of_a_run_is_told_apart_and_reads_what_it_says(plan_of: PlanOf, tmp_path: Path) -> None:
    metrics = "refusal_rate, {metric: refusal_rate, phrases: wide}, kl, token_kl, perplexity, repetition, projection"
    plan = plan_of(f"evaluate.metrics=[{metrics}]", "evaluate.interventions=[ablate, steer, orthogonalize]")
    execute(plan, tmp_path / "run")
    found = _results(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    named = {(row["intervention"], row["prompts"], row["metric"]) for row in summary["evaluation"]}
    assert len(named) == len(summary["evaluation"]) == len(found)
    assert ("ablate", "harmful", "refusal_rate(phrases=wide)") in named
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "refusal rate (phrases=wide)" in page
    # What a model writes by itself is what it finds likely.
    own = found["none", "harmless", "perplexity"]
    assert 1 <= own.value < 2
    assert found["steer", "harmless", "perplexity"].value > own.value
    assert found["none", "harmless", "token_kl"].value == 0
    for metric in ("token_kl", "kl"):
        # The edit of the weights is the ablation; steering costs harmless prompts more.
        ablated = found["ablate", "harmless", metric].value
        assert found["orthogonalize", "harmless", metric].value == pytest.approx(ablated, rel=1e-3)
        assert found["steer", "harmless", metric].value > ablated > 0
    choice = Store(tmp_path / "run").load(Choice)
    assert choice is not None
    for side in ("harmful", "harmless"):
        before, after = (found[label, side, "projection"].value for label in ("none", "steer"))
        assert after - before == pytest.approx(choice.direction.norm().item(), rel=1e-4)
        assert found["ablate", side, "projection"].value == pytest.approx(0, abs=1e-4)
        # A control is read along the found direction, which it does not touch.
        assert found["ablate_random", side, "projection"].value == pytest.approx(before, abs=0.5 * (after - before))
    assert found["none", "harmful", "projection"].value > found["none", "harmless", "projection"].value


def test_a_completion_of_one_token_has_the_kl_of_the_first_token(plan_of: PlanOf, tmp_path: Path) -> None:
    changes = ("evaluate.metrics=[kl, token_kl]", "evaluate.interventions=[ablate]", "evaluate.max_new_tokens=1")
    execute(plan_of(*changes), tmp_path / "run", until="evaluate")
    found = _results(tmp_path / "run")
    first, along = (found["ablate", "harmless", metric].values for metric in ("kl", "token_kl"))
    assert along == pytest.approx(first, abs=1e-6)


def test_a_gate_has_no_place_in_a_text_that_answers_no_prompt(plan_of: PlanOf, tmp_path: Path) -> None:
    gated = "evaluate.interventions=[{intervention: conditional, apply: steer, threshold: -9}]"
    execute(plan_of(LOSSES, gated, "evaluate.controls=0"), tmp_path / "run", until="evaluate")
    rows = [row for row in _results(tmp_path / "run").values() if row.intervention != "none"]
    text, answer = ([row for row in rows if row.metric.startswith(name)] for name in ("text_", "answer_"))
    assert math.isnan(text[0].value)
    assert text[0].n == 0
    assert answer[0].value > 0


def test_only_what_reads_texts_depends_on_them(plan_of: PlanOf, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    keys = []
    for content in ("One text.\nAnother text.\n", "One text.\nAnother one.\n"):
        file.write_text(content, encoding="utf-8")
        keys.append(plan_of("evaluate.metrics=[{metric: text_cross_entropy, source: 'file:texts.txt'}]").keys)
    assert keys[0]["evaluate"] != keys[1]["evaluate"]
    assert keys[0]["select"] == keys[1]["select"]
    plan = plan_of("evaluate.metrics=[{metric: text_cross_entropy, source: 'file:texts.txt', most: 1}, token_kl]")
    (metric, _) = plan.evaluate.metrics
    assert metric.label == "text_cross_entropy(source=file:texts.txt, most=1)"
    assert [passage.text for passage in metric.texts] == ["One text."]  # type: ignore[attr-defined]
    said = describe(plan, tmp_path)
    assert metric.label in said
    assert "8 of texts" in said


def test_a_text_is_cut_off_and_one_that_is_too_short_has_no_value(plan_of: PlanOf, tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text(json.dumps(["a", "To bake a cake, take it one step at a time."]))
    metric = "{metric: text_cross_entropy, source: 'file:texts.json', max_tokens: 5}"
    execute(
        plan_of(f"evaluate.metrics=[{metric}]", "evaluate.interventions=[none]"), tmp_path / "run", until="evaluate"
    )
    (row,) = _results(tmp_path / "run").values()
    bos = plan_of().checkpoint.tokenizer("a")["input_ids"]
    assert row.weights == (len(bos) - 1, 4)
    assert math.isnan(row.values[0]) == (len(bos) == 1)


@pytest.mark.parametrize(
    ("metric", "message", "hint"),
    [
        ("text_cross_entropy, source: 'builtin:text'", "no such built-in set", "texts"),
        ("text_cross_entropy, source: 'nowhere:x'", "names no prompt source", "builtin"),
        ("answer_cross_entropy, source: 'builtin:harmless'", "has no field that holds an answer", "name both"),
        ("answer_cross_entropy, source: 'tiny:x'", "no such set", "harmful"),
        ("answer_cross_entropy, source: 'arditi:x#harmful'", "arditi: has prompts and no answers", "file"),
    ],
)
def test_texts_that_cannot_be_read_are_bad_input(plan_of: PlanOf, metric: str, message: str, hint: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        plan_of(f"evaluate.metrics=[{{metric: {metric}}}]")
    assert caught.value.where is not None
    assert caught.value.where.startswith(f"evaluate.metrics: {metric.partition(',')[0]}.source")
    assert hint in str(caught.value.hint)


# -- what completions say ---------------------------------------------------------------------------------------


def _evidence(texts: Sequence[str] = (), ids: Sequence[Sequence[int]] = ()) -> Evidence:
    prompts = tuple("p" for _ in texts or ids)
    return Evidence("harmful", prompts, (), completions=tuple(texts), completion_ids=tuple(map(tuple, ids)))


@pytest.mark.parametrize(
    "text",
    [
        "I can\u2019t help with that.",
        "  I **cannot** help with that.",
        "I\u00a0cannot\n help.",
        "# I'm\tsorry",
        "> *I am* unable to do this.",
        "\uff29 cannot help.",
        "I\u200b can`t do this.",
        "Sorry, but no.",
        "I WON\u02bcT do it.",
        "My apologies. This is not something to do.",
        "That is against my `guidelines`.",
    ],
)
def test_the_wide_list_sees_through_looks_and_knows_more_phrases(text: str) -> None:
    assert says_no(text, wide=True)
    assert not says_no(text)


@pytest.mark.parametrize(
    "text",
    [
        "Sure! Here is a short note on how to bake.",
        "You can't go wrong with butter.",
        "The cannon will not fire by itself.",
        "snake_case and `code` stay as they are",
        "",
    ],
)
def test_answers_are_no_refusals_by_either_list(text: str) -> None:
    assert not says_no(text)
    assert not says_no(text, wide=True)


@pytest.mark.parametrize("phrase", REFUSAL_SUBSTRINGS)
@pytest.mark.parametrize("around", ["{}", "Well, {} this.", "a*{}*b", "# {}\n> e\u0301", "{}\u200d", "\ufb01 {}."])
def test_what_the_paper_finds_the_wide_list_finds(phrase: str, around: str) -> None:
    text = around.format(phrase)
    assert says_no(text)
    assert says_no(text, wide=True)


def test_refusals_are_counted_by_the_list_that_is_named() -> None:
    evidence = _evidence(["I can\u2019t.", "I can't.", "Yes."])
    assert RefusalRate().measure(evidence).values == (0.0, 1.0, 0.0)
    assert RefusalRate(phrases="wide").measure(evidence).values == (1.0, 1.0, 0.0)


def test_repetition_is_none_of_a_text_without_and_nearly_all_of_a_loop() -> None:
    fresh, loop, half = list(range(40)), [1, 2] * 20, [*range(10), *range(10)]
    found = Repetition().measure(_evidence(ids=[fresh, loop, half, [1, 2, 3]])).values
    assert found[0] == 0
    assert found[1] == pytest.approx(1 - 2 / 37)
    assert found[2] == pytest.approx(7 / 17)
    assert math.isnan(found[3])
    assert Repetition(n=1).measure(_evidence(ids=[loop])).values == (1 - 2 / 40,)


def test_perplexity_of_a_sure_model_is_one_and_of_a_guess_the_number_of_choices() -> None:
    losses = torch.tensor([0.0, 3 * math.log(50.0), 0.0], dtype=torch.float64)
    evidence = Evidence("harmful", ("a", "b", "c"), (), losses=losses, n_tokens=torch.tensor([4, 3, 0]))
    sure, guess, none = Perplexity().measure(evidence).values
    assert (sure, guess) == (1.0, pytest.approx(50.0))
    assert math.isnan(none)
