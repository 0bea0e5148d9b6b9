"""Execute what the documentation shows.

The convention: commands after `$ ` in a `console` block run, in order, in a folder of their own a page; commands in a
`bash` block are only checked against the command line, because they install, download or need a GPU. A block with
`title="NAME"` is a file of that name. A `yaml` block is a recipe, or a part of one.
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
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
import yaml

from refusalkit import reference
from refusalkit.builtin.adapters import LLAMA
from refusalkit.cli import app
from refusalkit.pipeline import execute
from refusalkit.plan import make_plan, read_pools
from refusalkit.recipe import Recipe, json_schema
from refusalkit.recipe_file import Source, check, load_recipe
from refusalkit.registry import Registry, load_registry
from refusalkit.testing import check_model_strategy, random_engine

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
METHODS = sorted((ROOT / "recipes" / "methods").glob("*.yaml"))
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


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry(entry_points=False)


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
        "yi-6b-chat.yaml",
    ]


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.name)
def test_every_method_runs_and_differs_from_the_others_in_one_line(path: Path, tmp_path: Path) -> None:
    kept = re.compile("^(# |name:|find:)")
    assert [line for line in path.read_text(encoding="utf-8").splitlines() if not kept.match(line)] == [
        line for line in METHODS[0].read_text(encoding="utf-8").splitlines() if not kept.match(line)
    ]
    registry = load_registry()
    changes = ["prompts.train=24", "prompts.validation=8", "prompts.test=8", "evaluate.max_new_tokens=4"]
    recipe = load_recipe(path, registry, changes)
    execute(make_plan(recipe, path.parent, registry), tmp_path / "run", until="evaluate")
    assert json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["choice"]


def test_every_strategy_that_needs_no_more_than_prompts_has_a_recipe(registry: Registry) -> None:
    shown = {load_recipe(path, registry).find.strategy for path in METHODS}
    assert shown == set(registry.strategies)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
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
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=recipe.schema.json\n")


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


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_link_leads_somewhere(page: Path) -> None:
    targets = [target for target, _ in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = sorted(re.findall(r"[\w./-]+\.md", text))
    assert listed == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_command_is_one(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    for block in _blocks(page):
        if block.language not in ("console", "bash"):
            continue
        for line in block.text.splitlines():
            assert block.language == "bash" or line.startswith("$ refusalkit "), line
        for arguments in _commands(block):
            _parse(group, arguments)


def _parse(group: Any, arguments: list[str]) -> None:
    """Let the command line read its arguments, without running anything; it raises for what it does not know."""
    name, *rest = arguments
    command = group.commands[name]
    if hasattr(command, "commands"):
        _parse(command, rest)
    else:
        command.make_context(name, rest)


@pytest.mark.parametrize("page", _with("yaml"), ids=_name)
def test_every_recipe_that_is_shown_validates(page: Path, registry: Registry, tmp_path: Path) -> None:
    plugin = _plugin(page, tmp_path)
    known = load_registry([plugin], entry_points=False) if plugin else registry
    for block in _blocks(page):
        if block.language == "yaml":
            _recipe(yaml.safe_load(block.text), known)


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


@pytest.mark.parametrize("page", [page for page in _with("console") if page.parent.name != "tutorial"], ids=_name)
def test_what_a_page_shows_runs(page: Path, sandbox: Path) -> None:
    _follow(page, sandbox)


def test_the_tutorial_can_be_followed(sandbox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _follow(DOCS / "tutorial" / "from-zero.md", sandbox)
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
    assert {entry.name for entry in (sandbox / "runs/quickstart").iterdir()} == listed


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shape(inner) for key, inner in value.items()}
    return [_shape(value[0])] if isinstance(value, list) else None


# -- the plugin -------------------------------------------------------------------------------------------------


def _plugin(page: Path, folder: Path) -> ModuleType | None:
    """Import the plugin that a page shows, if it shows one."""
    files = {block.title: block.text for block in _blocks(page) if block.title and block.language in ("python", "toml")}
    if "pyproject.toml" not in files:
        return None
    for name, text in files.items():
        (folder / str(name)).write_text(text, encoding="utf-8")
    points = tomllib.loads(files["pyproject.toml"])["project"]["entry-points"]["refusalkit"]
    (name,) = points.values()
    sys.path.insert(0, str(folder))
    try:
        sys.modules.pop(name, None)
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def test_the_plugin_that_is_shown_works(tmp_path: Path) -> None:
    plugin = _plugin(DOCS / "how-to" / "write-a-plugin.md", tmp_path)
    assert plugin is not None
    scope: dict[str, Any] = {}
    test = tmp_path / f"test_{plugin.__name__}.py"
    exec(compile(test.read_text(encoding="utf-8"), str(test), "exec"), scope)
    checks = [check for name, check in scope.items() if name.startswith("test_")]
    assert len(checks) == 3
    for run in checks:
        run()


def test_the_strategy_that_is_shown_to_run_the_model_improves_on_the_difference_in_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plugin(DOCS / "how-to" / "write-a-plugin.md", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    plugin = importlib.import_module("refusalkit_descent")
    known = load_registry([plugin], entry_points=False)
    laws = check_model_strategy(plugin.Descent(layer=2, steps=2), random_engine("LlamaForCausalLM", LLAMA))
    assert not [str(law) for law in laws if not law.holds]
    costs = []
    for find in ({"strategy": "descent", "layer": 5}, "difference_in_means"):
        shown = {"name": "shown", "find": find, "select": {"selector": "fixed", "layer": 5}}
        short = {**shown, "model": {"id": "tiny:llama"}}
        prompts = {"harmful": "tiny:harmful", "harmless": "tiny:harmless", "train": 12, "validation": 8, "test": 4}
        recipe = _recipe({**short, "prompts": prompts}, known)
        out = tmp_path / recipe.find.strategy
        execute(make_plan(recipe, tmp_path, known), out, until="select")
        costs.append(next(row["kl_nats"] for row in json.loads((out / "scores.json").read_text()) if row["kl_nats"]))
    assert costs[0] < 0.8 * costs[1]
