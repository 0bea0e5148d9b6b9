"""An analysis adds a section to a run and changes nothing else of it, and its numbers are what they are said to be."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from refusalkit.artifacts import Analyses, SuffixesFound
from refusalkit.errors import InputError
from refusalkit.pipeline import execute, write_report
from refusalkit.plan import Plan, make_plan
from refusalkit.plan_text import describe
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry
from refusalkit.run_directory import Run, read_run
from refusalkit.stages.suffixes import append, n_tokens, random_suffix
from refusalkit.store import STAGES, Store
from tests.conftest import ROOT
from tests.test_resume import states

RECIPES = sorted((ROOT / "recipes" / "analyses").glob("*.yaml"))
QUICK = ("prompts.train=24", "prompts.validation=8", "prompts.test=8", "evaluate.max_new_tokens=4")
SUFFIXES = "{analysis: suffixes, suffixes: {short: please}}"


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
    folder = run(path.stem).folder
    page = (folder / "report.html").read_text(encoding="utf-8")
    asked = yaml.safe_load(path.read_text(encoding="utf-8")).get("analyze", [])
    assert page.count('<section id="analysis-') == len(asked)
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
        ("[suffixes]", "analyze.0.suffixes", "'suffixes' is missing", "write suffixes as keys and values"),
        ("[{analysis: suffixes, suffixes: {}}]", "analyze.0.suffixes", "at least 1", "`suffixes`"),
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
