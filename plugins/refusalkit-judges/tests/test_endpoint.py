"""An endpoint is asked patiently and within limits, and what it cannot say is missing and never a number."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from conftest import Answer, Chat
from pydantic import ValidationError
from refusalkit_judges import Rubric
from refusalkit_judges.rubric import OUTCOMES

from refusalkit.errors import InputError, RunError
from refusalkit.metric import Evidence

N = 8
KEY = "sk-not-to-be-found-anywhere"
HARMFUL = Evidence("harmful", tuple(f"request {i}" for i in range(N)), (), tuple(f"reply {i}" for i in range(N)))


def judge(chat: Chat, **options: object) -> Rubric:
    return Rubric.model_validate({"base_url": chat.base_url, "model": "m", "count": ["refusal"], **options})


def verdicts(rubric: Rubric) -> list[float | None]:
    return [None if math.isnan(value) else value for value in rubric.measure(HARMFUL).values]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def number_of(asked: str) -> int:
    return next(i for i in range(N) if f"\nrequest {i}\n" in asked)


def test_every_outcome_is_a_rate_of_its_own_and_they_sum_to_one(chat: Chat) -> None:
    chat.answer = lambda _, asked: Answer(OUTCOMES[number_of(asked) % 4])
    parts = Rubric(base_url=chat.base_url, model="m").parts
    assert [part.label for part in parts] == [f"rubric_{outcome}" for outcome in OUTCOMES]
    assert [part.verdict for part in parts] == ["refused", None, None, None]
    shares = [part.measure(HARMFUL).values for part in parts]
    assert [sum(values) for values in zip(*shares, strict=True)] == [1.0] * N
    assert len(chat.asked) == N


@pytest.mark.parametrize(
    ("reply", "value"),
    [("Refusal.", 1.0), ("**refusal**", 1.0), ("<think>an answer?</think>\n\nrefusal", 1.0), ("answer", 0.0)],
)
def test_a_verdict_is_one_word_however_it_is_decorated(chat: Chat, reply: str, value: float) -> None:
    chat.answer = lambda *_: Answer(reply)
    assert verdicts(judge(chat)) == [value] * N


@pytest.mark.parametrize("reply", ["This is not a refusal", "", "refusal or answer", "1"])
def test_a_reply_that_is_no_verdict_is_missing_and_is_not_asked_for_again(chat: Chat, reply: str) -> None:
    chat.answer = lambda *_: Answer(reply)
    assert verdicts(judge(chat)) == verdicts(judge(chat)) == [None] * N
    assert len(chat.asked) == N


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_failure_is_asked_again(chat: Chat, status: int) -> None:
    chat.answer = lambda number, _: Answer("refusal", status=status if number % 2 else 200)
    assert verdicts(judge(chat, concurrency=1)) == [1.0] * N
    assert len(chat.asked) == 2 * N


def test_what_fails_too_often_is_missing_and_is_asked_again_by_the_next_run(chat: Chat, cache: Path) -> None:
    chat.answer = lambda _, asked: Answer("refusal", status=500 if number_of(asked) == 3 else 200)
    assert verdicts(judge(chat, retries=2)) == [1.0, 1.0, 1.0, None, 1.0, 1.0, 1.0, 1.0]
    assert len(chat.asked) == N - 1 + 3
    assert len(files(cache)) == N - 1


@pytest.mark.parametrize("body", ["{", "[]", '{"choices": []}', '{"choices": [{"message": {"content": null}}]}'])
def test_a_response_that_is_no_reply_is_missing(chat: Chat, body: str) -> None:
    chat.answer = lambda _, asked: Answer("refusal", body=body if number_of(asked) < 4 else None)
    assert verdicts(judge(chat)) == [None] * 4 + [1.0] * 4


def test_a_slow_endpoint_is_given_up_and_asked_again(chat: Chat) -> None:
    chat.answer = lambda number, _: Answer("refusal", seconds=0.5 if number == 1 else 0)
    assert verdicts(judge(chat, timeout_s=0.2, concurrency=1, retries=1)) == [1.0] * N


def test_no_more_requests_are_under_way_than_allowed(chat: Chat) -> None:
    chat.answer = lambda *_: Answer("refusal", seconds=0.03)
    verdicts(judge(chat, concurrency=2))
    assert chat.at_once == 2


def test_an_endpoint_that_answers_nothing_is_an_error(chat: Chat) -> None:
    chat.answer = lambda *_: Answer(status=503)
    with pytest.raises(RunError, match=r"127\.0\.0\.1:\d+ gave no reply to any of 8 requests"):
        verdicts(judge(chat, retries=1))


@pytest.mark.parametrize(("status", "said"), [(401, "the key is not accepted"), (404, "no such model")])
def test_a_hopeless_answer_ends_the_run_and_repeats_no_key(
    chat: Chat, status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    chat.answer = lambda *_: Answer(status=status, body=json.dumps({"error": f"bad key {KEY}"}))
    with pytest.raises(RunError, match=said) as caught:
        verdicts(judge(chat, key_variable="JUDGE_KEY"))
    assert KEY not in str(caught.value)


def test_the_key_is_read_from_the_variable_sent_and_kept_nowhere(
    chat: Chat, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    rubric = judge(chat, key_variable="JUDGE_KEY")
    verdicts(rubric)
    assert set(chat.keys) == {f"Bearer {KEY}"}
    assert KEY not in rubric.model_dump_json() + repr(rubric)
    assert not [path for path in files(cache) if KEY in path.read_text(encoding="utf-8")]


def test_without_a_key_none_is_sent(chat: Chat) -> None:
    verdicts(judge(chat))
    assert set(chat.keys) == {None}


def test_a_key_that_is_not_set_is_found_before_anything_runs(chat: Chat) -> None:
    assert "NO_SUCH_KEY" not in os.environ
    with pytest.raises(InputError, match="is not set"):
        judge(chat, key_variable="NO_SUCH_KEY").check()
    assert not chat.asked


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "https://me:secret@api.example/v1"},
        {"base_url": "https://api.example/v1?key=secret"},
        {"base_url": "file:///etc/passwd"},
        {"rubric": "Is {prompt} refused?"},
        {"count": []},
        {"count": ["refusal", "refusal"]},
        {"concurrency": 0},
    ],
)
def test_a_mistake_in_the_recipe_is_refused(chat: Chat, options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        judge(chat, **options)


def test_a_rerun_asks_nothing_and_another_judge_is_asked(chat: Chat, cache: Path) -> None:
    first = verdicts(judge(chat))
    assert (verdicts(judge(chat, timeout_s=5, concurrency=1, retries=0)), len(chat.asked)) == (first, N)
    for number, options in enumerate(({"model": "other"}, {"rubric": "{prompt} {completion}"}), start=2):
        verdicts(judge(chat, **options))
        assert len(chat.asked) == number * N
    # A reply and nothing else: whoever finds the cache reads no request and no completion.
    assert {path.read_text(encoding="utf-8") for path in files(cache)} == {'{\n "reply": "refusal"\n}\n'}


def test_a_kept_reply_that_is_damaged_is_asked_for_again(chat: Chat, cache: Path) -> None:
    verdicts(judge(chat))
    for path in files(cache)[:3]:
        path.write_text("{", encoding="utf-8")
    assert (verdicts(judge(chat)), len(chat.asked)) == ([1.0] * N, N + 3)


def test_two_prompts_that_are_alike_are_asked_about_once(chat: Chat) -> None:
    twice = Evidence("harmful", ("a", "a"), (), ("b", "b"))
    assert (judge(chat).measure(twice).values, len(chat.asked)) == ((1.0, 1.0), 1)


def test_braces_in_a_completion_are_not_filled_in(chat: Chat) -> None:
    odd = Evidence("harmful", ("write {completion}",), (), ("{prompt} {x}",))
    judge(chat, rubric="A {prompt} B {completion}").measure(odd)
    assert chat.asked == ["A write {completion} B {prompt} {x}"]


@pytest.mark.parametrize("status", [200, 404, 500])
def test_an_endpoint_is_greeted_before_the_evaluation_and_sent_nothing(chat: Chat, status: int) -> None:
    chat.models = status
    judge(chat).ready()
    assert (chat.greeted, chat.asked) == (["/v1/models"], [])


def test_an_endpoint_that_is_not_there_or_rejects_the_key_is_found_before_the_evaluation(chat: Chat) -> None:
    chat.models = 401
    with pytest.raises(RunError, match="the key is not accepted"):
        judge(chat).ready()
    with pytest.raises(RunError, match=r"127\.0\.0\.1:9 cannot be reached: ConnectError"):
        judge(chat, base_url="http://127.0.0.1:9/v1").ready()
