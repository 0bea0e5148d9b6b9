"""Execute what the documentation shows.

The convention: commands after `$ ` in a `console` block run, in order, in a folder of their own a page; commands in a
`bash` block are only checked against the command line, because they install, download or need a GPU. A block with
`title="NAME"` is a file of that name. A `yaml` block is a recipe, or a part of one, or thresholds of an audit.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

from refusalkit import adapter, command, hookspecs, intervention, metric, prompt_source, reference, selector, strategy
from refusalkit.audit.thresholds import Thresholds
from refusalkit.cli import app
from refusalkit.pipeline import execute
from refusalkit.plan import make_plan, read_pools
from refusalkit.recipe import Recipe, json_schema
from refusalkit.recipe_file import Source, check, load_members, load_recipe
from refusalkit.registry import Registry, load_registry
from tests.conftest import install

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
ANALYSES = sorted((ROOT / "recipes" / "analyses").glob("*.yaml"))
COMPARE = ROOT / "recipes" / "methods" / "compare.yaml"
METHODS = sorted(path for path in COMPARE.parent.glob("*.yaml") if path != COMPARE)
#: Pages that are followed by tests of their own.
JUDGES_PAGE = DOCS / "how-to" / "judge-completions.md"
TUTORIAL, PLUGIN_PAGE = DOCS / "tutorial" / "from-zero.md", DOCS / "how-to" / "write-a-plugin.md"
#: Those that are about finding a direction, and not about using it.
FINDING = [path for path in METHODS if "\nfind:" in path.read_text(encoding="utf-8")]
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])

#: What the sandbox's copy of the quickstart asks for instead, so that a page takes seconds.
SMALL = {"train: 64": "train: 24", "validation: 32": "validation: 8", "test: 64": "test: 8", "tokens: 64": "tokens: 8"}
#: A command of ours, as written in a `console` block or after `&&` in a `bash` block.
COMMAND = re.compile(r"^(?:\$ )?(?:.*&& )?(refusalkit .*)$")
FENCE = re.compile(r"^( *)```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?:\]\(|src=\"|srcset=\")([^)\"#\s]+)(#[^)\"]*)?")


@dataclass(frozen=True)
class Block:
    """Hold one fenced block."""

    language: str
    title: str | None
    text: str


def _blocks(page: Path) -> list[Block]:
    found = []
    for indent, language, title, text in FENCE.findall(page.read_text(encoding="utf-8")):
        plain = "\n".join(line.removeprefix(indent) for line in text.splitlines())
        found.append(Block(language, title or None, plain + "\n"))
    return found


def _commands(block: Block) -> Iterator[list[str]]:
    for line in block.text.splitlines():
        match = COMMAND.match(line)
        if match:
            yield shlex.split(match[1])[1:]


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _with(language: str) -> list[Path]:
    return [page for page in PAGES if any(block.language == language for block in _blocks(page))]


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a folder that looks like the repository to a reader, with a quickstart that takes seconds."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    quickstart = tmp_path / "recipes" / "quickstart.yaml"
    text = quickstart.read_text(encoding="utf-8")
    for old, new in SMALL.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    quickstart.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    # Models this small gain nothing from threads, and threads that wait for each other lose a lot.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


# -- recipes ----------------------------------------------------------------------------------------------------


def test_every_recipe_is_here() -> None:
    assert [path.name for path in RECIPES] == [
        "gemma-2-9b-it.yaml",
        "llama-3-8b-instruct.yaml",
        "quickstart.yaml",
        "qwen2.5-7b-instruct.yaml",
        "repair-over-refusal.yaml",
        "yi-6b-chat.yaml",
    ]


@pytest.mark.parametrize("path", FINDING, ids=lambda path: path.name)
def test_every_way_of_finding_differs_from_the_others_in_one_line(path: Path) -> None:
    kept = re.compile("^(# |name:|find:)")
    assert [line for line in path.read_text(encoding="utf-8").splitlines() if not kept.match(line)] == [
        line for line in FINDING[0].read_text(encoding="utf-8").splitlines() if not kept.match(line)
    ]


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.name)
def test_every_method_runs(path: Path, tmp_path: Path, registry: Registry) -> None:
    changes = ["prompts.train=24", "prompts.validation=8", "prompts.test=8", "evaluate.max_new_tokens=4"]
    recipe = load_recipe(path, registry, changes)
    execute(make_plan(recipe, path.parent, registry), tmp_path / "run", until="evaluate")
    assert json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["choice"]


def test_every_strategy_has_a_recipe(registry: Registry) -> None:
    assert {load_recipe(path, registry).find.strategy for path in FINDING} == set(registry.strategies)


def test_every_selector_has_a_recipe_but_the_one_that_names_a_place(registry: Registry) -> None:
    shown = {load_recipe(path, registry).select.selector for path in (*METHODS, *RECIPES)}
    assert shown == set(registry.selectors) - {"fixed"}


def test_every_intervention_has_a_recipe(registry: Registry) -> None:
    specs = [spec for path in METHODS for spec in load_recipe(path, registry).evaluate.interventions]
    assert {name for spec in specs for name in spec.names} == set(registry.interventions)


def test_the_comparison_asks_for_six_methods_and_a_control(registry: Registry) -> None:
    members = load_members(COMPARE, registry)
    assert len({member.recipe.find.strategy for member in members} - {"random", "shuffled"}) >= 6
    assert members[-1].recipe.find.strategy == "random"
    assert COMPARE.read_text(encoding="utf-8").startswith(FINDING[0].read_text(encoding="utf-8").partition("\n")[0])


@pytest.mark.parametrize("path", [*RECIPES, *ANALYSES], ids=lambda path: path.name)
def test_every_recipe_validates_and_has_enough_prompts(path: Path, registry: Registry) -> None:
    recipe = load_recipe(path, registry)
    assert recipe.name == path.stem
    pools, _ = read_pools(recipe.prompts, path.parent, registry)
    for splits in pools.values():
        assert {split: len(prompts) for split, prompts in splits.items()} == {
            "train": recipe.prompts.train,
            "validation": recipe.prompts.validation,
            "test": recipe.prompts.test,
        }
    schema = "recipe.schema.json" if path in RECIPES else "../recipe.schema.json"
    assert path.read_text(encoding="utf-8").startswith(f"# yaml-language-server: $schema={schema}\n")


def test_the_schema_beside_the_recipes_is_that_of_the_code(registry: Registry) -> None:
    written = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))
    assert written == json_schema(registry), "run: refusalkit schema > recipes/recipe.schema.json"


def test_the_readme_and_the_quickstart_spell_out_the_defaults(registry: Registry) -> None:
    written = next(block.text for block in _blocks(ROOT / "README.md") if block.language == "yaml")
    shown = yaml.safe_load(written)
    short = {key: shown[key] for key in ("name", "model", "prompts")}
    recipes = [_recipe(shown, registry), _recipe(short, registry), load_recipe(RECIPES[2], registry)]
    first, second, third = (recipe.model_dump(mode="json", serialize_as_any=True) for recipe in recipes)
    assert first == second == third


# -- pages ------------------------------------------------------------------------------------------------------


def test_the_generated_reference_is_up_to_date() -> None:
    for name, text in reference.pages().items():
        assert (DOCS / "reference" / name).read_text(encoding="utf-8") == text, "run: python -m refusalkit.reference"


def test_every_hook_is_explained_with_all_it_returns_and_is_given() -> None:
    headings = set(re.findall(r"^#+ `(\w+)`", reference.pages()["hooks.md"], re.MULTILINE))
    hooks = {name for name in vars(hookspecs) if name.startswith("refusalkit_")}
    modules = (adapter, strategy, selector, intervention, metric, prompt_source, command)
    classes = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__
    }
    assert headings == hooks | classes


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_link_leads_somewhere(page: Path) -> None:
    targets = [target for target, _ in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = sorted(re.findall(r"[\w./-]+\.md", text))
    assert listed == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_every_page_is_named_where_readers_start() -> None:
    start = (DOCS / "index.md").read_text(encoding="utf-8")
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} - {"index.md"}
    assert {page for page in pages if f"({page})" not in start} == set()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_command_is_one(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    # A page on plugins shows a command of its own, which it runs.
    shown = re.findall(r"Command\(\"([\w-]+)\"", page.read_text(encoding="utf-8"))
    for block in _blocks(page):
        if block.language not in ("console", "bash"):
            continue
        for line in block.text.splitlines():
            assert block.language == "bash" or line.startswith("$ refusalkit "), line
        for arguments in _commands(block):
            if arguments[0] not in shown:
                _parse(group, arguments)


def _parse(group: Any, arguments: list[str]) -> None:
    """Let the command line read its arguments, without running anything; it raises for what it does not know."""
    name, *rest = arguments
    command = group.commands[name]
    if hasattr(command, "commands"):
        _parse(command, rest)
    else:
        command.make_context(name, rest)


@pytest.mark.parametrize("page", [p for p in _with("yaml") if p not in (PLUGIN_PAGE, JUDGES_PAGE)], ids=_name)
def test_every_recipe_that_is_shown_validates(page: Path, registry: Registry) -> None:
    for block in _blocks(page):
        if block.title == "thresholds.yaml":
            Thresholds.model_validate(yaml.safe_load(block.text))
        elif block.language == "yaml":
            _recipe(yaml.safe_load(block.text), registry)


def test_the_judges_that_are_shown_are_those_of_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "plugins" / "refusalkit-judges")
    known = load_registry([importlib.import_module("refusalkit_judges")], entry_points=False)
    readme = ROOT / "plugins" / "refusalkit-judges" / "README.md"
    for page in (JUDGES_PAGE, readme):
        (block,) = [block for block in _blocks(page) if block.language == "yaml"]
        recipe = _recipe(yaml.safe_load(block.text), known)
        assert {"llama_guard", "strongreject", "rubric"} <= {metric.metric for metric in recipe.evaluate.metrics}


def _recipe(shown: Mapping[str, Any], registry: Registry) -> Recipe:
    """Check a recipe, or a part of one put into the shortest recipe there is."""
    shortest = {
        "name": "part",
        "model": {"id": "tiny:llama"},
        "prompts": {"harmful": "tiny:harmful", "harmless": "tiny:harmless"},
    }
    merged = dict(shown) if "name" in shown else {**shortest, **shown}
    merged["prompts"] = {**shortest["prompts"], **merged["prompts"]}  # type: ignore[dict-item]
    return check(Source(Path("shown.yaml"), merged, {}), registry)


@pytest.mark.parametrize("page", [page for page in _with("console") if page not in (TUTORIAL, PLUGIN_PAGE)], ids=_name)
def test_what_a_page_shows_runs(page: Path, sandbox: Path) -> None:
    _follow(page, sandbox)


def test_the_tutorial_can_be_followed(sandbox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _follow(TUTORIAL, sandbox)
    said = capsys.readouterr()
    assert "recipes/quickstart.yaml" not in said.err
    assert said.err.count("kept") == 4, "changing the intervention keeps four stages"
    for name in ("first", "mine", "gemma"):
        assert (sandbox / "runs" / name / "report.html").is_file()


def _follow(page: Path, sandbox: Path) -> None:
    """Do what a reader of the page does, from top to bottom."""
    for block in _blocks(page):
        if block.title:
            (sandbox / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "console":
            for arguments in _commands(block):
                app(arguments, standalone_mode=False)
        elif block.language == "python":
            exec(compile(block.text, _name(page), "exec"), {})


def test_the_readme_runs_from_python(sandbox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _follow(ROOT / "README.md", sandbox)
    assert "ablate harmful refusal_rate" in capsys.readouterr().out


def test_the_run_directory_is_as_described(sandbox: Path) -> None:
    app(["run", "recipes/quickstart.yaml"], standalone_mode=False)
    page = DOCS / "reference" / "run-directory.md"
    scope: dict[str, Any] = {}
    blocks = {block.language: block.text for block in _blocks(page)}
    exec(compile(blocks["python"], str(page), "exec"), scope)
    text = page.read_text(encoding="utf-8")
    keys = set(re.findall(r"`(\w+)`", text[text.index("| key | example |") : text.index("```python")]))
    assert set(scope["about"]) <= keys
    summary = json.loads((sandbox / "runs/quickstart/summary.json").read_text(encoding="utf-8"))
    assert _shape(json.loads(blocks["json"])) == _shape(summary)
    table = text[text.index("| path |") : text.index("Other tools")]
    rows = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    listed = {name.rstrip("/") for row in rows for name in row.strip("`").split("`, `")}
    # The quickstart asks for no analysis.
    assert {entry.name for entry in (sandbox / "runs/quickstart").iterdir()} == listed - {"analyze"}


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shape(inner) for key, inner in value.items()}
    return [_shape(value[0])] if isinstance(value, list) else None


# -- the plugin -------------------------------------------------------------------------------------------------


def test_the_plugin_page_can_be_followed(
    sandbox: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("REFUSALKIT_PLUGINS")
    folder, module = sandbox / "refusalkit-medians", "refusalkit_medians"
    printed = ""
    for block in _blocks(PLUGIN_PAGE):
        if block.title:
            (sandbox / block.title).write_text(block.text, encoding="utf-8")
        elif block.text == f"pip install -e {folder.name}\n":
            project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            assert list(project["entry-points"]["refusalkit"].values()) == [module]
            install(sandbox, project["name"], module, version=project["version"])
            monkeypatch.syspath_prepend(sandbox)
            monkeypatch.syspath_prepend(folder)
        elif block.language == "console":
            for arguments in _commands(block):
                # Every command is a process of its own, which reads the module as it is.
                sys.modules.pop(module, None)
                assert not app(arguments, standalone_mode=False)
                printed = capsys.readouterr().out
        elif block.language == "text":
            assert block.text == printed
        elif block.language == "python":
            assert any(block.text in path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
        elif block.language == "yaml":
            sys.modules.pop(module, None)
            _recipe(yaml.safe_load(block.text), load_registry())
    assert (sandbox / "runs" / "medians" / "report.html").is_file()
    scope: dict[str, Any] = {}
    test = folder / "tests" / f"test_{module}.py"
    exec(compile(test.read_text(encoding="utf-8"), str(test), "exec"), scope)
    scope["test_everything_it_provides_obeys_the_laws"]()


def test_the_strategy_that_is_shown_to_need_the_model_costs_harmless_prompts_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text,) = [block.text for block in _blocks(PLUGIN_PAGE) if "class Descent" in block.text]
    (tmp_path / "descent_shown.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    known = load_registry([importlib.import_module("descent_shown")], entry_points=False)
    prompts = {"harmful": "tiny:harmful", "harmless": "tiny:harmless", "train": 12, "validation": 8, "test": 4}
    shown = {"name": "shown", "model": {"id": "tiny:llama"}, "prompts": prompts}
    costs = []
    for find in ("descent", "difference_in_means"):
        recipe = _recipe({**shown, "find": find, "select": {"selector": "fixed", "layer": 4}}, known)
        execute(make_plan(recipe, tmp_path, known), tmp_path / find, until="select")
        rows = json.loads((tmp_path / find / "scores.json").read_text(encoding="utf-8"))
        costs.append(next(row["kl_nats"] for row in rows if row["status"] == "chosen"))
    assert costs[0] < 0.8 * costs[1]
