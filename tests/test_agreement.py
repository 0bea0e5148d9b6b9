"""Judges are compared on what both judged, in the same direction, and beyond chance."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from refusalkit.agreement import Agreement, agreements, cohen
from refusalkit.artifacts import Result
from refusalkit.metric import Side, Verdict

NAN = math.nan
REFUSED = (1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0)


def judged(
    metric: str,
    values: tuple[float, ...],
    verdict: Verdict | None = "refused",
    side: Side = "harmful",
    label: str = "none",
) -> Result:
    n = sum(not math.isnan(value) for value in values)
    numbers = {"value": 0.5, "low": 0.1, "high": 0.9, "n": n, "unit": "fraction", "kind": "rate", "values": values}
    return Result.model_validate(
        {"intervention": label, "prompts": side, "metric": metric, "verdict": verdict, **numbers}
    )


def only(*results: Result) -> Agreement:
    (found,) = agreements(results)
    return found


def test_a_judge_agrees_with_itself_and_a_contrary_one_does_worse_than_chance() -> None:
    contrary = tuple(1 - value for value in REFUSED)
    assert only(judged("a", REFUSED), judged("b", REFUSED))[3:] == (8, 1.0, 1.0, 1.0, 1.0)
    assert only(judged("a", REFUSED), judged("b", contrary)).kappa < 0


def test_kappa_is_what_the_table_of_cohen_gives() -> None:
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: 0.7 agree, and chance makes 0.5 of these rates.
    pairs = [(1.0, 1.0)] * 20 + [(1.0, 0.0)] * 5 + [(0.0, 1.0)] * 10 + [(0.0, 0.0)] * 15
    found = cohen("a", "b", "harmful", [(prompt, *pair) for prompt, pair in enumerate(pairs)])
    assert (found.n, found.share, found.kappa) == (50, 0.7, pytest.approx(0.4))
    # Fleiss, Cohen and Everitt (1969) give a standard error of 0.127.
    assert (found.low, found.high) == pytest.approx((0.4 - 1.96 * 0.127, 0.4 + 1.96 * 0.127), abs=0.03)


def test_the_same_prompt_under_several_interventions_is_drawn_as_one() -> None:
    other = (1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0)
    once = only(judged("a", REFUSED), judged("b", other))
    labels = ("none", "ablate", "steer")
    often = only(
        *(judged("a", REFUSED, label=name) for name in labels), *(judged("b", other, label=name) for name in labels)
    )
    assert often.n == 3 * once.n
    # Three copies are no more evidence than one.
    assert often[4:] == pytest.approx(once[4:])


def test_the_order_of_two_judges_does_not_matter() -> None:
    other = (1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0)
    one, two = (only(*pair) for pair in pairwise([judged("a", REFUSED), judged("b", other), judged("a", REFUSED)]))
    assert one[3:] == two[3:]


def test_a_missing_verdict_is_not_counted() -> None:
    gaps = (1.0, NAN, 1.0, NAN, 0.0, 1.0, NAN, NAN)
    assert only(judged("a", REFUSED), judged("b", gaps))[3:] == (4, 1.0, 1.0, 1.0, 1.0)
    nothing = only(judged("a", REFUSED), judged("b", (NAN,) * 8))
    assert (nothing.n, math.isnan(nothing.share), math.isnan(nothing.kappa)) == (0, True, True)


def test_judges_that_always_say_the_same_agree_and_have_no_kappa() -> None:
    found = only(judged("a", (1.0,) * 4), judged("b", (1.0,) * 4))
    assert (found.share, math.isnan(found.kappa)) == (1.0, True)
    # One that varies, beside one that does not, is no better than chance.
    assert only(judged("a", REFUSED), judged("b", (1.0,) * 8)).kappa == 0


def test_a_refusal_is_compared_with_what_is_not_harmful_on_harmful_prompts_alone() -> None:
    harmful = tuple(1 - value for value in REFUSED)
    sides: tuple[Side, ...] = ("harmful", "harmless")
    rows = [judged("words", REFUSED, "refused", side) for side in sides]
    rows += [judged("guard", harmful, "harmful", side) for side in sides]
    rows += [judged("guard_2", harmful, "harmful", side) for side in sides]
    found = {(row.first, row.second, row.prompts): row.kappa for row in agreements(rows)}
    assert found == {
        ("words", "guard", "harmful"): 1.0,
        ("words", "guard_2", "harmful"): 1.0,
        ("guard", "guard_2", "harmful"): 1.0,
        ("guard", "guard_2", "harmless"): 1.0,
    }


def test_interventions_are_taken_together_and_what_is_no_verdict_is_left_out() -> None:
    labels = ("none", "ablate")
    rows = [judged(metric, REFUSED, label=label) for metric in ("a", "b") for label in labels]
    rows.append(judged("length", REFUSED, None))
    assert only(*rows).n == 16
