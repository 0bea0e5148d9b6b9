"""A search is run, stopped and taken up, chosen on validation prompts and reported on test prompts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import altair as alt
import pytest
import refusalkit_search
from refusalkit_search.outcome import Found, document, sentence, text
from refusalkit_search.run import run_search
from refusalkit_search.setup import Setup, read_setup
from refusalkit_search.study import Budget

from refusalkit.errors import InputError, RunError
from refusalkit.progress import Silent
from refusalkit.registry import load_registry
from refusalkit.testing import broken_laws

RECIPES = Path(refusalkit_search.__file__).parent / "recipes"
SMALL = ["prompts.train=16", "prompts.validation=8", "prompts.test=8", "evaluate.max_new_tokens=4"]
BUDGET = Budget(4, 0)
OBJECTIVES = "objectives:\n  - {metric: refusal_rate, prompts: harmful, goal: minimize}\n"


def setup_of(name: str, *settings: str) -> Setup:
    """Read a search of the package, made small."""
    registry = load_registry([refusalkit_search], entry_points=False)
    return read_setup(RECIPES / f"{name}.yaml", RECIPES / f"{name}.search.yaml", [*SMALL, *settings], registry)


def written(folder: Path, space: str, *settings: str) -> Setup:
    """Read a search over a space written here."""
    path = folder / "space.yaml"
    path.write_text(space, encoding="utf-8")
    return read_setup(RECIPES / "ablate.yaml", path, [*SMALL, *settings], load_registry(entry_points=False))


class Impatient(Silent):
    """Stop a search before a trial, as Ctrl-C does."""

    def __init__(self, kind: str, trial: int) -> None:
        self._until, self._stage = (kind, trial), ""

    def stage(self, name: str, state: str) -> None:
        self._stage = name

    def advance(self, what: str, done: int, total: int) -> None:
        if (self._stage, done) == self._until:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("searches") / "ablate"


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    return run_search(setup_of("ablate"), folder, BUDGET, Silent())


def prompts_of(run: Path) -> dict[str, dict[str, list[str]]]:
    value = json.loads((run / "prompts" / "artifact.json").read_text(encoding="utf-8"))["value"]
    return {side: value[side] for side in ("harmful", "harmless")}


def times(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("trials/*/environment.json")}


# What is found


def test_what_is_chosen_is_no_worse_than_the_recipe_on_validation(found: Found) -> None:
    assert found.setup.own() is not None
    assert found.chosen is not None
    assert found.chosen.measured is not None
    assert found.fixed.measured is not None
    assert found.chosen.measured <= found.fixed.measured


def test_random_search_of_the_same_size_and_the_recipe_stand_beside_it(found: Found, folder: Path) -> None:
    assert len(found.search) == len(found.random) == BUDGET.trials
    assert [name for name, _ in found.compared()] == ["fixed", "random", "search"]
    for name, _ in found.compared():
        assert (folder / "test" / name / "report.html").is_file()
        assert found.tested(name, found.objectives[0]) is not None


def test_no_trial_knows_a_test_prompt(found: Found, folder: Path) -> None:
    tests = prompts_of(folder / "test" / "search")
    for run in (folder / "trials").iterdir():
        if (run / "prompts").is_dir():
            known = (run / "prompts" / "artifact.json").read_text(encoding="utf-8")
            assert not [prompt for splits in tests.values() for prompt in splits["test"] if json.dumps(prompt) in known]
            # What they are measured on in its place is what the recipe calls validation, before the filter.
            for side, splits in prompts_of(run).items():
                assert set(tests[side]["validation"]) <= set(splits["test"])
    assert len(times(folder)) == 1 + 2 * BUDGET.trials


def test_trials_share_what_they_have_in_common(found: Found, folder: Path) -> None:
    for kind in ("search", "random"):
        for path in folder.glob(f"trials/{kind}-*/environment.json"):
            shared = json.loads(path.read_text(encoding="utf-8"))["shared"]
            # Some strategies need every prompt's activations and some their means: one pass serves both.
            assert (shared["prompts"], shared["capture"]) == ("fixed", "fixed")


def test_the_page_stands_alone_and_holds_no_completion(found: Found, folder: Path) -> None:
    page = (folder / "search.html").read_text(encoding="utf-8")
    assert "Pareto front of the search" in page
    assert 'src="http' not in page
    charts = dict(re.findall(r'<script type="application/json" id="chart-(.*?)">(.*?)</script>', page, re.DOTALL))
    assert "pareto-refusal_rate-harmful-kl-harmless" in charts
    for specification in charts.values():
        assert alt.Chart.from_dict(json.loads(specification))
    for run in found.tests.values():
        assert not [text for made in run.evaluation.generated for text in made.texts if text and text in page]
    assert sentence(found).startswith("On test prompts, refusal_rate on harmful prompts is ")
    assert "4 trials, 4 of random search" in text(found)
    assert json.loads((folder / "search.json").read_text(encoding="utf-8")) == document(found)


def test_every_search_of_the_package_can_be_read() -> None:
    assert {path.name for path in RECIPES.glob("*.yaml")} == {
        f"{name}{part}.yaml" for name in ("ablate", "repair") for part in ("", ".search")
    }
    goals = [(objective.prompts, objective.goal) for objective in setup_of("repair").space.objectives]
    assert goals == [("over_refusal", "minimize"), ("harmful", "maximize"), ("harmless", "minimize")]


def test_limits_that_nothing_keeps_leave_nothing_to_choose(tmp_path: Path) -> None:
    space = "space: {select.layer: {low: 2, high: 6}}\nobjectives:\n"
    space += "  - {metric: kl, prompts: harmless, goal: minimize, limit: 0.0}\n"
    found = run_search(written(tmp_path, space), tmp_path / "out", Budget(2, 0), Silent())
    assert (found.chosen, list(found.tests)) == (None, ["fixed"])
    assert "None of 2 trials keeps the limits" in (tmp_path / "out" / "search.html").read_text(encoding="utf-8")


def test_a_recipe_that_comes_to_nothing_is_no_end_of_the_search(tmp_path: Path) -> None:
    space = "space:\n  select: [{selector: fixed, layer: 4}, {selector: fixed, layer: 5}]\n"
    asked = written(tmp_path, space + OBJECTIVES, "select={selector: causal, min_induced_score: 1000}")
    found = run_search(asked, tmp_path / "out", Budget(1, 0), Silent())
    assert found.fixed.measured is None
    assert "candidates survives" in str(found.fixed.reason)
    assert list(found.tests) == ["random", "search"]
    assert "the recipe as it is" in (tmp_path / "out" / "search.html").read_text(encoding="utf-8")


# Stopped and taken up


@pytest.mark.parametrize("stop", [("search", 2), ("random", 1)], ids=str)
def test_a_search_that_was_stopped_goes_on_and_repeats_nothing(
    found: Found, tmp_path: Path, stop: tuple[str, int]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_search(setup_of("ablate"), tmp_path / "out", BUDGET, Impatient(*stop))
    before = times(tmp_path / "out")
    again = run_search(setup_of("ablate"), tmp_path / "out", BUDGET, Silent())
    assert document(again) == document(found)
    after = times(tmp_path / "out")
    assert {run: after[run] for run in before} == before
    assert len(before) < len(after)


def test_more_trials_are_added_to_those_there_are(found: Found, folder: Path) -> None:
    before = times(folder)
    more = run_search(setup_of("ablate"), folder, Budget(BUDGET.trials + 1, 0), Silent())
    assert more.search[: BUDGET.trials] == found.search
    assert {run: times(folder)[run] for run in before} == before
    assert len(more.search) == BUDGET.trials + 1


def test_the_folder_of_something_else_is_refused(found: Found, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another search: its seed differs"):
        run_search(setup_of("ablate"), folder, Budget(4, 1), Silent())
    with pytest.raises(InputError, match="another search: its recipe differs"):
        run_search(setup_of("ablate", "prompts.seed=1"), folder, BUDGET, Silent())
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="not empty and holds no search"):
        run_search(setup_of("ablate"), tmp_path, BUDGET, Silent())


# Mistakes


@pytest.mark.parametrize(
    ("space", "where", "message", "hint"),
    [
        ("select.layr: {low: 1, high: 6}", "2: space.select.layr", "1 cannot be used: unknown key 'layr'", "'layer'"),
        ("select.layer: {lo: 1, high: 6}", "2: space.select.layer.lo", "unknown key 'lo'", "'low'"),
        ("select.layer: {low: 6, high: 1}", "2: space.select.layer", "`low: 6` is not below `high: 1`", "range"),
        ("select.layer: {low: 0, high: 1, log: true}", "2: space.select.layer", "needs a `low` above 0", "range"),
        ("select.layer: 3", "2: space.select.layer", "should be a list, not 3", "range"),
        ("find: [pca, ldaa]", "2: space.find", '"ldaa" cannot be used: no strategy is called', "'lda'"),
        ("find: [pca, pca]", "2: space.find", 'lists "pca" twice', "keep one"),
        ("find.rank: [2, 3]", "2: space.find.rank", "2 cannot be used: unknown key 'rank'", "one of"),
        ("prompts.seed: [1, 2]", "2: space.prompts.seed", "cannot change between trials", "below capture, find"),
        ("evaluate.controls: [1, 2]", "2: space.evaluate.controls", "cannot change between trials", "below capture"),
        ("evaluate.interventions.1.scale: [1]", "2: space.evaluate.interventions.1.scale", "no place in", "0 to 0"),
        ("evaluate.interventions.0.layers: [[0, 9]]", "2: space.evaluate.interventions.0.layers", "layer 9 of", "0 to"),
    ],
)
def test_a_mistake_in_the_space_is_found_before_anything_runs(
    tmp_path: Path, space: str, where: str, message: str, hint: str
) -> None:
    assert_refused(tmp_path, f"space:\n  {space}\n{OBJECTIVES}", where, (message, hint))


@pytest.mark.parametrize(
    ("objective", "key", "message", "hint"),
    [
        ("metric: refusal_rat, prompts: harmful, goal: minimize", "metric", "does not measure", "'refusal_rate'"),
        ("metric: kl, prompts: harmful, goal: minimize", "prompts", "kl on harmful prompts", "one of: harmless"),
        ("metric: refusal_rate, prompts: over_refusal, goal: minimize", "prompts", "on over_refusal", "one of: "),
        ("metric: kl, prompts: harmless, goal: lower", "goal", "'minimize' or 'maximize'", "way is better"),
        ("metric: kl, prompts: harmless, goal: minimize, intervention: 1", "intervention", "stands there", "0 (ablate"),
    ],
)
def test_a_mistake_in_an_objective_is_found_before_anything_runs(
    tmp_path: Path, objective: str, key: str, message: str, hint: str
) -> None:
    text = f"space:\n  select.layer: [3, 4]\nobjectives:\n  - {{{objective}}}\n"
    assert_refused(tmp_path, text, f"4: objectives.0.{key}", (message, hint))


def assert_refused(folder: Path, text: str, where: str, said: tuple[str, str]) -> None:
    """Check the place, the message and the hint of the error that a space is refused with."""
    with pytest.raises(InputError) as caught:
        written(folder, text)
    assert caught.value.where == f"{folder / 'space.yaml'}:{where}"
    assert said[0] in caught.value.message
    assert said[1] in str(caught.value.hint)


def test_a_model_that_does_not_refuse_ends_the_search(tmp_path: Path) -> None:
    settings = ["prompts.harmful=tiny:harmless", "prompts.harmless=tiny:harmful", "select.openers=[I]"]
    swapped = written(tmp_path, f"space:\n  select.layer: [3, 4]\n{OBJECTIVES}", *settings)
    with pytest.raises(RunError, match="the model refuses only 0 of 16"):
        run_search(swapped, tmp_path / "out", BUDGET, Silent())


# The command


def typed(*line: Any) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "refusalkit", *map(str, line)]
    return subprocess.run(whole, capture_output=True, text=True)


def test_the_command_searches(tmp_path: Path) -> None:
    settings = [part for setting in SMALL for part in ("--set", setting)]
    files = (RECIPES / "ablate.yaml", RECIPES / "ablate.search.yaml")
    done = typed("search", *files, "--trials", 1, "--out", tmp_path / "out", *settings)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out' / 'search.html'}\n"), done.stderr
    assert "1 trial, 1 of random search" in done.stderr


def test_help_shows_the_command_and_imports_nothing_heavy() -> None:
    script = "import sys, refusalkit.cli as cli\ntry: cli.main()\nexcept SystemExit: pass\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True)
    shown, _, modules = done.stdout.rstrip().rpartition("\n")
    assert "Search the values of a recipe's keys" in shown
    assert not {"torch", "optuna", "numpy", "transformers", "altair"} & set(modules.split())


def test_everything_it_provides_obeys_the_laws() -> None:
    assert not broken_laws(refusalkit_search)
