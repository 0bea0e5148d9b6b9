"""Runs are compared prompt by prompt where that means something, and chance is given its due."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from refusalkit.artifacts import Evaluation, Result
from refusalkit.errors import InputError
from refusalkit.intervals import bootstrap, wilson
from refusalkit.metric import Side
from refusalkit.paired import Difference, Sample, difference, holm
from refusalkit.report.comparison import Comparison, alignment, compare, differing
from refusalkit.report.comparison_page import finding, render_comparison
from refusalkit.report.comparison_text import text
from refusalkit.run_directory import read_run
from refusalkit.store import Store
from refusalkit.sweep_folder import write_sweep
from tests.browser import CHROMIUM, charts, drawn
from tests.test_report import SECRET, full_evaluation, prompts_of, write_run

N = 32
NAN = math.nan


def normal(seed: int, shift: float = 0.0, n: int = N) -> list[float]:
    dice = random.Random(seed)
    return [dice.gauss(shift, 1) for _ in range(n)]


def rates(ones: int, n: int = N) -> list[float]:
    return [float(index < ones) for index in range(n)]


def compared(first: Sequence[float], second: Sequence[float], kind: str = "mean") -> Difference:
    found = difference(Sample(first), Sample(second), "rate" if kind == "rate" else "mean")
    assert found is not None
    return found


# The tests


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 0), (6, 2), (3, 3), (0, 12)])
def test_mcnemar_counts_how_likely_a_fair_coin_is_as_uneven(lost: int, gained: int) -> None:
    first = [1.0] * lost + [0.0] * gained + [1.0, 0.0]
    second = [0.0] * lost + [1.0] * gained + [1.0, 0.0]
    n, fewer = lost + gained, min(lost, gained)
    tail = sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n
    assert compared(first, second, "rate").p == pytest.approx(min(1.0, 2 * tail))
    assert compared(first, second, "rate").only == (lost, gained)


def test_the_permutation_test_comes_close_to_trying_every_exchange() -> None:
    first, second = normal(0, n=10), normal(1, 0.6, n=10)
    gaps = [b - a for a, b in zip(first, second, strict=True)]
    signs = list(itertools.product((-1, 1), repeat=10))
    observed = abs(fmean(gaps))
    exact = fmean(abs(fmean(s * g for s, g in zip(row, gaps, strict=True))) >= observed - 1e-12 for row in signs)
    assert compared(first, second).p == pytest.approx(exact, abs=0.015)


def test_chance_alone_is_called_a_difference_as_often_as_it_should_be() -> None:
    p_values = [compared(normal(seed), normal(1000 + seed)).p for seed in range(200)]
    # Four standard errors around 5%.
    assert fmean(p < 0.05 for p in p_values) == pytest.approx(0.05, abs=0.062)


def test_a_difference_is_that_of_the_means_and_lies_in_its_interval() -> None:
    first, second = normal(0), normal(1, 1)
    found = compared(first, second)
    assert found.value == pytest.approx(fmean(second) - fmean(first))
    assert found.low < found.value < found.high
    assert found.p < 0.01
    backwards = compared(second, first)
    assert (backwards.value, backwards.p) == (pytest.approx(-found.value), pytest.approx(found.p, abs=0.005))
    same = compared(first, first)
    assert (same.value, same.p) == (0, 1)


def test_prompts_count_by_their_weights() -> None:
    first, second, weights = normal(0), normal(1), [float(1 + index % 5) for index in range(N)]
    found = difference(Sample(first, weights), Sample(second, weights), "mean")
    means = [sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights) for values in (first, second)]
    assert found is not None
    assert found.value == pytest.approx(means[1] - means[0])


def test_a_prompt_without_a_value_on_either_side_is_left_out() -> None:
    first, second = normal(0), normal(1)
    found = compared([NAN, *first, 3.0], [5.0, *second, NAN])
    assert found == compared(first, second)
    assert found.n == N
    assert difference(Sample([NAN, 1.0]), Sample([1.0, NAN]), "mean") is None


def test_holm_keeps_order_and_lies_between_no_correction_and_bonferroni() -> None:
    p_values = [random.Random(0).random() ** 3 for _ in range(12)]
    corrected = holm(p_values)
    assert sorted(range(12), key=p_values.__getitem__) == sorted(range(12), key=lambda i: (corrected[i], p_values[i]))
    assert all(p <= q <= min(1, 12 * p) for p, q in zip(p_values, corrected, strict=True))
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


# Comparing runs


def measured(label: str, side: Side, metric: str, values: Sequence[float]) -> Result:
    rate = metric == "refusal_rate"
    interval = wilson(values) if rate else bootstrap(values)
    return Result(
        intervention=label, prompts=side, metric=metric, value=interval.value, low=interval.low, high=interval.high,
        n=interval.n, unit="fraction of prompts" if rate else "nats", kind="rate" if rate else "mean",
        values=tuple(values),
    )  # fmt: skip


def evaluation_of(refused: int, score: float, kl: float, labels: Sequence[str] = ("ablate",)) -> Evaluation:
    results = [
        measured("none", "harmful", "refusal_rate", rates(30)),
        measured("none", "harmful", "refusal_score", normal(0, 5)),
        measured("none", "harmless", "kl", [0.0] * N),
    ]
    for label in labels:
        results += [
            measured(label, "harmful", "refusal_rate", rates(refused)),
            measured(label, "harmful", "refusal_score", normal(1, score)),
            measured(label, "harmless", "kl", [kl + 0.01 * index for index in range(N)]),
        ]
    return Evaluation(results=tuple(results), generated=(), separation=())


def rename(folder: Path, name: str, **changed: object) -> Path:
    recipe = folder / "recipe.yaml"
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    recipe.write_text(yaml.safe_dump({**content, "name": name, **changed}), encoding="utf-8")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Give three runs on the same prompts: a good direction, one about as good, and one that does nothing."""
    made = []
    for name, evaluation in (
        ("good", evaluation_of(2, -2, 0.05)),
        ("alike", evaluation_of(4, -1.9, 0.05)),
        ("nothing", evaluation_of(30, 5, 0.001, ("ablate", "ablate_random", "steer"))),
    ):
        folder = write_run(tmp_path / "sweep" / name, evaluation=evaluation)
        made.append(rename(folder, f"sweep/{name}", find={"strategy": name}))
    return made


def rows(comparison: Comparison) -> dict[str, list[str]]:
    """Return the first table of the text: run and its cells."""
    table = text(comparison).split("\n\n")[0].splitlines()[2:]
    return {line.split()[0]: re.split(r"\s{2,}", line)[1:] for line in table}


def test_marks_say_what_differs_from_the_unmodified_model_and_from_the_first_run(folders: list[Path]) -> None:
    comparison = compare(folders)
    found = rows(comparison)
    assert [entry.label for entry in comparison.entries] == ["good", "alike", "nothing"]
    assert found["tiny:llama"] == ["nothing", "94% [80, 98]"]
    assert found["good"] == ["ablate", "6% [2, 20] *"]
    assert found["alike"] == ["ablate", "12% [5, 28] *"]
    assert found["nothing"] == ["ablate", "94% [80, 98] +"]
    # A mean that is zero in the unmodified model is a distance from it, and is not tested against it.
    assert {change.second.metric for change in comparison.from_unmodified} == {"refusal_rate", "refusal_score"}
    assert {change.second.intervention for change in comparison.from_first} == {"ablate"}
    assert len(comparison.from_first) == 6
    assert [change.p for change in comparison.from_first] == pytest.approx(
        holm([change.found.p for change in comparison.from_first])
    )


def test_the_text_fits_eighty_columns_and_says_how_many_tests(folders: list[Path]) -> None:
    long = rename(folders[1], "sweep/" + "a-very-long-name-" * 5)
    said = text(compare([folders[0], long, folders[2]]))
    assert max(map(len, said.splitlines())) <= 80
    assert "* differs from the unmodified model (paired, Holm over 8 tests)" in said
    assert "good has no steer to compare that of nothing with." in said


def test_runs_on_other_prompts_stand_beside_each_other_without_a_test(folders: list[Path], tmp_path: Path) -> None:
    prompts = prompts_of(tuple(range(-5, 0)))
    other = {**prompts.harmful, "test": prompts.harmful["test"][::-1]}
    Store(folders[1]).save(prompts.model_copy(update={"harmful": other}), "key", {})
    comparison = compare(folders[:2])
    assert {change.second.prompts for change in comparison.from_first} == {"harmless"}
    assert comparison.notes == ("alike has other harmful test prompts than good: no paired test.",)
    assert comparison.notes[0] in render_comparison(comparison, tmp_path)


def test_a_run_of_an_earlier_version_is_shown_and_not_tested(folders: list[Path]) -> None:
    path = folders[1] / "evaluate" / "artifact.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    for row in document["value"]["results"]:
        del row["values"], row["weights"]
    path.write_text(json.dumps(document), encoding="utf-8")
    comparison = compare(folders[:2])
    assert comparison.from_first == ()
    assert "alike is from a version that kept no value a prompt" in comparison.notes[0]


def test_models_are_compared_on_the_same_prompts(folders: list[Path]) -> None:
    path = folders[1] / "environment.json"
    path.write_text(path.read_text(encoding="utf-8").replace("tiny:llama", "tiny:gemma"), encoding="utf-8")
    comparison = compare(folders[:2])
    assert [model for model, _ in comparison.unmodified] == ["tiny:llama", "tiny:gemma"]
    assert len(comparison.from_first) == 3
    assert alignment(comparison.entries[0].run, comparison.entries[1].run) is None


def test_two_finished_runs_are_needed(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 finished run to compare"):
        compare([folders[0], folders[0] / "..", folders[0]][::2])
    with pytest.raises(InputError, match="is not a folder"):
        compare([folders[0], tmp_path / "nowhere"])


def test_a_sweep_stands_for_its_finished_runs(folders: list[Path]) -> None:
    sweep = folders[0].parent
    write_sweep(sweep, {"alike": {"find": "x"}, "good": {}, "nothing": {}, "never started": {}})
    shutil.rmtree(folders[2] / "evaluate")
    comparison = compare([sweep])
    assert (comparison.name, [entry.label for entry in comparison.entries]) == ("sweep", ["alike", "good"])
    assert comparison.notes == ("nothing is not finished and left out.",)


def test_a_direction_is_aligned_with_itself(folders: list[Path], tmp_path: Path) -> None:
    one, other = (read_run(folder) for folder in folders[:2])
    place = one.candidates.positions.index(one.choice.position), one.choice.layer
    found = one.choice.model_copy(update={"direction": 3 * one.candidates.directions[place]})
    Store(folders[1]).save(found, "key", {})
    assert alignment(one, read_run(folders[1])) == pytest.approx(1)
    Store(folders[1]).save(found.model_copy(update={"direction": -found.direction}), "key", {})
    assert alignment(one, read_run(folders[1])) == pytest.approx(-1)
    wide = write_run(tmp_path / "wide", rank=2)
    assert 0 <= (alignment(other, read_run(wide)) or 0) <= 1


def test_the_recipes_are_laid_beside_each_other_where_they_differ(folders: list[Path]) -> None:
    rename(folders[1], "b", find={"strategy": "good", "rank": 1.0}, model={"id": "tiny:llama"})
    entries = compare(folders[:2]).entries
    assert sorted(differing(entries)) == [("find.rank", ("–", "1.0")), ("model.revision", ("null", "–"))]


# The page


@pytest.fixture
def page(folders: list[Path]) -> str:
    (folders[0] / "report.html").write_text("", encoding="utf-8")
    return render_comparison(compare(folders), folders[0].parent)


def plain(page: str) -> str:
    return re.sub(r"(?s)<script.*?</script>|<style.*?</style>|<img[^>]*>", "", page)


def test_the_page_says_what_was_found_first(folders: list[Path]) -> None:
    assert finding(compare(folders)) == (
        "Under ablate, the refusal rate of harmful requests, 94% [80, 98] without it, lies between 6% [2, 20] (good) "
        "and 94% [80, 98] (nothing). Of 6 differences from good, 4 are beyond chance."
    )


def test_the_page_holds_no_completion_and_needs_no_network(tmp_path: Path) -> None:
    evaluation = full_evaluation(6, ("none", "ablate"))
    runs = [write_run(tmp_path / name, evaluation=evaluation) for name in ("one", "two")]
    page = render_comparison(compare([rename(run, run.name) for run in runs]), tmp_path)
    assert SECRET not in page
    assert "Mix flour" not in page
    assert "default-src 'none'" in page
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", plain(page))


def test_the_page_links_to_reports_that_lie_below_it(page: str) -> None:
    assert '<a href="good/report.html">' in page
    assert "alike/report.html" not in page


def test_its_figures_are_as_the_schema_of_vega_lite_wants_them(page: str) -> None:
    assert len(charts(page)) > 1


def test_a_random_direction_stands_below_its_run(page: str) -> None:
    assert re.search(r'<tr class="control">\s*<th scope="row"><code>nothing_<wbr>random', page)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_a_browser_draws_the_comparison(tmp_path: Path, page: str, mode: str) -> None:
    for name, shown in drawn(tmp_path, {"small": page}, mode).items():
        assert len(shown.pop("csv")) > 3
        assert shown == {"drawn": mode, "charts": 6, "svgs": 6, "overflow": 0, "outside": [], "flat": 0}, name
