"""The house stays as it was drawn: who may import whom, how large things may grow, what may never be called."""

from __future__ import annotations

import ast
import importlib.resources
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "refusalkit"
MODULES = sorted(PACKAGE.rglob("*.py"))

#: From the bottom up: a module imports from its own layer and from those below it. Packages count as one.
LAYERS = (
    ("errors", "algebra", "intervals", "paired", "progress"),
    ("adapter", "strategy", "selector", "intervention", "metric", "prompt_source", "command", "arithmetic", "analysis"),
    ("hookspecs", "artifacts", "agreement", "store", "prompt_split", "template", "tiny"),
    ("builtin",),
    ("registry",),
    ("recipe", "recipe_faults", "recipe_file", "sweep"),
    ("checkpoint",),
    ("engine",),
    ("stages", "testing", "sharing"),
    ("limits", "plan"),
    ("run_directory", "sweep_folder", "report"),
    ("remote_cost", "server_status"),
    ("adapter_check", "bake", "pipeline", "plugin"),
    ("batch", "worker", "plan_text"),
    ("many", "python", "reproduction", "interchange", "monitor", "audit"),
    ("cli", "pytest_plugin"),
    ("__main__", "reference"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

#: Whatever a stranger's code or files raise there becomes a message.
MAY_CATCH_EVERYTHING = {"registry.py", "checkpoint.py", "torch_file.py", "law_sets.py", "check.py"}
VAGUE = {"utils", "util", "core", "base", "manager", "helpers", "common", "misc"}


@dataclass(frozen=True)
class Import:
    """Hold one imported module; one behind `TYPE_CHECKING` only names types."""

    module: str
    line: int
    only_types: bool


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def unit_of(path: Path) -> str:
    """Return the module or package directly below `refusalkit` that a file belongs to."""
    return name_of(path).partition("/")[0]


def imports(path: Path) -> Iterator[Import]:
    """Find every import of a file, inside functions too."""

    def visit(node: ast.AST, only_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            types = only_types or (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"))
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, types) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: imports are written in full"
                # `from refusalkit import plan` imports a module, `from refusalkit.plan import Plan` a name of one.
                for alias in child.names:
                    yield Import(f"{child.module}.{alias.name}", child.lineno, types)
            yield from visit(child, types)

    return visit(ast.parse(path.read_text(encoding="utf-8")), only_types=False)


def ours(path: Path) -> Iterator[tuple[Import, str]]:
    """Find the imports of our own modules, each with the unit it is of."""
    for found in imports(path):
        parts = found.module.split(".")
        if parts[0] == "refusalkit" and len(parts) > 1 and parts[1] in LEVEL:
            yield found, parts[1]


def trees() -> Iterator[tuple[Path, ast.Module]]:
    return ((path, ast.parse(path.read_text(encoding="utf-8"))) for path in MODULES)


# Who imports whom


def test_every_module_has_a_layer() -> None:
    assert {unit_of(path) for path in MODULES} - {"__init__"} == set(LEVEL)


def test_no_layer_imports_a_higher_one() -> None:
    wrong = [
        f"{name_of(path)}:{found.line} imports {found.module}"
        for path in MODULES
        if unit_of(path) in LEVEL
        for found, unit in ours(path)
        if not found.only_types and LEVEL[unit] > LEVEL[unit_of(path)]
    ]
    assert wrong == []


def test_no_module_imports_itself_around_a_corner() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        unit = unit_of(path)
        graph.setdefault(unit, set()).update(to for found, to in ours(path) if not found.only_types and to != unit)
    TopologicalSorter(graph).prepare()


def test_nnsight_stays_in_the_engine() -> None:
    users = {unit_of(path) for path in MODULES for found in imports(path) if found.module.split(".")[0] == "nnsight"}
    assert users == {"engine"}


def test_algebra_imports_torch_only() -> None:
    # Its source is shipped to machines where refusalkit is not installed.
    modules = {found.module.split(".")[0] for found in imports(PACKAGE / "algebra.py")}
    assert modules - {"__future__", "collections", "math"} == {"torch"}


@pytest.mark.parametrize(
    "name",
    [
        "errors",
        "recipe",
        "recipe_file",
        "sweep",
        "recipe_faults",
        "registry",
        "hookspecs",
        "pytest_plugin",
        *(f"cli/{path.stem}" for path in sorted((PACKAGE / "cli").glob("*.py"))),
    ],
)
def test_what_starts_at_once_imports_nothing_heavy_at_its_top(name: str) -> None:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    top = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {str(node.module).split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert top.isdisjoint({"torch", "transformers", "nnsight", "safetensors", "numpy", "altair", "jinja2", "rich"})


# How large


def test_no_module_is_over_five_hundred_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_no_function_is_over_sixty_lines() -> None:
    long = [
        f"{name_of(path)}:{node.lineno} {node.name} has {length} lines"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > 60
    ]
    assert long == []


def test_modules_are_named_for_what_they_hold() -> None:
    assert [name_of(path) for path in MODULES if path.stem in VAGUE or path.parent.name in VAGUE] == []


# What may never be called


def test_nothing_runs_code_from_a_file() -> None:
    called = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system"}
    loaded = {"pickle", "marshal", "shelve", "dill", "joblib"}
    wrong = [
        f"{name_of(path)}:{node.lineno} calls {ast.unparse(node.func)}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in called
    ]
    wrong += [
        f"{name_of(path)}:{node.lineno} may run what it loads"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "torch.load"
        and "weights_only=True" not in map(ast.unparse, node.keywords)
    ]
    wrong += [
        f"{name_of(path)}:{found.line} imports {found.module}"
        for path in MODULES
        for found in imports(path)
        if found.module.split(".")[0] in loaded
    ]
    assert wrong == []


def test_only_what_meets_strangers_catches_everything() -> None:
    wrong = []
    for path, tree in trees():
        allowed = {"Exception"} if path.name in MAY_CATCH_EVERYTHING else set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                names = {"BaseException"} if node.type is None else set(ast.unparse(node.type).strip("()").split(", "))
                if (names & {"Exception", "BaseException"}) - allowed:
                    wrong.append(f"{name_of(path)}:{node.lineno}")
    assert wrong == []


# How it reads


def documented(tree: ast.Module) -> Iterator[tuple[int, str, str | None]]:
    """Find what a reader may use: line, name and docstring of the module and its public functions and classes."""
    yield 1, "the module", ast.get_docstring(tree)
    for node in tree.body:
        # A hook is explained where it is declared.
        if (
            isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and "hookimpl" not in map(ast.unparse, node.decorator_list)
        ):
            yield node.lineno, node.name, ast.get_docstring(node)


def test_everything_public_says_what_it_is_for() -> None:
    wrong = []
    for path, tree in trees():
        for line, name, text in documented(tree):
            first = (text or "").split("\n\n")[0]
            if not first[:1].isupper() or not first.rstrip().endswith((".", ":")):
                wrong.append(f"{name_of(path)}:{line} {name}")
    assert wrong == []


# What is installed


@pytest.mark.parametrize(
    "name",
    [
        "py.typed",
        "report/style.css",
        "report/page.js",
        "report/template.html.j2",
        "reproduction/published.json",
        "reproduction/gemma-2b-it.yaml",
        *[f"builtin/prompts/{name}.jsonl" for name in ("harmful", "harmless", "over_refusal")],
        *[f"plugin/template/{name}.j2" for name in ("README.md", "pyproject.toml", "module.py", "test_module.py")],
        *[f"tiny/checkpoints/llama/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")],
    ],
)
def test_data_files_are_in_the_package(name: str) -> None:
    file = importlib.resources.files("refusalkit").joinpath(*name.split("/"))
    assert file.is_file()
    # What git ignores, the build backend leaves out of the wheel.
    if (ROOT / ".git").exists():
        ignored = subprocess.run(["git", "check-ignore", "-q", f"refusalkit/{name}"], cwd=ROOT)
        assert ignored.returncode == 1
