"""A plugin is started by one command, checked by another, and by pytest where that is asked for."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from refusalkit import hookimpl
from refusalkit.adapter import Adapter, Matrix, Write
from refusalkit.cli import app
from refusalkit.errors import InputError, RunError
from refusalkit.plugin.check import Checked, check_text, installed_plugin
from refusalkit.plugin.new import new_plugin
from refusalkit.recipe import json_schema
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry, load_registry
from refusalkit.testing import broken_laws, check_command, random_model
from refusalkit.testing.law_sets import law_sets
from tests.conftest import ROOT, SMALL, install

#: Breaks laws in every way there is; the second strategy raises, and two adapters and the selector cannot be checked.
LAWLESS = '''\
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from refusalkit import hookimpl
from refusalkit.adapter import Adapter, Matrix, Write
from refusalkit.prompt_source import PromptSource
from refusalkit.selector import Selector
from refusalkit.strategy import Strategy

WRITES = (
    Write("self_attn", (Matrix("self_attn.o_proj.weight"),)),
    Write("post_attention_layernorm", (Matrix("mlp.down_proj.weight"),)),
)


class Backwards(Strategy):
    """Find nothing of use."""

    strategy: Literal["backwards"] = "backwards"

    def find(self, harmful, harmless):
        return (harmful.mean - harmless.mean).flip(-1)


class Raising(Strategy):
    """Stumble."""

    strategy: Literal["raising"] = "raising"

    def find(self, harmful, harmless):
        raise KeyError("no such thing")


class Demanding(Selector):
    """Want an option that nobody can guess."""

    selector: Literal["demanding"] = "demanding"
    depth: int

    def select(self, inputs, subject):
        raise AssertionError


@hookimpl
def refusalkit_adapters():
    return (
        Adapter("misplaced", ("SmolLM3ForCausalLM",), *WRITES),
        Adapter("unheard_of", ("NoSuchModelForCausalLM",), *WRITES),
        Adapter("unbuildable", ("SmolLM3ForCausalLM",), *WRITES, tiny={"layer_types": ["nonsense"] * 4}),
    )


@hookimpl
def refusalkit_strategies():
    return (Backwards, Raising)


@hookimpl
def refusalkit_selectors():
    return (Demanding,)


@hookimpl
def refusalkit_prompt_sources():
    return (PromptSource("Odd One", "", lambda address, folder: {"everything": ("",)}),)
'''


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a folder on the path from which plugins are loaded, all of them."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delenv("REFUSALKIT_PLUGINS")
    known = set(sys.modules)
    yield folder
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


COMMANDS = '''
from typing import Annotated

import typer

from refusalkit import hookimpl
from refusalkit.command import Command
from refusalkit.errors import InputError


def greet(name: Annotated[str, typer.Argument(help="Who is meant.")]) -> None:
    """Greet someone."""
    if name == "nobody":
        raise InputError("there is nobody", where="NAME", hint="name someone")
    print(f"hello {name}")


def unspoken(name: str) -> None:
    print(name)


@hookimpl
def refusalkit_commands():
    return (Command("greet", greet), Command("Not Typed", unspoken))
'''


@pytest.fixture
def lawless(site: Path) -> ModuleType:
    """Install the plugin that breaks laws."""
    (site / "lawless.py").write_text(LAWLESS, encoding="utf-8")
    install(site, "refusalkit-lawless", "lawless")
    return importlib.import_module("lawless")


@pytest.fixture
def made(site: Path, registry: Registry) -> ModuleType:
    """Write a new plugin and install it."""
    folder = new_plugin("mean-of-medians", site, registry)
    (folder / "refusalkit_mean_of_medians.py").rename(site / "refusalkit_mean_of_medians.py")
    install(site, "refusalkit-mean-of-medians", "refusalkit_mean_of_medians")
    return importlib.import_module("refusalkit_mean_of_medians")


def command(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int, list[str]]:
    """Run a command; give its exit status and what it printed."""
    status = app(line, standalone_mode=False)
    return status or 0, capsys.readouterr().out.splitlines()


# A new plugin


def test_the_template_in_the_repository_is_what_the_command_writes(tmp_path: Path, registry: Registry) -> None:
    def files(folder: Path) -> dict[str, str]:
        found = (path for path in folder.rglob("*") if path.is_file() and not path.parts[-2].startswith(("__", ".")))
        return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in found}

    written = files(new_plugin("template", tmp_path, registry))
    assert len(written) == 4
    shown = files(ROOT / "plugins" / "refusalkit-template")
    assert shown == written, "run: refusalkit plugin new template --out plugins, without the old one"


def test_a_new_plugin_takes_part_in_recipes_schema_and_hints(made: ModuleType, recipe_file: Path) -> None:
    registry = load_registry()
    assert str(registry.owner("refusalkit_strategies", "mean_of_medians")) == "refusalkit-mean-of-medians 1.0"
    assert "mean_of_medians_smollm3" in registry.adapters
    assert "'mean_of_medians'" in str(json_schema(registry)["properties"]["find"])
    recipe_file.write_text(f"{SMALL}find: {{strategy: mean_of_medians, scale: 2}}\n", encoding="utf-8")
    found = load_recipe(recipe_file, registry).find
    assert isinstance(found, made.DifferenceInMedians)
    assert found.model_dump(exclude_unset=True) == {"strategy": "mean_of_medians", "scale": 2.0}
    recipe_file.write_text(f"{SMALL}find: mean_of_median\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_recipe(recipe_file, registry)
    assert "did you mean 'mean_of_medians'?" in str(caught.value.hint)


def test_a_new_plugin_obeys_the_laws(made: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert broken_laws(made) == []
    for name in ("mean-of-medians", "refusalkit-mean-of-medians", "Refusalkit_Mean.of_medians"):
        status, lines = command(capsys, "plugin", "check", name)
        assert status == 0
    assert [line.split() for line in lines if line.startswith("strategy")] == [
        ["strategy", "mean_of_medians", "5", "laws", "hold"]
    ]
    assert sum(line.endswith("7 laws hold") for line in lines) == 2


def test_two_new_plugins_live_side_by_side(made: ModuleType) -> None:
    site = Path(str(made.__file__)).parent
    folder = new_plugin("other", site, load_registry())
    (folder / "refusalkit_other.py").rename(site / "refusalkit_other.py")
    assert "other" in load_registry([importlib.import_module("refusalkit_other")]).strategies


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Mean Of_Medians", "did you mean 'mean-of-medians'?"),
        ("-medians-", "did you mean 'medians'?"),
        ("refusalkit-Medians", "did you mean 'medians'?"),
        ("2nd", "words of lower-case letters and digits"),
        ("../medians", "did you mean 'medians'?"),
        ("", "words of lower-case letters and digits"),
        ("pca", "choose another name"),
        ("svd-subspace", "choose another name"),
        ("kl", "choose another name"),
        ("m" * 300, "choose another place"),
    ],
)
def test_a_name_that_cannot_be_used_is_bad_input(name: str, hint: str, tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(InputError) as caught:
        new_plugin(name, tmp_path, registry)
    assert hint in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "occupy", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")], ids=["folder", "file", "dangling link"]
)
def test_nothing_that_exists_is_written_over(occupy: Callable[[Path], Any], tmp_path: Path, registry: Registry) -> None:
    occupy(tmp_path / "refusalkit-medians")
    with pytest.raises(InputError, match="exists already"):
        new_plugin("medians", tmp_path, registry)
    assert [path.name for path in tmp_path.rglob("*")] == ["refusalkit-medians"]


def test_where_nothing_can_be_written_nothing_is(recipe_file: Path, registry: Registry) -> None:
    with pytest.raises(InputError, match="cannot be written: Not a directory"):
        new_plugin("medians", recipe_file, registry)
    assert recipe_file.read_text(encoding="utf-8") == SMALL


# What breaks the laws


def test_every_broken_law_is_in_the_table(lawless: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = command(capsys, "plugin", "check", "lawless")
    assert status == 1
    assert max(map(len, lines)) <= 80
    table, _, details = (part.strip() for part in "\n".join(lines).partition("\n\nadapter"))
    states = [tuple(line.split()[1:2] + line.split()[-1:]) for line in table.splitlines()[3:]]
    assert states == [
        *[("misplaced", "BROKEN")] * 2,
        *[("unheard_of", "checked")] * 2,
        *[("unbuildable", "checked")] * 2,
        ("backwards", "BROKEN"),
        ("raising", "BROKEN"),
        ("demanding", "checked"),
        ("source", "BROKEN"),
    ]
    said = " ".join(details.split())
    for text in (
        "misplaced on SmolLM3ForCausalLM: BROKEN: resid_pre + attn_out + mlp_out == resid_post",
        "adapter unheard_of: transformers has no NoSuchModelForCausalLM; give settings in `Adapter.tiny`",
        "adapter unbuildable: StrictDataclassClassValidationError: ",
        "strategy backwards: BROKEN: recovers a planted direction",
        "strategy raising: it raises KeyError: 'no such thing'",
        "selector demanding: the option 'depth' has neither a default nor an example",
        "source Odd One: BROKEN: its scheme can stand before a colon",
        "source Odd One: BROKEN: its help is one line",
        "source Odd One: BROKEN: an address that leads nowhere is bad input, or gives prompts",
    ):
        assert text in said


def test_settings_of_an_adapter_give_its_models_their_shape() -> None:
    attention = Write("self_attn", (Matrix("self_attn.o_proj.weight"),))
    experts = (Matrix("mlp.experts.down_proj", 1), Matrix("mlp.shared_experts.down_proj.weight"))
    tiny = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    writes = (Write("mlp", experts), Write("mlp", (Matrix("mlp.down_proj.weight"),)))
    adapter = Adapter("glm4_moe", ("Glm4MoeForCausalLM",), attention, writes, tiny=tiny)
    plugin = SimpleNamespace(__name__="glm4_moe", refusalkit_adapters=hookimpl(lambda: (adapter,)))
    assert broken_laws(plugin) == []
    with pytest.raises(InputError, match=r"would have \d+ M parameters"):
        random_model("Glm4MoeForCausalLM", num_hidden_layers=40)


# Which plugin


def test_an_unknown_name_gets_the_nearest_one(made: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for written, meant in (
        ("refusalkit-mean-of-median", "mean-of-medians"),
        ("mean_medians", "mean-of-medians"),
        ("refusalkt", "refusalkit"),
    ):
        with pytest.raises(InputError, match=f"no plugin is called '{written}'") as caught:
            command(capsys, "plugin", "check", written)
        assert str(caught.value.hint).startswith(f"did you mean '{meant}'?")


def test_a_broken_plugin_is_told_from_an_unknown_one(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "stumbling.py").write_text("import os\n1 / 0\n", encoding="utf-8")
    install(site, "refusalkit-stumbling", "stumbling")
    with pytest.raises(RunError) as caught:
        command(capsys, "plugin", "check", "stumbling")
    assert caught.value.message == "cannot be loaded: ZeroDivisionError: division by zero (stumbling.py:2)"
    status, lines = command(capsys, "plugins")
    assert status == 1
    assert lines[-2:] == ["refusalkit-stumbling 1.0: broken", "  ZeroDivisionError: division by zero (stumbling.py:2)"]


def test_what_is_built_in_can_be_checked_and_fits_the_table(registry: Registry) -> None:
    owner = installed_plugin(registry, "refusalkit")
    sets = law_sets(registry, owner.name)
    assert {(laws.kind, laws.name) for laws in sets} >= {("adapter", "gemma3_multimodal"), ("prompt source", "hf")}
    lines = check_text(owner, [Checked(laws, 7) for laws in sets]).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.endswith("7 laws hold") for line in lines) == len(sets)


# pytest


@pytest.fixture
def pytest_run(site: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Give a function that runs pytest where refusalkit's plugin is installed, beside a test of nobody's."""
    install(site, "refusalkit-for-pytest", "refusalkit.pytest_plugin", group="pytest11")
    (tmp_path / "test_other.py").write_text(
        "import sys\n\n\ndef test_other():\n    assert 'refusalkit.pytest_plugin' in sys.modules\n"
        "    assert not {'torch', 'pydantic', 'refusalkit.registry'} & sys.modules.keys()\n",
        encoding="utf-8",
    )

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(site), str(ROOT)])
        line = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *options]
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return run


def test_pytest_checks_the_laws_where_it_is_asked_to(
    lawless: ModuleType, pytest_run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = pytest_run("-v", "-k", "not other", "--refusalkit=lawless")
    outcomes = dict(re.findall(r"^(refusalkit-lawless::.+?) (PASSED|FAILED|SKIPPED)", done.stdout, re.MULTILINE))
    states = {name.partition("::")[2]: state for name, state in outcomes.items()}
    assert states == {
        "adapter misplaced on SmolLM3ForCausalLM": "FAILED",
        "adapter misplaced on SmolLM3ForCausalLM, tied": "FAILED",
        "adapter unheard_of on NoSuchModelForCausalLM": "SKIPPED",
        "adapter unheard_of on NoSuchModelForCausalLM, tied": "SKIPPED",
        "adapter unbuildable on SmolLM3ForCausalLM": "SKIPPED",
        "adapter unbuildable on SmolLM3ForCausalLM, tied": "SKIPPED",
        "strategy backwards": "FAILED",
        "strategy raising": "FAILED",
        "selector demanding": "SKIPPED",
        "prompt source Odd One": "FAILED",
    }
    assert "BROKEN: recovers a planted direction (cosine): " in done.stdout
    assert "lawless.py:33: KeyError" in done.stdout
    assert done.returncode == 1


def test_pytest_imports_nothing_for_those_who_do_not_ask(
    pytest_run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = pytest_run()
    assert (done.returncode, "1 passed" in done.stdout) == (0, True)


def test_pytest_refuses_a_distribution_that_is_not_there(
    lawless: ModuleType, pytest_run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = pytest_run("--refusalkit", "refusalkit-lawles")
    assert done.returncode == 4
    assert "no plugin is called 'refusalkit-lawles'\nhint: did you mean 'lawless'?" in done.stderr


# Commands of plugins


@pytest.fixture
def polite(site: Path) -> Path:
    """Install the plugin that has commands."""
    (site / "polite.py").write_text(COMMANDS, encoding="utf-8")
    install(site, "refusalkit-polite", "polite")
    return site


def typed(site: Path, *line: str) -> subprocess.CompletedProcess[str]:
    """Type a command where plugins are installed."""
    environment = {key: value for key, value in os.environ.items() if key != "REFUSALKIT_PLUGINS"}
    whole = [sys.executable, "-m", "refusalkit", *line]
    return subprocess.run(whole, env={**environment, "PYTHONPATH": str(site)}, capture_output=True, text=True)


def test_a_command_of_a_plugin_is_one_of_ours(polite: Path) -> None:
    assert typed(polite, "greet", "you").stdout == "hello you\n"
    refused = typed(polite, "greet", "nobody")
    assert (refused.returncode, refused.stderr) == (2, "error: NAME: there is nobody\nhint: name someone\n")
    shown = typed(polite, "--help").stdout
    assert "Greet someone." in shown[shown.index("From refusalkit-polite 1.0") :]
    assert "Did you mean 'greet'" in typed(polite, "gret", "you").stderr


def test_a_plugin_cannot_take_a_name_of_ours(polite: Path) -> None:
    (polite / "polite.py").write_text(COMMANDS.replace('"greet"', '"run"'), encoding="utf-8")
    refused = typed(polite, "--help")
    assert refused.returncode == 2
    assert "refusalkit-polite 1.0: refusalkit has a command called 'run' itself" in refused.stderr


def test_a_command_obeys_the_laws(polite: Path) -> None:
    commands = importlib.import_module("polite").refusalkit_commands()
    broken = [[law.name for law in check_command(command) if not law.holds] for command in commands]
    assert broken == [[], ["its name can be typed", "its docstring says what it does"]]
