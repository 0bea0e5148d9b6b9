"""Wheels of plugins, installed beside that of refusalkit, take part in everything; one that raises harms nothing.

`.ci/run` runs this in an environment where those in `wheels/` are installed, from a folder that also holds the one that
raises, in `broken/`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from refusalkit.errors import InputError
from refusalkit.recipe import json_schema
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import load_registry

REGISTRY = load_registry()
PLUGINS = sorted({owner.name for owner in REGISTRY.owners.values()} - {"refusalkit"})
NAMED = [
    (hook.removeprefix("refusalkit_"), name) for (hook, name), owner in REGISTRY.owners.items() if owner.name in PLUGINS
]
#: Where a recipe names what a hook provides.
KEYS = {
    "strategies": "find={}",
    "selectors": "select={}",
    "interventions": "evaluate.interventions=[none, {}]",
    "metrics": "evaluate.metrics=[{}]",
}
#: What has to be said of those that have keys without a default.
REQUIRED = {"rubric": "{{metric: {}, base_url: 'http://127.0.0.1:9/v1', model: m}}"}
RECIPE = "name: wheel\nmodel: {id: 'tiny:llama'}\nprompts: {harmful: 'tiny:harmful', harmless: 'tiny:harmless'}\n"
SMALL = ["prompts.train=16", "prompts.validation=8", "prompts.test=8"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "wheel.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def refusalkit(*line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("refusalkit")
    return subprocess.run([script, *line], env={**os.environ, **environment}, capture_output=True, text=True)


def test_every_plugin_is_installed_and_works() -> None:
    wheels = {wheel.name.partition("-")[0].replace("_", "-") for wheel in Path("wheels").glob("refusalkit_*.whl")}
    assert wheels == set(PLUGINS) != set()
    assert REGISTRY.broken == ()


@pytest.mark.parametrize(("kind", "name"), [named for named in NAMED if named[0] in KEYS])
def test_names_are_valid_in_recipes_in_the_schema_and_in_suggestions(kind: str, name: str, recipe: Path) -> None:
    load_recipe(recipe, REGISTRY, [KEYS[kind].format(REQUIRED.get(name, "{}").format(name))])
    assert f'"{name}"' in json.dumps(json_schema(REGISTRY))
    with pytest.raises(InputError) as caught:
        load_recipe(recipe, REGISTRY, [KEYS[kind].format(f"{name}x")])
    assert f"did you mean '{name}'?" in str(caught.value.hint)


def test_adapters_are_listed_and_suggested() -> None:
    done = refusalkit("adapters")
    listed = {line.split()[0] for line in done.stdout.splitlines() if line}
    assert {name for kind, name in NAMED if kind == "adapters"} <= listed
    done = refusalkit("adapters", "tiny:llama", "--adapter", "template_smollm")
    assert (done.returncode, "did you mean 'template_smollm3'?" in done.stderr) == (2, True)


@pytest.mark.parametrize("name", [name for kind, name in NAMED if kind == "commands"])
def test_commands_are_listed_and_explain_themselves(name: str) -> None:
    assert f" {name} " in refusalkit("--help").stdout
    assert f"refusalkit {name} [OPTIONS]" in refusalkit(name, "--help").stdout


@pytest.mark.parametrize("plugin", PLUGINS)
def test_plugins_obey_the_laws(plugin: str) -> None:
    done = refusalkit("plugin", "check", plugin)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hold" in done.stdout


def test_a_recipe_runs_with_a_strategy_from_a_wheel(recipe: Path, tmp_path: Path) -> None:
    settings = [part for setting in ["find=template", *SMALL] for part in ("--set", setting)]
    done = refusalkit("run", str(recipe), "--until", "find", "--out", str(tmp_path / "run"), *settings)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "find" / "artifact.json").is_file()


def test_the_wheel_writes_a_new_plugin_and_brings_the_tests_to_pytest(tmp_path: Path) -> None:
    done = refusalkit("plugin", "new", "fresh", "--out", str(tmp_path))
    assert done.stdout == f"{tmp_path / 'refusalkit-fresh'}\n"
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        str(tmp_path / "refusalkit-fresh"),
        "--refusalkit=refusalkit-template",
    ]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert "4 passed" in done.stdout, done.stdout + done.stderr


def test_a_plugin_that_raises_at_import_leaves_everything_else_working(recipe: Path, tmp_path: Path) -> None:
    (wheel,) = Path("broken").glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)]
    subprocess.run(pip, check=True)
    path = str(tmp_path / "site")
    done = refusalkit("plugins", PYTHONPATH=path)
    assert done.returncode == 1
    assert "refusalkit-broken 0.1.0: broken\n  RuntimeError: it raises (refusalkit_broken.py:" in done.stdout
    assert all(name in done.stdout for _, name in NAMED)
    done = refusalkit("validate", str(recipe), PYTHONPATH=path)
    assert done.stdout == f"{recipe}: ok\n"
    assert json.loads(refusalkit("schema", PYTHONPATH=path).stdout) == json_schema(REGISTRY)
    done = refusalkit("plan", str(recipe), "--set", "find=template", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    done = refusalkit("plugin", "check", "broken", PYTHONPATH=path)
    assert (done.returncode, "cannot be loaded: RuntimeError: it raises" in done.stderr) == (1, True)
