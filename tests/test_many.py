"""Many recipes run at once: all are checked first, none stops another, and nothing is left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from refusalkit.errors import InputError, RunError
from refusalkit.many import exit_status, table
from refusalkit.sharing import hold
from refusalkit.worker import Ended, Task
from tests.conftest import SMALL, Command, one_hint

#: The line on which a key that is added to a recipe stands.
AFTER = SMALL.count("\n") + 1
#: No direction induces refusal by 99 nats.
FAILING = SMALL.replace("name: small", "name: failing") + "select:\n  min_induced_score: 99\n"
#: The least that makes a whole run.
QUICK = [
    "--set=evaluate.interventions=[ablate]",
    "--set=evaluate.controls=0",
    "--set=evaluate.metrics=[refusal_rate]",
    "--set=evaluate.max_new_tokens=2",
    "--set=select.screen=gradient",
    "--set=select.keep=2",
]


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """Give a folder with the recipes one, two, failing and wrong."""
    for name in ("one", "two"):
        text = SMALL.replace("name: small", f"name: {name}")
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "failing.yaml").write_text(FAILING, encoding="utf-8")
    (tmp_path / "wrong.yaml").write_text(f"{SMALL}evalute: {{}}\n", encoding="utf-8")
    return tmp_path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "refusalkit", "run", *arguments]
    return subprocess.Popen(
        line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(process: subprocess.Popen[str], *endings: str) -> None:
    """Read what a process says until every ending was said."""
    assert process.stderr is not None
    missing = set(endings)
    for said in process.stderr:
        missing -= {ending for ending in missing if said.rstrip().endswith(ending)}
        if not missing:
            return
    raise AssertionError(f"the process ended without saying {missing}")


def workers(parent: int) -> list[psutil.Process]:
    """Return the processes that execute runs for `parent`."""
    return [
        child for child in psutil.Process(parent).children() if any("spawn_main" in part for part in child.cmdline())
    ]


def gone(processes: list[psutil.Process]) -> bool:
    """Wait until none of some processes is alive."""
    return psutil.wait_procs(processes, timeout=20)[1] == []


# Before anything runs


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["one.yaml", "wrong.yaml"], f"error: wrong.yaml:{AFTER}: evalute: unknown key 'evalute'"),
        (["one.yaml", "one.yaml"], "error: one.yaml: its results would go to runs/one, and those of one.yaml to"),
        (["one.yaml", "two.yaml", "--out", "x"], "error: --out: several recipes need several folders"),
        (["one.yaml", "two.yaml", "--set", "model.id=tiny:lama"], "error: two.yaml: model.id 'tiny:lama': no such"),
        (["one.yaml", "two.yaml", "--jobs", "0"], "Invalid value for '--jobs'"),
    ],
)
def test_one_bad_recipe_keeps_all_from_starting(recipes: Path, command: Command, line: list[str], said: str) -> None:
    done = command("run", *line, cwd=recipes)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert not (recipes / "runs").exists()


def test_every_bad_recipe_is_named(recipes: Path, command: Command) -> None:
    done = command("run", "wrong.yaml", "nowhere.yaml", "one.yaml", cwd=recipes)
    assert [line.partition(": ")[2][:12] for line in done.stderr.splitlines() if line.startswith("error")] == [
        f"wrong.yaml:{AFTER}"[:12],
        "nowhere.yaml",
    ]


# While they run


def test_a_recipe_that_fails_stops_no_other(recipes: Path, command: Command) -> None:
    done = command("run", "one.yaml", "failing.yaml", "two.yaml", "--jobs", "2", *QUICK, cwd=recipes)
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["runs/one/report.html", "runs/two/report.html"]
    lines = done.stderr.splitlines()
    assert "failing: error: select: none of 40 candidates survives" in done.stderr
    rows = [line.split(maxsplit=2)[:2] for line in lines[-4:-1]]
    assert rows == [["one", "done"], ["failing", "failed"], ["two", "done"]]
    assert lines[-1] == "3 runs: 2 done, 1 failed"
    assert max(map(len, lines[-4:])) <= 80
    # Every line says whose it is.
    told = [line for line in lines[: lines.index("")] if not line.startswith("hint: ")]
    assert all(line.startswith(("one: ", "failing: ", "two: ")) for line in told)
    again = command("run", "two.yaml", "one.yaml", "--until", "evaluate", *QUICK, cwd=recipes)
    assert (again.returncode, again.stdout) == (0, "")
    assert [line for line in again.stderr.splitlines() if "running" in line] == []


def test_an_interruption_stops_every_process_and_says_how_to_go_on(recipes: Path) -> None:
    long = ("--set", "select.exhaustive=true", "--set", "prompts.validation=76")
    process = start(recipes, "one.yaml", "two.yaml", "failing.yaml", "--jobs", "2", "--until", "select", *long)
    wait_for(process, "one: select: running", "two: select: running")
    started = workers(process.pid)
    assert len(started) == 2
    # As Ctrl-C in a terminal does.
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert "3 runs: 3 not finished" in stderr
    assert stderr.endswith("interrupted; finished stages are kept, and the same command goes on from there\n")
    assert "Traceback" not in stderr
    assert gone(started)
    for name in ("one", "two"):
        assert sorted(path.name for path in (recipes / "runs" / name).iterdir() if path.is_dir()) == [
            "capture",
            "find",
            "prompts",
        ]


def test_a_process_that_is_killed_fails_its_run_and_no_other(recipes: Path) -> None:
    process = start(recipes, "one.yaml", "two.yaml", "--until", "prompts")
    wait_for(process, "one: prompts: running")
    (worker,) = workers(process.pid)
    worker.kill()
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "one: error: its process was killed by SIGKILL\nhint: SIGKILL mostly means that memory ran out" in stderr
    assert stderr.endswith("2 runs: 1 done, 1 failed\n")
    assert (recipes / "runs" / "two" / "prompts").is_dir()


def test_no_process_outlives_one_that_is_killed(recipes: Path) -> None:
    process = start(recipes, "one.yaml", "two.yaml", "--jobs", "2")
    wait_for(process, "one: prompts: running", "two: prompts: running")
    started = workers(process.pid)
    process.kill()
    process.communicate()
    assert gone(started)


def test_a_plugin_that_breaks_is_shown_with_its_traceback(recipes: Path, command: Command) -> None:
    (recipes / "broken.py").write_text(
        "from typing import Literal\n"
        "import refusalkit\n"
        "from refusalkit.strategy import Strategy\n\n"
        "class Broken(Strategy):\n"
        '    """Divide by zero."""\n'
        '    strategy: Literal["broken"] = "broken"\n'
        "    def find(self, harmful, harmless):\n"
        "        return harmful.mean / (harmful.n_prompts // 1000 * 0 or 1 // 0)\n\n"
        "@refusalkit.hookimpl\n"
        "def refusalkit_strategies():\n"
        "    return [Broken]\n"
    )
    info = recipes / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[refusalkit]\nbroken = broken\n")
    text = f"{SMALL}sweep:\n  find: [broken, random]\n"
    (recipes / "sweep.yaml").write_text(text, encoding="utf-8")
    path = os.pathsep.join([str(recipes), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = command("run", "sweep.yaml", "--until", "find", cwd=recipes, PYTHONPATH=path, REFUSALKIT_PLUGINS="broken")
    assert done.returncode == 1
    assert "small/broken: error: its process ended with exit status 1\n" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert "hint: this is a fault of refusalkit or of a plugin" in done.stderr
    assert done.stderr.endswith("2 runs: 1 done, 1 failed\n")


def test_a_sweep_ends_in_a_comparison_of_what_was_finished(recipes: Path, command: Command) -> None:
    # Adding a random direction induces no refusal.
    sweep = "sweep:\n  find: [difference_in_means, pca, random]\n"
    (recipes / "sweep.yaml").write_text(f"{SMALL}{sweep}", encoding="utf-8")
    planned = command("plan", "sweep.yaml", *QUICK, cwd=recipes)
    assert "computed  prompts once, capture once, find 3 times, select 3 times, evaluate 3 times" in planned.stdout
    done = command("run", "sweep.yaml", *QUICK, cwd=recipes)
    assert (done.returncode, done.stdout) == (1, "runs/small/comparison.html\n")
    assert "3 runs: 2 done, 1 failed" in done.stderr
    assert "random is not finished and left out." in done.stderr
    folder = recipes / "runs" / "small"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [".lock", "comparison.html", "difference_in_means", "pca", "random", "sweep.yaml"]
    environments = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/environment.json")]
    for stage in ("prompts", "capture"):
        assert sum(stage not in environment["shared"] for environment in environments) == 1
    compared = command("compare", "runs/small", "--out", "here.html", cwd=recipes)
    assert (compared.returncode, compared.stderr) == (0, "here.html\n")
    assert compared.stdout.rstrip("\n") in done.stderr


# One process a folder


def test_a_folder_in_which_another_process_runs_is_refused_until_that_ends(recipes: Path, command: Command) -> None:
    out = recipes / "runs" / "one"
    out.mkdir(parents=True)
    (out / ".capture.1.tmp").mkdir()
    holding = f"import sys, pathlib, refusalkit.sharing as s\nwith s.hold(pathlib.Path({str(out)!r})):\n"
    holding += "    print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        second = command("run", "one.yaml", "--until", "prompts", cwd=recipes)
        assert (second.returncode, second.stdout) == (1, "")
        assert second.stderr.startswith("error: runs/one: another process is running in this folder\n")
        assert one_hint(second.stderr.splitlines())
        process.kill()
    third = command("run", "one.yaml", "--until", "prompts", cwd=recipes)
    assert third.returncode == 0
    # What the killed process was writing is cleared away.
    assert list(out.glob(".*.tmp")) == []


def test_a_folder_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold(tmp_path):
        raise ZeroDivisionError
    with hold(tmp_path), pytest.raises(RunError, match="another process"), hold(tmp_path):
        raise AssertionError


# How it ended


def test_the_exit_status_tells_bad_input_from_failure() -> None:
    done, bad, failed = Ended(1, "found"), Ended(1, error=InputError("bad")), Ended(1, error=RunError("failed"))
    assert [exit_status(ends) for ends in ([], [done], [done, bad], [bad, failed], [failed])] == [0, 0, 2, 1, 1]


def test_the_table_fits_eighty_columns(tmp_path: Path, make_task: Callable[[str], Task]) -> None:
    tasks = [make_task(name) for name in ("a", "b" * 90, "c")]
    ended = {
        "a": Ended(3.21, error=RunError("said\nat length", where="select")),
        "b" * 90: Ended(7200, error=RunError("x" * 200)),
    }
    lines = table(tasks, ended).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["a", "failed", "3.2", "s", "select:", "said"]
    assert lines[2].split() == ["c", "not", "finished"]
    assert lines[-1] == "3 runs: 2 failed, 1 not finished"


@pytest.fixture
def make_task(tmp_path: Path) -> Callable[[str], Task]:
    def make(name: str) -> Task:
        return Task(name, tmp_path / "x.yaml", {}, tmp_path / name[:9], None, False, "report")

    return make
