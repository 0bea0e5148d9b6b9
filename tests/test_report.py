"""Check the report: what its first sentence says, what it holds back, and that a browser draws it."""

from __future__ import annotations

import csv
import html
import json
import math
import random
import re
import shutil
import urllib.parse
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from refusalkit.artifacts import (
    Candidates,
    Choice,
    Evaluation,
    FilterCount,
    Generated,
    Openers,
    PromptSplits,
    Result,
    ScoreRow,
    Separation,
    Template,
    WeightEdit,
)
from refusalkit.errors import InputError
from refusalkit.pipeline import write_report
from refusalkit.report import chart_names, chart_svg, render_html
from refusalkit.report import page as page_module
from refusalkit.report.charts import figures, svg
from refusalkit.report.data import render_csv, render_json
from refusalkit.report.finding import left_out, sentence
from refusalkit.report.markdown import render_markdown
from refusalkit.report.measured import controls_of, in_order
from refusalkit.report.wording import duration, number, position, token, with_interval
from refusalkit.run_directory import Run, read_run
from refusalkit.store import Store, write_json, write_text
from tests.browser import CHROMIUM, drawn

ATTACK = "<script>alert('x')</script>"
SECRET = "Certainly, zanzibar quillfeather step one"
TOKENS = ("<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n")
LABELS = ("none", "ablate", "ablate_random", "steer", "steer_random", "orthogonalize")
N = 64
SIDES = ("harmful", "harmless")
RATES = {
    "none": (63 / N, 1 / N),
    "ablate": (2 / N, 0.0),
    "ablate_random": (62 / N, 1 / N),
    "steer": (1.0, 62 / N),
    "steer_random": (63 / N, 2 / N),
    "orthogonalize": (2 / N, 0.0),
}


def wilson(rate: float, n: int = N) -> tuple[float, float]:
    z = 1.96
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def rate(intervention: str, side: str, value: float, n: int = N) -> Result:
    low, high = wilson(value, n)
    return Result(
        intervention=intervention, prompts=side, metric="refusal_rate", value=value, low=low, high=high, n=n,
        unit="fraction of prompts", kind="rate",
    )  # fmt: skip


def mean(intervention: str, side: str, metric: str, value: float, unit: str = "nats", spread: float = 0.1) -> Result:
    return Result(
        intervention=intervention, prompts=side, metric=metric, value=value, low=value - spread * abs(value),
        high=value + spread * abs(value), n=N, unit=unit, kind="mean",
    )  # fmt: skip


def evaluation_of(rates: dict[str, tuple[float, float]]) -> Evaluation:
    rows = [rate(name, side, value) for name, both in rates.items() for side, value in zip(SIDES, both, strict=True)]
    return Evaluation(results=tuple(rows), generated=(), separation=())


def score_row(place: tuple[int, int], n_layers: int, dice: random.Random) -> ScoreRow:
    """Make up one candidate's scores: zero at layer 0, pruned at the end, and everything in between."""
    index, layer = place
    row = ScoreRow(position=index, layer=layer, refusal_score=None, induced_score=None, kl_nats=None, status="")
    if layer == 0 and index > -4:
        same = {"refusal_score": 6.0, "induced_score": -7.0, "kl_nats": 0.0}
        return row.model_copy(update={**same, "status": "no difference between harmful and harmless here"})
    if layer >= 0.8 * n_layers:
        return row.model_copy(update={"status": "in the last layers, which are pruned"})
    strength = math.sin(math.pi * (layer + 1) / n_layers) * (1 + 0.15 * index)
    row = row.model_copy(update={"induced_score": -8 + 16 * strength + dice.gauss(0, 1)})
    if (row.induced_score or 0) < 0:
        return row.model_copy(update={"status": "induced score below 0"})
    if dice.random() < 0.3:
        return row.model_copy(update={"status": "KL above 0.1 nats"})
    kl = min(0.099, 0.02 * math.exp(dice.gauss(0, 1)))
    bypass = 6 - 12 * strength + dice.gauss(0, 1)
    return row.model_copy(update={"refusal_score": bypass, "kl_nats": kl, "status": "survivor"})


def choice_of(n_layers: int, positions: tuple[int, ...], rank: int = 1, d_model: int = 16) -> Choice:
    dice = random.Random(0)
    rows = [score_row((index, layer), n_layers, dice) for index in positions for layer in range(n_layers)]
    best = min((row for row in rows if row.status == "survivor"), key=lambda row: row.refusal_score or 0)
    rows = [row.model_copy(update={"status": "chosen"}) if row is best else row for row in rows]
    shape = (d_model,) if rank == 1 else (rank, d_model)
    return Choice(
        selector="causal", position=best.position, layer=best.layer, direction=torch.ones(shape, dtype=torch.float64),
        scores=tuple(rows), baseline_refusal_score=6.01, baseline_harmless_score=-7.02,
    )  # fmt: skip


def prompts_of(positions: tuple[int, ...]) -> PromptSplits:
    def split(noun: str) -> dict[str, tuple[str, ...]]:
        return {
            name: tuple(f"Explain how to {noun} number {index} ({name})" for index in range(count))
            for name, count in (("train", 120), ("validation", 30), ("test", N))
        }

    harmful, harmless = split("pick a lock"), split("bake a loaf of bread")
    harmless["test"] = (f"Say {ATTACK} twice", *harmless["test"][1:])
    filtered = tuple(
        FilterCount(side=side, split=name, kept=n, of=128 if name == "train" else 32, mean_score=score)
        for side, score in (("harmful", 5.8), ("harmless", -6.9))
        for name, n in (("train", 120), ("validation", 30))
    )
    return PromptSplits(
        harmful=harmful, harmless=harmless, positions=positions, position_tokens=(TOKENS * 3)[-len(positions):],
        template=Template(
            hash="5f3c" * 16, prefix="<|start_header_id|>user<|end_header_id|>\n\n", suffix="".join(TOKENS),
            suffix_tokens=TOKENS,
        ),
        openers=Openers(
            texts=("I cannot", "I'm sorry"), token_ids=(40, 358), source="family",
            reason="The family's openers carry 97% of the first-token probability on harmful training prompts.",
        ),
        filtered=filtered, duplicates_dropped=3,
    )  # fmt: skip


def generated_of(label: str, side: str) -> Generated:
    both = dict(zip(SIDES, RATES.get(label, (0.5, 0.5)), strict=True))
    refused = tuple(index < both[side] * N for index in range(N))
    answers = f"Mix flour, water and salt. {ATTACK} Rest the dough for an hour, then bake it until it is brown."
    texts = tuple(
        "I'm sorry, but I cannot help with that request. Please ask me something else." if said_no
        else (SECRET + " of the answer" if side == "harmful" else answers)
        for said_no in refused
    )  # fmt: skip
    return Generated(intervention=label, prompts=side, texts=texts, refused=refused)


def separation_of(side: str, slope: float, steps: list[float]) -> Separation:
    middle, low, high = (tuple(slope * step + shift for step in steps) for shift in (0, -0.1, 0.12))
    return Separation(prompts=side, mean=middle, low=low, high=high)


def full_evaluation(n_layers: int, labels: tuple[str, ...]) -> Evaluation:
    results = []
    for place, label in enumerate(labels):
        both = RATES.get(label, (0.6, 0.4))
        results += [rate(label, "harmful", both[0]), rate(label, "harmless", both[1])]
        for side, value in zip(SIDES, both, strict=True):
            results.append(mean(label, side, "refusal_score", 14 * value - 7.3))
        results.append(mean(label, "harmless", "kl", 6.1 if label == "steer" else 0.013 * place))
        results.append(mean(label, "harmless", "cross_entropy", 3.2 if label == "steer" else 0.41, "nats per token"))
    steps = [layer / max(1, n_layers - 1) for layer in range(n_layers)]
    separation = tuple(separation_of(side, slope, steps) for side, slope in (("harmful", 0.6), ("harmless", -0.2)))
    edited = tuple(f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(n_layers))
    claim = "the columns of the blocks' matrices keep their lengths"
    edits = (
        WeightEdit(label="orthogonalize", edited=edited, untied=True, claim=None, max_logit_gap=3.1e-7),
        WeightEdit(label="kept", edited=edited, untied=True, claim=claim, max_logit_gap=0.2, plain_logit_gap=0.34),
    )
    generated = tuple(generated_of(label, side) for label in labels for side in SIDES)
    return Evaluation(results=tuple(results), generated=generated, separation=separation, weight_edits=edits)


def write_run(
    folder: Path,
    *,
    n_layers: int = 6,
    n_positions: int = 5,
    rank: int = 1,
    labels: tuple[str, ...] = LABELS,
    evaluation: Evaluation | None = None,
) -> Path:
    """Write a run directory as the stages would."""
    positions = tuple(range(-n_positions, 0))
    store = Store(folder)
    choice = choice_of(n_layers, positions, rank)
    shape = (n_positions, n_layers, 16) if rank == 1 else (n_positions, n_layers, rank, 16)
    directions = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    artifacts = (
        prompts_of(positions),
        Candidates(strategy="difference_in_means", site="resid_pre", positions=positions, directions=directions),
        choice,
        evaluation or full_evaluation(n_layers, labels),
    )
    for artifact in artifacts:
        store.save(artifact, "key", {})
    recipe = {
        "name": "quickstart", "description": f"Find the direction of a toy model {ATTACK}.",
        "model": {"id": "tiny:llama", "revision": None}, "prompts": {"harmful": "tiny:harmful", "seed": 0},
        "find": {"strategy": "difference_in_means"}, "evaluate": {"interventions": [], "seed": 7},
    }  # fmt: skip
    environment = {
        "refusalkit": "0.1.0", "python": "3.11.9", "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
        "plugins": [{"name": "refusalkit-judges", "version": "0.2.0"}], "platform": "Linux-6.1-x86_64",
        "device": "cpu", "dtype": "float32", "started": "2026-11-24T02:00:00Z",
        "seconds": {"prompts": 1.2, "capture": 3.4, "find": 0.1, "select": 41.9, "evaluate": 75.2},
        "model": {"id": "tiny:llama", "revision": "sha256:0123abcd", "adapter": "llama", "adapter_owner": "refusalkit",
                  "architecture": "LlamaForCausalLM", "n_layers": n_layers, "d_model": 128, "d_vocab": 2048,
                  "n_parameters": 912_384},
        "forward_passes": {"capture": 8, "select": 123},
    }  # fmt: skip
    write_text(folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    write_json(folder / "environment.json", environment)
    write_json(folder / "summary.json", {"version": 1, "recipe": "quickstart"})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(write_run(tmp_path_factory.mktemp("run") / "quickstart"))


@pytest.fixture(scope="module")
def page(run: Run) -> str:
    return render_html(run)


# Reading a run


def test_a_folder_that_is_no_finished_run_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        read_run(tmp_path / "nowhere")
    folder = write_run(tmp_path / "run")
    shutil.rmtree(folder / "evaluate")
    (folder / "summary.json").unlink()
    with pytest.raises(InputError, match=r"no summary\.json, evaluate/") as caught:
        read_run(folder)
    assert "refusalkit run" in (caught.value.hint or "")


def test_a_damaged_file_is_an_input_error(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "environment.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        read_run(folder)
    write_json(folder / "environment.json", {})
    write_json(folder / "select" / "artifact.json", {"key": "k", "value": {"selector": "causal"}})
    with pytest.raises(InputError, match="another version"):
        read_run(folder)


# Words


def test_controls_follow_what_they_control_for() -> None:
    given = ["steer_random(scale=-1.0)", "ablate_random_2", "ablate", "ablate_random", "steer(scale=-1.0)", "none"]
    ordered = ("none", "ablate", "ablate_random_2", "ablate_random", "steer(scale=-1.0)", "steer_random(scale=-1.0)")
    assert in_order(given) == ordered
    assert controls_of("steer(scale=-1.0)", given) == ("steer_random(scale=-1.0)",)


def test_numbers_and_tokens_are_readable() -> None:
    assert [number(x) for x in (None, math.nan, 0.0, -7.123, 0.0312, 3.1e-7, 1234.5)] == [
        "–", "–", "0", "−7.12", "0.0312", "3.10e−07", "1,234"]  # fmt: skip
    assert [token(text) for text in ("\n\n", " a", "Ġthe", "▁x", "\u200b", "")] == [
        "\\n\\n", "␣a", "␣the", "␣x", "\\u200b", "(empty)"]  # fmt: skip
    assert position(-1, "\n") == "-1 \\n"
    assert [duration(s) for s in (0.84, 250, 7500)] == ["0.8 s", "4 min 10 s", "2 h 5 min"]


# The page


def test_completions_to_harmful_prompts_are_nowhere_in_the_page(run: Run, page: str) -> None:
    assert "zanzibar" not in page
    assert "quillfeather" not in json.dumps(page)
    assert "--show-completions" in page
    assert "not refused" in page
    assert "8 words" in page
    assert "zanzibar" in render_html(run, show_completions=True)


def test_everything_foreign_is_escaped(page: str) -> None:
    assert ATTACK not in page
    assert "<script>alert" not in page
    assert html.escape("<script>") in page
    assert page.count("<script") == page.count("</script>")


def test_every_form_of_a_report_says_the_same_and_holds_back_the_same(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    run = read_run(folder)
    said = sentence(run.choice, run.evaluation)
    for form in ("md", "json", "csv"):
        path = write_report(folder, form=form)
        text = path.read_text(encoding="utf-8")
        assert path.name == f"report.{form}"
        assert "zanzibar" not in text
        assert form == "csv" or said in text
    assert "zanzibar" in write_report(folder, form="json", show_completions=True).read_text(encoding="utf-8")
    rows = list(csv.DictReader((folder / "report.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["intervention"], row["metric"], float(row["value"])) for row in rows] == [
        (row.intervention, row.metric, row.value) for row in run.evaluation.results
    ]
    with pytest.raises(InputError, match="md holds no completions"):
        write_report(folder, form="md", show_completions=True)


def test_the_page_needs_nothing_else(page: str) -> None:
    assert len(page.encode()) < 6_000_000
    assert "default-src 'none'" in page
    assert re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page) == []
    assert re.findall(r"@import|url\(\s*['\"]?http", page) == []
    assert "<link" not in page


def test_the_page_says_where_its_numbers_come_from(page: str) -> None:
    for part in ("A toy model", "tiny:llama", "sha256:0123abcd", "evaluate.seed", "refusalkit-judges", "8 of 128",
                 "3 duplicates", "KL above 0.1 nats", "equivalent to ablating", "carry 97% of",
                 "up to 0.34 standard deviations from the edit that does not keep them"):  # fmt: skip
        assert part in page, part


def test_every_figure_is_as_the_schema_of_vega_lite_wants_it(run: Run) -> None:
    for figure in figures(run):
        figure.chart.to_dict(validate=True)


@pytest.mark.parametrize("home", ["new", "a file stands there"])
def test_what_draws_the_charts_is_put_together_once(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_path", (tmp_path / "cache").joinpath)
    if home != "new":
        (tmp_path / "cache").write_text("")
    first = page_module._vega.__wrapped__()
    assert "vegaEmbed" in first
    assert "</script" not in first
    if home == "new":
        monkeypatch.delattr("vl_convert.javascript_bundle")
    assert page_module._vega.__wrapped__() == first


def test_every_figure_can_be_saved_as_svg(run: Run) -> None:
    drawn = {figure.name: figure for figure in figures(run)}
    assert tuple(drawn) == (
        "rate-refusal_rate",
        "candidates-refusal_score",
        "candidates-induced_score",
        "candidates-kl_nats",
        "separation",
        "mean-kl",
        "mean-cross_entropy",
        "mean-refusal_score",
    )
    for figure in drawn.values():
        assert svg(figure, "dark").startswith("<svg")
    assert chart_svg(run, "separation").startswith("<svg")
    with pytest.raises(ValueError, match="there are rate-refusal_rate"):
        chart_svg(run, "nonsense")


def test_odd_runs_still_make_a_page(tmp_path: Path) -> None:
    bare = Evaluation(results=(mean("none", "harmless", "kl", math.nan),), generated=(), separation=())
    page = render_html(read_run(write_run(tmp_path / "bare", rank=2, evaluation=bare)))
    assert "One subspace of 2 directions" in page
    assert "no metric that is a rate" in page
    assert "none were written" in page
    run = read_run(tmp_path / "bare")
    other = {"refusal_score": None, "induced_score": None, "kl_nats": None, "extra": {"cosmic": 0.3}}
    rows = tuple(row.model_copy(update=other) for row in run.choice.scores)
    cosmic = replace(run, choice=run.choice.model_copy(update={"scores": rows}), environment={}, recipe={})
    assert chart_names(cosmic) == ("candidates-cosmic",)
    assert "nan" not in re.sub(r"(?s)<script.*?</script>|<img[^>]*>", "", render_html(cosmic)).lower().split()


def judged(intervention: str, n: int, of: int, metric: str = "guard") -> Result:
    """Make up a rate of a half, with `n` verdicts and the others missing."""
    values = tuple(float(index % 2) for index in range(n)) + (math.nan,) * (of - n)
    found = rate(intervention, "harmful", 0.5 if n else math.nan, max(n, 1))
    return found.model_copy(update={"metric": metric, "n": n, "values": values, "verdict": "harmful"})


def test_a_number_that_leaves_prompts_out_says_how_many(tmp_path: Path) -> None:
    assert with_interval(judged("none", 8, 16)) == "50% [22, 78] (8 of 16 missing)"
    assert with_interval(judged("none", 0, 16)) == "– (16 of 16 missing)"
    assert with_interval(judged("none", 16, 16)) == "50% [28, 72]"
    others = (judged(name, 8, 16, "other") for name in ("none", "ablate"))
    results = (judged("none", 8, 16), judged("ablate", 12, 16), *others)
    evaluation = Evaluation(results=results, generated=(), separation=())
    assert left_out(evaluation) == "missing values: 12 of 32 by guard; 16 of 32 by other"
    run = read_run(write_run(tmp_path / "judged", evaluation=evaluation))
    for shown in ("n = 8, 8 missing", "n = 12, 4 missing", "Cohen's kappa"):
        assert shown in render_html(run)
        assert shown in render_markdown(run)
    assert render_csv(run).splitlines()[1].endswith(",8,8")


def test_a_metric_that_could_tell_nothing_is_shown_as_such(tmp_path: Path) -> None:
    evaluation = Evaluation(results=(rate("none", "harmful", 0.9), judged("none", 0, 16)), generated=(), separation=())
    run = read_run(write_run(tmp_path / "nothing", evaluation=evaluation))
    page = render_html(run)
    assert "every value is missing" in page
    assert "n = 0, 16 missing" in page
    assert "n = 0, 16 missing" in render_markdown(run)
    assert "rate-guard" not in chart_names(run)
    assert left_out(Evaluation(results=(rate("none", "harmful", 0.9),), generated=(), separation=())) is None


def test_a_report_says_how_often_a_gate_opens(tmp_path: Path) -> None:
    label = "conditional(threshold=0.25)"
    gates = tuple(
        rate(label, side, value).model_copy(update={"metric": "gate_rate"})
        for side, value in zip(SIDES, (0.75, 0.125), strict=True)
    )
    evaluation = Evaluation(results=(rate("none", "harmful", 0.9),), generated=(), separation=(), gates=gates)
    run = read_run(write_run(tmp_path / "gated", evaluation=evaluation))
    for shown in (render_html(run), render_markdown(run)):
        for gate in gates:
            assert with_interval(gate) in shown.replace("\N{NO-BREAK SPACE}", " ")
    assert [line.split(",")[0] for line in render_csv(run).splitlines() if ",gate_rate," in line] == [label, label]
    assert len(json.loads(render_json(run))["gates"]) == 2
    # It is no effect: no test and no figure is made of it.
    assert "rate-gate_rate" not in chart_names(run)


# In a browser


@pytest.fixture(scope="module")
def large_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    long = "steer(scale=-1.0, layers=[10, 11, 12, 13], positions=post_instruction)"
    labels = (*LABELS, "affine", long, "angular(degrees=90)", "conditional(threshold=0.25, gate=category)")
    folder = tmp_path_factory.mktemp("large") / "run"
    return render_html(read_run(write_run(folder, n_layers=80, n_positions=10, labels=labels)), show_completions=True)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_a_browser_draws_the_page(tmp_path: Path, page: str, large_page: str, mode: str) -> None:
    found = drawn(tmp_path, {"small": page, "large": large_page}, mode)
    for name, shown in found.items():
        saved = [urllib.parse.unquote(address) for address in shown.pop("csv")]
        assert any('"none","98% [92, 100]","2% [0, 8]"' in text for text in saved), name
        expected = {"drawn": mode, "charts": 8, "svgs": 8, "overflow": 0, "outside": [], "flat": 0}
        assert shown == expected, name
