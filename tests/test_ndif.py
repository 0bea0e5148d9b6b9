"""Against a real NDIF server: a remote run ends as a local one, in few jobs, whatever breaks on the way.

Skipped where the server is not installed: `python -m tests.ndif.server install`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch

from refusalkit.checkpoint import open_checkpoint
from refusalkit.engine.jobs import Call
from refusalkit.engine.remote import connect
from refusalkit.errors import RunError
from refusalkit.pipeline import execute
from refusalkit.plan import Plan, make_plan
from refusalkit.recipe import ModelSection
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry
from tests.conftest import ROOT, SMALL, Command
from tests.ndif.server import LOCAL, Server, free_ports, missing, running
from tests.reference import build_reference_model, needs_shared, write_reference_recipe

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
#: Smaller where a job takes seconds to start.
TINY = SMALL.replace(", orthogonalize", "")
KEY = "5f0c1d2e-3b4a-4c5d-8e9f-a0b1c2d3e4f5"


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    """Give a server that runs jobs in the process that holds the model."""
    with running("Plain") as server:
        yield server


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Server]:
    """Give a server that runs every job in a process of its own, as a public one does."""
    with running("Sandbox") as server:
        yield server


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Give a small recipe without edits of weights."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return path


@pytest.fixture
def run(registry: Registry, tmp_path: Path) -> Callable[..., Path]:
    """Give a function that runs a recipe under settings, on a server where one is given, and returns its folder."""

    def run(recipe: Path, *settings: str, on: Server | None = None, until: str = "evaluate") -> Path:
        where = [] if on is None else ["model.where=ndif", f"model.host={on.host}"]
        plan = make_plan(load_recipe(recipe, registry, [*settings, *where]), recipe.parent, registry)
        out = tmp_path / ("local" if on is None else f"remote-{on.actor}")
        execute(plan, out, until=until)
        return out

    return run


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def jobs_of(out: Path) -> dict[str, dict[str, int]]:
    """Return what every stage asked of the server."""
    found: dict[str, dict[str, int]] = read(out / "environment.json")["jobs"]
    return found


def assert_same_run(local: Path, remote: Path) -> None:
    """Compare two runs: the choice and the completions are the same, every score is within 1e-4."""
    ours, theirs = read(local / "summary.json"), read(remote / "summary.json")
    assert ours["choice"] == pytest.approx(theirs["choice"], abs=1e-4)
    assert [ours["choice"][key] for key in ("position", "layer", "n_survivors")] == [
        theirs["choice"][key] for key in ("position", "layer", "n_survivors")
    ]
    for one, other in zip(ours["evaluation"], theirs["evaluation"], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    for one, other in zip(read(local / "scores.json"), read(remote / "scores.json"), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    written = [read(out / "evaluate" / "artifact.json")["value"]["generated"] for out in (local, remote)]
    assert written[0] == written[1]
    assert sum(len(each["texts"]) for each in written[0]) > 0


# The same run


def test_the_quickstart_ends_as_it_does_here_in_at_most_twelve_jobs(plain: Server, run: Callable[..., Path]) -> None:
    remote = run(QUICKSTART, on=plain)
    assert_same_run(run(QUICKSTART), remote)
    assert sum(stage["jobs"] for stage in jobs_of(remote).values()) <= 12
    # What was kept for a stage is gone when the stage is finished.
    assert not (remote / "jobs").exists()


def test_another_architecture_ends_as_it_does_here(plain: Server, recipe: Path, run: Callable[..., Path]) -> None:
    gemma = "model.id=tiny:gemma"
    assert_same_run(run(recipe, gemma), run(recipe, gemma, on=plain))


def test_a_sandboxed_run_ends_as_it_does_here(sandbox: Server, recipe: Path, run: Callable[..., Path]) -> None:
    assert_same_run(run(recipe), run(recipe, on=sandbox))


@pytest.mark.parametrize("actor", ["plain", "sandbox"])
def test_gates_windows_and_turns_end_as_they_do_here(
    actor: str, recipe: Path, run: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    chosen = (
        "{intervention: conditional, threshold: 0.3, apply: {intervention: combine, parts: [clamp, steer]}}",
        "{intervention: angular, degrees: 180, adaptive: true, layers: [2, 6]}",
        "{intervention: ablate, where: generated}",
        "{intervention: steer, where: last, steps: [0, 2]}",
    )
    settings = (f"evaluate.interventions=[{', '.join(chosen)}]", "evaluate.metrics=[refusal_rate, kl, cross_entropy]")
    assert_same_run(run(recipe, *settings), run(recipe, *settings, on=request.getfixturevalue(actor)))


@pytest.mark.parametrize("actor", ["plain", "sandbox"])
def test_every_metric_ends_as_it_does_here_in_one_job_more(
    actor: str, recipe: Path, run: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    metrics = "refusal_rate, token_kl, perplexity, repetition, projection, cross_entropy"
    texts = "text_cross_entropy, {metric: answer_cross_entropy, source: 'tiny:harmless', most: 8}"
    settings = ("evaluate.interventions=[ablate, steer]", f"evaluate.metrics=[{metrics}, {texts}]")
    remote = run(recipe, *settings, on=request.getfixturevalue(actor))
    assert_same_run(run(recipe, *settings), remote)
    # What the unmodified model writes, everything else, and what was written, read back.
    assert jobs_of(remote)["evaluate"]["jobs"] == 3


def test_samples_come_back_for_strategies_that_need_them(plain: Server, recipe: Path, run: Callable[..., Path]) -> None:
    settings = ("find=pca", "select.selector=fixed", "select.layer=4")
    assert_same_run(run(recipe, *settings), run(recipe, *settings, on=plain))


def test_analyses_end_as_they_do_here_in_a_job_each(
    plain: Server, recipe: Path, run: Callable[..., Path], registry: Registry
) -> None:
    from refusalkit.remote_cost import costs

    asked = "analyze=[{analysis: suffixes, append: {short: please}}, {analysis: directions, positions: [-2, -1]}]"
    local, remote = run(recipe, asked, until="analyze"), run(recipe, asked, on=plain, until="analyze")
    ours, theirs = (read(out / "analyze" / "artifact.json")["value"]["found"] for out in (local, remote))
    for one, other in zip(ours[0]["groups"], theirs[0]["groups"], strict=True):
        assert one["mean"] == pytest.approx(other["mean"], abs=1e-4)
        assert [row["value"] for row in one["results"]] == pytest.approx(
            [row["value"] for row in other["results"]], abs=1e-4
        )
    for one, other in zip(ours[1]["pairs"], theirs[1]["pairs"], strict=True):
        # Null at layer 0, where template tokens are the same in every prompt.
        assert one["between_halves"][1:] == pytest.approx(other["between_halves"][1:], abs=1e-4)
        assert one["between_halves"][0] is other["between_halves"][0] is None
    needed = jobs_of(remote)["analyze"]
    assert needed["jobs"] == 2
    settings = [asked, "model.where=ndif", f"model.host={plain.host}"]
    cost = costs(make_plan(load_recipe(recipe, registry, settings), recipe.parent, registry))["analyze"]
    assert needed["jobs"] <= cost.jobs
    assert needed["bytes_up"] <= cost.bytes_up
    assert needed["bytes_down"] <= 1.1 * cost.bytes_down + 2000


@pytest.mark.slow
@needs_shared
def test_the_reference_model_ends_as_it_does_here(plain: Server, run: Callable[..., Path], tmp_path: Path) -> None:
    model = build_reference_model(tmp_path / "model")
    recipe = write_reference_recipe(tmp_path, model, {"selector": "fixed", "layer": 10})
    few = [f"prompts.{split}=8" for split in ("train", "validation", "test")]
    settings = (*few, "evaluate.interventions=[none,ablate,steer]", "evaluate.max_new_tokens=8")
    assert_same_run(run(recipe, *settings), run(recipe, *settings, on=plain))


# Small


def test_captures_of_64_and_of_512_prompts_download_the_same(plain: Server, registry: Registry, tmp_path: Path) -> None:
    down = {}
    for n in (64, 512):
        for side in ("harmful", "harmless"):
            # Invented, so that there are enough.
            lines = [f"{side} request {number} of many" for number in range(n + 16)]
            (tmp_path / f"{side}-{n}.txt").write_text("\n".join(lines), encoding="utf-8")
        path = tmp_path / f"many-{n}.yaml"
        path.write_text(
            f"name: many-{n}\nmodel: {{id: tiny:llama, where: ndif, host: '{plain.host}'}}\n"
            f"prompts: {{harmful: 'file:harmful-{n}.txt', harmless: 'file:harmless-{n}.txt', train: {n}, "
            "validation: 8, test: 8, filter: false}\n"
            "select: {selector: fixed, layer: 4, openers: [I]}\n",
            encoding="utf-8",
        )
        out = tmp_path / f"out-{n}"
        execute(make_plan(load_recipe(path, registry), tmp_path, registry), out, until="capture")
        assert jobs_of(out)["capture"]["jobs"] == 1
        down[n] = jobs_of(out)["capture"]["bytes_down"]
    assert down[512] == pytest.approx(down[64], rel=0.05)


@pytest.mark.parametrize(
    "settings", [(), ("evaluate.interventions=[none, {intervention: conditional, threshold: 0}]",)]
)
def test_the_plan_says_at_most_what_the_run_needs(
    settings: tuple[str, ...], plain: Server, recipe: Path, run: Callable[..., Path], registry: Registry
) -> None:
    from refusalkit.remote_cost import costs

    there = [*settings, "model.where=ndif", f"model.host={plain.host}"]
    plan = make_plan(load_recipe(recipe, registry, there), recipe.parent, registry)
    needed = jobs_of(run(recipe, *settings, on=plain))
    for stage, cost in costs(plan).items():
        assert needed[stage]["jobs"] <= cost.jobs
        assert needed[stage]["bytes_up"] <= cost.bytes_up
        assert needed[stage]["bytes_down"] <= 1.1 * cost.bytes_down + 2000


# Whatever breaks


def start(recipe: Path, out: Path, server: Server, **environment: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "refusalkit", "run", str(recipe), "--out", str(out), "--set", "model.where=ndif"]
    return subprocess.Popen(
        line, env={**os.environ, "NDIF_HOST": server.host, **environment}, stderr=subprocess.PIPE, text=True
    )


def wait_for(process: subprocess.Popen[str], *words: str) -> list[str]:
    """Read what a run says until a line has all of some words."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if all(word in line for word in words):
            return said
    raise AssertionError(f"the run ended without saying {words}: {said[-5:]}")


def test_a_killed_client_finds_its_jobs_again(
    plain: Server, recipe: Path, run: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    with start(recipe, out, plain) as process:
        wait_for(process, "select: job")
        # While a job of select is under way, or just before the next.
        process.send_signal(signal.SIGKILL)
    before = {path.name: read(path) for path in (out / "jobs").glob("*.json")}
    assert before
    finished = {path.name for path in (out / "jobs").glob("*.safetensors")}
    with start(recipe, out, plain) as again:
        _, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert_same_run(run(recipe), out)
    # Neither what was finished nor what was under way was handed in again.
    assert jobs_of(out)["select"]["jobs"] == 5
    assert len(before) >= len(finished)


def test_a_run_survives_a_server_that_is_killed_and_started_again(
    recipe: Path, run: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "survived"
    with running("Plain") as server, start(recipe, out, server) as process:
        wait_for(process, "select: job")
        server.kill()
        said = wait_for(process, "select: the server cannot be reached")
        server.start()
        _, rest = process.communicate(timeout=400)
        assert process.returncode == 0, [*said, rest]
    assert_same_run(run(recipe), out)


def dawdle(model: Any, items: tuple[int, ...]) -> list[torch.Tensor]:
    """Take a second and a quarter an item."""
    for _ in items:
        time.sleep(1.25)
    return [torch.tensor(item) for item in items]


def test_jobs_shrink_below_the_limit_that_a_server_shows(registry: Registry, tmp_path: Path) -> None:
    nnsight.register(__name__)
    with running("Plain", NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS="9") as server:
        section = ModelSection(id="tiny:llama", where="ndif", host=server.host)
        jobs = connect(open_checkpoint(section, registry), tmp_path, lambda said: None).jobs
        call = Call(dawdle, tuple(range(16)), (), 10.0)
        assert [int(item) for item in jobs.run([call])[0]] == list(range(16))
        # Of sixteen, of eight, then of four items, which take five of nine seconds.
        assert (jobs.limit, jobs.ledger.totals()["jobs"]) == (40.0, 6)
        # Asked again, as after a crash, the same jobs are found.
        again = connect(open_checkpoint(section, registry), tmp_path, lambda said: None).jobs
        assert [int(item) for item in again.run([call])[0]] == list(range(16))
        assert again.ledger.totals()["jobs"] == 6


# Errors


def fails(plan: Plan, out: Path) -> str:
    with pytest.raises(RunError) as error:
        execute(plan, out, until="prompts")
    return str(error.value)


def planned(registry: Registry, recipe: Path, host: str, *settings: str) -> Plan:
    chosen = [*settings, "model.where=ndif", f"model.host={host}"]
    return make_plan(load_recipe(recipe, registry, chosen), recipe.parent, registry)


@pytest.fixture
def gate(plain: Server) -> Callable[..., str]:
    """Give a function that opens another door to the plain server, with settings of its own."""

    def gate(**settings: str) -> str:
        host = f"http://{LOCAL}:{free_ports(1)[0]}"
        plain.api(host, **settings)
        return host

    return gate


def test_a_server_that_wants_newer_clients_says_so(
    gate: Callable[..., str], registry: Registry, recipe: Path, tmp_path: Path
) -> None:
    said = fails(planned(registry, recipe, gate(NDIF_MIN_NNSIGHT_VERSION="99.0")), tmp_path / "out")
    assert "below the minimum supported 99.0" in said
    assert "hint: `refusalkit ndif status`" in said


def test_a_server_that_wants_a_key_says_so(
    gate: Callable[..., str], registry: Registry, recipe: Path, tmp_path: Path
) -> None:
    host = gate(NDIF_POSTGRES_URL="postgresql://127.0.0.1:9/none")
    said = fails(planned(registry, recipe, host), tmp_path / "out")
    assert "does not accept the API key (401)" in said
    assert "NDIF_API_KEY" in said


def test_a_wrong_key_is_not_repeated_where_the_server_repeats_it(
    gate: Callable[..., str], recipe: Path, tmp_path: Path, command: Command
) -> None:
    host = gate(NDIF_POSTGRES_URL="postgresql://127.0.0.1:9/none")
    out = tmp_path / "out"
    ended = command(
        "run", recipe, "--out", out, "--set", "model.where=ndif", NDIF_HOST=host, NDIF_API_KEY="not-a-key-but-secret"
    )
    assert ended.returncode == 1
    assert "does not accept the API key (400)" in ended.stderr
    assert "secret" not in ended.stderr + ended.stdout
    assert b"secret" not in b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())


def test_a_model_that_the_server_cannot_load_is_not_hosted(
    plain: Server, registry: Registry, recipe: Path, tmp_path: Path
) -> None:
    from refusalkit import tiny

    folder = shutil.copytree(tiny.checkpoint("llama"), tmp_path / "no-weights")
    (folder / "model.safetensors").unlink()
    said = fails(planned(registry, recipe, plain.host, f"model.id={folder}"), tmp_path / "out")
    assert "does not host" in said or "lost the job" in said


# Safe


def test_the_key_is_in_no_file_no_message_and_no_process_list(plain: Server, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    listed = ""
    said = []
    with start(recipe, out, plain, NDIF_API_KEY=KEY) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            listed += subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert process.returncode == 0, said
    assert "refusalkit" in listed
    kept = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert KEY not in listed + "".join(said)
    assert KEY.encode() not in kept


def test_the_status_names_versions_models_and_whether_a_recipe_can_run(
    plain: Server, recipe: Path, run: Callable[..., Path], command: Command
) -> None:
    run(recipe, on=plain, until="prompts")
    ended = command("ndif", "status", recipe, NDIF_HOST=plain.host)
    assert ended.returncode == 0, ended.stderr
    assert "nnsight 0.8.0, here 0.8.1" in ended.stdout
    assert "tiny:llama can run" in ended.stdout
