"""A sweep is a grid of readable runs that never compute the same stage twice."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from refusalkit.artifacts import Activations, Unmodified
from refusalkit.batch import Batch, check_folders, plan_batch
from refusalkit.errors import InputError
from refusalkit.many import sweep_folders
from refusalkit.pipeline import execute
from refusalkit.recipe_file import load_members, load_recipe
from refusalkit.registry import Registry
from refusalkit.sharing import Models, Sharing
from refusalkit.store import Store
from tests.conftest import ROOT, SMALL
from tests.test_resume import Noted

SWEEP = f"{SMALL}sweep:\n  find: [difference_in_means, pca]\n"
COMPARE = ROOT / "recipes" / "methods" / "compare.yaml"
#: Every strategy has a choice with these.
LOOSE = ("select.max_kl_nats=9", "select.min_induced_score=-99")

Load = Callable[..., list[str | None]]


@pytest.fixture
def names(recipe_file: Path, registry: Registry) -> Load:
    """Give a function that writes a recipe and returns the names of its runs."""

    def load(text: str, *settings: str) -> list[str | None]:
        recipe_file.write_text(text, encoding="utf-8")
        return [member.run for member in load_members(recipe_file, registry, settings)]

    return load


# The grid


def test_every_combination_is_a_run_with_a_name_that_can_be_read(names: Load) -> None:
    text = (
        f"{SMALL}sweep:\n  find: [pca, {{strategy: som, rank: 2}}]\n  prompts.seed: [0, 1]\n  prompts.filter: [yes]\n"
    )
    assert names(text) == [
        "pca,seed=0,filter=true",
        "pca,seed=1,filter=true",
        "som,rank=2,seed=0,filter=true",
        "som,rank=2,seed=1,filter=true",
    ]


@pytest.mark.parametrize(
    ("swept", "expected"),
    [
        ("model.id: ['tiny:llama', 'tiny/llama', 'tiny:gemma']", ["tiny-llama", "tiny-llama-2", "tiny-gemma"]),
        ("capture.positions: [-1, [-1, instruction_end]]", ["positions=-1", "positions=-1+instruction_end"]),
        ("evaluate.interventions: [[none, {intervention: steer, scale: 2}]]", ["interventions=none+steer,scale=2"]),
        ("prompts.seed: [0]\n  evaluate.seed: [1]", ["prompts.seed=0,evaluate.seed=1"]),
        ("prompts.system: [null, Be brief.]", ["system=null", "Be-brief"]),
    ],
)
def test_names_are_safe_for_folders_and_never_the_same(names: Load, swept: str, expected: list[str]) -> None:
    assert names(f"{SMALL}sweep:\n  {swept}\n") == expected


def test_a_run_of_a_sweep_is_a_recipe_of_its_own(recipe_file: Path, registry: Registry) -> None:
    recipe_file.write_text(SWEEP, encoding="utf-8")
    first, second = (member.recipe for member in load_members(recipe_file, registry))
    recipe_file.write_text(SMALL, encoding="utf-8")
    alone = load_recipe(recipe_file, registry, ["name=small/pca", "find=pca"])
    assert (first.name, first.find.strategy) == ("small/difference_in_means", "difference_in_means")
    assert second.model_dump(serialize_as_any=True) == alone.model_dump(serialize_as_any=True)
    assert "sweep" not in second.model_dump()


def test_settings_reach_every_run_and_replace_lists(names: Load, recipe_file: Path, registry: Registry) -> None:
    assert names(SWEEP, "sweep.find=[lda]", "sweep.prompts.seed=[3, 4]") == ["lda,seed=3", "lda,seed=4"]
    assert names(SWEEP, "sweep={}") == [None]
    members = load_members(recipe_file, registry, ["prompts.train=12"])
    assert [member.recipe.prompts.train for member in members] == [12, 12]


@pytest.mark.parametrize(
    ("swept", "settings", "where", "message"),
    [
        ("find: [pca, pcb]", (), "+1: sweep.find.1: in the run pcb", "no strategy is called 'pcb'"),
        ("find:\n    - {strategy: som, rnk: 2}", (), "+2: sweep.find.0.rnk: in the run som,rnk=2", "unknown key"),
        ("prompts.sed: [0]", (), "+1: sweep.prompts.sed.0: in the run sed=0", "unknown key 'sed'"),
        ("prompts.seed: [0, one]", (), "+1: sweep.prompts.seed.1: in the run one", "should be a whole number"),
        ("fnd: [pca]", (), "+1: sweep.fnd.0: in the run pca", "unknown key 'fnd'"),
        ("prompts.seed: 0", (), "+1: sweep.prompts.seed", "should be a list of values"),
        ("prompts.seed: []", (), "+1: sweep.prompts.seed", "lists no value"),
        ("prompts.seed: [0, 1, 0]", (), "+1: sweep.prompts.seed.2", "lists 0 twice"),
        ("name: [a, b]", (), "+1: sweep.name", "cannot differ between the runs"),
        ("prompts..seed: [0]", (), "+1: sweep.prompts..seed", "is no key of a recipe"),
        ("name.x: [a]", (), "+1: sweep.name.x", "cannot differ between the runs"),
        ("find: [pca, {strategy: pca}]", (), "+0: sweep", "the runs pca and pca-2 are the same"),
        ("find: [pca]", ("find=lda",), "--set find=lda", "the recipe sweeps over find"),
        ("find: [pca]", ("find.pairing=pooled",), "--set find.pairing=pooled", "the recipe sweeps over find"),
        ("find: [pca]", ("sweep.find=pca",), "--set sweep.find=pca", "should be a list of values"),
        ("find: [pca]", ("sweep=3",), "--set sweep=3", "should be keys with lists"),
        ("find: [pca]", ("prompts.train=x",), "--set prompts.train=x", "should be a whole number"),
        ("model.id.x: [1]", (), "+1: sweep.model.id.x.0", "model.id is not a section"),
    ],
)
def test_a_mistake_names_the_run_the_line_and_the_key(
    names: Load, recipe_file: Path, swept: str, settings: Sequence[str], where: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        names(f"{SMALL}sweep:\n  {swept}\n", *settings)
    # Lines count from the one on which `sweep:` stands.
    line, colon, key = where.removeprefix("+").partition(":")
    expected = where if where.startswith("--") else f"{recipe_file}:{SMALL.count(chr(10)) + 1 + int(line)}{colon}{key}"
    assert caught.value.where == expected
    assert message in caught.value.message
    assert caught.value.hint


def test_one_run_can_be_taken_out_of_a_sweep_where_one_is_needed(recipe_file: Path, registry: Registry) -> None:
    recipe_file.write_text(SWEEP, encoding="utf-8")
    with pytest.raises(InputError, match="is a sweep over 2 runs") as caught:
        load_recipe(recipe_file, registry)
    assert "--set 'sweep.find=[\"difference_in_means\"]'" in str(caught.value.hint)
    assert load_recipe(recipe_file, registry, ['sweep.find=["pca"]']).name == "small/pca"


# What is shared


@pytest.fixture
def plan_sweep(recipe_file: Path, registry: Registry) -> Callable[..., Batch]:
    """Give a function that plans the small sweep under settings, in the folder `sweep`."""
    recipe_file.write_text(SWEEP, encoding="utf-8")

    def plan(*settings: str) -> Batch:
        return plan_batch(
            recipe_file,
            load_members(recipe_file, registry, (*LOOSE, *settings)),
            recipe_file.with_name("sweep"),
            registry,
        )

    return plan


def run_sweep(batch: Batch, until: str = "evaluate") -> dict[str, list[str]]:
    """Execute the runs of a sweep one after another and return what became of each stage of each."""
    check_folders([batch])
    sharing = Sharing(batch.folder, Models())
    found = {}
    with sweep_folders([batch]):
        for run in batch.runs:
            noted = Noted()
            execute(run.plan, run.out, noted, until, sharing)
            found[str(run.member.run)] = list(noted.stages.values())
    return found


def passes(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["forward_passes"]
    return found


def test_what_comes_out_the_same_is_computed_once_and_linked(plan_sweep: Callable[..., Batch]) -> None:
    batch = plan_sweep()
    assert run_sweep(batch) == {
        "difference_in_means": ["done"] * 5,
        "pca": ["shared", "shared", "done", "done", "done"],
    }
    first, second = (run.out for run in batch.runs)
    for stage in ("prompts", "capture", "baseline"):
        for file in (first / stage).iterdir():
            assert os.path.samefile(file, second / stage / file.name)
    assert passes(second)["prompts"] == passes(second)["capture"] == 0
    # The unmodified model's completions are the one thing that the second evaluation need not do again.
    written = Store(first).load(Unmodified)
    assert written is not None
    assert all(len(completions) == 8 for completions in written.completions.values())
    assert passes(second)["evaluate"] < passes(first)["evaluate"]
    shared = json.loads((second / "environment.json").read_text(encoding="utf-8"))["shared"]
    assert shared == {"prompts": "difference_in_means", "capture": "difference_in_means"}


def test_one_capture_serves_strategies_of_both_kinds_and_gives_the_same_directions(
    plan_sweep: Callable[..., Batch], finished_run: Path
) -> None:
    batch = plan_sweep()
    assert [run.plan.recipe.find.needs for run in batch.runs] == ["means", "samples"]
    assert [run.plan.needs for run in batch.runs] == ["samples", "samples"]
    run_sweep(batch, "find")
    captured, alone = (Store(folder).load(Activations) for folder in (batch.runs[0].out, finished_run))
    assert captured is not None
    assert alone is not None
    assert captured.harmful_samples is not None
    assert alone.harmful_samples is None
    assert torch.equal(captured.harmful_mean, alone.harmful_mean)
    assert torch.equal(captured.harmless_mean, alone.harmless_mean)


def test_a_run_of_a_sweep_alone_finds_its_stages_finished(plan_sweep: Callable[..., Batch], registry: Registry) -> None:
    batch = plan_sweep()
    run_sweep(batch)
    for run in batch.runs:
        written = run.out / "recipe.yaml"
        alone = plan_batch(written, load_members(written, registry), run.out, registry).runs[0]
        assert alone.plan.recipe.find.needs == ("means" if run is batch.runs[0] else "samples")
        noted = Noted()
        execute(alone.plan, run.out, noted, "evaluate")
        assert list(noted.stages.values()) == ["kept"] * 5


def test_a_strategy_that_is_added_captures_again_only_where_it_needs_more(plan_sweep: Callable[..., Batch]) -> None:
    assert run_sweep(plan_sweep("sweep.find=[difference_in_means]"), "find") == {"difference_in_means": ["done"] * 3}
    # Its activations hold no samples, which `pca` needs; it goes on with the means that it has.
    assert run_sweep(plan_sweep(), "find") == {
        "difference_in_means": ["kept"] * 3,
        "pca": ["shared", "done", "done"],
    }
    assert run_sweep(plan_sweep("sweep.find=[lda, random]"), "find") == {
        "lda": ["shared", "shared", "done"],
        "random": ["shared", "shared", "done"],
    }


@pytest.mark.parametrize("damage", ["half a document", "no tensors"])
def test_what_is_damaged_in_one_run_is_not_taken_over_by_another(plan_sweep: Callable[..., Batch], damage: str) -> None:
    batch = plan_sweep("sweep.find=[difference_in_means, random]")
    run_sweep(plan_sweep("sweep.find=[difference_in_means]"), "capture")
    stage = batch.runs[0].out / "capture"
    if damage == "no tensors":
        (stage / "tensors.safetensors").unlink()
    else:
        (stage / "artifact.json").write_text('{"key')
    found = Noted()
    execute(batch.runs[1].plan, batch.runs[1].out, found, "capture", Sharing(batch.folder))
    assert found.stages == {"prompts": "shared", "capture": "done"}


def test_who_comes_second_waits_for_the_first(tmp_path: Path) -> None:
    sharing, said, order = Sharing(tmp_path), threading.Event(), []

    def second() -> None:
        with sharing.turn("key", said.set):
            order.append("second")

    with sharing.turn("key", lambda: None), sharing.turn("another key", lambda: None):
        waiting = threading.Thread(target=second)
        waiting.start()
        assert said.wait(20)
        order.append("first")
    waiting.join(20)
    assert order == ["first", "second"]


def test_runs_that_need_the_same_model_load_it_once(plan_sweep: Callable[..., Batch]) -> None:
    models = Models()
    first, second = (run.plan.checkpoint for run in plan_sweep().runs)
    other = plan_sweep("model.dtype=bfloat16").runs[0].plan.checkpoint
    engine = models.engine(first)
    assert models.engine(second) is engine
    assert models.engine(other) is not engine


# Folders


def test_a_folder_of_something_else_is_refused_before_anything_runs(
    plan_sweep: Callable[..., Batch], recipe_file: Path, registry: Registry
) -> None:
    batch = plan_sweep()
    batch.folder.mkdir()
    (batch.folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no sweep"):
        check_folders([batch])
    nested = plan_batch(recipe_file, load_members(recipe_file, registry, ["sweep={}"]), batch.folder / "pca", registry)
    with pytest.raises(InputError, match="its results would go to") as caught:
        check_folders([nested, batch])
    assert str(caught.value.where) == str(recipe_file)


# What it costs


def test_comparing_six_methods_takes_less_than_twice_the_passes_of_one(tmp_path: Path, registry: Registry) -> None:
    batch = plan_batch(COMPARE, load_members(COMPARE, registry), tmp_path / "compare", registry)
    assert len(batch.runs) >= 6
    run_sweep(batch)
    counted = [sum(passes(run.out).values()) for run in batch.runs]
    # The first run of a sweep does everything that a run alone does.
    alone, together = counted[0], sum(counted)
    assert together < 2 * alone
