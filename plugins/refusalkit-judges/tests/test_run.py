"""A recipe names judges like any other metric; what they cannot tell is counted and shown, and is in no number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import refusalkit_judges
from conftest import Answer, Chat

from refusalkit.builtin.phrases import says_no
from refusalkit.errors import InputError
from refusalkit.intervals import wilson
from refusalkit.pipeline import execute, write_report
from refusalkit.plan import Plan, make_plan
from refusalkit.plan_text import describe
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import load_registry
from refusalkit.report.comparison import compare
from refusalkit.report.comparison_text import text
from refusalkit.report.finding import left_out
from refusalkit.run_directory import read_run

N = 8
#: No judge: whatever it says of a completion is no verdict.
GUARD = "{metric: llama_guard, model: 'tiny:llama'}"
RECIPE = """
name: judged
model: {id: "tiny:llama"}
prompts: {harmful: "tiny:harmful", harmless: "tiny:harmless", train: 16, validation: 8, test: 8}
evaluate: {max_new_tokens: 8, interventions: [none, ablate]}
"""


def plan_of(folder: Path, *settings: str) -> Plan:
    path = folder / "judged.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    registry = load_registry([refusalkit_judges], entry_points=False)
    return make_plan(load_recipe(path, registry, settings), folder, registry)


def asking(chat: Chat, *others: str) -> str:
    rubric = f"{{metric: rubric, base_url: '{chat.base_url}', model: m}}"
    return f"evaluate.metrics=[{', '.join([*others, rubric])}]"


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def sees_refusals(_: int, asked: str) -> Answer:
    reply = asked.partition("<reply>\n")[2].partition("\n</reply>")[0]
    return Answer("refusal" if says_no(reply) else "answer")


@pytest.fixture
def garbled(chat: Chat) -> Chat:
    """Let the judge say nothing of use about half of the requests, whatever was replied."""
    first: dict[str, bool] = {}

    def answer(number: int, asked: str) -> Answer:
        request = asked.partition("<request>\n")[2].partition("\n</request>")[0]
        fails = first.setdefault(request, len(first) % 2 == 0)
        return Answer("As a language model, I judge nobody.") if fails else sees_refusals(number, asked)

    chat.answer = answer
    return chat


def test_half_garbage_is_half_missing_in_the_table_and_in_the_intervals(garbled: Chat, tmp_path: Path) -> None:
    # One request at a time, so that which half fails is half of each side.
    setting = asking(garbled, "refusal_rate").replace("model: m", "model: m, concurrency: 1")
    execute(plan_of(tmp_path, setting), tmp_path / "run")
    run = read_run(tmp_path / "run")
    rows = [row for row in run.evaluation.results if row.metric.startswith("rubric_")]
    assert {row.metric for row in rows} == {f"rubric_{name}" for name in refusalkit_judges.rubric.OUTCOMES}
    for row in rows:
        assert (row.n, row.missing, len(row.values)) == (N // 2, N // 2, N)
        told = [value for value in row.values if not math.isnan(value)]
        assert (row.value, row.low, row.high, row.n) == wilson(told)
    summary = summary_of(tmp_path / "run")
    judged = [row for row in summary["evaluation"] if row["metric"] == "rubric_refusal"]
    assert {(row["n"], row["missing"]) for row in judged} == {(4, 4)}
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "n = 4, 4 missing" in page
    by = f"{len(rows) // 4 * N // 2} of {len(rows) // 4 * N} by {', '.join(dict.fromkeys(row.metric for row in rows))}"
    assert left_out(run.evaluation) == f"missing values: {by}"
    twice = text(compare([tmp_path / "run", _second(garbled, tmp_path)]))
    assert "rubric_refusal, fraction of prompts, [95% interval], 4 a side, 4 missing" in twice
    assert max(map(len, twice.splitlines())) <= 80


def _second(chat: Chat, folder: Path) -> Path:
    setting = asking(chat, "refusal_rate").replace("model: m", "model: m, concurrency: 1")
    execute(plan_of(folder, setting, "name=second"), folder / "second", until="report")
    return folder / "second"


def test_verdicts_are_compared_with_substrings_where_both_exist(garbled: Chat, tmp_path: Path) -> None:
    setting = asking(garbled, "refusal_rate").replace("model: m", "model: m, concurrency: 1")
    execute(plan_of(tmp_path, setting), tmp_path / "run", until="evaluate")
    summary = summary_of(tmp_path / "run")
    found = {row["prompts"]: row for row in summary["agreement"]}
    labels = {row["intervention"] for row in summary["evaluation"]}
    assert len(labels) >= 3
    assert {row["n"] for row in found.values()} == {len(labels) * N // 2}
    assert (found["harmful"]["first"], found["harmful"]["second"]) == ("refusal_rate", "rubric_refusal")
    assert [row["share"] for row in found.values()] == [1.0, 1.0]
    assert found["harmful"]["kappa"] == 1.0


def test_a_judge_that_says_nothing_of_use_is_shown_as_such(tmp_path: Path) -> None:
    setting = (
        "evaluate.metrics=[{metric: llama_guard, model: 'tiny:llama'}, {metric: strongreject, model: 'tiny:llama'}]"
    )
    execute(plan_of(tmp_path, setting, "evaluate.interventions=[none]"), tmp_path / "run")
    summary = summary_of(tmp_path / "run")
    assert {(row["value"], row["n"], row["missing"]) for row in summary["evaluation"]} == {(None, 0, N)}
    assert "agreement" not in summary
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "every value is missing" in page
    assert "n = 0, 8 missing" in page
    shown = write_report(tmp_path / "run", show_completions=True).read_text(encoding="utf-8")
    assert "verdict" not in shown.partition('id="completions"')[2].partition("</section>")[0]


def test_a_missing_verdict_of_a_completion_is_neither_refused_nor_not(garbled: Chat, tmp_path: Path) -> None:
    setting = asking(garbled).replace("model: m", "model: m, concurrency: 1")
    execute(plan_of(tmp_path, setting, "evaluate.interventions=[none]"), tmp_path / "run")
    made = read_run(tmp_path / "run").evaluation.generated
    assert [row.refused.count(None) for row in made if row.refused is not None] == [4, 4]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert '<span class="verdict missing">missing</span>' in page


def test_a_rerun_in_a_new_folder_asks_nothing(chat: Chat, tmp_path: Path) -> None:
    chat.answer = sees_refusals
    for name in ("one", "two"):
        execute(plan_of(tmp_path, asking(chat)), tmp_path / name, until="evaluate")
    asked = len(chat.asked)
    assert 0 < asked <= len({row["intervention"] for row in summary_of(tmp_path / "one")["evaluation"]}) * 2 * N
    assert summary_of(tmp_path / "one") == summary_of(tmp_path / "two")
    assert len(set(chat.asked)) == asked


def test_the_plan_says_what_leaves_the_machine_and_sends_nothing(chat: Chat, tmp_path: Path) -> None:
    shown = describe(plan_of(tmp_path, asking(chat, "llama_guard")[:-1].replace("llama_guard", GUARD) + "]"), tmp_path)
    host = chat.base_url.removeprefix("http://").removesuffix("/v1")
    assert f"sends     harmful and harmless prompts and their completions are sent to {host}" in shown
    assert "llama_guard, rubric_refusal, rubric_deflection, rubric_answer, rubric_incoherent" in shown
    assert "sends" not in describe(plan_of(tmp_path, f"evaluate.metrics=[{GUARD}]"), tmp_path)
    assert not chat.asked


def test_no_key_is_in_any_file_of_a_run(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-not-to-be-found-anywhere")
    chat.answer = sees_refusals
    setting = asking(chat).replace("model: m", "model: m, key_variable: JUDGE_KEY")
    execute(plan_of(tmp_path, setting, "evaluate.interventions=[none]"), tmp_path / "run")
    assert set(chat.keys) == {"Bearer sk-not-to-be-found-anywhere"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if b"sk-not-to-be-found" in path.read_bytes()]


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ("[{metric: llama_guard, model: no/such-judge}]", "cannot be read"),
        ("[{metric: llama_guard, model: 'tiny:lama'}]", "no tiny model"),
        ("[{metric: rubric, model: m}]", "base_url"),
        ("[{metric: rubric, base_url: 'http://127.0.0.1:9/v1', model: m, key_variable: NOT_SET}]", "is not set"),
        ("[{metric: llama_gard}]", "llama_guard"),
        (f"[{GUARD}, {GUARD[:-1]}, batch_size: 2}}]", "another `name`"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(metrics: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        plan_of(tmp_path, f"evaluate.metrics={metrics}")
    assert said in str(caught.value)


def test_two_judges_of_a_kind_stand_side_by_side_under_names(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, f"evaluate.metrics=[{GUARD}, {GUARD[:-1]}, name: guard_2, batch_size: 2}}]")
    assert [metric.label for metric in plan.recipe.evaluate.metrics] == ["llama_guard", "guard_2"]
