"""Keep every test offline, on one thread and away from installed plugins; lend small recipes and a finished run."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Before transformers is imported anywhere: it reads this once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor are checkpoints that a developer has downloaded.
os.environ["HF_HUB_CACHE"] = os.path.join(os.devnull, "no-cache")
# What else is installed on a developer's machine is not under test.
os.environ["REFUSALKIT_PLUGINS"] = ""
# In processes that tests start, too. Sums over another number of threads also round differently, in the last digit.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from refusalkit import tiny
from refusalkit.pipeline import execute
from refusalkit.plan import Plan, make_plan
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry, load_registry

ROOT = Path(__file__).parent.parent
#: What refusalkit knows by itself, loaded once.
BUILT_IN = load_registry(entry_points=False)

SMALL = """\
name: small
model:
  id: tiny:llama
prompts:
  harmful: tiny:harmful
  harmless: tiny:harmless
  train: 16
  validation: 8
  test: 8
evaluate:
  interventions: [none, ablate, steer, orthogonalize]
  max_new_tokens: 8
"""

Copy = Callable[..., Path]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Compute on one thread: a worker runs on every core, and threads that wait for each other's cores spin."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that opens a connection to anywhere but this machine, even where the library catches the error."""
    tried: list[Any] = []
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and not str(address[0]).startswith(("127.", "::1", "localhost")):
            tried.append(address)
            raise OSError(f"a test tried to connect to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    yield
    assert not tried, f"connections were tried: {tried}"


@pytest.fixture(scope="session")
def registry() -> Registry:
    """Give what refusalkit knows by itself."""
    return BUILT_IN


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """Give the path of a recipe that runs in a few seconds."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return path


@pytest.fixture
def plan_of(recipe_file: Path, registry: Registry) -> Callable[..., Plan]:
    """Give a function that plans the small recipe under settings (`key=value`)."""

    def plan(*settings: str) -> Plan:
        return make_plan(load_recipe(recipe_file, registry, settings), recipe_file.parent, registry)

    return plan


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> Path:
    """Give the folder of a finished run of the small recipe; copy it before changing anything in it."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = folder / "small.yaml"
    recipe.write_text(SMALL, encoding="utf-8")
    execute(make_plan(load_recipe(recipe, registry), folder, registry), folder / "run")
    return folder / "run"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Copy:
    """Give a function that copies the embedded model and returns the folder, files replaced or (None) removed."""

    def copy(**files: str | bytes | None) -> Path:
        folder = Path(shutil.copytree(tiny.checkpoint("llama"), tmp_path / "checkpoint"))
        for key, content in files.items():
            (path,) = [path for path in folder.iterdir() if path.name.partition(".")[0] == key]
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        return folder

    return copy


@pytest.fixture(scope="session")
def command() -> Command:
    """Give a function that runs the command line in a process of its own."""

    def run(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "refusalkit", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def install(site: Path, distribution: str, module: str, group: str = "refusalkit", version: str = "1.0") -> None:
    """Do to a folder on the path what pip does in installing a plugin: name its entry point."""
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[{group}]\n{module.partition('.')[0]} = {module}\n", encoding="utf-8")


def one_hint(said: Sequence[str]) -> bool:
    """Say whether a message ends in exactly one hint."""
    return sum(line.startswith("hint: ") for line in said) == 1 and said[-1].startswith("hint: ")
