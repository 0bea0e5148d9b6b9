"""The notebook runs from top to bottom on the embedded model, offline, and shows what it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.conftest import ROOT

PATH = ROOT / "docs" / "tutorial.ipynb"

#: Runs cells as Jupyter does, in one namespace, and makes what a last expression shows; then gives numbers of it.
KERNEL = """\
import ast, json, sys

scope = {"__name__": "__main__"}
shown = 0
for number, source in enumerate(json.load(sys.stdin)):
    body, name = ast.parse(source).body, f"cell {number}"
    last = body.pop() if isinstance(body[-1], ast.Expr) and not source.rstrip().endswith(";") else None
    exec(compile(ast.Module(body, []), name, "exec"), scope)
    value = None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), scope)
    if hasattr(value, "_repr_html_"):
        shown += len(value._repr_html_()) > 0
figures = [scope["plt"].figure(number) for number in scope["plt"].get_fignums()]
for figure in figures:
    figure.canvas.draw()
rates = {key: scope[key].values.tolist() for key in ("rates", "again")}
scores = scope["grid"].isna().to_numpy().sum().item()
print(json.dumps({"tables": shown, "figures": len(figures), "unscored": scores, **rates}))
"""


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(PATH, as_version=4)


def code(notebook: Any, *, installs: bool = False) -> list[str]:
    """Return the cells that need no network, or those that install."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell.source for cell in cells if ("install" in cell.metadata.get("tags", [])) is installs]


def test_the_notebook_repeats_the_papers_finding(notebook: Any, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KERNEL],
        input=json.dumps(code(notebook)),
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg", "MPLCONFIGDIR": str(tmp_path / "matplotlib")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["tables"], found["figures"], found["unscored"]) == (4, 3, 0)
    rate = {(row[0], row[1]): row[3] for row in found["rates"]}
    assert rate["ablate", "harmful"] < 0.2 < 0.8 < rate["ablate_random", "harmful"]
    assert rate["steer_random", "harmless"] < 0.2 < 0.8 < rate["steer", "harmless"]
    subtracted = {row[0]: row[3] for row in found["again"] if row[1:3] == ["harmful", "refusal_rate"]}
    assert subtracted["steer(scale=-1.0)"] < subtracted["steer_random(scale=-1.0)"]
    assert (tmp_path / "runs" / "refusal" / "report.html").is_file()


def test_the_notebook_is_clean_and_needs_one_change_for_another_model(notebook: Any) -> None:
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
    (install,) = code(notebook, installs=True)
    assert install.startswith("%pip install")
    assert len(re.findall("tiny:llama", "\n".join(code(notebook)))) == 1
    for target in re.findall(r"\]\((?!https)([^)#]+)\)", "\n".join(cell.source for cell in notebook.cells)):
        assert (PATH.parent / target).is_file(), target
