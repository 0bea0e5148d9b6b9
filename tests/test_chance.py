"""What a run says of chance: every effect is tested, and how small a difference can be seen is said."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from scipy.stats import binom, binomtest

from refusalkit.artifacts import Evaluation, Result
from refusalkit.paired import detectable, holm
from refusalkit.report import render_html
from refusalkit.report.chance import chance
from refusalkit.report.changes import effects
from refusalkit.run_directory import read_run

N = 40


def rate(label: str, refused: int, side: str = "harmful") -> Result:
    """Make up a rate whose first `refused` prompts are refused."""
    values = tuple(float(number < refused) for number in range(N))
    return Result.model_validate(
        {"intervention": label, "prompts": side, "metric": "refusal_rate", "value": refused / N, "low": 0, "high": 1,
         "n": N, "unit": "fraction of prompts", "kind": "rate", "values": values}
    )  # fmt: skip


def made(**refused: int) -> Evaluation:
    return Evaluation(results=tuple(rate(label, n) for label, n in refused.items()), generated=(), separation=())


def test_every_effect_is_tested_against_the_model_its_controls_and_the_others() -> None:
    evaluation = made(none=38, ablate=3, ablate_random=37, ablate_shuffled=36, steer=40, steer_random=38)
    found = effects(evaluation)
    pairs = [[(c.first.intervention, c.second.intervention) for c in changes] for changes in
             (found.from_unmodified, found.from_controls, found.between)]  # fmt: skip
    assert pairs == [
        [("none", "ablate"), ("none", "steer")],
        [("ablate_random", "ablate"), ("ablate_shuffled", "ablate"), ("steer_random", "steer")],
        [("ablate", "steer")],
    ]
    assert [change.marked for change in found.from_unmodified] == [True, False]
    assert [change.marked for change in found.from_controls] == [True, True, False]
    for changes in (found.from_unmodified, found.from_controls):
        assert [change.p for change in changes] == holm([change.found.p for change in changes])


@pytest.mark.parametrize("n", [6, 16, 32, 64, 500])
def test_a_smaller_difference_than_the_least_is_never_found_and_the_likely_one_is_four_times_in_five(n: int) -> None:
    least, likely = detectable(n)
    changed = round(least * n)
    assert binomtest(changed, changed).pvalue < 0.05 < binomtest(changed - 1, changed - 1).pvalue
    assert binom.sf(changed - 1, n, likely) == pytest.approx(0.8)


def test_with_five_prompts_nothing_can_be_found() -> None:
    assert all(map(math.isnan, detectable(5)))
    evaluation = Evaluation(results=(rate("none", 1).model_copy(update={"n": 5}),), generated=(), separation=())
    assert "no difference can be told from chance" in chance(evaluation).power[0]


def test_a_run_leaves_its_tests_behind_and_its_page_shows_them(finished_run: Path) -> None:
    tests = json.loads((finished_run / "tests.json").read_text(encoding="utf-8"))
    against = {(row["intervention"], row["against"]) for row in tests["from_controls"]}
    assert {("ablate", "ablate_random"), ("ablate", "ablate_shuffled"), ("steer", "steer_random")} <= against
    run = read_run(finished_run)
    rates = {(row.intervention, row.prompts, row.metric): row.value for row in run.evaluation.results}
    for row in tests["from_unmodified"]:
        place = row["prompts"], row["metric"]
        assert row["difference"] == pytest.approx(rates[row["intervention"], *place] - rates["none", *place], abs=1e-9)
        assert row["p"] <= row["p_corrected"] <= 1
    page = render_html(run)
    assert "Could chance have done it?" in page
    assert "With 8 harmful and harmless requests a difference under 75 points" in page
