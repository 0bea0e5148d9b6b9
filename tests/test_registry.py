"""What is installed is known by name and owner, and no plugin can break the host or change a recipe in silence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from refusalkit import hookimpl
from refusalkit.builtin.strategies import STRATEGIES
from refusalkit.errors import InputError
from refusalkit.prompt_source import PromptSource
from refusalkit.recipe import json_schema
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry, load_registry
from refusalkit.strategy import Captured, Strategy
from tests.conftest import SMALL, install


class Median(Strategy):
    """Take the difference of medians."""

    strategy: Literal["median"] = "median"
    trim: float = 0.1
    """How much to cut off."""

    def find(self, harmful: Captured, harmless: Captured) -> Any:
        return harmful.mean - harmless.mean


class Unfinished(Strategy):
    """Lack the method that finds."""

    strategy: Literal["unfinished"] = "unfinished"


class Loose(Strategy):
    """Have a name that is not a literal."""

    strategy: str = "loose"

    def find(self, harmful: Captured, harmless: Captured) -> Any:
        return harmful.mean


def plugin(name: str, **hooks: Any) -> Any:
    """Make a plugin whose hooks return the given values."""

    def returning(value: Any) -> Any:
        return hookimpl(lambda: value)

    return SimpleNamespace(__name__=name, **{hook: returning(value) for hook, value in hooks.items()})


def refused(*plugins: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        load_registry(plugins, entry_points=False)
    assert caught.value.hint
    return caught.value


def test_everything_built_in_is_listed_with_its_owner(registry: Registry) -> None:
    names = {kind: [name for of, name in registry.owners if of == f"refusalkit_{kind}"] for kind in vars(registry)}
    assert {"llama", "yi", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"} <= set(names["adapters"])
    assert "difference_in_means" in names["strategies"]
    assert "causal" in names["selectors"]
    assert {"none", "ablate", "steer", "orthogonalize"} <= set(names["interventions"])
    assert {"refusal_rate", "refusal_score", "kl", "cross_entropy"} <= set(names["metrics"])
    assert {"builtin", "tiny", "file", "hf"} <= set(names["prompt_sources"])
    assert {owner.name for owner in registry.owners.values()} == {"refusalkit"}
    assert registry.broken == ()


def test_the_registry_cannot_be_changed(registry: Registry) -> None:
    with pytest.raises(TypeError):
        registry.strategies["mine"] = Median  # type: ignore[index]


def test_a_plugin_takes_part_in_recipes_schema_and_hints(recipe_file: Path) -> None:
    registry = load_registry([plugin("mine", refusalkit_strategies=(Median,))], entry_points=False)
    assert str(registry.owner("refusalkit_strategies", "median")) == "mine unpackaged"
    recipe_file.write_text(f"{SMALL}find: {{strategy: median, trim: 0.2}}\n", encoding="utf-8")
    found = load_recipe(recipe_file, registry).find
    assert isinstance(found, Median)
    assert found.model_dump(exclude_unset=True) == {"strategy": "median", "trim": 0.2}
    assert "'median'" in str(json_schema(registry)["properties"]["find"])
    for written, hint in (("meadian", "did you mean 'median'?"), ("{strategy: median, trin: 1}", "'trim'?")):
        recipe_file.write_text(f"{SMALL}find: {written}\n", encoding="utf-8")
        with pytest.raises(InputError) as caught:
            load_recipe(recipe_file, registry)
        assert hint in str(caught.value.hint)


def test_a_plugin_does_not_stay(registry: Registry) -> None:
    load_registry([plugin("mine", refusalkit_strategies=(Median,))], entry_points=False)
    assert "median" not in registry.strategies
    assert "median" not in load_registry(entry_points=False).strategies


def test_a_name_provided_twice_names_both_owners() -> None:
    error = refused(plugin("mine", refusalkit_strategies=STRATEGIES[:1]))
    assert error.message.startswith("'difference_in_means' is provided by both refusalkit ")
    assert error.message.endswith(" and mine unpackaged")
    both = [plugin(name, refusalkit_strategies=(Median,)) for name in ("one", "two")]
    assert refused(*both).message == "'median' is provided by both one unpackaged and two unpackaged"


def test_a_misspelt_hook_is_an_error() -> None:
    error = refused(plugin("mine", refusalkit_strategy=(Median,)))
    assert "refusalkit_strategy" in error.message
    assert error.where == "mine unpackaged"


@pytest.mark.parametrize(
    ("hook", "value", "message"),
    [
        ("refusalkit_strategies", None, "returned None, not a list or tuple"),
        ("refusalkit_strategies", "median", "returned 'median', not a list or tuple"),
        ("refusalkit_strategies", [Median()], "which is no subclass of Strategy"),
        ("refusalkit_strategies", [int], "which is no subclass of Strategy"),
        ("refusalkit_strategies", [Unfinished], "Unfinished, which does not define find"),
        ("refusalkit_strategies", [Loose], "Loose has no name"),
        ("refusalkit_metrics", [Median], "which is no subclass of Metric"),
        ("refusalkit_adapters", ["llama"], "which is no Adapter"),
        ("refusalkit_prompt_sources", [PromptSource], "which is no PromptSource"),
        ("refusalkit_commands", [print], "which is no Command"),
    ],
)
def test_what_no_recipe_could_use_is_refused(hook: str, value: Any, message: str) -> None:
    assert message in refused(plugin("mine", **{hook: value})).message


# Installed plugins, in a process of their own with a distribution folder on its path

GOOD = """\
from typing import Literal
from refusalkit import hookimpl
from refusalkit.strategy import Strategy

class Median(Strategy):
    "Take the difference of medians."
    strategy: Literal["median"] = "median"

    def find(self, harmful, harmless):
        return harmful.mean - harmless.mean

@hookimpl
def refusalkit_strategies():
    return (Median,)
"""
RAISES = "from refusalkit import hookimpl\n@hookimpl\ndef refusalkit_strategies():\n    raise KeyError('oh no')\n"
BROKEN = {
    "imports": (
        "import no_such_module_anywhere\n",
        "ModuleNotFoundError: No module named 'no_such_module_anywhere' (plugin_imports.py:1)",
    ),
    "exits": ("raise SystemExit(3)\n", "SystemExit: 3 (plugin_exits.py:1)"),
    "raises": (RAISES, "KeyError: 'oh no' (plugin_raises.py:4)"),
    "syntax": ("def\n", "SyntaxError: invalid syntax (plugin_syntax.py, line 1)"),
    "silent": (RAISES.replace("@hookimpl\n", ""), "has no hook"),
    "garbage": (RAISES.replace("raise KeyError('oh no')", "return 7"), "returned 7, not a list or tuple"),
    "misspelt": (RAISES.replace("_strategies", "_strategy"), "unknown hook 'refusalkit_strategy'"),
    "argument": (RAISES.replace("strategies()", "strategies(manager)"), "PluginValidationError"),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install one plugin that works and one for every way to be broken."""
    folder = tmp_path_factory.mktemp("site")
    for name, source in {"good": GOOD, **{name: source for name, (source, _) in BROKEN.items()}}.items():
        (folder / f"plugin_{name}.py").write_text(source, encoding="utf-8")
        install(folder, f"dist-{name}", f"plugin_{name}")
    return folder


def installed(site: Path, *arguments: object, only: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "REFUSALKIT_PLUGINS"}
    environment |= {"PYTHONPATH": str(site)} | ({} if only is None else {"REFUSALKIT_PLUGINS": only})
    line = [sys.executable, "-m", "refusalkit", *map(str, arguments)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)


def listed(text: str) -> dict[str, str]:
    """Take the list of plugins apart: what is said of each below the line that names it."""
    said: dict[str, str] = {}
    for line in text.splitlines():
        if line[0] != " ":
            owner = line
        said[owner] = " ".join([*said.get(owner, "").split(), *line.split()]) if line != owner else ""
    return said


def test_broken_plugins_are_reported_and_the_others_work(site: Path) -> None:
    done = installed(site, "plugins")
    assert done.returncode == 1
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80
    said = listed(done.stdout)
    assert said["dist-good 1.0: ok"] == "strategies median"
    assert "strategies difference_in_means, harmfulness, " in said[next(iter(said))]
    assert said.keys() - {next(iter(said)), "dist-good 1.0: ok"} == {f"dist-{name} 1.0: broken" for name in BROKEN}
    for name, (_, message) in BROKEN.items():
        assert message in said[f"dist-{name} 1.0: broken"]


def test_an_installed_strategy_is_used_and_a_missing_one_blames_broken_plugins(site: Path, recipe_file: Path) -> None:
    recipe_file.write_text(f"{SMALL}find: median\n", encoding="utf-8")
    assert installed(site, "validate", recipe_file).stdout == f"{recipe_file}: ok\n"
    recipe_file.write_text(f"{SMALL}find: oh_no\n", encoding="utf-8")
    done = installed(site, "validate", recipe_file)
    assert done.returncode == 2
    assert "dist-raises is broken" in done.stderr


@pytest.mark.parametrize(
    ("only", "names"), [("", set()), ("dist-good", {"dist-good"}), ("dist-good, dist-x", {"dist-good"})]
)
def test_a_variable_says_which_plugins_to_load(site: Path, only: str, names: set[str]) -> None:
    done = installed(site, "plugins", only=only)
    assert done.returncode == 0
    assert {line.split()[0] for line in listed(done.stdout)} - {"refusalkit"} == names
