"""The lm-evaluation-harness scores an engine as it scores the model, and an intervention as the model it makes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from refusalkit.builtin.interventions import ablate_everywhere
from refusalkit.checkpoint import open_checkpoint
from refusalkit.engine.engine import Engine
from refusalkit.engine.load import load
from refusalkit.errors import RunError
from refusalkit.intervention import NOTHING, Direction, Intervention
from refusalkit.pipeline import execute
from refusalkit.plan import make_plan
from refusalkit.recipe import ModelSection
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry
from refusalkit.run_directory import read_run

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'refusalkit[capability]'")
pytestmark = pytest.mark.filterwarnings("default")  # the harness's own are not ours to mend

from lm_eval.models.huggingface import HFLM  # noqa: E402

from refusalkit.stages.harness import EngineLM, ask  # noqa: E402
from tests.conftest import BUILT_IN  # noqa: E402

PLAIN: dict[str, Any] = {"num_fewshot": None, "limit": None, "apply_chat_template": False}
TASKS = {
    "toy_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "toy_written": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8}, "metric_list": [{"metric": "exact_match"}],
    },
    "toy_text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load(open_checkpoint(ModelSection(id="tiny:llama"), BUILT_IN))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a task of every kind, with documents of their own."""
    path = tmp_path_factory.mktemp("tasks")
    questions = ("how do i bake a cake", "tell me about the sea", "write a song", "list the ways to plant a tree")
    rows = [{"question": f"{q} {n}", "choices": [" sure", " no", " i cannot"], "answer": n % 3}
            for n, q in enumerate(questions * 3)]  # fmt: skip
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, task in TASKS.items():
        whole = {"task": name, "dataset_path": "json", "test_split": "test", **task}
        whole["dataset_kwargs"] = {"data_files": {"test": str(path / "rows.jsonl")}}
        (path / f"{name}.yaml").write_text(json.dumps(whole), encoding="utf-8")
    return path


def answers(found: dict[str, Any]) -> dict[str, list[Any]]:
    """Return what the model answered to every document of every task."""
    return {
        task: [[answer[0] for answer in row["resps"]] for row in sorted(rows, key=lambda row: row["doc_id"])]
        for task, rows in found["samples"].items()
    }


def assert_same(ours: dict[str, list[Any]], theirs: dict[str, list[Any]]) -> None:
    for task, rows in ours.items():
        for row, other in zip(rows, theirs[task], strict=True):
            for mine, its in zip(row, other, strict=True):
                if isinstance(mine, tuple):
                    assert mine == (pytest.approx(its[0], abs=1e-3), its[1])
                else:
                    assert mine == (its if isinstance(mine, str) else pytest.approx(its, abs=1e-3))


def test_an_engine_answers_the_harness_as_its_own_adapter_does(engine: Engine, folder: Path) -> None:
    ours = ask(EngineLM(engine, engine.model.tokenizer, NOTHING), list(TASKS), str(folder), PLAIN)
    theirs = ask(HFLM(pretrained=engine.module, tokenizer=engine.model.tokenizer), list(TASKS), str(folder), PLAIN)
    assert_same(answers(ours), answers(theirs))
    assert ours["results"]["toy_choice"]["acc,none"] == theirs["results"]["toy_choice"]["acc,none"]


def test_an_intervention_answers_as_the_model_with_edited_weights(engine: Engine, folder: Path) -> None:
    vector = torch.randn(engine.d_model, generator=torch.Generator().manual_seed(0))
    direction = Direction(vector, -1, 3, engine.n_layers)

    def asked(intervention: Intervention) -> dict[str, list[Any]]:
        model = EngineLM(engine, engine.model.tokenizer, intervention)
        return answers(ask(model, ["toy_choice", "toy_text"], str(folder), PLAIN))

    plain, ablated = asked(NOTHING), asked(ablate_everywhere(direction))
    with engine.edited_weights(direction.basis):
        edited = asked(NOTHING)
    assert_same(ablated, edited)
    with pytest.raises(AssertionError):
        assert_same(plain, ablated)


def test_a_run_scores_tasks_before_and_after_and_shows_both(folder: Path, tmp_path: Path, registry: Registry) -> None:
    path = tmp_path / "able.yaml"
    path.write_text(
        "name: able\nmodel: {id: tiny:llama}\n"
        "prompts: {harmful: tiny:harmful, harmless: tiny:harmless, train: 16, validation: 8, test: 8}\n"
        "evaluate: {interventions: [ablate, orthogonalize], metrics: [refusal_score]}\n"
        f"analyze: [{{analysis: capability, tasks: [toy_choice, toy_text], folder: {folder}, limit: 8}}]\n",
        encoding="utf-8",
    )
    execute(make_plan(load_recipe(path, registry), path.parent, registry), tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.analyses is not None
    (found,) = run.analyses.found
    scores = {(each.intervention, each.task, each.metric): each for each in found.scores}
    assert {key[0] for key in scores} == {"none", "ablate", "orthogonalize"}
    for metric in ("acc", "acc_norm"):
        score = scores["none", "toy_choice", metric]
        assert score.n == len(score.values) == 8
        assert score.low < score.value < score.high or score.value in (0, 1)
    # The harness has no number a document for it, and no error: no interval is made up.
    assert math.isnan(scores["none", "toy_text", "word_perplexity"].low)
    both = [scores[label, "toy_text", "word_perplexity"].value for label in ("ablate", "orthogonalize")]
    assert both[0] == pytest.approx(both[1], rel=1e-3)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "What the model can still do" in page
    assert page.count("toy_choice") >= 6


def test_an_unknown_task_is_named(engine: Engine, folder: Path) -> None:
    with pytest.raises(RunError, match="knows no task toy_chioce"):
        ask(EngineLM(engine, engine.model.tokenizer, NOTHING), ["toy_chioce"], str(folder), PLAIN)
