"""A published run can be repeated from its recipe, and what comes out is compared with the numbers published."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refusalkit.builtin.arditi import SAMPLES, read_arditi
from refusalkit.checkpoint import cached_commit
from refusalkit.cli import app
from refusalkit.errors import InputError
from refusalkit.pipeline import execute
from refusalkit.plan import Plan, read_pools
from refusalkit.prompt_split import normalized
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry
from refusalkit.reproduction.compare import Row, compare
from refusalkit.reproduction.published import NAMES, Published, Quantity, published
from refusalkit.reproduction.quantity import ELSEWHERE, MEASURED, SPREAD
from refusalkit.reproduction.reasons import departures
from refusalkit.reproduction.repeat import compared, plan_repetition
from refusalkit.reproduction.table import markdown
from refusalkit.run_directory import Run, read_run

from .conftest import Command
from .reference import SHARED, needs_shared, read_json

FOLDERS = {
    "gemma-2b-it": ("gemma-2b-it", "Gemma 2B"),
    "llama-2-7b-chat": ("llama-2-7b-chat-hf", "Llama-2 7B"),
    "llama-3-8b-instruct": ("meta-llama-3-8b-instruct", "Llama-3 8B"),
    "yi-6b-chat": ("yi-6b-chat", "Yi 6B"),
}
PlanOf = Callable[..., Plan]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Give a folder like `dataset` in the authors' repository."""
    folder = tmp_path / "dataset"
    for name in ("splits", "processed"):
        (folder / name).mkdir(parents=True)
    for file in (SHARED / "prompts").iterdir():
        kind = "processed" if file.stem == "jailbreakbench" else "splits"
        (folder / kind / file.name).symlink_to(file)
    return folder


# The authors' prompts


@needs_shared
@pytest.mark.parametrize(("side", "sizes"), [("harmful", (128, 32, 99)), ("harmless", (128, 32, 100))])
def test_the_prompts_are_those_of_the_published_runs(dataset: Path, side: str, sizes: tuple[int, ...]) -> None:
    replay = read_json(SHARED / "official_runs.json")["dataset_replay"]["sha256_of_newline_joined"]
    names = {"train": "train", "validation": "val", "test": "test"}
    ours = {f"{part}_{names[split]}": sample.sha256 for (part, split), sample in SAMPLES.items()}
    assert ours == replay
    found = read_arditi(f"{dataset.name}#{side}", dataset.parent)
    assert tuple(len(prompts) for prompts in found.values()) == sizes


@needs_shared
def test_only_the_test_request_that_was_trained_on_is_left_out(dataset: Path) -> None:
    found = read_arditi("dataset#harmful", dataset.parent)
    whole = [row["instruction"] for row in read_json(SHARED / "prompts" / "jailbreakbench.json")]
    (left_out,) = [prompt for prompt in whole if prompt not in found["test"]]
    assert normalized(left_out) in {normalized(prompt) for prompt in found["train"]}
    assert left_out not in found["train"]


@needs_shared
def test_a_file_that_was_changed_is_noticed(dataset: Path) -> None:
    file = dataset / "splits" / "harmless_val.json"
    rows = read_json(file)
    file.unlink()
    file.write_text(json.dumps(rows[1:]), encoding="utf-8")
    with pytest.raises(InputError, match="is not what the published runs drew") as caught:
        read_arditi("dataset#harmful", dataset.parent)
    assert caught.value.where == str(file)


@pytest.mark.parametrize(("address", "said"), [("nowhere#harmful", "no such folder"), (".#harmfull", "names no side")])
def test_an_address_without_the_prompts_says_how_to_get_them(tmp_path: Path, address: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read_arditi(address, tmp_path)
    assert caught.value.hint in (
        "git clone https://github.com/andyrdt/refusal_direction, check 9d852fa out, and name its `dataset` folder",
        "did you mean 'harmful'?",
    )


# The recipes


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_asks_for_the_published_candidates(name: str, registry: Registry) -> None:
    record = published(name)
    recipe = load_recipe(record.recipe, registry)
    assert (recipe.name, recipe.model.id) == (f"arditi-{name}", record.hub)
    assert isinstance(recipe.capture.positions, tuple)
    assert len(recipe.capture.positions) * record.n_layers == record.number("n_candidates")
    assert recipe.prompts.chat_template is not None
    assert not departures(record, _run_of(recipe.model_dump(mode="json", serialize_as_any=True)), registry)


def _run_of(recipe: dict[str, Any]) -> Run:
    """Give a run of which only the recipe is known."""
    nothing: Any = None
    return Run(Path(), recipe, {}, {}, nothing, nothing, nothing, nothing)


@needs_shared
def test_a_recipe_gets_its_prompts_from_the_folder(dataset: Path, registry: Registry) -> None:
    settings = [f"prompts.{side}=arditi:dataset#{side}" for side in ("harmful", "harmless")]
    recipe = load_recipe(published("yi-6b-chat").recipe, registry, settings)
    pools, dropped = read_pools(recipe.prompts, dataset.parent, registry)
    assert {side: [len(prompts) for prompts in pools[side].values()] for side in pools} == {
        "harmful": [128, 32, 99],
        "harmless": [128, 32, 100],
    }
    assert dropped == 0


def test_a_chat_template_in_the_recipe_takes_the_place_of_the_checkpoints(plan_of: PlanOf) -> None:
    own = plan_of()
    same = plan_of(f"prompts.chat_template={json.dumps(own.template.source)}")
    assert same.keys == own.keys
    other = plan_of("prompts.chat_template='[INST] {{ messages[0].content }} [/INST] '")
    assert other.template.around() == ("[INST] ", " [/INST] ")
    assert other.keys["prompts"] != own.keys["prompts"]


@pytest.mark.parametrize(("template", "said"), [("{% if %}", "is not Jinja"), ("", "is empty")])
def test_a_chat_template_that_is_none_is_the_recipes_fault(plan_of: PlanOf, template: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        plan_of(f"prompts.chat_template='{template}'")
    assert caught.value.where == "prompts.chat_template"


def test_an_opener_may_be_a_token_id(plan_of: PlanOf) -> None:
    template = plan_of().template
    (token,) = template.opener_ids(("I",))
    assert template.opener_ids((token, "I", 7)) == (token, 7)
    assert plan_of(f"select.openers=[{token}]").prompts.openers == (token,)
    with pytest.raises(InputError, match="there is no token 999999"):
        plan_of("select.openers=[999999]")
    with pytest.raises(InputError, match=r"select\.openers"):
        plan_of("select.openers=[-1]")


# The published numbers


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_those_that_were_published(name: str) -> None:
    folder, paper_name = FOLDERS[name]
    official = read_json(SHARED / "official_runs.json")
    authors, paper = official["models"][folder], official["paper_2406.11717"]
    record = published(name)
    assert {row.what for row in record.rows} <= MEASURED.keys() | ELSEWHERE.keys()
    rows = {(row.what, row.side, row.under): (row.authors, row.paper) for row in record.rows}
    assert len(rows) == len(record.rows)
    table5 = paper["table5_direction_selection"][paper_name]
    scores = zip(("refusal_score", "induced_score", "kl_nats"), ("bypass", "induce", "kl"), strict=True)
    for (what, column), selected in zip(scores, authors["selected"].values(), strict=True):
        assert rows[what, None, None] == (selected, table5[column])
    assert rows["position", None, None] == (authors["pos"], table5["pos"])
    assert rows["layer", None, None] == (authors["layer"], table5["layer"])
    assert rows["n_survivors", None, None][0] == authors["n_candidates_after_filter"]
    assert (record.n_layers, record.d_model) == (authors["n_layers"], authors["d_model"])
    cases = {"none": "baseline", "ablate": "ablation", "steer(scale=-1.0)": "actadd"}
    for number, (under, case) in enumerate(cases.items()):
        done = authors["completions"][f"jailbreakbench_{case}"]
        assert rows["refusal_rate", "harmful", under][0] == done["paper_refusal_score"]
        assert rows["safety_score", "harmful", under][0] == done["paper_safety_score"]
        losses = {"pile_loss": "pile", "alpaca_loss": "alpaca", "cross_entropy": "alpaca_custom_completions"}
        for column, (what, data) in enumerate(losses.items()):
            loss = authors["loss"][case][data]["ce_loss"]
            side = "harmless" if what == "cross_entropy" else None
            assert rows[what, side, under] == (loss, paper["table9_ce_loss"][paper_name][3 * column + number])
    for under, case in (("none", "baseline"), ("steer", "actadd")):
        rate = authors["completions"][f"harmless_{case}"]["substring_refusal_rate"]
        assert rows["refusal_rate", "harmless", under][0] == pytest.approx(rate)
    table8 = paper["table8_orth_vs_base"]
    for column, (edited, plain) in zip(table8["columns"], table8["rows"][paper_name], strict=True):
        assert rows[column.lower(), None, "orthogonalize"][1] == edited
        assert rows[column.lower(), None, "none"][1] == plain


@needs_shared
def test_close_means_as_close_as_the_authors_are_to_their_own_paper() -> None:
    official = read_json(SHARED / "official_runs.json")
    papers = {**dict(FOLDERS.values()), "qwen-1_8b-chat": "Qwen 1.8B"}
    apart: dict[str, float] = dict.fromkeys(SPREAD, 0.0)
    for folder, name in papers.items():
        authors = official["models"][folder]
        table5 = official["paper_2406.11717"]["table5_direction_selection"][name]
        table9 = official["paper_2406.11717"]["table9_ce_loss"][name]
        pairs = list(zip(("refusal_score", "induced_score", "kl_nats"), authors["selected"].values(), strict=True))
        for (what, theirs), column in zip(pairs, ("bypass", "induce", "kl"), strict=True):
            apart[what] = max(apart[what], abs(theirs - table5[column]))
        for number, case in enumerate(("baseline", "ablation", "actadd")):
            loss = authors["loss"][case]["alpaca_custom_completions"]["ce_loss"]
            apart["cross_entropy"] = max(apart["cross_entropy"], abs(loss - table9[6 + number]))
    for what, spread in SPREAD.items():
        assert apart[what] <= spread < apart[what] * 1.1


# Comparing


@pytest.fixture(scope="module")
def run(finished_run: Path) -> Run:
    return read_run(finished_run)


@pytest.fixture(scope="module")
def echo(run: Run) -> Published:
    """Give a published run whose numbers are those of the finished run."""
    shape = {key: run.environment["model"][key] for key in ("architecture", "n_layers", "d_model", "d_vocab")}
    place = {"position": run.choice.position, "layer": run.choice.layer}
    blank = [row.model_copy(update={"authors": place.get(row.what)}) for row in published("gemma-2b-it").rows]
    record = Published(name="gemma-2b-it", hub="tiny:llama", run="runs/small", rows=tuple(blank), **shape)
    rows = []
    for row in blank:
        known = MEASURED.get(row.what)
        rows.append(row.model_copy(update={"authors": known.read(run, record, row) if known else 1.0}))
    return record.model_copy(update={"rows": tuple(rows)})


def _moved(record: Published, what: str, by: float) -> Published:
    rows = (
        row.model_copy(update={"authors": row.authors + by}) if row.what == what and row.authors is not None else row
        for row in record.rows
    )
    return record.model_copy(update={"rows": tuple(rows)})


def _verdict(rows: tuple[Row, ...], what: str) -> str:
    return next(row.verdict for row in rows if row.quantity.what == what)


def test_a_run_equals_itself_in_every_row_it_measures(run: Run, echo: Published) -> None:
    rows = [row for row in compare(echo, run) if row.quantity.authors is not None and row.quantity.what in MEASURED]
    assert len(rows) >= 15
    assert {row.verdict for row in rows} == {"equal"}
    chosen = next(row for row in rows if row.quantity.what == "norm")
    assert chosen.ours == pytest.approx(run.choice.direction.norm().item())


@pytest.mark.parametrize("what", SPREAD)
def test_a_score_is_close_within_the_spread_and_differs_beyond_it(run: Run, echo: Published, what: str) -> None:
    for by, verdict in ((0.9 * SPREAD[what], "close"), (-0.9 * SPREAD[what], "close"), (1.1 * SPREAD[what], "differs")):
        assert _verdict(compare(_moved(echo, what, by), run), what) == verdict


@pytest.mark.parametrize("what", ["layer", "n_candidates", "n_survivors"])
def test_a_count_is_equal_or_differs(run: Run, echo: Published, what: str) -> None:
    assert _verdict(compare(_moved(echo, what, 1), run), what) == "differs"


def test_a_rate_is_close_within_two_standard_errors(run: Run, echo: Published) -> None:
    def verdict(authors: float, ours: float) -> str:
        row = Quantity(what="refusal_rate", side="harmful", under="none", authors=authors)
        results = tuple(
            result.model_copy(update={"value": ours})
            if (result.metric, result.prompts, result.intervention) == ("refusal_rate", "harmful", "none")
            else result
            for result in run.evaluation.results
        )
        changed = Run(**{**vars(run), "evaluation": run.evaluation.model_copy(update={"results": results})})
        return compare(echo.model_copy(update={"rows": (row,)}), changed)[0].verdict

    # 0.5 and 0.6 over 100 prompts each are 1.4 standard errors apart, 0.5 and 0.7 are 2.9.
    assert [verdict(0.5, ours) for ours in (0.5, 0.6, 0.7, math.nan)] == ["equal", "close", "differs", "not scored"]


def test_a_run_of_another_model_is_refused(run: Run) -> None:
    with pytest.raises(InputError, match=r"not the model .*architecture LlamaForCausalLM and not Gemma"):
        compare(published("gemma-2b-it"), run)


def test_what_the_run_did_otherwise_is_a_reason(run: Run, echo: Published, registry: Registry) -> None:
    said = [reason.text for reason in departures(echo, run, registry)]
    assert any("`prompts.harmful: tiny:harmful`" in text for text in said)
    assert any("`evaluate.max_new_tokens: 8`; the published one has `512`" in text for text in said)
    assert not any("model.id" in text or "`find" in text for text in said)
    moved = _moved(echo, "layer", 1)
    table = markdown(moved, compare(moved, run), departures(moved, run, registry))
    assert f"| layer of the choice | {run.choice.layer} | {run.choice.layer + 1} | 10 | differs (a, b" in table
    assert f"- a. {said[0]}" in table


# From the command line


@pytest.mark.parametrize("name", NAMES)
def test_without_weights_it_says_what_it_would_compare_and_how(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = published(name)
    assert app(["reproduce", name], standalone_mode=False) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"nothing was compared: the weights of {record.hub} are not on this machine")
    assert said.err.endswith(f"  refusalkit reproduce {name}\n")
    assert said.out.count("| not compared (") == sum(row.what in MEASURED for row in record.rows)
    assert "| differs" not in said.out
    assert said.out.endswith(f"```yaml\n{record.recipe.read_text(encoding='utf-8')}```\n")


def test_nothing_compared_is_status_one_and_leaves_nothing(command: Command, tmp_path: Path) -> None:
    done = command("reproduce", "gemma-2b-it", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_looking_for_weights_never_reaches_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    # The fixture that guards sockets fails this test at the first attempt.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert cached_commit("google/gemma-2b-it") is None


def test_weights_in_the_cache_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "models--google--gemma-2b-it"
    (home / "snapshots" / commit).mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots" / commit / "model.safetensors.index.json").write_text("{}")
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert cached_commit("google/gemma-2b-it") == commit


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["gemma-2b"], "no published run has this name\nhint: did you mean 'gemma-2b-it'?"),
        (["gemma-2b-it", "--run", "."], "is not a finished run"),
        (["gemma-2b-it", "--run", ".", "--out", "x"], "--run: a finished run needs no weights"),
        (["gemma-2b-it", "--weights", "./nowhere", "--prompts", "."], "no such file"),
    ],
)
def test_bad_input_is_said_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        app(["reproduce", *line], standalone_mode=False)
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


SMALL = """\
name: small
model: {id: elsewhere}
prompts: {harmful: "arditi:here#harmful", harmless: "arditi:here#harmless", train: 8, validation: 4, filter: false}
select: {selector: fixed, position: -1, layer: 2, openers: [I]}
evaluate: {interventions: [ablate], metrics: [refusal_score], controls: 0}
"""


@needs_shared
def test_a_run_is_repeated_on_weights_of_the_right_shape_only(
    dataset: Path, tmp_path: Path, echo: Published, registry: Registry
) -> None:
    class Small(Published):
        @property
        def recipe(self) -> Path:
            return tmp_path / "small.yaml"

    (tmp_path / "small.yaml").write_text(SMALL, encoding="utf-8")
    record = Small(**echo.model_dump())
    assert plan_repetition(record, None, dataset, registry) is None
    with pytest.raises(InputError, match=r"tiny:gemma.*is not the model of the published run"):
        plan_repetition(record, "tiny:gemma", dataset, registry)
    plan = plan_repetition(record, "tiny:llama", dataset, registry)
    assert plan is not None
    execute(plan, tmp_path / "run")
    table = compared(record, tmp_path / "run", registry)
    assert "| layer of the choice | 2 |" in table
    assert "This run has" not in table
