"""An analysis adds a section to a run and changes nothing else of it, and its numbers are what they are said to be."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from refusalkit import algebra
from refusalkit.artifacts import Analyses, AttributionFound, DirectionsFound, SuffixesFound
from refusalkit.engine.contributions import contributions
from refusalkit.engine.layout import resolve
from refusalkit.errors import InputError, RunError
from refusalkit.pipeline import execute, write_report
from refusalkit.plan import Plan, make_plan
from refusalkit.plan_text import describe
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry
from refusalkit.report.charts import figures
from refusalkit.run_directory import Run, read_run
from refusalkit.stages.compare_directions import HARMLESS, N_FOLDS, compared, dealt, divisions
from refusalkit.stages.suffixes import append, n_tokens, random_suffix
from refusalkit.store import STAGES, Store
from refusalkit.testing.models import random_engine, random_prompts
from tests.conftest import ROOT
from tests.test_resume import states

RECIPES = sorted((ROOT / "recipes" / "analyses").glob("*.yaml"))
QUICK = ("prompts.train=24", "prompts.validation=8", "prompts.test=8", "evaluate.max_new_tokens=4")
SUFFIXES = "{analysis: suffixes, append: {short: please}}"


def found(folder: Path) -> tuple[Any, ...]:
    analyses = read_run(folder).analyses
    assert analyses is not None
    return analyses.found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> Callable[[str], Run]:
    """Give a function that runs one of the recipes, once, and reads the run back."""
    runs: dict[str, Path] = {}

    def ran(name: str) -> Run:
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp(name) / "run"
            path = ROOT / "recipes" / "analyses" / f"{name}.yaml"
            execute(make_plan(load_recipe(path, registry, QUICK), path.parent, registry), runs[name])
        return read_run(runs[name])

    return ran


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_and_shows_a_section(path: Path, run: Callable[[str], Run]) -> None:
    shown = run(path.stem)
    for figure in figures(shown):
        figure.chart.to_dict(validate=True)
    folder = shown.folder
    page = (folder / "report.html").read_text(encoding="utf-8")
    asked = yaml.safe_load(path.read_text(encoding="utf-8")).get("analyze", [])
    assert page.count('<section id="analysis-') == len(asked)
    assert '<section id="separation">' in page
    if asked:
        for form in ("md", "json"):
            write_report(folder, form=form)
        data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        assert [each["analysis"] for each in data["analyses"]] == [each["analysis"] for each in asked]
        assert "analyses" not in json.loads((folder / "summary.json").read_text(encoding="utf-8"))


# What an analysis is to a run


def test_a_run_without_analyses_has_no_trace_of_them(finished_run: Path) -> None:
    assert not (finished_run / "analyze").exists()
    assert read_run(finished_run).analyses is None
    write_report(finished_run, form="json")
    assert "analyses" not in json.loads((finished_run / "report.json").read_text(encoding="utf-8"))


def test_an_analysis_is_added_changed_and_taken_away_alone(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    out, kept = tmp_path / "run", ["kept"] * len(STAGES)
    states(plan_of(), out)
    summary = (out / "summary.json").read_bytes()
    asked = plan_of(f"analyze=[{SUFFIXES}]")
    assert "analyze   suffixes: short" in describe(asked, out)
    assert states(asked, out, "analyze") == [*kept, "done"]
    assert states(asked, out, "analyze") == [*kept, "kept"]
    first = found(out)
    other = plan_of(f"analyze=[{SUFFIXES[:-1]}, seed: 1}}]")
    assert states(other, out, "analyze") == [*kept, "done"]
    assert found(out) != first
    assert (out / "summary.json").read_bytes() == summary
    assert states(plan_of(), out) == kept
    assert Store(out).key(Analyses.stage) is None


@pytest.mark.parametrize(
    ("written", "key", "message", "hint"),
    [
        ("[sufixes]", "analyze.0", "no analysis is called 'sufixes'", "did you mean 'suffixes'?"),
        ("[directions]", "analyze.0", "one direction and nothing to compare it with", "Compare directions"),
        ("[{analysis: directions, groups: {harmful: 'file:a.txt'}}]", "analyze.0", "the run's own", "Compare"),
        ("[{analysis: directions, positions: [lats, -1]}]", "analyze.0.positions.0", "cannot be 'lats'", "'last'?"),
        ("[suffixes]", "analyze.0.append", "'append' is missing", "write suffixes as keys and values"),
        ("[{analysis: suffixes, append: {}}]", "analyze.0.append", "at least 1", "`append`"),
        (f"[{SUFFIXES[:-1]}, sead: 1}}]", "analyze.0.sead", "unknown key 'sead'", "did you mean 'seed'?"),
        (f"[{SUFFIXES}, {SUFFIXES}]", "analyze", "lists suffixes twice", "one of: "),
    ],
)
def test_a_mistake_is_answered_like_any_other(
    recipe_file: Path, registry: Registry, written: str, key: str, message: str, hint: str
) -> None:
    with recipe_file.open("a", encoding="utf-8") as file:
        file.write(f"analyze: {written}\n")
    with pytest.raises(InputError) as caught:
        load_recipe(recipe_file, registry)
    assert str(caught.value.where).endswith(f": {key}")
    assert message in caught.value.message
    assert hint in str(caught.value.hint)


# Suffixes


def test_a_random_suffix_has_as_many_tokens_and_none_that_is_a_sign(plan_of: Callable[..., Plan]) -> None:
    for model in ("llama", "gemma", "qwen", "yi"):
        template = plan_of(f"model.id=tiny:{model}").template
        for length in (1, 7, 20):
            text = random_suffix(template, length, random.Random(3))
            assert (
                text
                == random_suffix(template, length, random.Random(3))
                != random_suffix(template, length, random.Random(4))
            )
            assert n_tokens(template, text) == length
            plain = template.tokens(append("Make a cake", "")[:-1])
            whole = template.tokens(append("Make a cake", text))
            assert len(whole) - len(plain) == length
            signs = [ids.count(sign) for sign in template.tokenizer.all_special_ids for ids in (plain, whole)]
            assert signs[::2] == signs[1::2]


def test_prompts_without_a_suffix_are_those_of_the_evaluation(run: Callable[[str], Run]) -> None:
    ran = run("suffixes")
    assert ran.analyses is not None
    (study,) = ran.analyses.found
    assert isinstance(study, SuffixesFound)
    groups = {group.label: group for group in study.groups}
    for band in ran.evaluation.separation:
        assert groups[band.prompts].mean == pytest.approx(band.mean, abs=1e-6)
        for result in groups[band.prompts].results:
            (same,) = [
                row
                for row in ran.evaluation.results
                if (row.intervention, row.prompts, row.metric) == ("none", band.prompts, result.metric)
            ]
            assert result == same
    # Two groups as they are, then each suffix and what is random in its place.
    assert [group.random for group in study.groups] == [False, False, False, True, False, True]
    for group in study.groups:
        assert all(low <= mean <= high for low, mean, high in zip(group.low, group.mean, group.high, strict=True))
        assert [result.metric for result in group.results] == ["refusal_rate", "refusal_score"]


# Attribution


@pytest.mark.parametrize(
    ("architecture", "adapter"),
    [
        ("LlamaForCausalLM", "llama"),
        ("Qwen3_5ForCausalLM", "qwen3_5"),
        ("Gemma2ForCausalLM", "gemma2"),
        ("Gemma4ForCausalLM", "gemma4"),
        ("Olmo2ForCausalLM", "olmo2"),
        ("PhiForCausalLM", "phi"),
        ("CohereForCausalLM", "cohere"),
        ("GraniteForCausalLM", "granite"),
        ("GPT2LMHeadModel", "gpt2"),
        ("GPTNeoXForCausalLM", "gpt_neox"),
    ],
)
def test_heads_and_bias_add_up_to_attention_and_everything_to_the_stream(
    architecture: str, adapter: str, registry: Registry
) -> None:
    engine = random_engine(architecture, registry.adapters[adapter])
    prompts = random_prompts(5)
    unit = algebra.unit(torch.randn(engine.d_model, generator=torch.Generator().manual_seed(1)).double())
    config = engine.module.config.get_text_config()
    before = config._attn_implementation
    found = contributions(engine, prompts, 3 * unit, [((0, len(prompt)), (2, 5)) for prompt in prompts])
    assert config._attn_implementation == before
    scale = found.attention.abs().max()
    assert (found.heads.nansum(-1) + found.bias - found.attention).abs().max() < 1e-6 * scale
    assert (found.bias != 0).any() == any(path.endswith(("dense.bias", "c_proj.bias")) for path in _parameters(engine))
    sites = [engine.capture(prompts, (-1,), site, keep_samples=True).samples for site in ("resid_pre", "resid_post")]
    first, last = sites[0][:, 0, 0].double() @ unit, sites[1][:, 0, -1].double() @ unit
    multiplier = engine.adapter.block_multiplier
    for layer in range(engine.n_layers) if multiplier else ():
        first = first * float(resolve(engine.module, f"{engine.layout.block(layer)}.{multiplier}"))
    total = first + found.attention.sum(1) + found.mlp.sum(1)
    assert (total - last).abs().max() < 1e-5 * last.abs().max()
    whole, part = found.attended.unbind(-1)
    # Of a linear attention there are no weights.
    linear = torch.tensor([attention.output == "linear_attn" for attention, _ in engine.layout.writes])
    assert whole.isnan()[:, linear].all()
    assert (whole[:, ~linear] - 1).abs().max() < 1e-5
    assert ((part[:, ~linear] >= 0) & (part[:, ~linear] <= 1)).all()


def _parameters(engine: Any) -> list[str]:
    """Name the parameters of attention's projections."""
    return [
        f"{layer}.{matrix.path}"
        for layer, (attention, _) in enumerate(engine.layout.writes)
        for matrix in attention.matrices
        if resolve(resolve(engine.module, engine.layout.block(layer)), matrix.path) is not None
    ]


def test_attribution_shows_where_the_top_heads_look(run: Callable[[str], Run]) -> None:
    ran = run("attribution")
    assert ran.analyses is not None
    (study,) = ran.analyses.found
    assert isinstance(study, AttributionFound)
    harmful, harmless, suffixed, randomly = study.groups
    assert [group.random for group in study.groups] == [False, False, False, True]
    for group in study.groups:
        for heads, attention in zip(group.heads, group.attention, strict=True):
            assert sum(heads) == pytest.approx(attention, abs=1e-5)
    every = sorted((value for heads in harmful.heads for value in heads), reverse=True)
    on_harmful = [head for head in study.top if head.label == harmful.label]
    assert [head.value for head in on_harmful] == pytest.approx(every[:8])
    for head in study.top:
        assert head.low <= head.value <= head.high
        assert 0 < head.on_instruction <= 1
        assert (head.on_suffix > 0) == (head.label in (suffixed.label, randomly.label))
    # What writes the direction tells harmful prompts from harmless ones.
    assert sum(harmful.attention) + sum(harmful.mlp) > sum(harmless.attention) + sum(harmless.mlp)


@pytest.mark.parametrize(
    ("setting", "message"),
    [("model.where=ndif", "stay on the server"), ("model.quantize=int8", "packed")],
)
def test_attribution_is_refused_before_anything_is_sent_where_weights_cannot_be_read(
    plan_of: Callable[..., Plan], setting: str, message: str
) -> None:
    if "quantize" in setting:
        pytest.importorskip("bitsandbytes")
    with pytest.raises(InputError, match=message):
        plan_of("analyze=[attribution]", "evaluate.interventions=[ablate]", setting)


# Directions


def test_a_prompt_lies_in_one_fold_whatever_groups_it_is_in() -> None:
    groups = {"all": [f"p{number}" for number in range(40)], "some": [f"p{number}" for number in range(5, 30, 2)]}
    folds = dealt({**groups, "others": [f"q{number}" for number in range(21)]}, seed=3)
    for name in ("all", "others"):
        sizes = [len(fold) for fold in folds[name]]
        assert max(sizes) - min(sizes) <= 1
        assert len(set().union(*folds[name])) == sum(sizes)
    assert all(set(some) <= set(whole) for some, whole in zip(folds["some"], folds["all"], strict=True))
    assert folds == dealt({**groups, "others": [f"q{number}" for number in range(21)]}, seed=3)
    halves = divisions(N_FOLDS)
    assert len({frozenset(half) for pair in halves for half in pair}) == 2 * len(halves) == 70
    assert all(sorted(one + other) == list(range(N_FOLDS)) for one, other in halves)


@pytest.mark.parametrize("truth", [0.0, 0.6, 1.0])
def test_noise_lowers_a_cosine_and_not_its_share_of_the_ceiling(truth: float) -> None:
    d_model, n, generator = 512, 6, torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d_model, 2, dtype=torch.float64, generator=generator)).Q.T
    ahead = {"one": basis[0], "other": truth * basis[0] + (1 - truth**2) ** 0.5 * basis[1], HARMLESS: 0 * basis[0]}

    def sums(mean: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(N_FOLDS, n, 1, 1, d_model, dtype=torch.float64, generator=generator) * 0.3
        return (mean + noise).sum(1)

    counts = {name: torch.full((N_FOLDS,), float(n), dtype=torch.float64) for name in ahead}
    found = compared({name: sums(mean) for name, mean in ahead.items()}, counts, (-1,))
    (pair,) = [pair for pair in found.pairs if (pair.first, pair.second) == ("one", "other")]
    assert pair.ceiling[0] < 0.5
    assert pair.between_halves[0] / pair.ceiling[0] == pytest.approx(truth, abs=0.1)
    # The cosine as found is between: noise pulls it down, and the harmless mean, which both share, to one half.
    assert (pair.cosine[0] > truth + 0.1) if truth == 0 else (pair.cosine[0] < truth)


def test_directions_compare_groups_and_positions(run: Callable[[str], Run]) -> None:
    for name, labels in (
        ("categories", ["harmful", "computers", "fraud", "violence", "looks harmful"]),
        ("harmfulness-and-refusal", ["position -6", "position -1"]),
    ):
        ran = run(name)
        assert ran.analyses is not None
        (study,) = ran.analyses.found
        assert isinstance(study, DirectionsFound)
        assert [row.label for row in study.rows] == labels
        assert len(study.pairs) == len(labels) * (len(labels) + 1) // 2
        for pair in study.pairs:
            # Template tokens are the same in every prompt, so at layer 0 there is no direction there.
            there = [layer for layer, cosine in enumerate(pair.cosine) if cosine == cosine]
            assert there[0] == (0 if (pair.first, pair.second) == ("position -6",) * 2 else 1)
            if pair.first == pair.second:
                assert [pair.cosine[layer] for layer in there] == pytest.approx([1.0] * len(there))
                assert pair.ceiling[ran.choice.layer] == pytest.approx(pair.between_halves[ran.choice.layer])


def test_a_group_that_is_too_small_is_refused(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("Make a cake\nMake a pie\n", encoding="utf-8")
    plan = plan_of("analyze=[{analysis: directions, groups: {few: 'file:few.txt'}}]")
    with pytest.raises(RunError, match="'few' has 2 prompts"):
        states(plan, tmp_path / "run", "analyze")


# The base model


def test_a_direction_is_followed_through_a_model_without_chat_template(
    checkpoint: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    base = checkpoint(chat_template=None)
    path = ROOT / "recipes" / "analyses" / "base-model.yaml"
    settings = (*QUICK, f"model.id={base}")
    with pytest.raises(InputError, match="no chat template"):
        make_plan(load_recipe(path, registry, [*settings, "prompts.chat_template=null"]), path.parent, registry)
    execute(make_plan(load_recipe(path, registry, settings), path.parent, registry), tmp_path / "run")
    ran = read_run(tmp_path / "run")
    harmful, harmless = ran.evaluation.separation
    layer = ran.choice.layer
    assert (ran.choice.position, layer) == (-1, 5)
    assert harmful.low[layer] > harmless.high[layer]
