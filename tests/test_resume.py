"""A run that is stopped anywhere goes on where it was, ends the same, and never repeats or mixes up a stage."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refusalkit.errors import InputError, RunError
from refusalkit.pipeline import execute, write_report
from refusalkit.plan import Plan
from refusalkit.run_directory import read_run
from refusalkit.store import STAGES, Store
from tests.conftest import Command

PlanOf = Callable[..., Plan]


class Noted:
    """Note what became of every stage."""

    def __init__(self) -> None:
        self.stages: dict[str, str] = {}
        self.shown: list[str] = []

    def stage(self, name: str, state: str) -> None:
        self.stages[name] = state

    def advance(self, what: str, done: int, total: int) -> None:
        self.shown.append(what)

    def state(self, said: str) -> None:
        self.shown.append(said)


def states(plan: Plan, out: Path, until: str = "evaluate") -> list[str]:
    """Execute a plan, by default without the report, and return what became of each stage, in order."""
    noted = Noted()
    execute(plan, out, noted, until)
    return list(noted.stages.values())


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """Give a copy of the finished run, to be changed."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def start(recipe: Path, out: Path) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "refusalkit", "run", str(recipe), "--out", str(out)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stderr is not None
    for said in process.stderr:
        if said.startswith(line):
            return
    raise AssertionError(f"the run ended without saying {line!r}")


def whole_artifacts(out: Path) -> set[str]:
    """Return the stages that can be read; anything else under a stage's name is half-written."""
    found = {stage for stage in STAGES if (out / stage).exists()}
    assert all(Store(out).key(stage) for stage in found)
    return found


def test_a_run_killed_during_select_goes_on_and_ends_the_same(
    recipe_file: Path, finished_run: Path, command: Command
) -> None:
    out = recipe_file.with_name("out")
    process = start(recipe_file, out)
    wait_for(process, "select: running")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert whole_artifacts(out) == {"prompts", "capture", "find"}
    assert not (out / "summary.json").exists()
    done = command("run", recipe_file, "--out", out)
    assert done.returncode == 0
    assert done.stderr.splitlines()[:4] == ["prompts: kept", "capture: kept", "find: kept", "select: running"]
    for name in ("summary.json", "scores.json", "recipe.yaml"):
        assert (out / name).read_bytes() == (finished_run / name).read_bytes(), name
    # Not by the byte: safetensors writes the metadata in any order.
    for name in ("direction.safetensors", "candidates.safetensors"):
        ours, theirs = load_file(out / name), load_file(finished_run / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("stage", ["prompts", "evaluate"])
def test_an_interrupted_run_says_so_in_one_line(recipe_file: Path, finished_run: Path, stage: str) -> None:
    out = recipe_file.with_name("out")
    shutil.copytree(finished_run, out)
    shutil.rmtree(out / stage)
    process = start(recipe_file, out)
    wait_for(process, f"{stage}: running")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    said = [line for line in stderr.splitlines() if line]
    assert said == ["interrupted; finished stages are kept, and the same command goes on from there"]
    assert whole_artifacts(out) == set(STAGES) - {stage}


def test_a_finished_run_is_not_run_again(plan_of: PlanOf, run_copy: Path) -> None:
    before = {path: path.stat().st_ino for stage in STAGES for path in (run_copy / stage).iterdir()}
    summary = (run_copy / "summary.json").read_bytes()
    assert states(plan_of(), run_copy) == ["kept"] * 5
    assert {path: path.stat().st_ino for path in before} == before
    assert (run_copy / "summary.json").read_bytes() == summary


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ("evaluate.max_new_tokens=4", 4),
        ("select.max_kl_nats=0.2", 3),
        ("capture.positions=-1", 0),
        ("model.batch_size=2", 5),
        ("model.device=cpu", 5),
        ("description=other words", 5),
    ],
)
def test_only_what_a_change_decides_is_run_again(plan_of: PlanOf, run_copy: Path, setting: str, kept: int) -> None:
    assert states(plan_of(setting), run_copy) == ["kept"] * kept + ["done"] * (5 - kept)
    assert read_run(run_copy).summary["version"] == 1


def test_until_stops_and_the_next_run_continues(plan_of: PlanOf, tmp_path: Path, finished_run: Path) -> None:
    out = tmp_path / "out"
    assert states(plan_of(), out, "find") == ["done"] * 3
    assert (out / "candidates.safetensors").is_file()
    assert not (out / "direction.safetensors").exists()
    assert states(plan_of(), out, "evaluate") == ["kept"] * 3 + ["done"] * 2
    assert not (out / "report.html").exists()
    assert (out / "summary.json").read_bytes() == (finished_run / "summary.json").read_bytes()


def _edit(stage: str, **changed: object) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        path = run / stage / "artifact.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))

    return edit


def _replace_tensors(run: Path) -> None:
    (run / "find" / "tensors.safetensors").unlink()
    (run / "find" / "tensors.safetensors").mkdir()


@pytest.mark.parametrize(
    ("stage", "damage"),
    [
        pytest.param("select", lambda run: (run / "select/artifact.json").write_text('{"key'), id="half a document"),
        pytest.param("select", lambda run: (run / "select/artifact.json").write_bytes(b"\xff"), id="no text"),
        pytest.param("select", lambda run: (run / "select/artifact.json").write_text("[]"), id="a list"),
        pytest.param("select", lambda run: (run / "select/artifact.json").unlink(), id="no document"),
        pytest.param("select", _edit("select", key="another"), id="another key"),
        pytest.param("select", _edit("select", value=None), id="no value"),
        pytest.param("select", _edit("select", value={"layer": "x"}), id="a value of another version"),
        pytest.param("find", lambda run: (run / "find/tensors.safetensors").unlink(), id="no tensors"),
        pytest.param("find", lambda run: (run / "find/tensors.safetensors").write_bytes(b"abc"), id="half tensors"),
        pytest.param("find", _replace_tensors, id="a folder for tensors"),
        pytest.param("prompts", lambda run: (run / "environment.json").write_text("{"), id="environment"),
    ],
)
def test_a_damaged_file_is_made_again(
    plan_of: PlanOf, run_copy: Path, stage: str, damage: Callable[[Path], None]
) -> None:
    summary = (run_copy / "summary.json").read_bytes()
    damage(run_copy)
    if stage == "prompts":
        shutil.rmtree(run_copy / stage)
    assert states(plan_of(), run_copy) == ["done" if name == stage else "kept" for name in STAGES]
    assert (run_copy / "summary.json").read_bytes() == summary
    assert read_run(run_copy).environment["packages"].keys() == {"torch", "transformers", "nnsight"}


def test_a_run_that_ends_early_leaves_no_summary_of_other_results(plan_of: PlanOf, run_copy: Path) -> None:
    execute(plan_of("select.max_kl_nats=0.2"), run_copy, until="select")
    with pytest.raises(InputError, match=r"is not a finished run: no summary\.json"):
        write_report(run_copy, show_completions=False)


def _without_pictures(run: Path) -> str:
    """Read the report; the renderer numbers the parts of its pictures anew each time."""
    return re.sub(r"base64,[\w+/=]+", "", (run / "report.html").read_text(encoding="utf-8"))


def test_a_report_is_written_again_without_the_model(run_copy: Path) -> None:
    before = _without_pictures(run_copy)
    (run_copy / "report.html").unlink()
    for path in (run_copy / "recipe.yaml", run_copy / "environment.json", run_copy / "summary.json"):
        path.write_text(path.read_text(encoding="utf-8").replace("tiny:llama", "tiny:nowhere"), encoding="utf-8")
    assert write_report(run_copy, show_completions=False) == run_copy / "report.html"
    after = _without_pictures(run_copy)
    assert "tiny:nowhere" in after
    assert after.replace("tiny:nowhere", "tiny:llama") == before


@pytest.mark.parametrize(
    ("setting", "difference"),
    [
        ("name=other", "its name is 'small', here it is 'other'"),
        ("model.dtype=bfloat16", "its model.dtype is 'auto', here it is 'bfloat16'"),
        ("prompts.seed=1", "its prompts.seed is 0, here it is 1"),
    ],
)
def test_the_folder_of_another_recipe_is_refused(
    plan_of: PlanOf, run_copy: Path, setting: str, difference: str
) -> None:
    before = {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as caught:
        execute(plan_of(setting), run_copy)
    assert caught.value.message == f"the folder holds a run of another recipe: {difference}"
    assert caught.value.where == f"--out {run_copy}"
    assert caught.value.hint
    assert {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()} == before


def test_a_folder_without_a_finished_stage_takes_a_corrected_recipe(plan_of: PlanOf, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="refuses only 0 of 16"):
        execute(plan_of("select.openers=[Zebra]"), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [".lock", "recipe.yaml"]
    assert states(plan_of("prompts.train=12"), tmp_path / "out", "capture") == ["done", "done"]
