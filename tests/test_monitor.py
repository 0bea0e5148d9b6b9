"""A detector made from a run flags no more than was allowed, tells the sides apart, and answers line by line."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refusalkit import tiny
from refusalkit.artifacts import Choice, PromptSplits
from refusalkit.errors import InputError
from refusalkit.intervals import auroc
from refusalkit.monitor.detector import KINDS, Detector, Kind, threshold
from refusalkit.monitor.fit import Monitor, open_monitor, reader_of
from refusalkit.monitor.stream import arriving, lines
from refusalkit.pipeline import execute
from refusalkit.plan import Plan, make_plan
from refusalkit.progress import Silent
from refusalkit.recipe_file import load_recipe
from refusalkit.registry import Registry, load_registry
from refusalkit.store import Store
from refusalkit.template import ChatTemplate
from refusalkit.tiny.grammar import requests
from tests.conftest import BUILT_IN, Command, one_hint

from .reference import build_reference_model, needs_shared, write_reference_recipe

HARMFUL, HARMLESS = ({"prompt": requests(side, "train")[0]} for side in ("harmful", "harmless"))


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """Give a copy of the finished run."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def opened(folder: Path, kind: Kind = "projection", fpr: float = 0.05, *settings: str) -> Monitor:
    reader = reader_of(folder, BUILT_IN, settings, Silent())
    return open_monitor(folder, kind, fpr, reader)


def written(stdout: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stdout.splitlines()]


# What a detector is


@pytest.mark.parametrize("fpr", [0.0, 0.01, 0.05, 0.07, 0.29, 0.5, 0.99])
@pytest.mark.parametrize("n", [1, 8, 20, 100])
def test_the_threshold_is_the_smallest_that_flags_no_more_than_is_allowed(fpr: float, n: int) -> None:
    draw = random.Random(n)
    scores = [draw.gauss(0, 1) for _ in range(n)]

    def share(bound: float) -> float:
        return sum(score > bound for score in scores) / n

    found = threshold(scores, fpr)
    assert share(found) <= fpr + 1e-12
    below = [score for score in scores if score < found]
    assert not below or share(max(below)) > fpr


def test_ties_at_the_threshold_are_not_flagged() -> None:
    assert threshold([1.0] * 10 + [0.0] * 10, 0.25) == 1.0


def test_the_area_counts_pairs_and_its_interval_is_never_a_point() -> None:
    draw = random.Random(0)
    positive, negative = [draw.randint(0, 6) for _ in range(25)], [draw.randint(-3, 4) for _ in range(40)]
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    found = auroc(positive, negative)
    assert found.value == pytest.approx(sum(pairs) / len(pairs))
    assert found.low < found.value < found.high
    mirrored = auroc(negative, positive)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high))
    apart = auroc([2.0] * 32, [1.0] * 32)
    assert apart.value == apart.high == 1
    assert apart.low == pytest.approx(0.937, abs=1e-3)


@pytest.mark.parametrize("true", [0.8, 0.98])
def test_the_interval_of_the_area_holds_the_truth_as_often_as_it_says(true: float) -> None:
    generator = torch.Generator().manual_seed(1)
    shift = math.sqrt(2) * torch.special.ndtri(torch.tensor(true, dtype=torch.float64)).item()
    held = 0
    for _ in range(200):
        negative, positive = torch.randn(2, 32, generator=generator, dtype=torch.float64)
        found = auroc((positive + shift).tolist(), negative.tolist())
        held += found.low <= true <= found.high
    assert held >= 186, "93% of 200; 95% are asked for"


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_what_the_file_says_they_are(run: Path, kind: Kind) -> None:
    """Score again from the saved detector with transformers alone."""
    opened(run, kind)
    detector = Store(run / "monitor").load(KINDS[kind])
    assert detector is not None
    folder = tiny.checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    template = ChatTemplate(AutoTokenizer.from_pretrained(folder))
    splits = Store(run).load(PromptSplits)
    assert splits is not None
    for prompt, score in zip(splits.of("harmful", "test"), detector.test["harmful"], strict=True):
        with torch.no_grad():
            states = model(torch.tensor([template.tokens(prompt)]), output_hidden_states=True).hidden_states
        rows = torch.stack([states[layer][0, detector.position] for layer in detector.layers]).double()
        if detector.scaled:
            rows = rows / rows.norm(dim=-1, keepdim=True)
        assert (rows * detector.vectors).sum(-1).mean().item() == pytest.approx(score, abs=1e-4)


def test_the_projection_reads_the_chosen_place_and_the_guard_the_end_of_the_instruction(run: Path) -> None:
    choice = Store(run).load(Choice)
    assert choice is not None
    projection, guard = opened(run).detector, opened(run, "latent_guard").detector
    assert (projection.position, projection.layers) == (choice.position, (choice.layer,))
    assert projection.vectors.norm().item() == pytest.approx(1)
    assert guard.position == -6, "before five template tokens"
    assert guard.layers == tuple(range(8))


def test_a_detector_of_the_embedded_model_tells_its_requests_apart(run: Path) -> None:
    detector = opened(run).detector
    assert detector.auroc.value > 0.95
    assert detector.auroc.low < detector.auroc.value
    assert detector.flagged(detector.test["harmful"]).value > 0.8


@pytest.mark.parametrize("fpr", [0.0, 0.05, 0.2, 0.5])
def test_no_more_validation_prompts_are_flagged_than_was_allowed(run: Path, fpr: float) -> None:
    detector = opened(run, fpr=fpr).detector
    assert detector.flagged(detector.validation["harmless"]).value <= fpr
    assert detector.fpr == fpr


# What is kept


def ages(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (run / "monitor").rglob("*") if path.is_file()}


def test_a_detector_is_fitted_once_and_another_rate_moves_the_threshold_alone(run: Path) -> None:
    first = opened(run)
    assert "bench" in vars(first.reader), "the model was loaded"
    before = ages(run)
    again = opened(run)
    assert "bench" not in vars(again.reader)
    assert ages(run) == before
    moved = opened(run, fpr=0.3)
    assert "bench" not in vars(moved.reader)
    assert moved.detector.threshold < first.detector.threshold
    assert moved.detector.test == first.detector.test
    kept = Store(run / "monitor").load(KINDS["projection"])
    assert kept is not None
    assert kept.threshold == moved.detector.threshold


def test_a_run_that_chooses_another_direction_needs_another_detector(
    run: Path, plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    first = opened(run).detector
    layer = 2 if first.layers != (2,) else 3
    plan = plan_of("select.selector=fixed", "select.position=-1", f"select.layer={layer}")
    execute(plan, run, until="select")
    assert opened(run).detector.layers == (layer,)


def test_the_monitor_folder_alone_is_enough(run: Path, tmp_path: Path, command: Command) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f"{json.dumps(HARMFUL)}\n{json.dumps(HARMLESS)}\n", encoding="utf-8")
    there = command("monitor", run, prompts)
    shutil.copytree(run / "monitor", tmp_path / "elsewhere" / "monitor")
    shutil.rmtree(run)
    here = command("monitor", tmp_path / "elsewhere", prompts)
    assert (here.returncode, here.stdout) == (0, there.stdout)
    assert [row["flagged"] for row in written(here.stdout)] == [True, False]
    other = command("monitor", tmp_path / "elsewhere", "--set", "model.id=tiny:qwen")
    assert other.returncode == 2
    assert "was made with another model: its revision is" in other.stderr
    assert one_hint(other.stderr.splitlines())


def test_what_holds_no_run_or_cannot_be_monitored_is_refused(run: Path, tmp_path: Path, command: Command) -> None:
    for line, said in (
        ([tmp_path], "holds neither a run nor a detector"),
        ([run, "nowhere.jsonl"], "cannot be read: No such file"),
        ([run, tmp_path], "this is a folder"),
        ([run, "--fpr", "5"], "--fpr: 5 is no share"),
        ([run, "--set", "model.where=ndif"], "a monitor reads prompts on this machine"),
    ):
        done = command("monitor", *line)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
        assert one_hint(done.stderr.splitlines()), done.stderr
    shutil.rmtree(run / "select")
    with pytest.raises(InputError, match="is not a finished stage"):
        opened(run)


def test_without_prompts_the_detector_is_described(run: Path, command: Command) -> None:
    done = command("monitor", run)
    assert done.returncode == 0
    card = json.loads(done.stdout)
    assert card["auroc"]["value"] == opened(run).detector.auroc.value
    assert card["flagged"]["harmless_validation"]["value"] <= card["fpr"] == 0.05
    assert "AUROC" in done.stderr


# Line by line


@pytest.fixture(scope="module")
def fitted(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a detector that is fitted already."""
    folder = tmp_path_factory.mktemp("monitor") / "run"
    shutil.copytree(finished_run, folder)
    opened(folder)
    return folder


@pytest.fixture
def stream(fitted: Path) -> Iterator[subprocess.Popen[str]]:
    """Give a monitor that waits for lines on a pipe."""
    process = subprocess.Popen(
        [sys.executable, "-m", "refusalkit", "monitor", str(fitted), "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def say(process: subprocess.Popen[str], *rows: object) -> None:
    assert process.stdin is not None
    process.stdin.write("".join(json.dumps(row) + "\n" for row in rows))
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


def test_a_line_is_answered_while_the_pipe_is_open_and_many_in_order(stream: subprocess.Popen[str]) -> None:
    say(stream, HARMFUL)
    assert hear(stream)["flagged"]
    say(stream, HARMLESS)
    assert not hear(stream)["flagged"]
    prompts = [{"prompt": request, "id": number} for number, request in enumerate(requests("harmless", "train")[:70])]
    say(stream, *prompts)
    rows = [hear(stream) for _ in prompts]
    assert [row["id"] for row in rows] == list(range(70))
    assert [row["line"] for row in rows] == list(range(3, 73))
    stdout, stderr = stream.communicate(timeout=60)
    assert (stream.returncode, stdout) == (0, "")
    assert "Traceback" not in stderr


def test_a_monitor_that_is_interrupted_says_so_in_a_line(stream: subprocess.Popen[str]) -> None:
    say(stream, HARMFUL)
    hear(stream)
    stream.send_signal(signal.SIGINT)
    stdout, stderr = stream.communicate(timeout=60)
    assert (stream.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1] == "interrupted; records written: 1"
    assert "Traceback" not in stderr


def test_a_monitor_whose_reader_goes_ends_quietly(stream: subprocess.Popen[str]) -> None:
    say(stream, HARMFUL)
    hear(stream)
    assert stream.stdout is not None
    stream.stdout.close()
    say(stream, *[HARMLESS] * 50)
    assert stream.stderr is not None
    assert stream.wait(timeout=60) == 0
    said = stream.stderr.read()
    assert "Traceback" not in said
    assert "Exception ignored" not in said


def test_bad_lines_are_records_and_stop_nothing(fitted: Path, tmp_path: Path, command: Command) -> None:
    good = json.dumps(HARMFUL).encode()
    bad = {
        b"{": "not JSON: Expecting property name",
        b"\xff": "byte 0 is not UTF-8",
        b"[" * 100_000: "nested too deeply",
        b'"text"': 'either "prompt" or "messages"',
        b'{"prompt": "a", "messages": []}': 'either "prompt" or "messages"',
        b'{"prompt": 1}': '"prompt" is not a text',
        b'{"prompt": null}': '"prompt" is missing',
        b'{"prompt": " "}': '"prompt" is empty',
        b'{"prompt": "\\ud800"}': "half of a surrogate pair",
        b'{"messages": []}': '"messages" is not a list of objects',
        b'{"messages": [{"role": "user"}]}': '"content" of message 1 is missing',
        b'{"messages": [{"role": "assistant", "content": "a"}]}': "the last message is the assistant's",
        json.dumps({"prompt": "word " * 3000}).encode(): "the model reads at most 2048",
    }
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b"\xef\xbb\xbf" + b"\n".join(line for each in bad for line in (good, b"", each)))
    done = command("monitor", fitted, prompts)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"lines that could not be read: {len(bad)}; their records say why"
    rows = written(done.stdout)
    assert [row["line"] for row in rows] == [number for n in range(len(bad)) for number in (3 * n + 1, 3 * n + 3)]
    assert all(row["flagged"] for row in rows[::2])
    for row, said in zip(rows[1::2], bad.values(), strict=True):
        assert said in row["error"]
        assert set(row) == {"line", "error"}


def test_lines_that_wait_share_a_pass_and_none_is_lost() -> None:
    waiting = threading.Event()

    def source() -> Iterator[bytes]:
        yield from (b"%d" % number for number in range(10))
        waiting.set()

    groups = arriving(source(), 4)
    first = next(groups)
    assert waiting.wait(timeout=10)
    found = [first, *groups]
    assert [line for group in found for line in group] == [(n + 1, b"%d" % n) for n in range(10)]
    assert max(map(len, found)) == 4


def test_a_line_is_whole_however_it_arrives() -> None:
    out, into = os.pipe()
    found = lines(out)
    os.write(into, b"one\ntw")
    assert next(found) == b"one"
    os.write(into, b"o\n\nthree")
    assert next(found) == b"two"
    os.close(into)
    assert list(found) == [b"", b"three"]
    os.close(out)


def test_a_conversation_of_one_message_is_a_prompt_and_a_system_message_is_read(registry: Registry) -> None:
    template = ChatTemplate(AutoTokenizer.from_pretrained(tiny.checkpoint("llama")), system="Be kind.")
    message = {"role": "user", "content": "Sing"}
    assert template.text([message]) == template.text("Sing")
    own = template.text([{"role": "system", "content": "Be brief."}, message])
    assert "Be brief." in own
    assert "Be kind." not in own
    turns = [message, {"role": "assistant", "content": "La la"}, {"role": "user", "content": "Louder"}]
    assert template.text(turns).endswith(template.text("Louder").partition("Louder")[2])
    assert "La la" in template.text(turns)


@needs_shared
@pytest.mark.slow
def test_a_detector_of_a_real_model_tells_held_out_requests_apart(tmp_path: Path) -> None:
    model = build_reference_model(tmp_path / "model")
    # What the causal selector chooses; `test_parity` tests that it does.
    recipe = write_reference_recipe(tmp_path, model, {"selector": "fixed", "position": -1, "layer": 23})
    registry = load_registry()
    execute(make_plan(load_recipe(recipe, registry), tmp_path, registry), tmp_path / "run", until="select")
    for kind in KINDS:
        detector: Detector = opened(tmp_path / "run", kind).detector
        assert detector.auroc.value > 0.95
        assert detector.auroc.low > 0.85
        assert detector.flagged(detector.validation["harmless"]).value <= 0.05
